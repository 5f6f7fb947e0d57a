"""Ask a run's world model what it knows, on fresh episodes, and show the answers on one page.

    python -m runners.diagnose --run-dir runs/a

Five questions: what the latent knows of the physical state (probes), whether imagined rewards answer to actions as real
ones do (effects), what surprises the model (surprise), how far ahead it sees (open-loop), and how its latents lie
(geometry). ``--out`` gets a PNG for each picture, diagnosis.json with all figures, and index.html, which shows and
explains them. The last line of output names the page.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from agents.random import RandomAgent
from envs import make_env
from runners.checks import refuse_below
from runners.config import WORLD_MODEL_AGENTS, ConfigError, read_config, resolve_device
from runners.disk import clear_disk_full, replace_file
from runners.findings import find_effects, find_geometry, find_open_loop, find_probes, find_surprise
from runners.questions import QUESTIONS, PartName
from runners.recordings import Recordings, follow, play
from runners.report_page import page
from runners.session import configure_torch
from runners.subject import Finding, Loaded, Subject, load, plan
from runners.train import USER_ERRORS

PAGE, FIGURES = "index.html", "diagnosis.json"


@dataclass(frozen=True)
class DiagnoseConfig:
    """Ask a run's world model what it knows; the last line printed names the page with the answers."""

    run_dir: str
    """Folder of the run, as given to runners.train."""
    out: str | None = None
    """Folder of pictures, figures and page. None: diagnosis, in the run's folder."""
    parts: tuple[PartName, ...] = ()
    """What to ask. Left out: everything that this task allows; probes and effects need a physical state."""
    episodes: int = 20
    """Fresh episodes; a quarter of them judges, the others fit probes and baselines. At least 4."""
    longest: int = 500
    """Agent steps after which an episode is cut."""
    policy: Literal["run", "random"] = "run"
    """Who acts: the run's own policy, sampled, or uniformly random actions."""
    random_actions: float = 0.5
    """With the run's policy: each episode takes a random action with a probability drawn between 0 and this, so that
    the states vary and what an action causes does not follow from the state."""
    horizon: int = 15
    """Agent steps that are imagined open loop, H."""
    starts: int = 64
    """Held-out moments at which actions are compared."""
    clips: int = 32
    """Held-out moments at which something impossible happens, for each kind of edit."""
    seed: int = 0
    """Of the episodes, the split, the actions and the probes."""
    checkpoint: Literal["latest", "best"] = "latest"
    """best is the one whose evaluation during training scored highest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the world model runs; probes are fitted on the CPU."""
    threads: int = 0
    """CPU threads that PyTorch uses. 0: all cores."""


def diagnose(config: DiagnoseConfig, command: str, console: Console) -> Path:
    """Play, ask and write; returns the page.

    Args:
        command: what was asked for, for the record.
        console: where progress is shown.

    Raises:
        ConfigError: no run there or none with a world model, impossible numbers, parts that the task does not allow.
        CheckpointError: no usable checkpoint, or one of another task or size.
    """
    _check(config)
    run = read_config(Path(config.run_dir))
    if run.agent not in WORLD_MODEL_AGENTS:
        raise ConfigError(f"{config.run_dir} is a run of the {run.agent} agent: there is no world model to ask")
    out = Path(config.out) if config.out is not None else Path(config.run_dir) / "diagnosis"
    device = resolve_device(config.device)
    configure_torch(config.threads)
    torch.manual_seed(config.seed)
    env = make_env(run.task, run.env, config.seed)
    with Progress(console=console) as progress:
        try:
            asked = plan(env, run, config.parts)
            loaded = load(
                Path(config.run_dir),
                run,
                env,
                device,
                best=config.checkpoint == "best",
                random_actions=config.random_actions,
                seed=config.seed,
            )
            bar = progress.add_task("playing episodes", total=config.episodes + len(asked.parts))
            recordings = _play(config, loaded, env, physical=bool(asked.names), done=lambda: progress.advance(bar))
        finally:
            env.close()
        subject = Subject(
            run=run,
            model=loaded.model,
            untrained=loaded.untrained,
            viewer=loaded.viewer,
            recordings=recordings,
            followed=follow(loaded.model, recordings),
            names=asked.names,
            angles=asked.angles,
            make_env=lambda obs: make_env(
                run.task, run.env if obs == "as trained" else dataclasses.replace(run.env, obs="state"), config.seed
            ),
            seed=config.seed,
        )
        findings = {}
        for part in asked.parts:
            progress.update(bar, description=QUESTIONS[part].title)
            findings[part] = _ask(part, subject, config)
            progress.advance(bar)
    return _write(out, config, loaded, recordings, findings, asked.notes, command)


def _check(config: DiagnoseConfig) -> None:
    refuse_below(
        [
            ("--episodes", config.episodes, 4),
            ("--longest", config.longest, 1),
            ("--horizon", config.horizon, 1),
            ("--starts", config.starts, 2),
            ("--clips", config.clips, 1),
            ("--seed", config.seed, 0),
            ("--threads", config.threads, 0),
        ]
    )
    if not 0 <= config.random_actions <= 1:
        raise ConfigError(f"--random-actions is {config.random_actions}, but must lie in 0 to 1")


def _play(
    config: DiagnoseConfig, loaded: Loaded, env: gym.Env, *, physical: bool, done: Callable[[], None]
) -> Recordings:
    assert env.action_space.shape is not None
    randomly = RandomAgent(env.action_space.shape[0], config.seed)
    return play(
        env,
        randomly if config.policy == "random" else loaded.agent,
        config.episodes,
        config.longest,
        seed=config.seed,
        physical=physical,
        after_episode=done,
    )


def _ask(part: PartName, subject: Subject, config: DiagnoseConfig) -> Finding:
    match part:
        case "probes":
            return find_probes(subject)
        case "effects":
            return find_effects(subject, config.starts)
        case "surprise":
            return find_surprise(subject, config.clips)
        case "open-loop":
            return find_open_loop(subject, config.horizon)
        case "geometry":
            return find_geometry(subject)


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(
    out: Path,
    config: DiagnoseConfig,
    loaded: Loaded,
    recordings: Recordings,
    findings: dict[PartName, Finding],
    notes: list[str],
    command: str,
) -> Path:
    returns = np.bincount(recordings.episode, weights=recordings.reward)
    about: dict[str, Any] = {
        "command": command,
        "task": loaded.run.task,
        "run_dir": config.run_dir,
        "checkpoint": loaded.checkpoint.name,
        "env_steps": loaded.env_steps,
        "returns": returns.tolist(),
        "rows": len(recordings.obs),
        "held_out_episodes": recordings.split.held_out.tolist(),
        "settings": dataclasses.asdict(config),
        "env": dataclasses.asdict(loaded.run.env),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "mujoco")}},
        "notes": notes,
        **{name: finding.figures for name, finding in findings.items()},
    }
    facts = [
        ("task", f"{loaded.run.task}, {loaded.run.env.obs}, {loaded.run.env.render} rendering"),
        ("run", f"{config.run_dir}, checkpoint {loaded.checkpoint.name}, {loaded.env_steps:,} env_steps"),
        (
            "episodes",
            f"{config.episodes} fresh ones, {len(recordings.split.held_out)} of them held out, {about['rows']:,} rows; "
            f"actions: {_who(config)}; mean return {returns.mean():.1f}",
        ),
        ("command", command),
    ]
    sections = [finding.section for finding in findings.values()]
    title = f"What the world model of {Path(config.run_dir).resolve().name} knows"
    files = {one.name: one.png for section in sections for one in section.pictures}
    files[FIGURES] = (json.dumps(_plain(about), indent=2, allow_nan=False) + "\n").encode()
    files[PAGE] = page(title, facts, sections, notes).encode()
    with clear_disk_full(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                replace_file(out / name, content)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(f"--out {out} cannot be written: {error}") from error
    return out / PAGE


def _who(config: DiagnoseConfig) -> str:
    if config.policy == "random":
        return "uniformly random"
    return f"the run's policy, sampled, up to {config.random_actions:.0%} random ones in an episode"


def _plain(value: Any) -> Any:
    """JSON: what is not finite is null."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(args: Sequence[str] | None = None) -> int:
    """0, or 1 after an error."""
    given = sys.argv[1:] if args is None else list(args)
    config = tyro.cli(DiagnoseConfig, args=given, prog="python -m runners.diagnose")
    try:
        where = diagnose(config, shlex.join(["python", "-m", "runners.diagnose", *given]), Console(stderr=True))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"page: {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Reach goals given as images with a run's world model, and compare with acting without one.

    python -m runners.plan --run-dir runs/reacher-lewm --data data/reacher

Starts and goals are moments of recorded episodes. The simulator is put back to the start, the planner sees pictures
alone, and the physical state says whether it got to the goal. A random policy, staying still and the recorded actions
themselves get the same starts. The last line of output is one JSON object.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch

from agents.amortised import Amortised
from agents.dreamer import DreamerAgent
from agents.goals import GoalSearch, GoalSeeker
from envs import EnvConfig, action_repeat_of, make_env, resolve_task
from envs.physics import physical_units
from envs.worker import render_fps
from runners.amortise import amortised_policy
from runners.attempts import Attempts, Method, Oracle, Randomly, Seeking, Still, attempt
from runners.config import WORLD_MODEL_AGENTS, Config, ConfigError, build_agent, read_config, resolve_device
from runners.dataset import Dataset
from runners.disk import clear_disk_full, replace_file
from runners.film import Film
from runners.goal_report import figures, protocol, table
from runners.goals import Halves, Match, Pairs, choose_pairs, split_like_pretraining
from runners.plan_config import PlanConfig, build_search, check, parse_args
from runners.progress import Display
from runners.run import find_checkpoint, load_agent
from runners.session import configure_torch
from runners.train import USER_ERRORS
from runners.transfer import other_sight
from worldmodels.lewm import LeWorldModel


class Loaded(NamedTuple):
    """A run's checkpoint and the dataset that goals are taken from."""

    task: str
    env: EnvConfig
    data: Dataset
    model: LeWorldModel
    device: torch.device
    bf16: bool
    checkpoint: Path
    env_steps: int

    @property
    def action_dim(self) -> int:
        return self.data.spaces()[1].shape[0]

    @property
    def action_repeat(self) -> int:
        return action_repeat_of(self.task, self.env)


def plan(config: PlanConfig, command: str) -> dict[str, Any]:
    """Try all goals with every method, and print how and how well; what the last line says.

    Args:
        command: what was asked for, for the record.

    Raises one of ``USER_ERRORS``.
    """
    check(config)
    loaded = load(config)
    halves = split_like_pretraining(loaded.data, Path(config.run_dir), config.seed)
    with ExitStack() as opened:
        envs = [opened.enter_context(closing(_make_env(config, loaded)))]
        names, before = loaded.data.about.physics, loaded.model.history  # type: ignore[union-attr]
        match = Match(names or [], physical_units(envs[0]), config.match, config.tolerance)
        pairs = choose_pairs(
            loaded.data,
            halves.held_out,
            match,
            count=config.goals,
            apart=config.apart,
            before=before,
            seed=config.seed,
        )
        while len(envs) < min(config.num_envs, len(pairs.start)):
            envs.append(opened.enter_context(closing(_make_env(config, loaded))))
        said = protocol(config, loaded.task, loaded.data, halves, match, pairs, before)
        print("\n".join(said), flush=True)
        film = None if config.video is None else Film(loaded.data, pairs)
        results = _attempt_all(_methods(config, loaded, halves), pairs, loaded, envs, match, film)
        rate = render_fps(envs[0]) / loaded.action_repeat
    found = {name: figures(attempts) for name, attempts in results.items()}
    print("\n".join(table(found)))
    answer = {
        "task": loaded.task,
        "command": command,
        "checkpoint": loaded.checkpoint.name,
        "env_steps": loaded.env_steps,
        "goals": len(pairs.start),
        "excluded": pairs.solved,
        "drawn": pairs.drawn,
        "tolerance": dict(zip(match.names, match.limits, strict=True)),
        "protocol": said,
        "methods": found,
        "start_rows": pairs.start.tolist(),
        "settings": asdict(config) | {"budget": config.decisions},
    }
    if config.json is not None:
        _write(Path(config.json), answer)
    if film is not None and config.video is not None:  # last: what was found is safe if there is no room for it
        film.write(Path(config.video), rate)
        print(f"video: {config.video}")
    return answer


# -- what there is -----------------------------------------------------------------------------------------------------


def load(config: PlanConfig) -> Loaded:
    """The world model and the data, if they belong together.

    Raises:
        ConfigError: no run there or none with a world model; a dataset of another task, seen in another way, or without
            physical states.
        ReplayError, CheckpointError, UnknownTask: what is read is missing, damaged or of another size.
    """
    path = Path(config.run_dir)
    run = read_config(path)
    if run.agent not in WORLD_MODEL_AGENTS:
        raise ConfigError(f"{path} is a run of the {run.agent} agent: there is no world model to plan with")
    if config.task is not None and config.task != run.task:
        resolve_task(config.task)
        raise ConfigError(f"--task is {config.task}, but {path} is a run on {run.task}")
    data = Dataset(config.data)
    env = _recorded_env(data, path, run)
    device = resolve_device(config.device)
    configure_torch(config.threads)
    torch.manual_seed(config.seed)
    state, meta, where = find_checkpoint(path, run, best=config.checkpoint == "best")
    agent = build_agent(replace(run, agent="dreamer"), *data.spaces(), device)
    load_agent(agent, state["agent"], path)
    assert isinstance(agent, DreamerAgent)
    assert isinstance(agent.model, LeWorldModel)
    return Loaded(run.task, env, data, agent.model.eval(), device, agent.bf16, where, meta["env_steps"])


def _recorded_env(data: Dataset, path: Path, run: Config) -> EnvConfig:
    """How the dataset's episodes were played. Raises ConfigError where ``run`` cannot reach goals among them."""
    about, shape = data.about, data.spaces()[0].shape
    if about is None or about.task is None or about.env is None:
        raise ConfigError(f"{data.path} does not say of which task it is; record it with python -m runners.collect")
    if about.task != run.task:
        raise ConfigError(f"{data.path} is of the task {about.task}, but {path} is a run on {run.task}")
    if data.physics is None or about.starts is None:
        raise ConfigError(
            f"{data.path} has no physical states, which tell whether a goal was reached; they are recorded by python "
            f"-m runners.collect on tasks of dmc/ and mujoco/, and this one is {about.task}"
        )
    changed = other_sight(run, replace(run, env=about.env))
    if not changed and run.env.obs == "pixels" and shape != (3, run.env.size, run.env.size):
        changed = [f"observations: {(3, run.env.size, run.env.size)} there, {shape} here"]
    if changed:
        raise ConfigError(f"{path} has learned from other observations than those of {data.path}: {'; '.join(changed)}")
    return about.env


def _make_env(config: PlanConfig, loaded: Loaded) -> gym.Env:
    """An environment of the dataset that draws no picture unasked, and that no time limit ends before the budget."""
    limit = config.decisions * loaded.action_repeat + 1
    return make_env(loaded.task, replace(loaded.env, obs="state", time_limit=limit, physics=False), config.seed)


def _methods(config: PlanConfig, loaded: Loaded, halves: Halves) -> dict[str, Method]:
    """Who tries: the planners, and who needs no world model."""
    methods: dict[str, Method] = {}
    for name in config.planner:
        seeker: GoalSeeker
        if name == "amortised":
            seeker = _amortised(config, loaded, halves)
        else:
            seeker = GoalSearch(loaded.model, build_search(config, name), loaded.action_dim, config.search)
        methods[name] = Seeking(
            loaded.model,
            seeker,
            loaded.data,
            budget=config.decisions,
            before=loaded.model.history,
            device=loaded.device,
            bf16=loaded.bf16,
        )
    return methods | {
        "random": Randomly(loaded.action_dim, config.decisions, config.seed),
        "still": Still(loaded.action_dim, config.decisions),
        "oracle": Oracle(loaded.data, config.apart, config.decisions),
    }


def _amortised(config: PlanConfig, loaded: Loaded, halves: Halves) -> Amortised:
    with closing(Display(config.amortised.updates, "updates", "updates")) as display:
        policy, trained = amortised_policy(
            loaded.model,
            loaded.data,
            halves.train,
            config.amortised,
            longest=config.decisions,
            seed=config.seed,
            run_dir=Path(config.run_dir),
            checkpoint=loaded.checkpoint,
            progress=lambda done, text: display.progress(done, done, text),
        )
        told = "trained and saved with the run" if trained else "as saved with the run"
        display.message(f"amortised planner: {told}")
    return Amortised(loaded.model, policy)


def _attempt_all(
    methods: dict[str, Method],
    pairs: Pairs,
    loaded: Loaded,
    envs: Sequence[gym.Env],
    match: Match,
    film: Film | None,
) -> dict[str, Attempts]:
    """Every method on every goal; what the first one does is filmed."""
    total = len(pairs.start) * sum(method.decisions for method in methods.values())
    results: dict[str, Attempts] = {}
    with closing(Display(total, "decisions", "decisions")) as display:
        for name, method in methods.items():
            watch = None if film is None or results else film.watch
            done = sum(found.decided for found in results.values())

            def show(made: int, done: int = done, name: str = name) -> None:
                display.progress(done + made, done + made, name)

            results[name] = attempt(method, pairs, loaded.data, envs, match, after_decision=show, watch=watch)
    return results


def main(args: Sequence[str] | None = None) -> int:
    """0, or 1 after an error."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    given = sys.argv[1:] if args is None else list(args)
    config = parse_args(given)
    try:
        answer = plan(config, shlex.join(["python", "-m", "runners.plan", *given]))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer, allow_nan=False))
    return 0


def _write(file: Path, answer: dict[str, Any]) -> None:
    with clear_disk_full(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, (json.dumps(answer, indent=2, allow_nan=False) + "\n").encode())
        except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(f"--json {file} cannot be written: {error}") from error


if __name__ == "__main__":
    sys.exit(main())

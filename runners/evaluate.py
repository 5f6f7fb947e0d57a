"""Evaluate a run's checkpoint on fresh episodes.

    python -m runners.evaluate --run-dir runs/a --episodes 10 --video out.mp4

The last line of output is one JSON object: mean_return, std, returns, env_steps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from agents.mpc import MPCConfig
from envs.vector import VectorEnv
from runners.checks import check, refuse_below
from runners.config import WORLD_MODEL_AGENTS, ConfigError, build_agent, read_config, resolve_device
from runners.logger import write_video
from runners.rollout import Evaluation, evaluate
from runners.run import find_checkpoint, load_agent
from runners.session import configure_torch
from runners.train import USER_ERRORS


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a run's checkpoint on fresh episodes; the last line printed is JSON."""

    run_dir: str
    """Folder of the run, as given to runners.train."""
    episodes: int = 10
    """Complete episodes to play."""
    agent: Literal["dreamer", "mpc"] | None = None
    """How to act with what was learned: dreamer by the policy, mpc by planning. None: as it was trained."""
    mpc: MPCConfig = field(default_factory=MPCConfig)
    """How to plan; what no flag says is as in the run's configuration."""
    seed: int = 0
    """Of the evaluation's episodes; a run's own evaluations use other seeds."""
    checkpoint: Literal["latest", "best"] = "latest"
    """best is the one whose evaluation during training scored highest, a flattered score; here it is played afresh."""
    video: str | None = None
    """Write the first episode here, as mp4. A run that observes states is drawn for it, 256×256."""
    explore: bool = False
    """Sample the policy instead of taking its most likely action."""
    num_envs: int = 5
    """Environments side by side, in this process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    """CPU threads that PyTorch uses. 0: all cores."""


def evaluate_run(config: EvaluateConfig) -> tuple[Evaluation, int, float]:
    """Play the episodes; also the checkpoint's env_steps, and the agent steps in a simulated second.

    Raises:
        ConfigError: no run there, or impossible numbers.
        CheckpointError: no usable checkpoint, or one of another task or size.
    """
    path = Path(config.run_dir)
    refuse_below(
        [
            ("--episodes", config.episodes, 1),
            ("--num-envs", config.num_envs, 1),
            ("--seed", config.seed, 0),
            ("--threads", config.threads, 0),
        ]
    )
    trained = read_config(path)
    if config.agent is not None and trained.agent not in WORLD_MODEL_AGENTS:
        raise ConfigError(
            f"{path} is a run of the {trained.agent} agent: it learned no world model that --agent {config.agent} "
            "could use"
        )
    run = replace(trained, agent=config.agent or trained.agent, mpc=config.mpc)
    drawn = config.video is not None and run.env.obs == "state"
    if drawn:
        run = replace(run, env=replace(run.env, size=256))
    check(run)
    device = resolve_device(config.device)
    configure_torch(config.threads)
    torch.manual_seed(config.seed)
    state, meta, _ = find_checkpoint(path, run, best=config.checkpoint == "best")
    envs = VectorEnv(run.task, run.env, min(config.num_envs, config.episodes), config.seed, processes=False)
    try:
        agent = build_agent(run, envs.single_observation_space, envs.single_action_space, device)
        load_agent(agent, state["agent"], path)
        picture = partial(envs.picture, 0) if drawn else None
        result = evaluate(agent, envs, config.episodes, seed=config.seed, explore=config.explore, picture=picture)
        rate = float(envs.metadata["render_fps"])
    finally:
        envs.close()
    return result, meta["env_steps"], rate


def parse_args(args: Sequence[str] | None) -> EvaluateConfig:
    """The command line, with the run's own settings of the planner as defaults."""
    where, _ = tyro.cli(_Where, args=args, return_unknown_args=True, add_help=False)
    mpc = MPCConfig()
    if where.run_dir is not None and (Path(where.run_dir) / "config.json").exists():
        mpc = read_config(Path(where.run_dir)).mpc
    default = EvaluateConfig(run_dir=tyro.MISSING, mpc=mpc)
    return tyro.cli(EvaluateConfig, default=default, args=args, prog="python -m runners.evaluate")


@dataclass(frozen=True)
class _Where:
    """The flag that decides the defaults of others."""

    run_dir: str | None = None


def main(args: Sequence[str] | None = None) -> int:
    """0, or 1 after an error."""
    try:
        config = parse_args(args)
        result, env_steps, rate = evaluate_run(config)
        if config.video is not None:
            assert result.frames is not None  # observed, or drawn for the film
            write_video(Path(config.video), result.frames.transpose(0, 2, 3, 1), fps=rate)
            print(f"video: {config.video}")
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    answer = {
        "mean_return": float(np.mean(result.returns)),
        "std": float(np.std(result.returns)),
        "returns": result.returns,
        "env_steps": env_steps,
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())

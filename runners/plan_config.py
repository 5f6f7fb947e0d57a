"""The settings of reaching goals, and what of them is impossible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from agents.amortised import AmortisedConfig
from agents.goals import GoalSearchConfig
from agents.mpc import MPCConfig, build_planner
from agents.planner import CEMConfig, GradientConfig, ICEMConfig, MPPIConfig, Planner
from runners.checks import refuse_below
from runners.config import ConfigError
from runners.goals import Tolerance

PlannerName = Literal["cem", "icem", "mppi", "gradient", "amortised"]


@dataclass(frozen=True)
class PlanConfig:
    """Reach goals given as images with a run's world model; the last line printed is JSON."""

    run_dir: str
    """Folder of the run, as given to runners.pretrain or runners.train."""
    data: str
    """Dataset that runners.collect wrote, on a task of MuJoCo: starts and goals come from episodes that the run was not
    pretrained on, where that is known."""
    task: str | None = None
    """The task that both have to be of. None: whatever the run's is."""
    planner: tuple[PlannerName, ...] = ("cem",)
    """Who plans, one or several to compare: cem, icem, mppi and gradient search anew at each decision; amortised is one
    network that learned beforehand, in a minute or less, and is kept with the run."""
    goals: int = 50
    """Goals to try; a score that is reported takes at least 50."""
    apart: int = 15
    """Decisions that the recorded episode took from the start to the goal."""
    budget: int | None = None
    """Decisions to reach a goal within. None: twice those of --apart."""
    match: tuple[str, ...] = ()
    """Which quantities of the physical state have to agree with the goal's, as qpos/shoulder. Left out: all
    positions."""
    tolerance: Tolerance = field(default_factory=Tolerance)
    search: Annotated[GoalSearchConfig, tyro.conf.arg(name="")] = field(default_factory=GoalSearchConfig)
    cem: CEMConfig = field(default_factory=lambda: CEMConfig(samples=128, iterations=4, elites=16))
    icem: ICEMConfig = field(default_factory=lambda: ICEMConfig(samples=128, iterations=4, elites=16))
    mppi: MPPIConfig = field(default_factory=lambda: MPPIConfig(samples=128, iterations=4, elites=16))
    gradient: GradientConfig = field(default_factory=GradientConfig)
    amortised: AmortisedConfig = field(default_factory=AmortisedConfig)
    seed: int = 0
    """Of the choice of starts, the random policy and the amortised planner's training."""
    checkpoint: Literal["latest", "best"] = "latest"
    """best is the one whose evaluation during training scored highest."""
    num_envs: int = 10
    """Goals that are pursued side by side, planned for in one call; their environments are in this process."""
    json: str | None = None
    """Write the last line here, too, indented."""
    video: str | None = None
    """Write here, as mp4, how the first goals went: start, goal and what happened side by side."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the world model runs."""
    threads: int = 0
    """CPU threads that PyTorch uses. 0: all cores."""

    @property
    def decisions(self) -> int:
        """The budget, resolved."""
        return 2 * self.apart if self.budget is None else self.budget


def parse_args(args: Sequence[str]) -> PlanConfig:
    """The command line. Exits with 2, naming the closest matches, on an unknown flag or value."""
    return tyro.cli(PlanConfig, args=args, prog="python -m runners.plan")


def check(config: PlanConfig) -> None:
    """Refuse impossible numbers before anything is built.

    Raises:
        ConfigError: the first one found.
    """
    refuse_below(
        [
            ("--goals", config.goals, 1),
            ("--apart", config.apart, 1),
            ("--budget", config.decisions, 1),
            ("--tolerance.angle", config.tolerance.angle, 0),
            ("--tolerance.length", config.tolerance.length, 0),
            ("--tolerance.other", config.tolerance.other, 0),
            ("--path-weight", config.search.path_weight, 0),
            ("--horizon", config.search.horizon, 1),
            ("--replan-every", config.search.replan_every, 1),
            ("--std", config.search.std, 0),
            ("--amortised.units", config.amortised.units, 1),
            ("--amortised.layers", config.amortised.layers, 0),
            ("--amortised.updates", config.amortised.updates, 1),
            ("--amortised.batch", config.amortised.batch, 1),
            ("--amortised.lr", config.amortised.lr, 0),
            ("--amortised.rows", config.amortised.rows, 2),
            ("--seed", config.seed, 0),
            ("--num-envs", config.num_envs, 1),
            ("--threads", config.threads, 0),
        ]
    )
    if not config.planner or len(set(config.planner)) < len(config.planner):
        raise ConfigError(f"--planner takes one or more planners, each once; got {' '.join(config.planner) or 'none'}")
    for flag, file in (("--json", config.json), ("--video", config.video)):
        if file is not None and (Path(file).is_dir() or any(parent.is_file() for parent in Path(file).parents)):
            raise ConfigError(f"{flag} {file} cannot be a file there; choose another name")
    for name in config.planner:
        if name != "amortised":
            build_search(config, name)


def build_search(config: PlanConfig, name: Literal["cem", "icem", "mppi", "gradient"]) -> Planner:
    """The search of that name.

    Raises:
        ConfigError: its numbers are impossible.
    """
    named = MPCConfig(planner=name, cem=config.cem, icem=config.icem, mppi=config.mppi, gradient=config.gradient)
    try:
        return build_planner(named)
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}") from error

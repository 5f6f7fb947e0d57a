"""A grid of runs, tasks × agents × seeds, and the folder that holds it.

    OUT/grid.json                                         what was asked for
    OUT/runs/cartpole-swingup/sac-state/seed-1/           a run's folder, as runners.train writes it
    OUT/logs/cartpole-swingup/sac-state/seed-1.log        what its process printed
    OUT/failed/cartpole-swingup/sac-state/seed-1.json     that it was given up, and why

The folder is the whole record: what is missing is read from it every time, so a grid goes on after any interruption.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from runners.config import AgentName, ConfigError, read_config
from runners.disk import ASIDE, lock_file, replace_file
from runners.logger import read_rows

FORMAT = 1
"""Version of grid.json."""
OBSERVATIONS = ("pixels", "state")


class GridError(ValueError):
    """The grid cannot be run as asked. The message says why and what to do."""


class Cell(NamedTuple):
    """One run of a grid. ``agent`` is a label as :func:`agent_label` gives it."""

    task: str
    agent: str
    seed: int

    def __str__(self) -> str:
        return str(self.place)

    @property
    def place(self) -> Path:
        """Where it lies under OUT/runs, OUT/logs and OUT/failed."""
        task = self.task.partition("/")[2].replace("/", "-").replace(":", "-")
        return Path(task, self.agent.replace(":", "-"), f"seed-{self.seed}")

    @property
    def kind(self) -> tuple[str, str]:
        """The agent's name and what it observes."""
        name, _, obs = self.agent.partition(":")
        return name, obs or OBSERVATIONS[0]


def agent_label(entry: str) -> str:
    """``sac:pixels`` and ``sac`` as ``sac``, ``sac:state`` as itself.

    Raises:
        GridError: no such agent or observation.
    """
    name, colon, obs = entry.partition(":")
    if name not in get_args(AgentName):
        raise GridError(f"there is no agent {name!r}; the agents are {', '.join(get_args(AgentName))}")
    if colon and obs not in OBSERVATIONS:
        raise GridError(f"--agents {entry}: after the colon stands what the agent observes, pixels or state")
    return f"{name}:state" if obs == "state" else name


@dataclass(frozen=True)
class Grid:
    """What was asked for. ``agents`` are labels, ``flags`` are passed to every runners.train."""

    tasks: tuple[str, ...]
    agents: tuple[str, ...]
    seeds: tuple[int, ...]
    env_steps: int
    flags: tuple[str, ...] = ()

    def cells(self) -> list[Cell]:
        """Seeds outermost: every task and agent has its first run before any has its second."""
        return [Cell(task, agent, seed) for seed in self.seeds for task in self.tasks for agent in self.agents]

    def arguments(self, cell: Cell) -> list[str]:
        """Arguments of runners.train for a cell, but for folder and threads."""
        name, obs = cell.kind
        own = {"task": cell.task, "agent": name, "seed": cell.seed, "env-steps": self.env_steps, "env.obs": obs}
        return [word for flag, value in own.items() for word in (f"--{flag}", str(value))] + list(self.flags)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT} | asdict(self), indent=2) + "\n"


def read_grid(file: Path) -> Grid:
    """The inverse of :meth:`Grid.to_json`.

    Raises:
        GridError: not a grid of this version; names the file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        lists = {name: tuple(content.pop(name)) for name in ("tasks", "agents", "seeds", "flags")}
        env_steps = content.pop("env_steps")
        kinds = {"tasks": str, "agents": str, "seeds": int, "flags": str}
        fits = all(type(one) is kind for name, kind in kinds.items() for one in lists[name])
        if content or type(env_steps) is not int or not fits:
            raise ValueError("its fields are not those that this version writes")
        return Grid(env_steps=env_steps, **lists)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise GridError(f"{file} cannot be used as a grid: {error}") from error


def grown(old: Grid, new: Grid) -> Grid:
    """The grid that a folder holds, with the tasks, agents and seeds that were added. Old ones keep their places.

    Raises:
        GridError: anything else differs; lists all that does.
    """
    changed = []
    merged = {}
    for name in ("tasks", "agents", "seeds"):
        before, after = getattr(old, name), getattr(new, name)
        lost = [str(one) for one in before if one not in after]
        if lost:
            changed.append(f"{name}: {', '.join(lost)} left out")
        merged[name] = before + tuple(one for one in after if one not in before)
    if old.env_steps != new.env_steps:
        changed.append(f"env_steps: {old.env_steps} → {new.env_steps}")
    if old.flags != new.flags:
        changed.append(f"flags for runners.train: {' '.join(old.flags) or 'none'} → {' '.join(new.flags) or 'none'}")
    if changed:
        lines = "\n  ".join(changed)
        raise GridError(
            f"the folder holds a grid that was asked for with other settings:\n  {lines}\n"
            "Tasks, agents and seeds can be added. For anything else repeat its own command, or choose another --out."
        )
    return replace(old, **merged)


class Progress(NamedTuple):
    """How far a run is, by its records: env_steps, and the seconds of training they took, over all sessions."""

    env_steps: int
    wall_s: float


class GridFolder:
    """OUT. Nothing is read or written before a method is called; paths are absolute."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def file(self) -> Path:
        return self.path / "grid.json"

    def run_dir(self, cell: Cell) -> Path:
        return self.path / "runs" / cell.place

    def log(self, cell: Cell) -> Path:
        return (self.path / "logs" / cell.place).with_suffix(".log")

    def failure(self, cell: Cell) -> Path:
        return (self.path / "failed" / cell.place).with_suffix(".json")

    def grow_to(self, asked: Grid) -> Grid:
        """What the folder would hold: ``asked``, in an order that a smaller grid in it may give. Changes nothing.

        Raises:
            GridError: the folder is another thing than a grid, or another grid.
        """
        places: dict[Path, Cell] = {}
        for cell in asked.cells():
            if places.setdefault(cell.place, cell) != cell:
                raise GridError(
                    f"{places[cell.place].task} and {cell.task} would share a folder; put them in two grids"
                )
        if self.file.exists():
            return grown(read_grid(self.file), asked)
        if self.path.exists() and not self.path.is_dir():
            raise GridError(f"{self.path} is a file; choose another --out")
        if any(self._foreign()):
            raise GridError(f"{self.path} holds other things and no grid.json; choose another --out, or a new folder")
        return asked

    def _foreign(self) -> Iterator[Path]:
        if self.path.exists():
            yield from (one for one in self.path.iterdir() if one.name != "grid.lock" and one.suffix != ASIDE)

    def claim(self, asked: Grid) -> tuple[Grid, int]:
        """Make the folder this grid's, and hold it until the returned descriptor is closed or the process ends.

        Raises:
            GridError: as :meth:`grow_to`; another process runs the grid; the folder cannot be made.
        """
        self.grow_to(asked)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held = lock_file(self.path / "grid.lock")
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise GridError(f"{self.path} cannot hold a grid: {error}; choose another --out") from error
        if held is None:
            raise GridError(f"the grid in {self.path} is being run by another process; wait for it, or stop it")
        try:
            grid = self.grow_to(asked)  # again, because the other process may have written since
            replace_file(self.file, grid.to_json().encode())
        except BaseException:
            os.close(held)
            raise
        return grid, held

    def finished(self, cell: Cell, env_steps: int) -> bool:
        """Whether the run has an evaluation at the end of its budget, and is the one that the cell asks for."""
        rows = read_rows(self.run_dir(cell) / "evals.jsonl")
        if not any(_number(row, "env_steps") >= env_steps for row in rows):
            return False
        try:
            config = read_config(self.run_dir(cell))
        except ConfigError:
            return False
        found = (config.task, (config.agent, config.env.obs), config.seed, config.env_steps)
        return found == (cell.task, cell.kind, cell.seed, env_steps)

    def threads(self, cell: Cell) -> int | None:
        """The threads that a run began with, which are part of its configuration; None before it has one."""
        try:
            return read_config(self.run_dir(cell)).threads
        except ConfigError:
            return None

    def progress(self, cell: Cell) -> Progress | None:
        """None for a run without records."""
        records = (read_rows(self.run_dir(cell) / name)[-1:] for name in ("metrics.jsonl", "evals.jsonl"))
        last = [Progress(int(_number(row, "env_steps")), _number(row, "wall_s")) for rows in records for row in rows]
        return max(last, default=None)

    def mark_failed(self, cell: Cell, attempts: int, error: str) -> None:
        """Write down that a run was given up."""
        file = self.failure(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, (json.dumps({"attempts": attempts, "error": error}, indent=2) + "\n").encode())


def _number(row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


RESERVED = ("task", "agent", "seed", "env-steps", "run-dir", "threads", "env.obs")
"""Flags of runners.train that the grid sets itself."""


def check_flags(flags: Sequence[str]) -> tuple[str, ...]:
    """The words after ``--``.

    Raises:
        GridError: one of them is the grid's own business.
    """
    for word in flags:
        name = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and name in RESERVED:
            raise GridError(f"--{name} after -- is set by the grid itself: say it by its own flags (see --help)")
    return tuple(flags)

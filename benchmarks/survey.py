"""What folders of runs hold: which runs are there, how far they are, and which of a grid are missing."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from benchmarks.curves import Curve, CurvesError, kind, names, read_run
from benchmarks.grid import Cell, Grid, GridError, read_grid
from runners.config import AgentName, Config

FEW_SEEDS = 5
"""Below this many seeds a bootstrap cannot know how much seeds differ, and its intervals come out too narrow."""


class SurveyError(ValueError):
    """There is nothing to report on. The message says where it was looked for, and why."""


@dataclass(frozen=True)
class Survey:
    """Every run that has an evaluation, and what a reader must know about those that are not there."""

    tasks: Sequence[str]
    """In the order of every table and picture, as are the agents."""
    agents: Sequence[str]
    runs: Mapping[Cell, Curve]
    env_steps: int
    """The budget: the grid's, or else the largest of any run."""
    wanted: frozenset[Cell]
    """What the grid asked for; what was found, where there is no grid."""
    notes: Sequence[str]
    """What is missing, unfinished, failed, left out or unequal. Plain sentences."""

    def of(self, task: str, agent: str) -> list[Curve]:
        """The runs of one cell, by seed."""
        return [run for key, run in sorted(self.runs.items()) if key[:2] == (task, agent)]

    def finished(self, key: Cell) -> bool:
        """Whether the run was evaluated at the end of its budget."""
        run = self.runs.get(key)
        return run is not None and run.rows[-1].env_steps >= self.target(run)

    def target(self, run: Curve) -> int:
        """The env_steps that a run is to reach: no more than the grid asks for."""
        return min(run.config.env_steps, self.env_steps)


def agent_label(config: Config) -> str:
    """The agent as a grid names it: with ``:state`` where it does not see pixels."""
    return f"{config.agent}:state" if config.env.obs == "state" else config.agent


def in_words(cell: Cell) -> str:
    return f"{cell.agent} on {short(cell.task)}, seed {cell.seed}"


def short(task: str) -> str:
    """A task without its suite."""
    return task.partition("/")[2]


def survey(folders: Sequence[Path]) -> Survey:
    """Reads every run under the folders. Runs may be going on, and half-written ones are said, not fatal.

    Raises:
        SurveyError: no such folder, a file, a grid.json that is none, or no run with an evaluation in any.
    """
    for folder in folders:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise SurveyError(f"{folder} {what}; give a folder that benchmarks.run or runners.train wrote")
    grids = [grid for folder in folders if (grid := _read_grid(folder)) is not None]
    curves, broken = _read_all(_run_folders(folders))
    if not curves:
        where = ", ".join(map(str, folders))
        why = f": {broken[0]}" if broken else "; nothing there was written by runners.train"
        more = f" (and {len(broken) - 1} more like it)" if len(broken) > 1 else ""
        raise SurveyError(f"no run with an evaluation in {where}{why}{more}")
    labels = {curve: agent_label(curve.config) for curve in curves} if grids else _telling_labels(curves)
    runs, notes = _by_key(curves, labels)
    wanted = frozenset(cell for grid in grids for cell in grid.cells())
    if wanted:
        extra = sorted(runs.keys() - wanted)
        if extra:
            notes.append(f"Left out, because the grid does not name them: {_listed(extra)}.")
        runs = {key: run for key, run in runs.items() if key in wanted}
        if not runs:
            raise SurveyError(
                f"no run of the grid in {folders[0]} has an evaluation yet; wait for the first, or see "
                "what stands in its folder failed"
            )
    budget = max((grid.env_steps for grid in grids), default=max(run.config.env_steps for run in runs.values()))
    tasks = list(dict.fromkeys([task for grid in grids for task in grid.tasks] or [key.task for key in sorted(runs)]))
    agents = list(dict.fromkeys([one for grid in grids for one in grid.agents] or _in_order(runs)))
    found = Survey(tasks, agents, runs, budget, wanted or frozenset(runs), [])
    notes = [*_missing(found, _failures(folders), broken), *_unequal(found), *notes, *_settings(found)]
    return Survey(tasks, agents, runs, budget, found.wanted, notes)


# -- reading -----------------------------------------------------------------------------------------------------------


def _read_grid(folder: Path) -> Grid | None:
    file = folder / "grid.json"
    if not file.exists():
        return None
    try:
        return read_grid(file)
    except GridError as error:
        raise SurveyError(str(error)) from error


def _run_folders(folders: Iterable[Path]) -> Iterator[Path]:
    """Every folder with a config.json, each once; what lies within a run is no other run."""
    seen = set()
    for folder in folders:
        for place, inside, files in os.walk(folder):
            inside.sort()
            if "config.json" in files:
                inside.clear()
                if Path(place).resolve() not in seen:
                    seen.add(Path(place).resolve())
                    yield Path(place)


def _read_all(paths: Iterable[Path]) -> tuple[list[Curve], list[str]]:
    """The curves, and why some folders have none."""
    curves, broken = [], []
    for path in paths:
        try:
            curves.append(read_run(path))
        except (CurvesError, OSError) as error:
            broken.append(str(error))
    return curves, broken


def _failures(folders: Iterable[Path]) -> dict[str, str]:
    """What benchmarks.run wrote down about runs that failed: the error, by the place of the run."""
    out = {}
    for folder in folders:
        for file in sorted((folder / "failed").rglob("*.json")):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                content = {}
            place = file.relative_to(folder / "failed").with_suffix("").as_posix()
            out[place] = _reason(content) if isinstance(content, dict) else ""
    return out


def _reason(failure: dict[str, Any]) -> str:
    """The last line of what a failed run said."""
    said = str(failure.get("error") or failure.get("message") or failure.get("stderr") or "").strip().splitlines()
    return said[-1] if said else ""


def _telling_labels(curves: Sequence[Curve]) -> dict[Curve, str]:
    """Labels of runs that no grid holds together: where one agent has several settings on one task, with those."""
    kinds: dict[tuple[str, str], set[tuple[str, ...]]] = defaultdict(set)
    for curve in curves:
        kinds[curve.config.task, agent_label(curve.config)].add(kind(curve.config))
    various = {label for (_, label), found in kinds.items() if len(found) > 1}
    return {
        curve: ", ".join((label, *kind(curve.config)[1:])) if label in various else label
        for curve in curves
        for label in [agent_label(curve.config)]
    }


def _by_key(curves: Sequence[Curve], labels: Mapping[Curve, str]) -> tuple[dict[Cell, Curve], list[str]]:
    """One run for each cell: of two with the same seed, which are no independent runs, the one that went further."""
    runs: dict[Cell, Curve] = {}
    notes = []
    for curve in curves:
        key = Cell(curve.config.task, labels[curve], curve.config.seed)
        if key in runs:
            first, second = sorted((runs[key], curve), key=lambda one: -one.rows[-1].env_steps)
            counts, other = names([first, second])
            notes.append(f"There are two runs of {in_words(key)}; {counts} counts, {other} does not.")
            curve = first
        runs[key] = curve
    return runs, notes


def _in_order(runs: Iterable[Cell]) -> list[str]:
    """Labels as the agents are listed in --help, each one's pixels before its state."""
    known = get_args(AgentName)
    return sorted(
        {key.agent for key in runs}, key=lambda label: (known.index(label.split(":")[0].split(",")[0]), label)
    )


# -- what a reader must know -------------------------------------------------------------------------------------------


def _missing(found: Survey, failures: Mapping[str, str], broken: Sequence[str]) -> list[str]:
    notes = []
    absent = sorted(found.wanted - found.runs.keys())
    unfinished = [key for key in sorted(found.runs) if not found.finished(key)]
    total = len(found.wanted)
    if absent:
        notes.append(f"Missing: {len(absent)} of {total} runs have no evaluation: {_listed(absent)}.")
    if unfinished:
        reached: dict[tuple[int, int], list[Cell]] = defaultdict(list)
        for key in unfinished:
            run = found.runs[key]
            reached[run.rows[-1].env_steps, found.target(run)].append(key)
        notes.append(
            f"Unfinished: {len(unfinished)} of {total} runs have not reached their budget and count up to where they "
            "are. "
            + " ".join(
                f"At {at:,} of {target:,} env_steps: {_listed(keys)}." for (at, target), keys in sorted(reached.items())
            )
        )
    notes += [f"Failed: {place}{f' ({why})' if why else ''}." for place, why in failures.items()]
    return notes + [f"Left out: {why}." for why in broken]


def _unequal(found: Survey) -> list[str]:
    counts = {
        (task, agent): sum(key[:2] == (task, agent) for key in found.runs)
        for task in found.tasks
        for agent in found.agents
    }
    some = {count for count in counts.values() if count}
    notes = []
    if len(set(counts.values())) > 1:
        most = max(some)
        fewer = "; ".join(f"{agent} on {short(task)} {n}" for (task, agent), n in counts.items() if n < most)
        notes.append(f"Seeds are unequal: {most} for each agent and task, but {fewer}.")
    if min(some) < FEW_SEEDS:
        notes.append(
            f"Few seeds: {' to '.join(map(str, sorted({min(some), max(some)})))} for each agent and task. A "
            f"bootstrap over fewer than {FEW_SEEDS} is too narrow: read bands and intervals as the spread of these "
            "runs, not as 95 % certainty." + (" A single seed has none." if min(some) == 1 else "")
        )
    return notes


def _settings(found: Survey) -> list[str]:
    """Where runs of one cell were not the same experiment, and returns that are no numbers."""
    notes = []
    for task in found.tasks:
        for agent in found.agents:
            runs = found.of(task, agent)
            if len({kind(run.config) for run in runs}) > 1:
                kinds = "; ".join(sorted({", ".join(kind(run.config)[1:]) for run in runs}))
                notes.append(f"The runs of {agent} on {short(task)} differ in more than their seed: {kinds}.")
    limited = [key for key, run in sorted(found.runs.items()) if run.config.env.time_limit is not None]
    if limited:
        notes.append(
            f"Shorter or longer episodes than the tasks' own (--env.time-limit): {_listed(limited)}. Their returns "
            "compare with no published figure."
        )
    bad = [key for key, run in sorted(found.runs.items()) if any(math.isnan(row.mean_return) for row in run.rows)]
    if bad:
        notes.append(f"Some returns are not finite, which leaves gaps: {_listed(bad)}.")
    return notes


def _listed(keys: Iterable[Cell]) -> str:
    """Cells in words, with the seeds of each together."""
    cells: dict[tuple[str, str], list[int]] = defaultdict(list)
    for key in keys:
        cells[key.agent, key.task].append(key.seed)
    return "; ".join(
        f"{agent} on {short(task)}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
        for (agent, task), seeds in cells.items()
    )

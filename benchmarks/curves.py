"""Learning curves of runs, as a small table with where it comes from, and as a picture.

    python -m benchmarks.curves runs/* --out benchmarks/results/cpu --plot benchmarks/results/cpu.png

writes cpu.csv (one row for each evaluation), cpu.json (commands, machine, date, each run's settings) and the picture.
Runs may still be going on.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.plot import Line, Panel, PlotError, Reference, Series, check_format, draw, read_references
from benchmarks.provenance import command_line, machine_line, now, software
from envs import UnknownTask, action_repeat_of
from runners.config import Config, ConfigError, differences, from_json, presets
from runners.logger import read_rows

REFERENCE = Path(__file__).parent / "reference.csv"


@dataclass(frozen=True)
class CurvesConfig:
    """Gather the evaluations of finished or running trainings into NAME.csv and NAME.json, and draw them."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that runners.train wrote."""
    out: Path
    """NAME of the two files, without a suffix, such as benchmarks/results/cpu."""
    plot: Path | None = None
    """Draw the curves here, as png, svg or pdf."""
    machine: str = ""
    """What the runs ran on, if not this machine."""
    note: str = ""
    """What else a reader should know; it stands in the JSON and under the picture."""
    reference: Path = REFERENCE
    """Published figures to draw beside the runs: CSV with task, algorithm, env_steps, mean_return and source, and obs
    where it is state; those of runs that see the same are drawn."""


@dataclass(frozen=True)
class Row:
    """One evaluation: a row of the table. Returns are undiscounted; NaN where an episode's return was not finite."""

    task: str
    agent: str
    seed: int
    env_steps: int
    """Of training, behind the policy that was evaluated."""
    wall_s: float
    """Seconds the run had taken when the evaluation began, earlier evaluations included."""
    mean_return: float
    std: float
    """Over the episodes (population)."""
    min: float
    max: float
    episodes: int
    render: str
    action_repeat: int
    preset: str


class CurvesError(ValueError):
    """A folder has no curve to show. The message says which folder and why."""


@dataclass(frozen=True, eq=False)
class Curve:
    """One run: its configuration and its evaluations, oldest first."""

    path: Path
    """The run's folder, absolute."""
    config: Config
    rows: list[Row]


def names(curves: Sequence[Curve]) -> list[str]:
    """What to call each run: its folder, below the last one that all of them share."""
    shared = os.path.commonpath([curve.path.parent for curve in curves])
    return [curve.path.relative_to(shared).as_posix() for curve in curves]


def read_run(path: Path) -> Curve:
    """A run's curve from config.json and evals.jsonl. A half-written last line is left out.

    Raises:
        CurvesError: not a run of this version, no evaluation yet, or a row that is not as runners.train writes it.
    """
    file = path / "config.json"
    if not file.is_file():
        raise CurvesError(f"{path} is not a run: it has no config.json; give the folder that runners.train wrote")
    try:
        config = from_json(file.read_text(encoding="utf-8"))
        repeat = action_repeat_of(config.task, config.env)
    except (ConfigError, UnknownTask, UnicodeDecodeError) as error:
        raise CurvesError(f"{file}: {error}") from error
    evaluations = read_rows(path / "evals.jsonl")
    if not evaluations:
        raise CurvesError(f"{path} has no evaluation in evals.jsonl yet; let it reach its first one or leave it out")
    try:
        return Curve(path.resolve(), config, [_row(config, repeat, one) for one in evaluations])
    except (KeyError, TypeError, ValueError) as error:
        raise CurvesError(f"{path / 'evals.jsonl'} has a row that is no evaluation: {error!r}") from error


def _row(config: Config, repeat: int, evaluation: dict[str, Any]) -> Row:
    returns = np.array([math.nan if value is None else float(value) for value in evaluation["returns"]])
    if not len(returns):
        raise ValueError("no returns")
    return Row(
        task=config.task,
        agent=config.agent,
        seed=config.seed,
        env_steps=int(evaluation["env_steps"]),
        wall_s=round(float(evaluation["wall_s"]), 1),
        mean_return=round(float(returns.mean()), 2),
        std=round(float(returns.std()), 2),
        min=round(float(returns.min()), 2),
        max=round(float(returns.max()), 2),
        episodes=len(returns),
        render=config.env.render,
        action_repeat=repeat,
        preset=config.preset,
    )


def _base(config: Config) -> Config:
    """The preset that a run started from, for its task, agent and seed."""
    preset = presets().get(config.preset, Config())
    own = {name: getattr(config, name) for name in ("preset", "task", "agent", "seed", "run_dir")}
    return dataclasses.replace(preset, **own)


LOCAL = ("device", "threads", "replay_device")
"""Fields that say where a run ran, not what it was."""


def training_command(config: Config) -> str:
    """The line that starts such a run, with every flag in which it differs from its preset.

    Folder, device and threads are left to whoever runs it. A configuration that no command made (of no preset) differs
    from the defaults of the tree.
    """
    args = ["--preset", config.preset, "--task", config.task, "--agent", config.agent, "--seed", str(config.seed)]
    return command_line("runners.train", args + _flags(asdict(_base(config)), asdict(_portable(config))))


def _portable(config: Config) -> Config:
    """The configuration with its preset's idea of where to run."""
    return dataclasses.replace(config, **{name: getattr(_base(config), name) for name in LOCAL})


def _flags(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    flags: list[str] = []
    for name, value in after.items():
        dashed = name.replace("_", "-")
        if isinstance(value, dict):
            flags += _flags(before[name], value, f"{prefix}{dashed}.")
        elif value != before[name]:
            if isinstance(value, bool):
                flags.append(f"--{prefix}{dashed}" if value else f"--{prefix}no-{dashed}")
            else:
                flags += [f"--{prefix}{dashed}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return flags


def provenance(curves: Sequence[Curve], options: CurvesConfig, command: str) -> dict[str, Any]:
    """Where the table comes from, as JSON: commands, date, machine, software here, each run's settings."""
    return {
        "command": command,
        "date": now(),
        "machine": options.machine or machine_line(),
        "note": options.note,
        "software": software(),
        "runs": [
            {
                "run": name,
                "command": training_command(curve.config),
                "differs_from_preset": differences(_base(curve.config), curve.config),
                "env_steps": curve.rows[-1].env_steps,
                "budget_env_steps": curve.config.env_steps,
                "evaluations": len(curve.rows),
                "mean_of_last_three": _mean_of_last_three(curve),
            }
            for name, curve in zip(names(curves), curves, strict=True)
        ],
    }


def _mean_of_last_three(curve: Curve) -> float | None:
    """What a run is judged by; None where a return was not finite."""
    mean = float(np.mean([row.mean_return for row in curve.rows[-3:]]))
    return round(mean, 2) if math.isfinite(mean) else None


def panels(curves: Sequence[Curve]) -> list[Panel]:
    """One panel for each task, with one series for all runs that differ in seed and length only."""
    kinds = {curve: kind(curve.config) for curve in curves}
    out = []
    for task in dict.fromkeys(curve.config.task for curve in curves):
        own = [curve for curve in curves if curve.config.task == task]
        series = []
        for one in dict.fromkeys(kinds[curve] for curve in own):
            alike = {other for other in kinds.values() if other[0] == one[0]}
            label = one[0] if len(alike) == 1 else ", ".join(one)
            series.append(Series(label, [_line(curve) for curve in own if kinds[curve] == one]))
        out.append(Panel(task, _subtitle(own), series))
    return out


def kind(config: Config) -> tuple[str, ...]:
    """The agent, the preset, and what was changed in it."""
    changes = differences(_base(config), dataclasses.replace(_portable(config), env_steps=_base(config).env_steps))
    return (config.agent, f"{config.preset} preset", *changes)


def _line(curve: Curve) -> Line:
    table = np.array([(row.env_steps, row.wall_s / 60, row.mean_return) for row in curve.rows], np.float64)
    return Line(*table.T)


def _subtitle(curves: Sequence[Curve]) -> str:
    """Seeds, rendering and action repeat, each if it is the same for all."""
    seeds = {curve.config.seed for curve in curves}
    said = [f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {min(seeds)}"]
    renders = {row.render for curve in curves for row in curve.rows}
    repeats = {row.action_repeat for curve in curves for row in curve.rows}
    said += [f"{one} rendering" for one in renders if len(renders) == 1]
    said += [f"action repeat {one}" for one in repeats if len(repeats) == 1]
    return " · ".join(said)


def write_csv(path: Path, curves: Sequence[Curve]) -> None:
    """One row for each evaluation, run after run, with the run's name, under which the JSON has its settings."""
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = ["run", *(field.name for field in dataclasses.fields(Row))]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for name, curve in zip(names(curves), curves, strict=True):
            writer.writerows({"run": name} | asdict(row) for row in curve.rows)


def gather(options: CurvesConfig, command: str) -> list[Path]:
    """Read the runs, write what was asked for; the files written.

    Raises:
        CurvesError: no runs, the same one twice, or one without a curve. Nothing is written then.
        PlotError: no known picture format, or no published figures where they were named. Nor then.
        OSError: the files cannot be written.
    """
    if not options.runs:
        raise CurvesError("no run was named; give one or more folders that runners.train wrote")
    if len({path.resolve() for path in options.runs}) < len(options.runs):
        raise CurvesError("a run was named twice; name each once")
    references: list[Reference] = []
    if options.plot is not None:
        check_format(options.plot)
        if options.reference.exists() or options.reference != REFERENCE:
            references = read_references(options.reference)
    curves = sorted((read_run(path) for path in options.runs), key=lambda one: (one.config.task, one.config.seed))
    seen = {curve.config.env.obs for curve in curves}
    references = [one for one in references if one.obs in seen]
    table, about = (options.out.with_name(options.out.name + suffix) for suffix in (".csv", ".json"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(table, curves)
    content = provenance(curves, options, command)
    about.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.plot is None:
        return [table, about]
    footer = " · ".join(part for part in (content["machine"], content["date"][:10], options.note) if part)
    draw(options.plot, panels(curves), references, footer)
    return [table, about, options.plot]


def main(args: Sequence[str] | None = None) -> int:
    """0, or 1 after an error."""
    args = sys.argv[1:] if args is None else args
    options = tyro.cli(CurvesConfig, args=args, prog="python -m benchmarks.curves")
    try:
        written = gather(options, command_line("benchmarks.curves", args))
    except (CurvesError, PlotError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A report's pictures as PNGs for papers: the same figures as on the page, drawn alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plot import DMC_LIMITS, draw_references, legend, plain
from benchmarks.report_data import Content, Look, TaskCurves, count, seeds_said, steps_shown
from benchmarks.statistics import AGGREGATES, Aggregates, Band, Estimate
from benchmarks.survey import short

_DPI = 200
_ROW = 0.32  # inches of a row of an interval plot


def draw_all(folder: Path, content: Content) -> list[Path]:
    """Write every picture; the files. Raises OSError."""
    files = []
    axes: tuple[Literal["env_steps", "wall_time"], ...] = ("env_steps", "wall_time")
    for against in axes:
        files.append(folder / f"curves-{against}.png")
        learning_curves(content, against).savefig(files[-1])
    for one in content.aggregates:
        budget = count(one.block.env_steps)
        for name, figure in (
            ("aggregates", aggregates(content, one)),
            ("profiles", profiles(content, one)),
            ("improvement", improvements(content, one) if one.improvements else None),
        ):
            if figure is not None:
                files.append(folder / f"{name}-{budget}.png")
                figure.savefig(files[-1])
    return files


def learning_curves(content: Content, against: Literal["env_steps", "wall_time"]) -> Figure:
    """A panel for each task, up to four beside each other."""
    tasks = content.curves
    columns = next((width for width in (3, 4) if len(tasks) % width == 0), min(len(tasks), 4))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(max(6.4, 3.1 * columns), 0.8 + 2.6 * rows), dpi=_DPI, layout="constrained")
    same_scale = all(one.task.startswith("dmc/") for one in tasks)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=same_scale)
    algorithms = list(dict.fromkeys(one.algorithm for one in content.published))
    for one, axis in zip(tasks, axes.flat, strict=False):
        for curve in one.curves:
            x = curve.steps if against == "env_steps" else curve.minutes
            _draw_band(axis, x, content.looks[curve.agent], curve.agent)
        if against == "env_steps":
            draw_references(axis, one.published, algorithms)
            axis.set_xlim(0, steps_shown(one))
        else:
            axis.set_xlim(left=0)
        _dress(axis, short(one.task), one)
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("evaluation return", fontsize=9)
    figure.supxlabel("env_steps, thousands" if against == "env_steps" else "wall-clock time, minutes", fontsize=9)
    legend(figure, axes.ravel().tolist())
    return figure


def _dress(axis: Axes, title: str, one: TaskCurves) -> None:
    plain(axis)
    axis.set_title(title, fontsize=10, fontweight="bold", loc="left")
    axis.set_title(seeds_said(one), fontsize=8, color="0.4", loc="right")
    if one.task.startswith("dmc/"):
        axis.set_ylim(*DMC_LIMITS)


def _draw_band(axis: Axes, curve: Band, look: Look, label: str) -> None:
    """The mean over all seeds, its band, and, dotted, the mean over those that went further."""
    whole, beyond = curve.whole, ~curve.whole
    axis.fill_between(
        curve.x[whole],
        curve.low[whole],
        curve.high[whole],
        color=look.colour,
        alpha=0.15,
        linewidth=0,
    )
    axis.plot(
        curve.x[whole],
        curve.mean[whole],
        color=look.colour,
        linestyle="--" if look.state else "-",
        linewidth=1.8,
        marker="o" if whole.sum() == 1 else None,
        label=label,
    )
    if beyond.any():
        start = max(int(np.argmax(beyond)) - 1, 0)
        axis.plot(curve.x[start:], curve.mean[start:], color=look.colour, linestyle=":", linewidth=1.1)


def aggregates(content: Content, one: Aggregates) -> Figure:
    """The four aggregates with their intervals, side by side."""
    agents = list(one.estimates)
    figure = Figure(figsize=(9.3, 1.1 + _ROW * len(agents)), dpi=_DPI, layout="constrained")
    axes = figure.subplots(1, len(AGGREGATES), sharey=True)
    for axis, name in zip(axes, AGGREGATES, strict=True):
        estimates = [one.estimates[agent][name] for agent in agents]
        _draw_intervals(axis, estimates, [content.looks[agent] for agent in agents], agents)
        better = "lower" if name == "optimality gap" else "higher"
        axis.set_title(f"{name} ({better} is better)", fontsize=9, loc="left")
    figure.supxlabel(f"return / 1000 at {count(one.block.env_steps)} env_steps, {_tasks(one)}", fontsize=8.5)
    return figure


def profiles(content: Content, one: Aggregates) -> Figure:
    """The share of runs above each score."""
    figure = Figure(figsize=(5.6, 3.6), dpi=_DPI, layout="constrained")
    axis = figure.subplots()
    for agent, curve in one.profiles.items():
        _draw_band(axis, curve, content.looks[agent], agent)
    plain(axis)
    axis.set(xlim=(0, 1), ylim=(-0.02, 1.02))
    axis.set_xlabel(f"return / 1000 (τ) at {count(one.block.env_steps)} env_steps, {_tasks(one)}", fontsize=9)
    axis.set_ylabel("share of runs above τ", fontsize=9)
    legend(figure, [axis])
    return figure


def improvements(content: Content, one: Aggregates) -> Figure:
    """How probable it is that the first agent's run beats the second's."""
    pairs = one.improvements
    figure = Figure(figsize=(5.6, 1.0 + 0.9 * _ROW * len(pairs)), dpi=_DPI, layout="constrained")
    axis = figure.subplots()
    looks = [content.looks[pair.agent] for pair in pairs]
    _draw_intervals(axis, [pair.probability for pair in pairs], looks, [f"{p.agent} over {p.over}" for p in pairs])
    axis.axvline(0.5, color="0.55", linestyle="--", linewidth=0.9, zorder=0)
    axis.set_xlabel(f"probability of improvement at {count(one.block.env_steps)} env_steps, {_tasks(one)}", fontsize=9)
    return figure


def _draw_intervals(axis: Axes, estimates: Sequence[Estimate], looks: Sequence[Look], rows: Sequence[str]) -> None:
    for y, (estimate, look) in enumerate(zip(estimates, looks, strict=True)):
        axis.plot(
            [estimate.low, estimate.high],
            [y, y],
            color=look.colour,
            linewidth=4,
            alpha=0.45,
            solid_capstyle="butt",
            zorder=1,
        )
        axis.plot(
            estimate.value,
            y,
            "o",
            color=look.colour,
            markerfacecolor="white" if look.state else look.colour,
            markeredgewidth=1.6,
            markersize=6,
            zorder=2,
        )
    plain(axis)
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(-0.03, 1.03)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])


def _tasks(one: Aggregates) -> str:
    tasks = one.block.tasks
    return short(tasks[0]) if len(tasks) == 1 else f"{len(tasks)} tasks"

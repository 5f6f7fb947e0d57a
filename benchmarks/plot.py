"""The picture of learning curves: against env_steps above, against wall-clock time below, one column for each task."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which the colour-blind can tell apart; without its yellow, too pale on white."""

DMC_LIMITS = (-25.0, 1025.0)
"""Of an axis of returns of dm_control tasks, which lie in [0, 1000]."""

PUBLISHED_STYLES = (("o", "--"), ("s", ":"), ("^", "-."), ("D", (0, (5, 1))), ("v", (0, (1, 1))), ("P", (0, (3, 2))))
"""Marker and line of each published algorithm; all of them are grey, so that what was measured here stands out."""

_LETTERS_AN_INCH = 17  # of the caption, which nothing else keeps within the picture
_LETTERS_AN_INCH_OF_LEGEND = 10
_LEGEND_MARGIN = 0.6  # inches, with the line that stands before a label


class PlotError(ValueError):
    """There is nothing to draw from, or nothing to draw as. The message says what."""


@dataclass(frozen=True)
class Line:
    """One run's evaluations: training env_steps, minutes and mean return of each."""

    env_steps: Float[np.ndarray, " N"]
    minutes: Float[np.ndarray, " N"]
    mean_return: Float[np.ndarray, " N"]


@dataclass(frozen=True)
class Series:
    """Runs that differ in their seed only, in one colour. ``label`` says what they are, in every panel the same."""

    label: str
    lines: list[Line]


@dataclass(frozen=True)
class Panel:
    """One task's column."""

    task: str
    subtitle: str
    series: list[Series]


@dataclass(frozen=True)
class Reference:
    """A published figure."""

    task: str
    """Of dm_control, as domain-task."""
    obs: str
    """What the algorithm saw: pixels or state."""
    algorithm: str
    env_steps: int
    mean_return: float
    source: str

    @property
    def label(self) -> str:
        """What a legend says."""
        return f"{self.algorithm}{' from state' if self.obs == 'state' else ''}, published"


def read_references(path: Path) -> list[Reference]:
    """Published figures from a CSV with the columns task, algorithm, env_steps, mean_return and source, and maybe obs:
    pixels, unless it says state.

    Raises:
        PlotError: it cannot be read, has not these columns, or has something else than numbers in them.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                Reference(
                    row["task"],
                    row.get("obs", "pixels"),
                    row["algorithm"],
                    int(row["env_steps"]),
                    float(row["mean_return"]),
                    row["source"],
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise PlotError(f"{path} is no table of published figures: {error!r}") from error


def mean_curve(
    xs: Sequence[Float[np.ndarray, " N"]], ys: Sequence[Float[np.ndarray, " N"]]
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """The mean of several curves where all of them have values, each one interpolated linearly to every x of any."""
    start, end = max(x[0] for x in xs), min(x[-1] for x in xs)
    grid = np.unique(np.concatenate(xs))
    grid = grid[(grid >= start) & (grid <= end)]
    return grid, np.mean([np.interp(grid, x, y) for x, y in zip(xs, ys, strict=True)], axis=0)


def check_format(path: Path) -> None:
    """Raises PlotError if the suffix is of no format that can be written."""
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise PlotError(f"{path} is no picture that can be drawn; give one of .{', .'.join(sorted(known))}")


def draw(path: Path, panels: Sequence[Panel], references: Sequence[Reference], footer: str) -> None:
    """Write the picture; the suffix decides the format. ``references`` appear in the upper row of their tasks.

    Raises:
        PlotError: see ``check_format``.
    """
    check_format(path)
    labels = list(dict.fromkeys(one.label for panel in panels for one in panel.series))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    algorithms = list(dict.fromkeys(one.algorithm for one in references))
    same_scale = all(panel.task.startswith("dmc/") for panel in panels)
    figure = Figure(figsize=(max(6.4, 3.3 * len(panels)), 6.4), dpi=150, layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharey="all" if same_scale else "col")
    for panel, upper, lower in zip(panels, axes[0], axes[1], strict=True):
        _title(upper, panel)
        own = [one for one in references if one.task == panel.task.partition("/")[2]]
        draw_references(upper, own, algorithms)
        for series in panel.series:
            lines = series.lines
            _draw_series(upper, [line.env_steps / 1000 for line in lines], lines, colours[series.label], series.label)
            _draw_series(lower, [line.minutes for line in lines], lines, colours[series.label], series.label)
        upper.set_xlabel("env_steps, thousands")
        lower.set_xlabel("wall-clock time, minutes")
        upper.set_xlim(0, _end_of_steps(panel, references))
        lower.set_xlim(0, 1.03 * max(line.minutes[-1] for one in panel.series for line in one.lines) or 1)
        if same_scale:
            upper.set_ylim(*DMC_LIMITS)
    for axis in axes.flat:
        plain(axis)
    for axis in axes[:, 0]:
        axis.set_ylabel("evaluation return")
    legend(figure, axes.ravel().tolist())
    caption = textwrap.wrap(footer, int(figure.get_figwidth() * _LETTERS_AN_INCH))
    if any(len(one.lines) > 1 for panel in panels for one in panel.series):
        caption.insert(0, "thick: mean of the seeds, thin: each seed")
    figure.supxlabel("\n".join(caption), fontsize=7.5, color="0.45", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_series(axis: Axes, xs: list[np.ndarray], lines: list[Line], colour: str, label: str) -> None:
    ys = [line.mean_return for line in lines]
    if len(lines) > 1:
        for x, y in zip(xs, ys, strict=True):
            axis.plot(x, y, color=colour, linewidth=0.9, alpha=0.45, marker="." if len(x) == 1 else None)
    x, y = mean_curve(xs, ys)
    axis.plot(
        x, y, color=colour, linewidth=2.4, label=label, solid_capstyle="round", marker="o" if len(x) == 1 else None
    )


def draw_references(axis: Axes, references: Sequence[Reference], algorithms: Sequence[str]) -> None:
    """Published figures of one task, against thousands of env_steps. ``algorithms`` are those of all tasks, so that
    each looks the same everywhere; hollow markers are of those that saw the state."""
    for label in dict.fromkeys(one.label for one in references):
        own = sorted((one for one in references if one.label == label), key=lambda one: one.env_steps)
        i = algorithms.index(own[0].algorithm) % len(PUBLISHED_STYLES)
        marker, style = PUBLISHED_STYLES[i]
        axis.plot(
            [one.env_steps / 1000 for one in own],
            [one.mean_return for one in own],
            color=str(published_grey(i)),
            linestyle=style,
            linewidth=1.1,
            marker=marker,
            markersize=4.5,
            markerfacecolor="white" if own[0].obs == "state" else None,
            label=label,
        )


def published_grey(index: int) -> float:
    """How light the line of a published algorithm is, by its place: from 0, black, to 1."""
    return 0.35 + 0.07 * (index % len(PUBLISHED_STYLES))


def _end_of_steps(panel: Panel, references: Sequence[Reference]) -> float:
    """Thousands of env_steps on the upper axis: the runs', and at least the first published figure."""
    longest = max(line.env_steps[-1] for one in panel.series for line in one.lines)
    published = [one.env_steps for one in references if one.task == panel.task.partition("/")[2]]
    return 1.03 * max(longest, min(published, default=0)) / 1000


def _title(axis: Axes, panel: Panel) -> None:
    # Annotations and not the axes' title, which stands higher where a name has no letter below the line.
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "baseline"}
    axis.annotate(panel.task.removeprefix("dmc/"), (0, 1), (0, 20), fontsize=11, fontweight="bold", **place)
    axis.annotate(panel.subtitle, (0, 1), (0, 7), fontsize=8, color="0.4", **place)


def plain(axis: Axes) -> None:
    """Few lines, quiet ones, and round numbers."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("0.6")
    axis.grid(color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.tick_params(colors="0.3", labelsize=8)


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Every label once, above all panels, in as many columns as fit; one too long for any is broken into lines."""
    entries: dict[str, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)

    def rank(label: str) -> tuple[bool, bool]:
        """Measured ones first, then what was published from pixels, then from state."""
        return label.endswith("published"), "from state" in label

    ordered = {label: entries[label] for label in sorted(entries, key=rank)}
    width = int((figure.get_figwidth() - _LEGEND_MARGIN) * _LETTERS_AN_INCH_OF_LEGEND)
    for columns in range(min(len(ordered), int(figure.get_figwidth() / 2)), 0, -1):
        drawn = figure.legend(
            list(ordered.values()),
            list(ordered) if columns > 1 else [textwrap.fill(label, width) for label in ordered],
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            fontsize=8.5,
        )
        if drawn.get_window_extent().width <= figure.bbox.width or columns == 1:
            return
        drawn.remove()

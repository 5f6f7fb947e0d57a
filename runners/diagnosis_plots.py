"""The pictures of a diagnosis, one function each: numbers in, a matplotlib figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from runners.action_effects import STEPS, ActionEffects
from runners.latents import OpenLoop
from runners.probes import ProbeScores
from runners.surprise import AFTER, BEFORE, EDITED_ROWS, Edited, Surprise

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, which the colour-blind can tell apart."""
_GREY, _WIDTH = "#8a929c", 9.6
_LEAST_R2 = -0.25
"""Worse probes are drawn as this one."""


def png(figure: Figure) -> bytes:
    """The figure as a file's content."""
    out = BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def picture(image: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """The same for an image."""
    out = BytesIO()
    Image.fromarray(image).save(out, format="PNG")
    return out.getvalue()


def _figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _logarithmic(axis: Axes) -> None:
    """With plain numbers on the axis."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def probe_bars(names: Sequence[str], scores: Mapping[str, ProbeScores]) -> Figure:
    """R² of each quantity from each kind of features: linear probes left, MLPs right."""
    figure = _figure(1.3 + 0.16 * (len(scores) + 1) * len(names))
    axes = figure.subplots(1, 2, sharey=True)
    colours = dict(zip(scores, (COLOURS[0], COLOURS[5], "#c2c7cd", "#8a929c", COLOURS[4]), strict=False))
    height = 0.84 / len(scores)
    for axis, kind in zip(axes, ("linear", "mlp"), strict=True):
        for i, (source, found) in enumerate(scores.items()):
            values = np.nan_to_num(np.array(getattr(found, kind)), nan=0.0)
            places = np.arange(len(names)) + (i - (len(scores) - 1) / 2) * height
            axis.barh(places, np.clip(values, _LEAST_R2, 1), height, label=source, color=colours[source])
        axis.axvline(0, color="0.3", linewidth=0.8)
        axis.set_xlim(_LEAST_R2, 1.02)
        axis.set_title({"linear": "linear probe", "mlp": "MLP probe"}[kind], fontsize=10)
        axis.set_xlabel("R² on held-out episodes", fontsize=9)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        _plain(axis)
    axes[0].set_yticks(np.arange(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def effects_scatter(effects: ActionEffects, labels: Sequence[str]) -> Figure:
    """Predicted against real effects over all steps (left); correlation and slope against the number of steps."""
    figure = _figure(4.2)
    left, right = figure.subplots(1, 2)
    for i, label in enumerate(labels):
        real, predicted = effects.real[:, i, -1], effects.predicted[:, i, -1]
        left.scatter(real, predicted, s=14, alpha=0.7, color=COLOURS[i % len(COLOURS)], label=label)
    reach = float(np.abs(effects.real[..., -1]).max()) or 1.0
    left.plot([-reach, reach], [-reach, reach], color=_GREY, linewidth=1, linestyle="--", label="exact")
    left.set_xlabel(f"real effect on the reward of {STEPS} steps", fontsize=9)
    left.set_ylabel("imagined effect", fontsize=9)
    left.legend(fontsize=8, frameon=False)
    steps = np.arange(1, STEPS + 1)
    found = [effects.agreement(int(step)) for step in steps]
    for name, colour in (("correlation", COLOURS[0]), ("slope", COLOURS[1])):
        values = [np.nan if (value := getattr(one, name)) is None else value for one in found]
        right.plot(steps, values, marker="o", color=colour, label=name)
    right.set_ylim(max(-1.0, right.get_ylim()[0]), min(2.0, max(1.1, right.get_ylim()[1])))
    right.axhline(1, color=_GREY, linewidth=1, linestyle="--")
    right.axhline(0, color="0.3", linewidth=0.8)
    right.set_xlabel("steps that the reward is summed over", fontsize=9)
    right.set_xticks(steps)
    right.legend(fontsize=8, frameon=False)
    _plain(left)
    _plain(right)
    return figure


def auroc_bars(found: Surprise) -> Figure:
    """AUROC of each edit."""
    figure = _figure(1.0 + 0.36 * len(found.edits))
    axis = figure.subplots()
    places = np.arange(len(found.edits))
    bars = axis.barh(places, [one.auroc for one in found.edits], 0.6, color=COLOURS[0])
    axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=3)
    axis.axvline(0.5, color=COLOURS[1], linewidth=1.2, linestyle="--")
    axis.set_yticks(places, [one.name for one in found.edits])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.06)
    axis.set_xlabel("AUROC of edited against plausible rows (dashed: chance)", fontsize=9)
    _plain(axis)
    return figure


def surprise_strip(
    found: Surprise,
    edited: Edited,
    example: int,
    recorded: UInt8[np.ndarray, "S 3 H W"] | None,
    shown: UInt8[np.ndarray, "S 3 H W"] | None,
) -> Figure:
    """The frames of one clip as they were and as they were edited, and under them the surprise, frame by frame."""
    offsets = np.arange(1 - BEFORE, AFTER + 1)
    strips = [] if recorded is None or shown is None else [("recorded", recorded), ("edited", shown)]
    side = (_WIDTH - 1) / len(offsets)
    figure = _figure(2.6 + side * len(strips))
    ratios = [side] * len(strips) + [2.3]
    axes = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    for axis, (label, frames) in zip(axes, strips, strict=False):
        seam = max(1, frames.shape[-1] // 24)
        padded = np.pad(frames, [(0, 0)] * 3 + [(seam, seam)], constant_values=255)
        strip = np.concatenate(list(padded.transpose(0, 2, 3, 1)), 1)
        axis.imshow(strip, extent=(offsets[0] - 0.5, offsets[-1] + 0.5, 0, 1), aspect="auto")
        axis.set_yticks([])
        axis.set_ylabel(label, fontsize=9)
        axis.spines[:].set_visible(False)
        axis.tick_params(bottom=False)
    axis = axes[-1]
    scores = np.where(edited.clips.alive, edited.scores, np.nan)
    curves = np.concatenate([found.around[:, :BEFORE], scores], 1)
    for values, colour, label in ((found.around, _GREY, "not edited"), (curves, COLOURS[1], "edited")):
        low, middle, high = np.nanquantile(values, [0.25, 0.5, 0.75], axis=0)
        axis.fill_between(offsets, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.plot(offsets, middle, color=colour, linewidth=2, label=f"{label}, median and quartiles")
    axis.plot(offsets, curves[example], color="0.15", linewidth=1, marker=".", label="the clip above")
    axis.axvspan(0.5, EDITED_ROWS[edited.name] + 0.5, color=COLOURS[4], alpha=0.18, linewidth=0, label="edited rows")
    _logarithmic(axis)
    axis.set_xlim(offsets[0] - 0.5, offsets[-1] + 0.5)
    axis.set_xticks(offsets)
    axis.set_xlabel("agent steps since the last row before the edit", fontsize=9)
    axis.set_ylabel("surprise", fontsize=9)
    axis.legend(fontsize=7.5, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _plain(axis)
    return figure


def open_loop_curves(found: OpenLoop) -> Figure:
    """Error against the number of steps that were only imagined."""
    figure = _figure(3.8)
    axis = figure.subplots()
    steps = np.arange(1, len(found.model) + 1)
    axis.plot(steps, found.model, marker="o", color=COLOURS[0], linewidth=2.2, label="world model")
    axis.plot(steps, found.linear, marker="s", markersize=4, color=COLOURS[2], label="linear baseline")
    axis.plot(steps, found.copy_last, marker="^", markersize=4, color=COLOURS[1], label="copy the last latent")
    axis.axhline(1, color=_GREY, linestyle="--", linewidth=1, label="always the mean latent")
    _logarithmic(axis)
    axis.set_xlabel("agent steps imagined", fontsize=9)
    axis.set_ylabel("squared error / latent variance", fontsize=9)
    axis.grid(color="0.92")
    axis.legend(fontsize=8, frameon=False)
    _plain(axis)
    return figure


def latent_map(points: Float[np.ndarray, "R 2"], colours: Mapping[str, Float[np.ndarray, " R"]]) -> Figure:
    """The latents on their two principal axes, once for each quantity that colours them."""
    columns = min(3, len(colours))
    lines = -(-len(colours) // columns)
    figure = _figure(0.4 + 3.0 * lines * (1 if columns == 3 else 1.2))
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (name, values) in zip(axes, colours.items(), strict=False):
        scatter = axis.scatter(*points.T, c=values, s=3, cmap="cividis", linewidths=0, rasterized=True)
        axis.set_title(name, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        figure.colorbar(scatter, ax=axis, shrink=0.8).ax.tick_params(labelsize=7)
    for axis in axes[len(colours) :]:
        axis.set_visible(False)
    return figure

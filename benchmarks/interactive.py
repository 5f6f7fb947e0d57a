"""A report's pictures as interactive HTML, by plotly. Every agent looks the same in each and stands in the same place.

Each function gives one ``<div>`` with its script; the page carries plotly.js once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from benchmarks.plot import DMC_LIMITS, Reference, published_grey
from benchmarks.report_data import Content, Look, TaskCurves, interval, steps_shown
from benchmarks.statistics import AGGREGATES, Aggregates, Band

_DASHES = ("dash", "dot", "dashdot", "longdash", "2px,2px", "6px,3px")
_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
_FONT = {"family": "system-ui, sans-serif", "size": 13, "color": "#1d232b"}
_GRID = "#e9ecef"


def learning_curves(content: Content, one: TaskCurves, name: str) -> str:
    """One task against env_steps, with what was published, and against wall-clock time."""
    figure = make_subplots(1, 2, horizontal_spacing=0.07, shared_yaxes=one.task.startswith("dmc/"))
    for curve in one.curves:
        look = content.looks[curve.agent]
        _add_band(figure, curve.steps, look, curve.agent, curve.seeds, "k env_steps", 1)
        _add_band(figure, curve.minutes, look, curve.agent, curve.seeds, "min", 2)
    algorithms = list(dict.fromkeys(known.algorithm for known in content.published))
    for label in dict.fromkeys(known.label for known in one.published):
        _add_published(figure, [known for known in one.published if known.label == label], algorithms)
    figure.update_xaxes(title="env_steps, thousands", range=[0, steps_shown(one)], row=1, col=1)
    figure.update_xaxes(title="wall-clock time, minutes", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(title="evaluation return", row=1, col=1)
    if one.task.startswith("dmc/"):
        figure.update_yaxes(range=DMC_LIMITS)
    return _div(figure, name, 400)


def _add_band(figure: go.Figure, curve: Band, look: Look, agent: str, seeds: int, unit: str, column: int) -> None:
    """The mean over all seeds, its band, and, dotted, the mean over those that went further."""
    place: dict[str, Any] = {"row": 1, "col": column}
    group: dict[str, Any] = {"legendgroup": agent, "name": agent}
    whole, beyond = curve.whole, ~curve.whole
    if np.isfinite(curve.low[whole]).any():
        x = curve.x[whole]
        figure.add_trace(
            go.Scatter(
                x=np.concatenate([x, x[::-1]]),
                y=np.concatenate([curve.high[whole], curve.low[whole][::-1]]),
                mode="lines",
                fill="toself",
                fillcolor=_faint(look.colour),
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                **group,
            ),
            **place,
        )
    # A legend entry without a line would lose its dash, so the first column's mean speaks for the whole group.
    bounds = np.stack([curve.low, curve.high], -1)
    figure.add_trace(
        go.Scatter(
            x=curve.x[whole],
            y=curve.mean[whole],
            mode="lines+markers" if whole.sum() == 1 else "lines",
            line={"color": look.colour, "width": 2.4, "dash": "dash" if look.state else "solid"},
            marker={"symbol": "circle-open" if look.state else "circle", "size": 8},
            customdata=bounds[whole],
            hovertemplate=(
                f"{agent}, {_seeds(seeds)}: %{{y:.0f}} [%{{customdata[0]:.0f}}, %{{customdata[1]:.0f}}] "
                f"at %{{x:.1f}} {unit}<extra></extra>"
            ),
            showlegend=column == 1,
            **group,
        ),
        **place,
    )
    if beyond.any():
        start = max(int(np.argmax(beyond)) - 1, 0)  # from the last point of all seeds on
        figure.add_trace(
            go.Scatter(
                x=curve.x[start:],
                y=curve.mean[start:],
                mode="lines",
                line={"color": look.colour, "width": 1.4, "dash": "dot"},
                hovertemplate=f"{agent}, fewer seeds: %{{y:.0f}} at %{{x:.1f}} {unit}<extra></extra>",
                showlegend=False,
                **group,
            ),
            **place,
        )


def _add_published(figure: go.Figure, own: Sequence[Reference], algorithms: Sequence[str]) -> None:
    own = sorted(own, key=lambda one: one.env_steps)
    i = algorithms.index(own[0].algorithm) % len(_MARKERS)
    grey = f"rgb({','.join([str(round(255 * published_grey(i)))] * 3)})"
    figure.add_trace(
        go.Scatter(
            x=[one.env_steps / 1000 for one in own],
            y=[one.mean_return for one in own],
            mode="lines+markers",
            line={"color": grey, "width": 1.2, "dash": _DASHES[i]},
            marker={"symbol": _MARKERS[i] + ("-open" if own[0].obs == "state" else ""), "size": 7, "color": grey},
            name=own[0].label,
            hovertemplate=f"{own[0].label}: %{{y:.0f}} at %{{x:.0f}} k env_steps<extra></extra>",
        ),
        row=1,
        col=1,
    )


def aggregates(content: Content, one: Aggregates, name: str) -> str:
    """The four aggregates with their intervals, side by side."""
    agents = list(one.estimates)[::-1]  # plotly counts rows from below
    figure = make_subplots(1, len(AGGREGATES), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[*TITLES])
    for column, figure_name in enumerate(AGGREGATES, 1):
        for agent in agents:
            estimate, look = one.estimates[agent][figure_name], content.looks[agent]
            figure.add_trace(
                _interval_mark(estimate, agent, look.colour, look.state, f"{agent}: {interval(estimate, 3)}"),
                row=1,
                col=column,
            )
    figure.update_xaxes(range=[-0.03, 1.03], dtick=0.25)
    figure.update_yaxes(categoryorder="array", categoryarray=agents)
    return _div(figure, name, 110 + 34 * len(agents), tools=False)


TITLES = ("IQM, higher is better", "median, higher", "mean, higher", "optimality gap, lower")
"""Of the panels of aggregates."""


def profiles(content: Content, one: Aggregates, name: str) -> str:
    """The share of runs above each score."""
    figure = make_subplots(1, 1)
    for agent, curve in one.profiles.items():
        seeds = len(one.block.seeds[agent])
        _add_band(figure, curve, content.looks[agent], agent, seeds, "normalised score", 1)
    figure.update_xaxes(title="normalised score τ", range=[0, 1])
    figure.update_yaxes(title="share of runs with a score above τ", range=[-0.02, 1.02])
    for trace in figure.data:
        if trace.hovertemplate:
            trace.hovertemplate = f"{trace.name}: %{{y:.0%}} of runs above %{{x:.2f}}<extra></extra>"
    return _div(figure, name, 380)


def improvements(content: Content, one: Aggregates, name: str) -> str:
    """How probable it is that the first agent's run beats the second's."""
    pairs = one.improvements[::-1]
    figure = make_subplots(1, 1)
    labels = [f"{pair.agent} over {pair.over}" for pair in pairs]
    for label, pair in zip(labels, pairs, strict=True):
        look = content.looks[pair.agent]
        text = f"P({pair.agent} > {pair.over}) = {interval(pair.probability, 2)}"
        figure.add_trace(_interval_mark(pair.probability, label, look.colour, look.state, text))
    figure.add_vline(x=0.5, line={"color": "#8a949e", "dash": "dash", "width": 1})
    figure.update_xaxes(title="probability of improvement", range=[-0.03, 1.03], dtick=0.25)
    figure.update_yaxes(categoryorder="array", categoryarray=labels)
    return _div(figure, name, 110 + 26 * len(pairs), tools=False)


def _interval_mark(estimate: Sequence[float], row: str, colour: str, hollow: bool, text: str) -> go.Scatter:
    value, low, high = estimate
    known = bool(np.isfinite(low))
    return go.Scatter(
        x=[value],
        y=[row],
        mode="markers",
        marker={
            "color": "white" if hollow else colour,
            "size": 10,
            "line": {"width": 2.4, "color": colour},
        },
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - value if known else 0],
            "arrayminus": [value - low if known else 0],
            "color": colour,
            "thickness": 4,
            "width": 0,
        },
        hovertemplate=text + "<extra></extra>",
        showlegend=False,
    )


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _div(figure: go.Figure, name: str, height: float, tools: bool = True) -> str:
    """``tools`` to zoom and to save show while the pointer is there."""
    figure.update_layout(
        template="none",
        height=height,
        font=_FONT,
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 60, "r": 20, "t": 34, "b": 52},
        hoverlabel={"namelength": -1},
        legend={"tracegroupgap": 0, "font": {"size": 12}, "y": 1, "yanchor": "top"},
    )
    figure.update_annotations(font_size=13)
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(title_font_size=13, tickfont_size=12)
    figure.update_xaxes(gridcolor=_GRID, zeroline=False, linecolor="#9aa3ab", ticks="outside", tickcolor="#9aa3ab")
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, linecolor="#9aa3ab", automargin=True)
    html: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={
            "responsive": True,
            "displaylogo": False,
            "displayModeBar": "hover" if tools else False,
            "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d"],
        },
    )
    return html

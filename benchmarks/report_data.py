"""What a report shows, before it is drawn: curves, tables and aggregates; and the tables as CSV, Markdown and JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.plot import COLOURS, Reference
from benchmarks.statistics import (
    Aggregates,
    Band,
    Estimate,
    aggregate,
    band,
    budgets,
    complete_block,
    mean_interval,
    mean_where_alive,
    scores_at,
)
from benchmarks.survey import Survey, short


class Look(NamedTuple):
    """How an agent is drawn, the same everywhere: a colour for the algorithm, and broken and hollow for state."""

    colour: str
    state: bool


class AgentCurve(NamedTuple):
    """One agent on one task."""

    agent: str
    seeds: int
    steps: Band
    """Against thousands of env_steps."""
    minutes: Band
    """The same against wall-clock time: each point lies where its seeds were on average, in minutes."""


class TaskCurves(NamedTuple):
    """One task's learning curves, in the agents' order, and the published figures to draw beside them."""

    task: str
    curves: list[AgentCurve]
    published: list[Reference]


class Score(NamedTuple):
    """One agent's score on one task at one budget."""

    task: str
    agent: str
    env_steps: int
    seeds: dict[int, float]
    mean: Estimate


@dataclass(frozen=True)
class Content:
    """Everything that stands in a report."""

    found: Survey
    looks: dict[str, Look]
    curves: list[TaskCurves]
    scores: list[Score]
    aggregates: list[Aggregates]
    """One for each budget at which anything can be aggregated."""
    notes: list[str]
    """What could not be computed, and why."""
    published: list[Reference]
    """Of the report's tasks, for agents that see the same."""

    @property
    def budgets(self) -> list[int]:
        """Those that some run has reached."""
        return sorted({one.env_steps for one in self.scores})


def gather(found: Survey, references: Sequence[Reference], reps: int) -> Content:
    """Compute what the report shows. ``reps`` is how often each bootstrap draws."""
    published = sorted((one for one in references if _fits(one, found)), key=lambda one: one.obs)  # pixels first
    scores = [
        Score(task, agent, budget, cell[task, agent], mean_interval(list(cell[task, agent].values()), reps))
        for budget in budgets(found)
        for cell in [scores_at(found, budget)]
        for task in found.tasks
        for agent in found.agents
        if (task, agent) in cell
    ]
    notes, aggregates = [], []
    for budget in budgets(found):
        block = complete_block(found, budget)
        if not any(one.env_steps == budget for one in scores):
            notes.append(f"No run has a score at {budget:,} env_steps yet.")
        elif not block.scores:
            why = "; ".join(block.left_out)
            notes.append(f"No aggregate over tasks at {budget:,} env_steps ({why}).")
        else:
            aggregates.append(aggregate(block, reps))
    curves = [_curves(found, task, published, reps) for task in found.tasks]
    return Content(
        found, _looks(found.agents), [one for one in curves if one.curves], scores, aggregates, notes, published
    )


def _fits(one: Reference, found: Survey) -> bool:
    """Whether a published figure is of a task here, seen the same way; of an algorithm that also is an agent here, only
    if that agent is in the report."""
    agents = [agent for agent in found.agents if agent.split(",")[0].endswith(":state") == (one.obs == "state")]
    baseline = one.algorithm in ("SAC", "PPO")
    return (
        f"dmc/{one.task}" in found.tasks
        and bool(agents)
        and (not baseline or any(agent.split(":")[0].split(",")[0] == one.algorithm.lower() for agent in agents))
    )


def _looks(agents: Sequence[str]) -> dict[str, Look]:
    algorithms = list(dict.fromkeys(agent.replace(":state", "") for agent in agents))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(algorithms)}
    return {agent: Look(colours[agent.replace(":state", "")], ":state" in agent) for agent in agents}


def _curves(found: Survey, task: str, published: Sequence[Reference], reps: int) -> TaskCurves:
    curves = []
    for agent in found.agents:
        runs = found.of(task, agent)
        if not runs:
            continue
        returns = [np.array([row.mean_return for row in run.rows], np.float64) for run in runs]
        thousands = [np.array([row.env_steps / 1000 for row in run.rows], np.float64) for run in runs]
        minutes = [np.array([row.wall_s / 60 for row in run.rows], np.float64) for run in runs]
        steps = band(thousands, returns, reps)
        curves.append(AgentCurve(agent, len(runs), steps, steps._replace(x=mean_where_alive(thousands, minutes))))
    return TaskCurves(task, curves, [one for one in published if f"dmc/{one.task}" == task])


def seeds_said(one: TaskCurves) -> str:
    """How many seeds the agents of a panel have."""
    counts = sorted({min(curve.seeds for curve in one.curves), max(curve.seeds for curve in one.curves)})
    return f"{' to '.join(map(str, counts))} {'seed' if counts == [1] else 'seeds'}"


def steps_shown(one: TaskCurves) -> float:
    """Thousands of env_steps on the axis: the runs', and at least the first published figure."""
    longest = max(float(curve.steps.x[-1]) for curve in one.curves)
    return 1.04 * max(longest, min((known.env_steps / 1000 for known in one.published), default=0.0))


# -- tables ------------------------------------------------------------------------------------------------------------


def count(env_steps: int) -> str:
    """A budget in few letters: 50k, 1M."""
    for unit, size in (("M", 1_000_000), ("k", 1000)):
        if env_steps >= size and env_steps % (size // 10) == 0:
            return f"{env_steps / size:g}{unit}"
    return f"{env_steps:,}"


def interval(estimate: Estimate, digits: int) -> str:
    """A value and, if it has one, its interval."""
    if math.isnan(estimate.low):
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def score_rows(content: Content, env_steps: int) -> Iterator[list[str]]:
    """A table's rows: a header, then each task with every agent's mean, interval and number of seeds."""
    yield ["task", *content.found.agents]
    for task in content.found.tasks:
        own = {one.agent: one for one in content.scores if (one.task, one.env_steps) == (task, env_steps)}
        cells = [
            f"{interval(own[agent].mean, 0)} ({len(own[agent].seeds)})" if agent in own else "–"
            for agent in content.found.agents
        ]
        yield [short(task), *cells]


def published_rows(content: Content, env_steps: int) -> Iterator[list[str]]:
    """A table's rows: a header, then what was published for each task and this budget; none where nothing was."""
    there = [one for one in content.published if one.env_steps == env_steps]
    labels = [
        name for name in dict.fromkeys(one.label for one in content.published) if name in {t.label for t in there}
    ]
    if labels:
        yield ["task", *labels]
    for task in content.found.tasks if labels else []:
        known = {one.label: f"{one.mean_return:.0f}" for one in there if f"dmc/{one.task}" == task}
        yield [short(task), *(known.get(name, "–") for name in labels)]


def aggregate_rows(one: Aggregates) -> Iterator[list[str]]:
    """A table's rows: a header, then every agent's aggregates."""
    names = list(next(iter(one.estimates.values())))
    yield ["agent", "seeds", *names]
    for agent, figures in one.estimates.items():
        cells = [interval(figures[name], 3) for name in names]
        yield [agent, ", ".join(map(str, one.block.seeds[agent])), *cells]


def markdown(rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    header, *body = rows
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def write_scores(path: Path, content: Content) -> None:
    """A row for each task, agent and budget, with every seed's score; published figures below, with their source."""
    header = ("task", "agent", "env_steps", "seeds", "mean_return", "low_95", "high_95", "seed_scores", "source")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for one in content.scores:
            each = " ".join(f"{seed}:{score:.2f}" for seed, score in one.seeds.items())
            figures = [_plain(value) for value in one.mean]
            writer.writerow([one.task, one.agent, one.env_steps, len(one.seeds), *figures, each, "this report"])
        for known in content.published:
            if known.env_steps in content.budgets:
                mean = f"{known.mean_return:.2f}"
                row = [f"dmc/{known.task}", known.label, known.env_steps, "", mean, "", "", "", known.source]
                writer.writerow(row)


def write_aggregates(path: Path, content: Content) -> None:
    """A row for each budget, agent and aggregate, and for each pair's probability of improvement."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("env_steps", "agent", "figure", "value", "low_95", "high_95", "seeds", "tasks"))
        for one in content.aggregates:
            steps, tasks = one.block.env_steps, len(one.block.tasks)
            for agent, figures in one.estimates.items():
                for name, value in figures.items():
                    numbers = [_plain(part, 4) for part in value]
                    writer.writerow([steps, agent, name, *numbers, len(one.block.seeds[agent]), tasks])
            for pair in one.improvements:
                numbers = [_plain(part, 4) for part in pair.probability]
                writer.writerow([steps, pair.agent, f"P(better than {pair.over})", *numbers, "", tasks])


def _plain(value: float, digits: int = 2) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def as_json(content: Content, about: dict[str, Any]) -> str:
    """Aggregates, profiles and what they rest on, strictly JSON."""
    blocks = [
        {
            "env_steps": one.block.env_steps,
            "tasks": one.block.tasks,
            "seeds": one.block.seeds,
            "left_out": one.block.left_out,
            "aggregates": {
                agent: {name: _known(value) for name, value in figures.items()}
                for agent, figures in one.estimates.items()
            },
            "probability_of_improvement": [
                {"agent": pair.agent, "over": pair.over, **_known(pair.probability)} for pair in one.improvements
            ],
            "profiles": {
                agent: {"threshold": curve.x.round(2).tolist(), "share_above": curve.mean.round(4).tolist()}
                for agent, curve in one.profiles.items()
            },
        }
        for one in content.aggregates
    ]
    tree = {**about, "notes": [*content.found.notes, *content.notes], "budgets": blocks}
    return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _known(value: Estimate) -> dict[str, float | None]:
    return {name: None if math.isnan(part) else round(part, 4) for name, part in value._asdict().items()}

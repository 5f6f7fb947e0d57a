"""From evaluations to figures: scores at a budget, bands over seeds, and aggregates over tasks by rliable.

Aggregates are those of Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from rliable import library, metrics

from benchmarks.curves import Curve
from benchmarks.survey import Survey, short

BUDGETS = (50_000, 100_000, 500_000, 1_000_000)
"""Env_steps at which published results are usually compared."""

WINDOW, SLACK, REACH = 0.9, 1.01, 0.2
HOW_SCORES_ARE_READ = (
    "A run's score at a budget is the mean return of its evaluations in the last 10 % up to it (1 % beyond counts, "
    "since parallel environments overshoot). Where evaluations are further apart, it is interpolated between the one "
    "before and the one after, each within 20 % of the budget. A run that ended earlier has no score there."
)

MAX_RETURN = 1000
"""Of a dm_control task: 1000 simulator steps with rewards in [0, 1]."""

AGGREGATES: dict[str, Callable[[np.ndarray], Any]] = {
    "IQM": metrics.aggregate_iqm,
    "median": metrics.aggregate_median,
    "mean": metrics.aggregate_mean,
    "optimality gap": metrics.aggregate_optimality_gap,
}
THRESHOLDS: Float[np.ndarray, " S"] = np.linspace(0, 1, 101)
"""Normalised scores at which a performance profile is evaluated."""

_SEED = 20210831  # of every bootstrap, so that the same runs always give the same report


class Estimate(NamedTuple):
    """A figure and its 95 % interval; NaN bounds where a single seed gives none."""

    value: float
    low: float
    high: float


class Band(NamedTuple):
    """A mean over seeds along an axis, and its 95 % interval as far as all seeds go."""

    x: Float[np.ndarray, " M"]
    mean: Float[np.ndarray, " M"]
    low: Float[np.ndarray, " M"]
    high: Float[np.ndarray, " M"]
    whole: Bool[np.ndarray, " M"]
    """Where every seed has values; beyond, the mean is over those that went further."""


class Block(NamedTuple):
    """The runs that can be aggregated at one budget: each agent's own seeds, complete on the same tasks."""

    env_steps: int
    tasks: list[str]
    seeds: dict[str, list[int]]
    """The seeds of each agent, which need not be equally many."""
    scores: dict[str, Float[np.ndarray, "seeds tasks"]]
    """Normalised to [0, 1]."""
    left_out: list[str]
    """What is not in it, in plain sentences."""


class Improvement(NamedTuple):
    """How probable it is that a run of ``agent`` scores higher than one of ``over`` on the same task."""

    agent: str
    over: str
    probability: Estimate


class Aggregates(NamedTuple):
    """One block's figures; agents in its order."""

    block: Block
    estimates: dict[str, dict[str, Estimate]]
    """By agent and name, as in AGGREGATES."""
    profiles: dict[str, Band]
    """Share of runs with a score above each threshold."""
    improvements: list[Improvement]


# -- one task ----------------------------------------------------------------------------------------------------------


def score_at(curve: Curve, env_steps: int) -> float | None:
    """A run's score at a budget, as HOW_SCORES_ARE_READ says. None: it has none there, or one that is not finite."""
    x = np.array([row.env_steps for row in curve.rows], np.float64)
    y = np.array([row.mean_return for row in curve.rows], np.float64)
    inside = (x >= WINDOW * env_steps) & (x <= SLACK * env_steps)
    around = (x >= (1 - REACH) * env_steps) & (x <= (1 + REACH) * env_steps)
    if inside.any():
        score = float(y[inside].mean())
    elif (around & (x < env_steps)).any() and (around & (x > env_steps)).any():
        score = float(np.interp(env_steps, x, y))
    else:
        return None
    return score if math.isfinite(score) else None


def scores_at(found: Survey, env_steps: int) -> dict[tuple[str, str], dict[int, float]]:
    """The scores of every cell's seeds; cells without any are left out."""
    out: dict[tuple[str, str], dict[int, float]] = {}
    for key, run in sorted(found.runs.items()):
        score = score_at(run, env_steps)
        if score is not None:
            out.setdefault((key.task, key.agent), {})[key.seed] = score
    return out


def budgets(found: Survey) -> list[int]:
    """The usual budgets up to the runs' own, and theirs; until every run has reached one, how far all have."""
    usual = {one for one in BUDGETS if one < found.env_steps} | {found.env_steps}
    shared = min(run.rows[-1].env_steps for run in found.runs.values())
    return sorted(usual | {shared} if 0 < shared < min(usual) else usual)


def mean_interval(values: Sequence[float], reps: int) -> Estimate:
    """The mean and its bootstrap percentile interval over seeds."""
    mean, low, high = _bootstrap_mean(np.array(values, np.float64)[:, None], reps)
    return Estimate(float(mean[0]), float(low[0]), float(high[0]))


def band(xs: Sequence[Float[np.ndarray, " N"]], ys: Sequence[Float[np.ndarray, " N"]], reps: int) -> Band:
    """The mean curve of several seeds from where all have begun, each interpolated linearly to every x of any.

    Seeds end at different x. Beyond the end of the first one the mean goes on over the others, without an interval.
    """
    grid, alive = _grid(xs)
    curves = np.array([np.interp(grid, x, y) for x, y in zip(xs, ys, strict=True)])
    whole = np.asarray(alive.all(axis=0))
    low, high = np.full_like(grid, np.nan), np.full_like(grid, np.nan)
    _, low[whole], high[whole] = _bootstrap_mean(curves[:, whole], reps)
    return Band(grid, mean_where_alive(xs, ys), low, high, whole)


def mean_where_alive(
    xs: Sequence[Float[np.ndarray, " N"]], ys: Sequence[Float[np.ndarray, " N"]]
) -> Float[np.ndarray, " M"]:
    """At every x of :func:`band`, the mean over the seeds that have not ended before it."""
    grid, alive = _grid(xs)
    curves = np.array([np.interp(grid, x, y) for x, y in zip(xs, ys, strict=True)])
    mean: Float[np.ndarray, " M"] = np.where(alive, curves, 0).sum(0) / alive.sum(0)
    return mean


def _grid(xs: Sequence[Float[np.ndarray, " N"]]) -> tuple[Float[np.ndarray, " M"], Bool[np.ndarray, "seeds M"]]:
    """Every x of any seed from where all have begun, and which seeds have not ended there."""
    grid = np.unique(np.concatenate(xs))
    start = min(max(x[0] for x in xs), max(x[-1] for x in xs))
    grid = grid[grid >= start]
    return grid, np.array([grid <= x[-1] for x in xs])


def _bootstrap_mean(
    values: Float[np.ndarray, "seeds M"], reps: int
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """Mean over seeds, and the 2.5 and 97.5 percentiles of means over seeds drawn with replacement."""
    mean = values.mean(0)
    count = len(values)
    if count < 2:
        nothing = np.full_like(mean, np.nan)
        return mean, nothing, nothing
    weights = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), size=reps) / count
    low, high = np.percentile(weights @ values, [2.5, 97.5], axis=0)
    return mean, low, high


# -- all tasks ---------------------------------------------------------------------------------------------------------


def complete_block(found: Survey, env_steps: int) -> Block:
    """The largest plain comparison that the runs allow: the same tasks for every agent.

    The agent or the task of which the largest share of cells has no score is left out until no cell is empty (a task
    before an agent where they are equal). Then each agent keeps the seeds that have a score on all of the tasks.
    """
    scores = scores_at(found, env_steps)
    tasks = [task for task in found.tasks if task.startswith("dmc/")]
    agents = list(found.agents)
    left_out = []
    other = [short(task) for task in found.tasks if task not in tasks]
    if other:
        left_out.append(f"{', '.join(other)}: returns outside dm_control have no largest value to normalise by")
    while tasks and agents:
        empty_tasks = {task: _share((task, agent) in scores for agent in agents) for task in tasks}
        empty_agents = {agent: _share((task, agent) in scores for task in tasks) for agent in agents}
        task, agent = max(tasks, key=empty_tasks.__getitem__), max(agents, key=empty_agents.__getitem__)
        if not empty_tasks[task]:
            break
        if empty_tasks[task] >= empty_agents[agent]:
            tasks.remove(task)
            left_out.append(f"{short(task)}: not every agent has a score there")
        else:
            agents.remove(agent)
            left_out.append(f"{agent}: no score on {_missing_on(agent, tasks, scores)}")
    seeds = {}
    for agent in agents if tasks else []:
        cells = [scores[task, agent] for task in tasks]
        common = sorted(set.intersection(*map(set, cells)))
        asked = {key.seed for key in found.wanted if key.agent == agent and key.task in tasks}
        spare = sorted(asked - set(common))
        if not common:
            left_out.append(f"{agent}: no seed has a score on all of the tasks")
            continue
        if spare:
            left_out.append(f"{agent}, {_seeds(spare)}: not every task has a score")
        seeds[agent] = common
    table = {
        agent: np.array([[scores[task, agent][seed] / MAX_RETURN for task in tasks] for seed in own])
        for agent, own in seeds.items()
    }
    return Block(env_steps, tasks, seeds, table, left_out)


def _share(there: Iterator[bool]) -> float:
    """The share of cells that are empty."""
    known = list(there)
    return 1 - sum(known) / len(known)


def _missing_on(agent: str, tasks: Sequence[str], scores: Mapping[tuple[str, str], Any]) -> str:
    return ", ".join(short(task) for task in tasks if (task, agent) not in scores)


def _seeds(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def aggregate(block: Block, reps: int) -> Aggregates:
    """Aggregates with stratified bootstrap intervals: within each task, seeds are drawn anew with replacement."""
    estimates = _estimates(block.scores, lambda x: np.array([one(x) for one in AGGREGATES.values()]), reps)
    profiles = _estimates(block.scores, share_above, reps)
    agents = list(block.scores)
    pairs = [(agent, over) for i, agent in enumerate(agents) for over in agents[i + 1 :]]
    better = _estimates({pair: [block.scores[one] for one in pair] for pair in pairs}, probability_of_improvement, reps)
    return Aggregates(
        block,
        {
            agent: {name: Estimate(*map(float, column)) for name, column in zip(AGGREGATES, columns.T, strict=True)}
            for agent, columns in estimates.items()
        },
        {
            agent: Band(THRESHOLDS, mean, low, high, np.ones(len(THRESHOLDS), bool))
            for agent, (mean, low, high) in profiles.items()
        },
        [Improvement(*pair, Estimate(*map(float, better[pair].ravel()))) for pair in pairs],
    )


def share_above(scores: Float[np.ndarray, "seeds tasks"]) -> Float[np.ndarray, " S"]:
    """The performance profile: the share of runs with a score above each of THRESHOLDS."""
    return (scores[..., None] > THRESHOLDS).mean((0, 1))


def probability_of_improvement(
    x: Float[np.ndarray, "seeds tasks"], y: Float[np.ndarray, "others tasks"]
) -> Float[np.ndarray, "1"]:
    """P(X > Y) on the same task, averaged over tasks; a tie is half.

    It equals rliable's own, which ranks all scores at each draw and takes a hundred times as long.
    """
    first, second = x[:, None], y[None]
    return np.array([((first > second) + 0.5 * (first == second)).mean()])


def _estimates(
    scores: Mapping[Any, Any], func: Callable[..., np.ndarray], reps: int
) -> dict[Any, Float[np.ndarray, "3 ..."]]:
    """Value, low and high of ``func`` for each entry, by rliable's stratified percentile bootstrap.

    An agent with a single seed has nothing to draw from: its bounds are NaN.
    """
    with _numpy_seeded():
        values, intervals = library.get_interval_estimates(scores, func, reps=reps)
    out = {}
    for name, value in values.items():
        tables = scores[name] if isinstance(scores[name], list) else [scores[name]]
        bounds = intervals[name] if min(map(len, tables)) > 1 else np.full_like(intervals[name], np.nan)
        out[name] = np.vstack([np.atleast_1d(value), bounds])
    return out


@contextmanager
def _numpy_seeded() -> Iterator[None]:
    """rliable draws from NumPy's global generator, whatever random_state it is given."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(_SEED)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002

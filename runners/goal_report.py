"""What attempts at goals came to: under which protocol, for people and for programs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from runners.attempts import Attempts
from runners.dataset import Dataset
from runners.goals import Halves, Match, Pairs
from runners.plan_config import PlanConfig

ENOUGH = 50
"""Goals below which a success rate says little: even then its interval reaches 13 % to either side."""


class Rate(NamedTuple):
    """A success rate and the 95 % interval around it."""

    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.0%} ({self.low:.0%}–{self.high:.0%})"


def wilson(successes: int, tries: int) -> Rate:
    """Wilson's score interval, which holds for few tries and near 0 and 1, too."""
    from scipy.stats import binomtest  # which takes seconds to import

    found = binomtest(successes, tries).proportion_ci(confidence_level=0.95, method="wilson")
    return Rate(successes / tries, float(found.low), float(found.high))


def protocol(
    config: PlanConfig, task: str, data: Dataset, halves: Halves, match: Match, pairs: Pairs, before: int
) -> list[str]:
    """How the scores come about, in words."""
    count, recorded = len(pairs.start), min(config.apart, config.decisions)
    lines = [
        f"goals: {count} of {task}, each what was observed {config.apart} decisions after its start in one of "
        f"{len(halves.held_out)} held-out episodes of {data.path} ({halves.why})",
        f"left out: {pairs.solved} of {pairs.drawn} starts drawn, which satisfied their goals already",
        f"reached: {match}, in the simulator, after any of {config.decisions} decisions; beside it, after the last one",
        f"start: the simulator is put back to the recorded state, and planners have seen the {before} recorded "
        "observations before it, which tell how it moves",
        f"from the same starts: random (uniform actions), still (action 0), oracle (the {recorded} recorded actions, "
        "then it stops)",
        f"time: of deciding, encoding included and simulating not, for up to {config.num_envs} goals together",
    ]
    if count < config.goals:
        lines.append(f"note: {config.goals} goals were asked for, but only {count} starts do not satisfy theirs yet")
    if count < ENOUGH:
        lines.append(f"note: {count} goals are too few for a score; report at least {ENOUGH}")
    return lines


def figures(found: Attempts) -> dict[str, Any]:
    """A method's results for programs."""
    tries = len(found.reached)
    return {
        "reached": wilson(int(found.reached.any(1).sum()), tries)._asdict(),
        "at_the_end": wilson(int(found.reached[:, -1].sum()), tries)._asdict(),
        "first_reached_after": found.first,
        "median_error_at_the_end": np.median(found.error, 0).tolist(),
        "decisions": found.decided,
        "ms_per_decision": 1000 * found.seconds / found.decided,
    }


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The :func:`figures` of all methods for people, a line each."""
    lines = [f"{'':10}{'reached (95 %)':>20}{'at the end (95 %)':>20}{'ms a decision':>16}"]
    for name, found in results.items():
        reached, end = Rate(**found["reached"]), Rate(**found["at_the_end"])
        lines.append(f"{name:10}{reached!s:>20}{end!s:>20}{found['ms_per_decision']:>16.2f}")
    return lines

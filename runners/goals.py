"""Starts and goals out of recorded episodes, and the physical test of whether a goal was reached."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from envs import closest
from runners.config import ConfigError, read_config
from runners.dataset import Dataset
from runners.pretrain_config import SETTINGS

# -- reached or not ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """How far a quantity may be from the goal's for the goal to count as reached."""

    angle: float = 0.15
    """Of a hinge, in rad; full turns do not count."""
    length: float = 0.03
    """Of a slide or a free body's place, in m."""
    other: float = 0.1
    """Of all else: parts of quaternions, velocities (rad/s or m/s), activations."""


class Match:
    """Whether physical states agree with those of goals, in every quantity that counts.

    Args:
        names: of all numbers of a physical state.
        units: theirs, as ``envs.physics.physical_units`` gives them.
        wanted: the quantities that count; if none, all positions.

    Raises:
        ConfigError: a quantity that there is not, with the closest names; none at all.
    """

    def __init__(self, names: Sequence[str], units: Sequence[str], wanted: Sequence[str], tolerance: Tolerance) -> None:
        for name in wanted:
            if name not in names:
                there_are = f"There are: {', '.join(names)}"
                raise ConfigError(f"--match: there is no quantity {name!r}.{closest(name, names)} {there_are}")
        self.names = list(wanted) or [name for name in names if name.startswith("qpos/")]
        if not self.names:
            raise ConfigError("this task has no positions to reach; say with --match what is to be reached")
        self._columns = np.array([list(names).index(name) for name in self.names])
        self._units = [units[column] for column in self._columns]
        limits = {"rad": tolerance.angle, "m": tolerance.length}
        self.limits = [limits.get(unit, tolerance.other) for unit in self._units]

    def errors(self, state: Float[np.ndarray, "*#N S"], goal: Float[np.ndarray, "*#N S"]) -> Float[np.ndarray, "*N M"]:
        """The absolute difference of each quantity that counts; of angles the shorter way round."""
        difference = (state - goal)[..., self._columns]
        wrapped = (difference + np.pi) % (2 * np.pi) - np.pi
        return np.abs(np.where(np.array(self._units) == "rad", wrapped, difference))

    def reached(self, state: Float[np.ndarray, "*#N S"], goal: Float[np.ndarray, "*#N S"]) -> Bool[np.ndarray, "*N"]:
        return np.all(self.errors(state, goal) <= self.limits, axis=-1)

    def __str__(self) -> str:
        """For people: ``qpos/shoulder within 0.15 rad, …``."""
        parts = zip(self.names, self.limits, self._units, strict=True)
        return ", ".join(f"{name} within {limit:g} {unit}".rstrip() for name, limit, unit in parts)


# -- which episodes ----------------------------------------------------------------------------------------------------


class Halves(NamedTuple):
    """Episodes to learn from and episodes to take goals from, and why these."""

    train: Int64[np.ndarray, " N"]
    held_out: Int64[np.ndarray, " M"]
    why: str


def split_like_pretraining(data: Dataset, run_dir: Path, seed: int, validation: float = 0.1) -> Halves:
    """The split of the pretraining that the run, or the one it was started from, made of this very dataset. If there
    was none, a split of its own, and ``why`` says so.

    Raises:
        DatasetError: there is only one episode.
        ConfigError: what is written of the pretraining cannot be read.
    """
    source = run_dir
    while not (source / SETTINGS).exists():
        start = read_config(source).init_from
        if start is None:
            break
        source = Path(start)
    if (source / SETTINGS).exists():
        where, share, its_seed = _pretraining(source / SETTINGS)
        if Path(where).resolve() == data.path.resolve():
            return Halves(*data.split(share, its_seed), f"the validation split of the pretraining in {source}")
        other = f"{source} was pretrained on {where}"
    else:
        other = f"{run_dir} was not pretrained on a dataset"
    why = f"a split made here: {other}, so whether it saw these episodes is not known here"
    return Halves(*data.split(validation, seed), why)


def _pretraining(file: Path) -> tuple[str, float, int]:
    """Dataset, share of validation and seed of a pretraining."""
    try:
        values = json.loads(file.read_bytes())
        return str(values["data"]), float(values["validation"]), int(values["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} cannot be used: {error!r}") from error


# -- which moments -----------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """G starts and their goals, as rows of a dataset."""

    start: Int64[np.ndarray, " G"]
    goal: Int64[np.ndarray, " G"]
    drawn: int
    """Starts that were drawn to get them."""
    solved: int
    """Those of them that satisfied their goal already, and were left out."""


def choose_pairs(
    data: Dataset,
    episodes: Int64[np.ndarray, " M"],
    match: Match,
    *,
    count: int,
    apart: int,
    before: int,
    seed: int,
) -> Pairs:
    """Random moments of these episodes, no two the same, each with the moment ``apart`` decisions later as its goal.

    Args:
        before: rows that a start needs before it in its episode.

    Raises:
        ConfigError: episodes that are too short; no start that does not satisfy its goal already.
    """
    assert data.physics is not None
    spans = data.spans[episodes]
    rows = [np.arange(first + before, first + length - apart) for _, first, length in spans]
    possible = np.concatenate(rows)
    if not len(possible):
        raise ConfigError(
            f"a goal {apart} decisions after its start takes an episode of {before + apart + 1} rows, as the model "
            f"first sees {before} rows before the start, and the longest held-out one of {data.path} has "
            f"{spans[:, 2].max()}; lower --apart"
        )
    start = np.random.default_rng(seed).permutation(possible)
    solved = match.reached(np.asarray(data.physics[start]), np.asarray(data.physics[start + apart]))
    if solved.all():
        raise ConfigError(
            f"all {len(start)} starts satisfy their goals already ({match}); raise --apart or lower --tolerance"
        )
    drawn = int(np.searchsorted(np.cumsum(~solved), count)) + 1 if (~solved).sum() >= count else len(start)
    chosen = start[:drawn][~solved[:drawn]]
    return Pairs(chosen, chosen + apart, drawn, int(solved[:drawn].sum()))

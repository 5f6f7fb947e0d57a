"""Attempts at goals: whoever acts starts where a recorded episode once stood, and physics says what was reached."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from agents.goals import GoalSeeker
from envs.physics import physical_state
from runners.dataset import Dataset
from runners.dataset_folder import DatasetError
from runners.goals import Match, Pairs
from worldmodels.interface import State, WorldModel

# -- who acts ----------------------------------------------------------------------------------------------------------


class Method(Protocol):
    """A way of pursuing goals, several at once. ``sees`` says whether it needs observations; ``decisions`` is how many
    it makes."""

    sees: bool
    decisions: int

    def begin(self, start: Int64[np.ndarray, " B"], goal: Int64[np.ndarray, " B"]) -> None:
        """New goals, as rows of the dataset."""
        ...

    def act(self, obs: Shaped[np.ndarray, "B *obs"] | None) -> Float[np.ndarray, "B A"]:
        """Actions in [-1, 1]. ``obs`` is what arrived since the last ones; None at the start, whose observation the
        dataset has."""
        ...


class Seeking:
    """A world model and whoever plans with it.

    It first observes the start and the ``before`` recorded rows before it, with the actions between them, so that it
    knows how things move: a single picture does not tell the velocities that the simulator is put back to.
    """

    sees = True

    def __init__(
        self,
        model: WorldModel,
        seeker: GoalSeeker,
        data: Dataset,
        *,
        budget: int,
        before: int,
        device: torch.device,
        bf16: bool,
    ) -> None:
        self.model, self.seeker, self.data = model, seeker, data
        self.decisions, self.before, self.device, self.bf16 = budget, before, device, bf16

    @torch.no_grad()
    def begin(self, start: Int64[np.ndarray, " B"], goal: Int64[np.ndarray, " B"]) -> None:
        self.model.eval()
        self.seeker.begin()
        self._left = self.decisions
        stream = np.zeros_like(start)
        seen = self.data.replay.take(stream, start - self.before, self.before + 1)
        wanted = self.data.replay.take(stream, goal, 1)
        self._action = torch.zeros_like(seen.action[:, 0], device=self.device)
        first = torch.ones(len(start), dtype=torch.bool, device=self.device)
        with self._autocast():
            nothing = self.model.initial(len(start))
            alone = self.model.observe(nothing, self._action, wanted.obs[:, 0].to(self.device), first)
            self._goal = self.model.latent(alone)
            self._state: State = nothing
            for k in range(self.before + 1):
                self._state = self.model.observe(
                    self._state, self._action, seen.obs[:, k].to(self.device), first & (k == 0)
                )
                self._action = seen.action[:, k].to(self.device)

    @torch.no_grad()
    def act(self, obs: Shaped[np.ndarray, "B *obs"] | None) -> Float[np.ndarray, "B A"]:
        with self._autocast():
            if obs is not None:
                arrived: Tensor = torch.as_tensor(obs, device=self.device)
                never = torch.zeros(len(obs), dtype=torch.bool, device=self.device)
                self._state = self.model.observe(self._state, self._action, arrived, never)
            self._action = self.seeker.act(self._state, self._goal, self._left).float()
        self._left -= 1
        return self._action.cpu().numpy()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


class Randomly:
    """Uniform actions, drawn for each start by itself."""

    sees = False

    def __init__(self, action_dim: int, budget: int, seed: int) -> None:
        self.action_dim, self.decisions, self.seed = action_dim, budget, seed

    def begin(self, start: Int64[np.ndarray, " B"], goal: Int64[np.ndarray, " B"]) -> None:
        self._generators = [np.random.default_rng([self.seed, int(row)]) for row in start]

    def act(self, obs: Shaped[np.ndarray, "B *obs"] | None) -> Float[np.ndarray, "B A"]:
        return np.stack([g.uniform(-1, 1, self.action_dim) for g in self._generators]).astype(np.float32)


class Still:
    """The action 0."""

    sees = False

    def __init__(self, action_dim: int, budget: int) -> None:
        self.action_dim, self.decisions = action_dim, budget

    def begin(self, start: Int64[np.ndarray, " B"], goal: Int64[np.ndarray, " B"]) -> None:
        self._goals = len(start)

    def act(self, obs: Shaped[np.ndarray, "B *obs"] | None) -> Float[np.ndarray, "B A"]:
        return np.zeros((self._goals, self.action_dim), np.float32)


class Oracle:
    """The recorded actions, up to the goal or to the budget's end: what the starts and the test of success allow."""

    sees = False

    def __init__(self, data: Dataset, apart: int, budget: int) -> None:
        self.data, self.decisions = data, min(apart, budget)

    def begin(self, start: Int64[np.ndarray, " B"], goal: Int64[np.ndarray, " B"]) -> None:
        self._actions = self.data.replay.take(np.zeros_like(start), start, self.decisions).action.cpu().numpy()
        self._t = 0

    def act(self, obs: Shaped[np.ndarray, "B *obs"] | None) -> Float[np.ndarray, "B A"]:
        self._t += 1
        return self._actions[:, self._t - 1]


# -- what happens ------------------------------------------------------------------------------------------------------


class Attempts(NamedTuple):
    """What became of G goals over T decisions."""

    reached: Bool[np.ndarray, "G T"]
    """Whether the goal was satisfied after each decision; after an episode that ended by itself, as at its end."""
    error: Float[np.ndarray, "G M"]
    """How far each quantity that counts was from the goal at the end."""
    seconds: float
    """Spent deciding, encoding included and simulating not."""
    decided: int
    """Decisions, over all goals."""

    @property
    def first(self) -> list[int | None]:
        """Decisions after which each goal was first reached."""
        return [int(row.argmax()) + 1 if row.any() else None for row in self.reached]


Watch = Callable[[int, gym.Env], Any]
"""Called with the number of a goal and its environment at the start and after each decision."""


def attempt(
    method: Method,
    pairs: Pairs,
    data: Dataset,
    envs: Sequence[gym.Env],
    match: Match,
    *,
    after_decision: Callable[[int], None] = lambda made: None,
    watch: Watch | None = None,
) -> Attempts:
    """Let ``method`` try every goal, as many at once as there are environments. Where an episode ends by itself, its
    goal is decided for to no effect until the others are through.

    Args:
        envs: of the dataset's task and settings, observing the state; pictures are drawn where the dataset has some.
        after_decision: told how many have been made, over all goals.

    Raises:
        DatasetError: the dataset has no physical states.
        EnvironmentFault: a simulation diverged.
    """
    reached, errors, seconds, decided = [], [], 0.0, 0
    if data.physics is None:
        raise DatasetError(f"{data.path} has no physical states, which tell whether a goal was reached")
    for first in range(0, len(pairs.start), len(envs)):
        group = slice(first, first + len(envs))
        start, goal = pairs.start[group], pairs.goal[group]
        player = _Group(envs[: len(start)], data, first, start, watch)
        method.begin(start, goal)
        wanted, obs, after = data.physics[goal], None, []
        for _ in range(method.decisions):
            began = time.perf_counter()
            action = method.act(obs)
            seconds += time.perf_counter() - began
            obs = player.step(action, see=method.sees)
            after.append(player.physics())
            decided += len(start)
            after_decision(decided)
        reached.append(match.reached(np.stack(after, 1), wanted[:, None]))
        errors.append(match.errors(after[-1], wanted))
    return Attempts(np.concatenate(reached), np.concatenate(errors), seconds, decided)


class _Group:
    """Environments side by side, each put back into a recorded moment; the first one pursues goal number ``first``."""

    def __init__(
        self,
        envs: Sequence[gym.Env],
        data: Dataset,
        first: int,
        start: Int64[np.ndarray, " B"],
        watch: Watch | None,
    ) -> None:
        self._envs, self._first, self._watch = envs, first, watch
        self._pixels = len(data.spaces()[0].shape) == 3
        self._over = [False] * len(envs)
        self._obs: list[np.ndarray] = [np.empty(0)] * len(envs)
        for i, (env, row) in enumerate(zip(envs, start, strict=True)):
            data.restore(env, int(row))
            self._show(i)

    def step(self, action: Float[np.ndarray, "B A"], *, see: bool) -> Shaped[np.ndarray, "B *obs"] | None:
        """One decision each; an episode that has ended by itself stays where it ended."""
        for i, env in enumerate(self._envs):
            if not self._over[i]:
                obs, _, terminated, truncated, _ = env.step(action[i])
                self._over[i] = terminated or truncated
                if see:
                    self._obs[i] = np.asarray(env.render()).transpose(2, 0, 1) if self._pixels else obs
                self._show(i)
        return np.stack(self._obs) if see else None

    def physics(self) -> Float[np.ndarray, "B S"]:
        return np.stack([physical_state(env) for env in self._envs])

    def _show(self, i: int) -> None:
        if self._watch is not None:
            self._watch(self._first + i, self._envs[i])

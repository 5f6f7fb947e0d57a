"""Actions that know nothing of the task, but vary in how long they persist, so that data reach beyond a standstill."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped

from agents.interface import Carry
from agents.random import RandomAgent

_SHORTEST, _LONGEST = 2.0, 32.0
"""Decisions, between which the persistence of an episode's actions is drawn, evenly in its logarithm."""


class MixtureAgent(RandomAgent):
    """Each episode draws one habit: white noise, held actions, coloured noise or sinusoids.

    White noise alone averages out: a body with inertia hardly leaves its place under it. All four have mean zero, and
    all but the sinusoids are uniform in [-1, 1].
    """

    def initial(self, envs: int) -> Carry:
        return (iter(()),) * envs

    def act(
        self, obs: Shaped[np.ndarray, "E *obs"], is_first: Bool[np.ndarray, " E"], carry: Carry, *, explore: bool
    ) -> tuple[Float[np.ndarray, "E A"], Carry]:
        habits = tuple(self._habit() if first else habit for first, habit in zip(is_first, carry, strict=True))
        return np.stack([next(habit) for habit in habits]).astype(np.float32), habits

    def _habit(self) -> Iterator[Float[np.ndarray, " A"]]:
        habits = (self._white, self._held, self._coloured, self._sinusoids)
        return habits[self.generator.integers(len(habits))](float(self._persistence()))

    def _persistence(self, size: int | None = None) -> Any:
        return np.exp(self.generator.uniform(np.log(_SHORTEST), np.log(_LONGEST), size))

    def _uniform(self) -> Float[np.ndarray, " A"]:
        return self.generator.uniform(-1, 1, self.action_dim)

    def _white(self, steps: float) -> Iterator[Float[np.ndarray, " A"]]:
        while True:
            yield self._uniform()

    def _held(self, steps: float) -> Iterator[Float[np.ndarray, " A"]]:
        """One action for a number of steps that has this mean, then another."""
        while True:
            action = self._uniform()
            for _ in range(self.generator.geometric(1 / steps)):
                yield action

    def _coloured(self, steps: float) -> Iterator[Float[np.ndarray, " A"]]:
        """An Ornstein–Uhlenbeck process with this time constant, through its own distribution function."""
        keep = np.exp(-1 / steps)
        x = self.generator.standard_normal(self.action_dim)
        while True:
            yield torch.erf(torch.from_numpy(x) / 2**0.5).numpy()
            x = keep * x + np.sqrt(1 - keep**2) * self.generator.standard_normal(self.action_dim)

    def _sinusoids(self, steps: float) -> Iterator[Float[np.ndarray, " A"]]:
        """One for each action, of its own amplitude, period (twice a persistence) and phase."""
        amplitude, phase = self.generator.uniform(0, [[1.0], [2 * np.pi]], (2, self.action_dim))
        frequency = np.pi / self._persistence(self.action_dim)
        t = 0
        while True:
            yield amplitude * np.sin(frequency * t + phase)
            t += 1

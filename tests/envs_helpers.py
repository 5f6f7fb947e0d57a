"""Environments whose every number is known, registered for ``gym/tests.envs_helpers:<Id>`` in any process.

The workers of a vector import this module: it imports no torch, which takes seconds, and nothing of the project.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import gymnasium as gym
import numpy as np

PREFIX = "gym/tests.envs_helpers:"
LENGTH = 5


class Counting(gym.Env[np.ndarray, Any]):
    """Observes its own step number; rewards with the action. Episodes of five steps, terminated when the first
    random draw of the episode is below a half, else truncated. Its picture is as bright as the step number.

    Args:
        bad: what goes wrong at step 3: nothing, "reward" or "obs" is not finite, "crash" raises. "picture": the first
            picture needs what is not installed.
        discrete, unbounded: another action space.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  as Gymnasium declares it

    def __init__(
        self, render_mode: str | None = None, bad: str = "", discrete: bool = False, unbounded: bool = False
    ) -> None:
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
        limit = np.inf if unbounded else 2.0
        self.action_space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-limit, limit, (1,), np.float32)
        self._bad = bad

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.terminates = bool(self.np_random.random() < 0.5)
        self._count = 0
        return np.zeros(1), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._count += 1
        obs, reward, over = np.array([float(self._count)]), float(action[0]), self._count == LENGTH
        if self._count == 3:
            if self._bad == "crash":
                raise ArithmeticError("step three is out of order")
            obs = np.array([np.nan]) if self._bad == "obs" else obs
            reward = float("inf") if self._bad == "reward" else reward
        return obs, reward, over and self.terminates, over and not self.terminates, {}

    def render(self) -> np.ndarray:
        assert self.render_mode == "rgb_array"
        if self._bad == "picture":
            raise gym.error.DependencyNotInstalled("a painter is not installed, run `pip install painter`")
        return np.full((40, 60, 3), 10 * self._count, np.uint8)


class Moody(gym.Env[np.ndarray, np.ndarray]):
    """Observes (step number, its length), rewards with the action. Episodes of 3 to 7 steps, as the seed says.

    The class counts its steps over all episodes and gives NaN at those in ``bad_steps``.
    """

    bad_steps: Container[int] = ()
    steps_taken = 0

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._length, self._count = int(self.np_random.integers(3, 8)), 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._count += 1
        Moody.steps_taken += 1
        obs = self._obs() * (np.nan if Moody.steps_taken in Moody.bad_steps else 1.0)
        return obs, float(action[0]), self._count == self._length, False, {}

    def _obs(self) -> np.ndarray:
        return np.array([self._count, self._length], np.float64)


gym.register("Moody-v0", entry_point=Moody)
gym.register("Absent-v0", entry_point="absent_package:Env")
for _name, _kwargs in {
    "Counting-v0": {},
    "BadReward-v0": {"bad": "reward"},
    "BadObs-v0": {"bad": "obs"},
    "Crash-v0": {"bad": "crash"},
    "Painted-v0": {"bad": "picture"},
    "Discrete-v0": {"discrete": True},
    "Unbounded-v0": {"unbounded": True},
}.items():
    gym.register(_name, entry_point=Counting, kwargs=_kwargs)

"""A dm_control suite task as a Gymnasium environment: native actions, flat state, its own picture."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dm_env
import gymnasium as gym
import mujoco
import numpy as np
import scipy
from dm_control.rl.control import PhysicsError
from jaxtyping import Float32

from envs.camera import Camera, Image, Profile, apply_profile, fixed_view
from envs.wrappers import EnvironmentFault


class _WhenUsed:
    """A module that is imported at the first use of something in it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


@contextmanager
def _ndimage_when_used() -> Iterator[None]:
    """What imports scipy.ndimage meanwhile gets it when it is used. The suite's quadruped does, for the hills of one
    task, and a third of what starting a worker takes would be this."""
    if "scipy.ndimage" in sys.modules:
        yield
        return
    scipy.ndimage = _WhenUsed("scipy.ndimage")
    try:
        yield
    finally:
        del scipy.ndimage


with _ndimage_when_used():
    from dm_control import suite

_UNLIMITED = 1e9
"""MuJoCo reports an actuator without limits as ±1e10; a unit of action is then a unit of control (the lqr tasks)."""

_MODEL_SEED = 0
"""The lqr tasks draw their stiffnesses when they are built. One fixed draw makes them the same task for every seed."""


def task_names() -> list[str]:
    """Every suite task as ``<domain>-<task>``."""
    return [f"{domain}-{task}" for domain, task in suite.ALL_TASKS]


class DMCEnv(gym.Env[Float32[np.ndarray, " S"], np.ndarray]):
    """Observations are the task's observation dict, flattened in its own order, as float32.

    dm_control's end of time truncates and its discount 0 terminates.

    Args:
        name: ``<domain>-<task>``.
        camera: index of the model's camera, -1 for the free one.
        size: image height and width.
        own_time_limit: whether the task's own time limit ends episodes; otherwise nothing does but termination.
        blind: observations are zeros. dm_control works them out at every simulator step, a tenth of what cartpole's
            steps take, for nothing where only pictures are looked at.
    """

    def __init__(
        self, name: str, camera: int, size: int, profile: Profile, own_time_limit: bool, *, blind: bool = False
    ) -> None:
        domain, _, task = name.partition("-")
        task_kwargs: dict[str, Any] = {"random": np.random.RandomState(_MODEL_SEED)}
        if not own_time_limit:
            task_kwargs["time_limit"] = float("inf")
        self._env = suite.load(domain, task, task_kwargs=task_kwargs)
        physics = self._env.physics
        model = physics.model.ptr
        view = fixed_view(model, camera)
        apply_profile(model, size, profile)
        self._camera = Camera(model, physics.data.ptr, view, size, profile, physics)
        spec = self._env.action_spec()
        unlimited = (spec.minimum < -_UNLIMITED) | (spec.maximum > _UNLIMITED)
        low, high = np.where(unlimited, -1.0, spec.minimum), np.where(unlimited, 1.0, spec.maximum)
        self.action_space = gym.spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        width = sum(int(np.prod(part.shape)) for part in self._env.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        if blind:
            nothing = {"nothing": np.zeros(width, np.float32)}
            self._env.task.get_observation = lambda physics: nothing
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / self._env.control_timestep())}
        self.render_mode = "rgb_array"

    @property
    def simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """The model and its state, for those who look behind the observation."""
        return self._env.physics.model.ptr, self._env.physics.data.ptr

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32[np.ndarray, " S"], dict[str, Any]]:
        """Starts an episode; with ``seed`` (below 2**32), the episode that this seed always gives."""
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed)
        try:
            return _flatten(self._env.reset()), {}
        except PhysicsError as error:
            raise EnvironmentFault(f"the physics diverged ({error})") from error

    def step(self, action: np.ndarray) -> tuple[Float32[np.ndarray, " S"], float, bool, bool, dict[str, Any]]:
        """One simulator control step."""
        try:
            row = self._env.step(np.asarray(action, np.float64))
        except PhysicsError as error:
            raise EnvironmentFault(f"the physics diverged ({error})") from error
        terminated = bool(row.last() and row.discount == 0.0)
        return _flatten(row), float(row.reward), terminated, bool(row.last() and not terminated), {}

    def render(self) -> Image:
        """The picture of the present state."""
        return self._camera.render()

    def close(self) -> None:
        """Frees the simulation and its context. May be called twice."""
        if self._env is not None:
            self._camera.close()
            self._env.physics.free()
            self._env = None


def _flatten(row: dm_env.TimeStep) -> Float32[np.ndarray, " S"]:
    return np.concatenate([np.ravel(part) for part in row.observation.values()], dtype=np.float32)

"""OGBench's manipulation tasks (arXiv 2410.20092; the extra ``.[ogbench]``): an arm and cubes, drawn by our camera.

Scenes are drawn as OGBench draws them for its own data: the arm and the cubes anywhere, from the episode's seed alone.
(Its evaluation tasks take their number from NumPy's global generator, so that a seed does not fix an episode.) Nothing
but time ends an episode, and goals are given from outside: the reward, for a hidden target, means little here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import gymnasium as gym
import mujoco
import numpy as np

from envs.camera import Camera, Profile, apply_profile, fixed_view
from envs.wrappers import Divergence, Pictures, UnsupportedSetting

_ENTRY = "ogbench.manipspace."

_ORACLES = ("cube", "button", "drawer", "window")
"""What a scene can ask for next, and the module and class of OGBench that knows how."""


def is_manipulation(name: str) -> bool:
    """Whether a registered Gymnasium id, with or without its module, is one of OGBench's manipulation tasks."""
    return str(gym.spec(name.rpartition(":")[2]).entry_point).startswith(_ENTRY)


def make_manipulation(
    name: str,
    obs: Literal["pixels", "state", "both"],
    *,
    size: int,
    profile: Profile,
    camera: int | None,
    time_limit: int | None,
) -> gym.Env:
    """A task whose ``render`` is a square picture by the task's own camera, with the arm all but transparent, as in
    OGBench's pixel tasks, whatever is observed; with ``obs`` state that is OGBench's state.

    Raises:
        UnsupportedSetting: both pixels and state, which the task has no observation for; no such camera.
    """
    if obs == "both":
        raise UnsupportedSetting("OGBench's tasks give pixels or state, not both: choose obs pixels or state")
    scene: dict[str, Any] = {"mode": "data_collection", "terminate_at_goal": False, "visualize_info": False}
    kind = "pixels" if obs == "pixels" else "states"
    env = gym.make(name, max_episode_steps=time_limit, disable_env_checker=True, ob_type=kind, **scene)
    task: Any = env.unwrapped
    # Its own renderer would draw each observation a second time, and switch OpenGL contexts behind our camera's back.
    blank = np.zeros((1, 1, 3), np.uint8)
    task.get_pixel_observation = lambda: blank
    task._ob_type = "pixels"  # the model to be drawn, whatever is observed
    env.reset(seed=0)  # compiles it, once and for all
    task._ob_type = kind
    index = mujoco.mj_name2id(task.model, mujoco.mjtObj.mjOBJ_CAMERA, "front_pixels") if camera is None else camera
    view = fixed_view(task.model, index)
    apply_profile(task.model, size, profile)
    pictures = Pictures(Divergence(env), size, Camera(task.model, task.data, view, size, profile))
    pictures.metadata["render_fps"] = round(1 / task.control_timestep())
    return pictures


class Scripted(gym.Wrapper):
    """Takes OGBench's own scripted actions instead of those it is given: they go to one of the scene's objects, move it
    to where it is wanted next, and so on. Random actions hardly ever touch anything.

    Observations are a dict of "observation" and "action": the action that led there, zeros after a reset.

    Args:
        noise: largest standard deviation of the noise on the script's actions, three times that on the yaw and ten
            times on the gripper, as OGBench records its own data; each episode draws its own up to this.

    Raises:
        UnsupportedSetting: the task is none of OGBench's manipulation.
    """

    _generator: np.random.Generator
    _info: dict[str, Any]

    def __init__(self, env: gym.Env, noise: float = 0.1) -> None:
        super().__init__(env)
        spec = env.unwrapped.spec
        if spec is None or not is_manipulation(spec.id):
            raise UnsupportedSetting("scripted actions exist for OGBench's manipulation tasks only")
        self.observation_space = gym.spaces.Dict({"observation": env.observation_space, "action": env.action_space})
        self._noise = noise
        self._oracles = {name: self._oracle(name) for name in _ORACLES}

    def _oracle(self, name: str) -> Any:
        module = importlib.import_module(f"{_ENTRY}oracles.markov.{name}_markov")
        return getattr(module, f"{name.capitalize()}MarkovOracle")(env=self.env)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """See the class."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._generator = np.random.default_rng(seed)
        self._spread = self._generator.uniform(0, self._noise) * np.array([1, 1, 1, 3, 10])
        self._begin(info)
        return {"observation": obs, "action": np.zeros(self.env.action_space.shape, np.float32)}, info  # type: ignore[arg-type]

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step of the script, whatever ``action`` is."""
        wanted = self._at_work.select_action(None, self._info) + self._generator.normal(0, self._spread)
        taken = np.clip(wanted, -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, info = self.env.step(taken)
        self._info = info
        if self._at_work.done:
            self._begin(self.env.unwrapped.set_new_target(return_info=True)[1])  # type: ignore[attr-defined]
        return {"observation": obs, "action": taken}, reward, terminated, truncated, info

    def _begin(self, info: dict[str, Any]) -> None:
        """Go to what is wanted next."""
        self._info = info
        self._at_work = self._oracles[info["privileged/target_task"]]
        with _drawing_from(self._generator):
            self._at_work.reset(None, info)


@contextmanager
def _drawing_from(generator: np.random.Generator) -> Iterator[None]:
    """NumPy's global random numbers, which OGBench's scripts draw from, follow from ``generator`` meanwhile."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(generator.integers(2**32))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002

"""OGBench's manipulation tasks (arXiv 2410.20092; the extra ``.[ogbench]``): an arm and cubes, drawn by our camera.

Scenes are drawn as OGBench draws them for its own data: the arm and the cubes anywhere, from the episode's seed alone.
(Its evaluation tasks take their number from NumPy's global generator, so that a seed does not fix an episode.) Nothing
but time ends an episode, and goals are given from outside: the reward, for a hidden target, means little here.
"""

from __future__ import annotations

from typing import Any, Literal

import gymnasium as gym
import mujoco
import numpy as np

from envs.camera import Camera, Profile, apply_profile, fixed_view
from envs.wrappers import Divergence, Pictures

_ENTRY = "ogbench.manipspace."


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
    OGBench's pixel tasks; with ``obs`` state the observation is OGBench's state.

    Raises:
        ValueError: both pixels and state, which the task has no observation for; no such camera.
    """
    if obs == "both":
        raise ValueError("OGBench's tasks give pixels or state, not both: choose obs pixels or state")
    scene: dict[str, Any] = {"mode": "data_collection", "terminate_at_goal": False, "visualize_info": False}
    kind = "pixels" if obs == "pixels" else "states"
    env = gym.make(name, max_episode_steps=time_limit, disable_env_checker=True, ob_type=kind, **scene)
    task: Any = env.unwrapped
    # Its own renderer would draw each observation a second time, and switch OpenGL contexts behind our camera's back.
    blank = np.zeros((1, 1, 3), np.uint8)
    task.get_pixel_observation = lambda: blank
    env.reset(seed=0)  # compiles the model, once and for all
    index = mujoco.mj_name2id(task.model, mujoco.mjtObj.mjOBJ_CAMERA, "front_pixels") if camera is None else camera
    view = fixed_view(task.model, index)
    apply_profile(task.model, size, profile)
    return Pictures(Divergence(env), size, Camera(task.model, task.data, view, size, profile))

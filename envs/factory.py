"""From a task's name to an environment: what a task is called, what can be chosen, and the stack of wrappers."""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium import wrappers
from gymnasium.envs.registration import load_env_creator, registry

from envs import dmc
from envs.camera import Camera, apply_profile, fixed_view
from envs.manipulation import Scripted, is_manipulation, make_manipulation
from envs.physics import WithPhysics
from envs.wrappers import Divergence, Episodes, Pictures, UnsupportedSetting

if TYPE_CHECKING:
    from gymnasium.envs.mujoco import MujocoEnv

MIN_SIZE, MAX_SIZE = 8, 1024

DMC_ACTION_REPEAT = {"cartpole": 8, "reacher": 4, "cheetah": 4, "ball_in_cup": 4, "walker": 2, "finger": 2}
"""Simulator steps per action by dm_control domain, as in PlaNet (Hafner et al. 2019, table 1); 2 where not listed."""

DMC_CAMERA = {"quadruped": 2, "fish": 3}
"""The camera that shows the task, by dm_control domain; 0 where not listed."""

FORMS = "dmc/<domain>-<task>, mujoco/<Id>, gym/<Id>, or gym/<module>:<Id> for one that a module registers"


class UnknownTask(ValueError):
    """No task has this name. The message lists the closest ones and the forms that a name takes."""


class UnsupportedActionSpace(ValueError):
    """The task's actions are not a bounded box of real numbers."""


@dataclass(frozen=True)
class EnvConfig:
    """How a task is seen and stepped. Impossible values raise ValueError when it is made."""

    obs: Literal["pixels", "state", "both"] = "pixels"
    """What an observation is: pixels (3, size, size) uint8, state (S,) float32, or both in a dict."""
    size: int = 64
    """Image height and width, in pixels, 8 to 1024."""
    camera: int | None = None
    """Index of the task's camera, -1 for the free one. None: quadruped 2, fish 3, other dm_control tasks 0; on MuJoCo
    tasks the tracking camera where there is one."""
    action_repeat: int | None = None
    """Simulator control steps per action. None: by dm_control domain (cartpole 8; reacher, cheetah and ball_in_cup 4;
    others 2), and 1 on other tasks."""
    time_limit: int | None = None
    """Longest episode, in simulator control steps (not agent steps). None: the task's own."""
    render: Literal["fast", "canonical"] = "fast"
    """Rendering profile: canonical is the published picture; fast has no shadows, reflections or multisampling and
    averages four drawn pixels into one."""
    physics: bool = False
    """Add the simulator's own state to the observation, for recording data; no agent here learns from it."""
    scripted: bool = False
    """Take OGBench's scripted actions instead of those given, and add them to the observation, for recording data."""

    def __post_init__(self) -> None:
        for name, allowed in (("obs", ("pixels", "state", "both")), ("render", ("fast", "canonical"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise ValueError(f"size must be {MIN_SIZE} to {MAX_SIZE} pixels, not {self.size}")
        for name in ("action_repeat", "time_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 simulator step, not {value}")
        if self.camera is not None and self.camera < -1:
            raise ValueError(f"camera must be -1 (free) or a camera's index, not {self.camera}")


DEFAULT = EnvConfig()


class Task(NamedTuple):
    """A task that exists. ``name`` is the part after the suite: a dm_control name or a Gymnasium id."""

    suite: Literal["dmc", "mujoco", "gym"]
    name: str

    def __str__(self) -> str:
        return f"{self.suite}/{self.name}"


def tasks() -> list[str]:
    """Every dm_control suite task and every Gymnasium MuJoCo task. ``gym/<Id>`` tasks are not listed."""
    return [f"dmc/{name}" for name in dmc.task_names()] + [f"mujoco/{name}" for name in _mujoco_ids("v5")]


def _mujoco_ids(*versions: str) -> list[str]:
    return [
        name
        for name, spec in registry.items()
        if str(spec.entry_point).startswith("gymnasium.envs.mujoco") and name.rpartition("-")[2] in versions
    ]


def resolve_task(task: str) -> Task:
    """Finds a task by its name.

    Raises:
        UnknownTask: there is none; says the closest names.
    """
    suite, _, name = task.partition("/")
    if suite == "dmc" and name in dmc.task_names():
        return Task("dmc", name)
    if suite == "mujoco" and name in _mujoco_ids("v4", "v5"):
        return Task("mujoco", name)
    if suite == "gym" and name:
        module, _, name_in_module = name.rpartition(":")
        with contextlib.suppress(gym.error.Error, ImportError):
            if module:
                importlib.import_module(module)
            gym.spec(name_in_module)
            return Task("gym", name)
    known = tasks() + [f"gym/{name}" for name in registry if "/" not in name]
    raise UnknownTask(f"There is no task {task!r}.{closest(task, known)} A task is {FORMS}.")


def closest(name: str, known: Iterable[str]) -> str:
    """For the end of an error message: the known names that ``name`` may have meant, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.3)
    return f" The closest: {', '.join(close)}." if close else ""


def default_action_repeat(task: str) -> int:
    """Simulator steps per action when the config does not say. Raises UnknownTask."""
    found = resolve_task(task)
    return DMC_ACTION_REPEAT.get(found.name.partition("-")[0], 2) if found.suite == "dmc" else 1


def action_repeat_of(task: str, config: EnvConfig) -> int:
    """Simulator steps per action on this task. Raises UnknownTask."""
    return config.action_repeat if config.action_repeat is not None else default_action_repeat(task)


def make_env(task: str, config: EnvConfig = DEFAULT, seed: int = 0) -> gym.Env:
    """Builds a task's environment.

    Actions are Box(-1, 1, (A,), float32). ``info["env_steps"]`` is the number of simulator steps that a step took.
    ``seed`` fixes every episode; see :class:`envs.wrappers.Episodes` for how to go back to one.

    Raises:
        UnknownTask: no such task.
        UnsupportedActionSpace: its actions are not a bounded box.
        UnsupportedSetting: it has no such camera, or no script.
        NoPhysics: the config wants the physics of a task without MuJoCo.
        NoOpenGL: at the first picture, on a machine that cannot draw.
        gymnasium.error.DependencyNotInstalled: it needs a package that is not installed.
    """
    found = resolve_task(task)
    env = _make_dmc(found, config) if found.suite == "dmc" else _make_gym(found, config)
    try:
        env = _common_stack(env, found, config)
    except BaseException:
        env.close()
        raise
    return Episodes(env, task, seed)


def _make_dmc(task: Task, config: EnvConfig) -> gym.Env:
    camera = DMC_CAMERA.get(task.name.partition("-")[0], 0) if config.camera is None else config.camera
    env: gym.Env = dmc.DMCEnv(
        task.name,
        camera,
        config.size,
        config.render,
        own_time_limit=config.time_limit is None,
        blind=config.obs == "pixels",
    )
    return env if config.time_limit is None else wrappers.TimeLimit(env, config.time_limit)


def _make_gym(task: Task, config: EnvConfig) -> gym.Env:
    """A Gymnasium task with its own time limit, whose ``render`` gives a square picture."""
    if is_manipulation(task.name):
        return make_manipulation(
            task.name,
            config.obs,
            size=config.size,
            profile=config.render,
            camera=config.camera,
            time_limit=config.time_limit,
        )
    from gymnasium.envs.mujoco import MujocoEnv  # which brings a window system, for nothing where all is dm_control

    is_mujoco = task.suite == "mujoco" or task.name in _mujoco_ids("v4", "v5")
    try:
        draws = not is_mujoco and (config.obs != "state" or _draws_itself(task.name))
        own_rendering = {"render_mode": "rgb_array"} if draws else {}
        env = gym.make(task.name, max_episode_steps=config.time_limit, disable_env_checker=True, **own_rendering)
    except ImportError as error:
        raise gym.error.DependencyNotInstalled(f"{task} cannot be made here: {error}") from error
    if isinstance(env.unwrapped, MujocoEnv):
        return Pictures(Divergence(env), config.size, _mujoco_camera(env.unwrapped, config))
    if config.camera is not None:
        raise UnsupportedSetting(f"{task} draws its own picture: it has no camera to choose, leave camera unset")
    return Pictures(env, config.size) if draws else env


def _draws_itself(name: str) -> bool:
    """Whether the environment says that it renders an rgb_array. Raises ImportError."""
    entry = gym.spec(name.rpartition(":")[2]).entry_point
    creator = load_env_creator(entry) if isinstance(entry, str) else entry
    return "rgb_array" in getattr(creator, "metadata", {}).get("render_modes", ())


def _mujoco_camera(env: MujocoEnv, config: EnvConfig) -> Camera:
    """The chosen camera; else the one named "track"; else a free one, placed as the environment says."""
    model = env.model
    index = config.camera
    if index is None:
        index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    view = fixed_view(model, index)
    if index == -1:
        reference = mujoco.MjData(model)  # not env.data: the view must not depend on the first episode
        mujoco.mj_forward(model, reference)
        view.lookat[:] = np.median(reference.geom_xpos, axis=0)
        view.distance = model.stat.extent
        for name, value in (env.mujoco_renderer.default_cam_config or {}).items():
            if isinstance(value, np.ndarray):
                getattr(view, name)[:] = value
            else:
                setattr(view, name, value)
    apply_profile(model, config.size, config.render)
    return Camera(model, env.data, view, config.size, config.render)


def _common_stack(env: gym.Env, task: Task, config: EnvConfig) -> gym.Env:
    """[-1, 1] actions, counted action repeat, and the observation that the config asks for."""
    space = env.action_space
    if not isinstance(space, gym.spaces.Box) or space.dtype.kind != "f" or len(space.shape) != 1:
        raise UnsupportedActionSpace(
            f"{task} has actions {space}; only a flat Box of real numbers is supported (discrete actions are not)"
        )
    if not np.isfinite([space.low, space.high]).all():
        raise UnsupportedActionSpace(f"{task} has unbounded actions {space}, which cannot be scaled to [-1, 1]")
    env = wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    if space.dtype != np.float32:
        env = wrappers.TransformAction(
            env, lambda action: action.astype(space.dtype), gym.spaces.Box(-1, 1, space.shape, np.float32)
        )
    env = wrappers.RecordEpisodeStatistics(env, buffer_length=1)  # inside the repeat: it counts simulator steps
    env = wrappers.RepeatAction(env, action_repeat_of(str(task), config))
    if config.obs != "pixels" and not isinstance(env.unwrapped, dmc.DMCEnv):
        env = _flat_float32(env)
    if config.obs != "state":
        env = wrappers.AddRenderObservation(env, render_only=config.obs == "pixels")
        env = _channels_first(env, config)
    if config.scripted:
        env = Scripted(env)
    return WithPhysics(env) if config.physics else env


def _flat_float32(env: gym.Env) -> gym.Env:
    env = wrappers.FlattenObservation(env)
    box = env.observation_space
    assert isinstance(box, gym.spaces.Box)
    space = gym.spaces.Box(box.low.astype(np.float32), box.high.astype(np.float32), dtype=np.float32)
    return wrappers.TransformObservation(env, lambda obs: obs.astype(np.float32), space)


def _channels_first(env: gym.Env, config: EnvConfig) -> gym.Env:
    image = gym.spaces.Box(0, 255, (3, config.size, config.size), np.uint8)
    if config.obs == "pixels":
        return wrappers.TransformObservation(env, _to_chw, image)
    assert isinstance(env.observation_space, gym.spaces.Dict)
    space = gym.spaces.Dict({"pixels": image, "state": env.observation_space["state"]})
    return wrappers.TransformObservation(env, lambda obs: {**obs, "pixels": _to_chw(obs["pixels"])}, space)


def _to_chw(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def make_registered(task: str, render_mode: str | None = None, seed: int = 0, **config: Any) -> gym.Env:
    """What ``gymnasium.make`` calls: the keywords are EnvConfig's fields. ``render`` always gives an rgb_array.

    Raises:
        TypeError: a keyword is not a field; says the closest.
        ValueError: another render_mode.
    """
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode must be rgb_array, not {render_mode!r}")
    names = [field.name for field in fields(EnvConfig)]
    for name in config:
        if name not in names:
            raise TypeError(f"{name!r} is no setting of a task.{closest(name, names)}")
    return make_env(task, EnvConfig(**config), seed)


def register_tasks() -> None:
    """Makes ``gymnasium.make("dmc/walker-walk-v0")`` and ``gymnasium.make("mujoco/Hopper-v5")`` work."""
    for task in tasks():
        name = f"{task}-v0" if task.startswith("dmc/") else task
        if name not in registry:
            gym.register(name, entry_point="envs.factory:make_registered", kwargs={"task": task})

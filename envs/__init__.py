"""Gymnasium environments for control from pixels: dm_control, MuJoCo, and any other task with continuous actions.

    env = make_env("dmc/cartpole-swingup", EnvConfig(obs="pixels", size=64), seed=1)

The OpenGL backend is chosen before MuJoCo is imported, here and not in whoever imports this package.
"""

# ruff: noqa: E402
from envs.opengl import NoOpenGL, choose_backend

choose_backend()

from envs.factory import (
    EnvConfig,
    Task,
    UnknownTask,
    UnsupportedActionSpace,
    action_repeat_of,
    closest,
    default_action_repeat,
    make_env,
    register_tasks,
    resolve_task,
    tasks,
)
from envs.physics import NoPhysics
from envs.vector import VectorEnv, WorkerFailure, make_vector_env
from envs.wrappers import EnvironmentFault, UnsupportedSetting, episode_seed

register_tasks()

__all__ = [
    "EnvConfig",
    "EnvironmentFault",
    "NoOpenGL",
    "NoPhysics",
    "Task",
    "UnknownTask",
    "UnsupportedActionSpace",
    "UnsupportedSetting",
    "VectorEnv",
    "WorkerFailure",
    "action_repeat_of",
    "choose_backend",
    "closest",
    "default_action_repeat",
    "episode_seed",
    "make_env",
    "make_vector_env",
    "resolve_task",
    "tasks",
]

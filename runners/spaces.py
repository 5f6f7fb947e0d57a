"""What Stable-Baselines3 and its users call an environment: which of them an agent here can learn, and its spaces."""

from __future__ import annotations

import contextlib
from functools import partial

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float, Shaped
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import Tensor

from envs import EnvConfig, UnsupportedActionSpace, episode_seed, make_env, resolve_task
from runners.config import Config, ConfigError

TaskOrEnv = str | gym.Env | VecEnv


def task_name(env: TaskOrEnv) -> str:
    """The task of a name, with or without the -v0 of ``gymnasium.make``; of an environment, the id it was made by.

    Raises:
        envs.UnknownTask: a name of no task; says the closest.
    """
    if isinstance(env, str):
        return str(resolve_task(env.removesuffix("-v0") if env.startswith("dmc/") else env))
    spec = None
    with contextlib.suppress(AttributeError, NotImplementedError):  # a VecEnv need not be made of Gymnasium's
        spec = env.get_attr("spec", 0)[0] if isinstance(env, VecEnv) else env.spec
    return type(env.unwrapped).__name__ if spec is None else str(spec.id)


def observes(env: gym.Env | VecEnv) -> str:
    """state or pixels, as ``EnvConfig.obs``."""
    return "state" if len(env.observation_space.shape or ()) == 1 else "pixels"


def as_vec_env(env: TaskOrEnv, config: Config, *, verbose: int) -> VecEnv:
    """``env`` as Stable-Baselines3 wraps it, images channel-first. A task's name gives ``config.num_envs`` copies in
    this process, which play the episodes of ``runners.train`` with the same seed; anything else is seeded here.

    Raises:
        ConfigError: observations that no world model here reads.
        UnsupportedActionSpace: actions that are not a bounded, flat box of real numbers.
    """
    if isinstance(env, str):
        task = task_name(env)
        seeds = [episode_seed(config.seed, i) for i in range(config.num_envs)]
        copies = DummyVecEnv([partial(_monitored, task, config.env, seed) for seed in seeds])
        boxes(copies.observation_space, copies.action_space)
        return BaseAlgorithm._wrap_env(copies, verbose)
    boxes(env.observation_space, env.action_space)
    wrapped = BaseAlgorithm._wrap_env(env, verbose)
    wrapped.seed(config.seed)
    return wrapped


def _monitored(task: str, config: EnvConfig, seed: int) -> gym.Env:
    return Monitor(make_env(task, config, seed))


def boxes(observations: gym.Space, actions: gym.Space) -> tuple[gym.spaces.Box, gym.spaces.Box]:
    """The spaces of an environment, if they can be learned. Raises what :func:`as_vec_env` does."""
    box = observations if isinstance(observations, gym.spaces.Box) else None
    if box is None or not (len(box.shape) == 1 or is_image_space(box)):
        what = "a Dict" if isinstance(observations, gym.spaces.Dict) else _one_line(observations)
        raise ConfigError(
            f"the world model reads images, (H, W, C) or (C, H, W) uint8 from 0 to 255, or vectors, not {what}; choose "
            "or flatten the observations, as with gymnasium.wrappers.FlattenObservation"
        )
    if not isinstance(actions, gym.spaces.Box) or actions.dtype.kind != "f" or len(actions.shape) != 1:
        raise UnsupportedActionSpace(
            f"the environment has actions {_one_line(actions)}; only a flat Box of real numbers is supported (discrete "
            "actions are not)"
        )
    if not np.isfinite([actions.low, actions.high]).all():
        raise UnsupportedActionSpace(f"actions {_one_line(actions)} are unbounded and cannot be scaled to [-1, 1]")
    return box, actions


def _one_line(space: gym.Space) -> str:
    return " ".join(str(space).split())


def refuse_other_spaces(
    env: VecEnv, name: str, observations: gym.spaces.Box, actions: gym.spaces.Box, task: str
) -> None:
    """Raises ValueError where ``env``, called ``name``, has other spaces than a model has learned, on ``task``."""
    others = boxes(env.observation_space, env.action_space)
    for what, own, other in zip(("observations", "actions"), (observations, actions), others, strict=True):
        sizes = [f"{space.dtype} of shape {space.shape}" for space in (own, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the model has learned {task}, whose {what} are {sizes[0]}; those of {name} are {sizes[1]}"
            )
        if own != other:
            raise ValueError(f"the model has learned {task}, whose {what} have other bounds than {name}'s")


def to_space(action: Float[np.ndarray, "E A"], space: gym.spaces.Box) -> Float[np.ndarray, "E A"]:
    """Actions in [-1, 1] as the environment counts them."""
    if (space.low == -1).all() and (space.high == 1).all():
        return action
    scaled = space.low + 0.5 * (action + 1) * (space.high - space.low)
    return np.clip(scaled, space.low, space.high).astype(space.dtype)


def readable(obs: Shaped[np.ndarray, "E *obs"]) -> Shaped[np.ndarray, "E *obs"]:
    """Images as they are, vectors as float32: what a replay holds and a world model reads. A copy, because some
    vector environments answer with the same array again and again."""
    return np.array(obs, np.uint8 if obs.ndim == 4 else np.float32)


def bounds(space: gym.spaces.Box) -> dict[str, Tensor]:
    """A box as tensors, for a checkpoint."""
    return {"low": torch.as_tensor(space.low), "high": torch.as_tensor(space.high)}


def box_of(bounds: dict[str, Tensor]) -> gym.spaces.Box:
    """The inverse of :func:`bounds`."""
    low, high = bounds["low"].numpy(), bounds["high"].numpy()
    return gym.spaces.Box(low, high, dtype=low.dtype.type)

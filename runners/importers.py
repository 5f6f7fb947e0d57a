"""Datasets of others as episodes of ours: stable-worldmodel's HDF5 files, and Minari.

Both packages are extras. Actions are brought into [-1, 1] and pictures into (C, H, W); what actions were divided by
stands in dataset.json.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

from envs import EnvConfig, UnknownTask, resolve_task
from runners.dataset_folder import About, DatasetError, Episode

_LOG = logging.getLogger(__name__)


def _extra(module: str, extra: str) -> ModuleType:
    """An optional package. Raises DatasetError, with the command that installs it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DatasetError(
            f"{module} is not installed ({error}); install it with pip install -e '.[{extra}]', then run this again"
        ) from error


# -- stable-worldmodel's HDF5 ------------------------------------------------------------------------------------------


def from_hdf5(path: Path, about: About, *, column: str, resize: int | None) -> tuple[int, Iterator[Episode]]:
    """How many episodes an HDF5 file of stable-worldmodel has, and they themselves.

    Its layout: columns of all rows one after another (``pixels`` (N,H,W,3), ``action`` (N,A), and maybe ``reward`` and
    ``terminated``), with each episode's first row and length in ``ep_offset`` and ``ep_len``. Row t holds what arrived
    at t and the action that left; the last row's action means nothing. Without rewards they are zeros.

    Args:
        about: learns the policy and how actions were scaled.
        column: what becomes the observation.

    Raises:
        DatasetError: no such file, another layout, a truncated or an empty one.
    """
    h5py = _extra("h5py", "hdf5")
    with contextlib.suppress(ImportError):
        importlib.import_module("hdf5plugin")  # knows the compressions that HDF5 itself does not
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path} cannot be read as HDF5: {error}") from error
    try:
        offsets, lengths, actions = _check_columns(path, file, column)
    except BaseException:
        file.close()
        raise
    ends = np.isin(np.arange(len(actions)), offsets + lengths - 1)
    about.policy, about.seed = str(path), None
    scale = _fill_scale(about, np.abs(actions[~ends]).max(0, initial=0))
    return len(offsets), _hdf5_episodes(path, file, column, resize, zip(offsets, lengths, strict=True), actions / scale)


def _check_columns(path: Path, file: Any, column: str) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, "N A"]]:
    """First rows and lengths of all episodes of at least two rows, and every row's action."""
    for name in ("ep_offset", "ep_len", "action", column):
        if name not in file:
            raise DatasetError(
                f"{path} has no column {name!r}; it has {', '.join(sorted(file))}"
                + ("; choose one to observe with --column" if name == column else "")
            )
    offsets, lengths = np.asarray(file["ep_offset"], np.int64), np.asarray(file["ep_len"], np.int64)
    rows = min(len(file["action"]), len(file[column]))
    if len(offsets) != len(lengths) or (len(offsets) and (offsets + lengths).max() > rows):
        raise DatasetError(
            f"{path} is truncated: its {len(lengths)} episodes need {(offsets + lengths).max()} rows, but {column} and "
            f"action hold {rows}"
        )
    long = lengths >= 2
    if not long.any():
        raise DatasetError(f"{path} holds no episode of at least two rows")
    if not long.all():
        _LOG.warning("%s: %d episodes of a single row are left out", path, (~long).sum())
    actions = np.asarray(file["action"], np.float64)
    return offsets[long], lengths[long], actions.reshape(len(actions), -1)


def _hdf5_episodes(
    path: Path, file: Any, column: str, resize: int | None, spans: Any, actions: Float[np.ndarray, "N A"]
) -> Iterator[Episode]:
    with file:
        for first, length in spans:
            rows, last = slice(first, first + length), first + length - 1
            try:
                obs = _observations(file[column][rows], resize)
                reward = file["reward"][rows][1:] if "reward" in file else np.zeros(length - 1)
                terminated = bool(np.any(file["terminated"][last])) if "terminated" in file else False
            except OSError as error:
                raise DatasetError(
                    f"{path} cannot be read: {error}; it is damaged, or compressed in a way that needs hdf5plugin"
                ) from error
            yield Episode(obs, actions[first:last], np.asarray(reward, np.float32).reshape(-1), terminated)


# -- Minari ------------------------------------------------------------------------------------------------------------


def from_minari(name: str, about: About, *, resize: int | None) -> tuple[int, Iterator[Episode]]:
    """How many episodes the Minari dataset ``name`` has, and they themselves. Downloads it if need be.

    Pictures stay pictures; a Box or a Dict of numbers becomes one state vector.

    Args:
        about: learns the policy, the task where it is one of ours, and how actions were scaled.

    Raises:
        DatasetError: there is none, it cannot be downloaded, it is empty, or its actions are not continuous.
    """
    minari = _extra("minari", "minari")
    try:
        data = minari.load_dataset(name, download=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise DatasetError(f"the Minari dataset {name!r} cannot be loaded: {error}") from error
    space = data.action_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise DatasetError(f"{name} has actions {space}; only a flat Box of real numbers can be imported")
    if data.total_episodes == 0:
        raise DatasetError(f"the Minari dataset {name!r} holds no episode")
    about.policy, about.seed = f"minari/{name}", None
    if about.task is None and (task := _task_of(data)) is not None:
        about.task, about.env = task, EnvConfig(obs="state", action_repeat=1)
    limits = np.maximum(np.abs(space.low), np.abs(space.high)).astype(np.float64)
    if not np.isfinite(limits).all():
        limits = np.max([np.abs(episode.actions).max(0) for episode in data.iterate_episodes()], axis=0)
    return data.total_episodes, _minari_episodes(data, _fill_scale(about, limits), resize)


def _task_of(data: Any) -> str | None:
    """Our name of the task that the data are of, if it is one of ours."""
    spec = getattr(data, "env_spec", None)
    for task in [] if spec is None else [f"mujoco/{spec.id}", f"gym/{spec.id}"]:
        with contextlib.suppress(UnknownTask):
            resolve_task(task)
            return task
    return None


def _minari_episodes(data: Any, scale: Float[np.ndarray, " A"], resize: int | None) -> Iterator[Episode]:
    for episode in data.iterate_episodes():
        obs = episode.observations
        if isinstance(obs, dict):
            rows = len(episode.actions) + 1
            obs = np.concatenate([np.asarray(part, np.float32).reshape(rows, -1) for part in _leaves(obs)], axis=1)
        yield Episode(
            _observations(np.asarray(obs), resize),
            episode.actions / scale,
            np.asarray(episode.rewards, np.float32),
            bool(episode.terminations[-1]) if len(episode.terminations) else False,
        )


def _leaves(obs: dict[str, Any]) -> Iterator[Any]:
    for name in sorted(obs):
        yield from _leaves(obs[name]) if isinstance(obs[name], dict) else [obs[name]]


# -- both --------------------------------------------------------------------------------------------------------------


def _fill_scale(about: About, limits: Float[np.ndarray, " A"]) -> Float[np.ndarray, " A"]:
    """What to divide actions by. Those that lie in [-1, 1] already stay as they are."""
    if not np.isfinite(limits).all():
        raise DatasetError(f"{about.policy} has NaN or inf among its actions")
    scale = np.maximum(limits, 1.0)
    if (scale > 1).any():
        about.action_scale = scale.tolist()
    return scale


def _observations(rows: np.ndarray, resize: int | None) -> Shaped[np.ndarray, "L ..."]:
    """Pictures (L,H,W,3) as (L,3,H,W) uint8, square of side ``resize`` if given; anything else as (L,S) float32."""
    if rows.ndim != 4:
        return rows.reshape(len(rows), -1).astype(np.float32)
    if rows.dtype != np.uint8 or rows.shape[-1] != 3:
        raise DatasetError(f"pictures of the shape {rows.shape[1:]} and type {rows.dtype} are not (H, W, 3) uint8")
    if resize is not None and rows.shape[1:3] != (resize, resize):
        box = Image.Resampling.BOX
        rows = np.stack([np.asarray(Image.fromarray(row).resize((resize, resize), box)) for row in rows])
    return np.ascontiguousarray(rows.transpose(0, 3, 1, 2))

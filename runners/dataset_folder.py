"""A dataset's folder: the replay's format, with the physical states behind it and a word on its origin.

data/reacher/
    index.json obs.npy action.npy …   one stream of whole episodes, as ``replay_folder`` says
    physics.npy                       (rows, S) float64, the simulator's state at each row, where there is one
    dataset.json                      task, environment, policy, seed; returns, lengths and starts of the episodes
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Shaped

from envs import EnvConfig
from runners.config import read_config
from runners.disk import clear_disk_full, new_folder, replace_file
from runners.replay_folder import Index, ReplayError
from worldmodels.interface import Batch

_ABOUT = "dataset.json"


class DatasetError(ReplayError):
    """A dataset cannot be read, written or used as asked. The message says why."""


class Episode(NamedTuple):
    """A whole episode of L observations, with what happened between them."""

    obs: Shaped[np.ndarray, "L ..."]
    action: Float[np.ndarray, "L1 A"]
    """L1 = L − 1 actions in [-1, 1]; action t leads from obs t to obs t + 1."""
    reward: Float[np.ndarray, " L1"]
    """Reward t came with obs t + 1."""
    terminated: bool
    """Whether it ended by itself; otherwise its time was up."""
    physics: Float64[np.ndarray, "L S"] | None = None
    start: tuple[int, int] | None = None
    """The seed and the number of the episode, as ``envs.wrappers.Episodes`` counts them."""


@dataclass
class About:
    """Where a dataset comes from: dataset.json."""

    policy: str
    """Who acted, or which dataset of others it was."""
    task: str | None = None
    env: EnvConfig | None = None
    seed: int | None = None
    physics: list[str] | None = None
    """What each column of physics.npy is."""
    action_scale: list[float] | None = None
    """What an imported dataset's actions were divided by, so that they lie in [-1, 1]."""
    command: str = field(default_factory=lambda: shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]))
    date: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))
    episodes: int = 0
    rows: int = 0
    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Rows of each episode, one more than its agent steps."""
    starts: list[list[int]] | None = None
    """The seed and the number of each episode. ``env.reset(seed=seed, options={"episode": number})`` begins it again,
    with all that it drew at its start."""

    @classmethod
    def read(cls, path: Path) -> About | None:
        """That of the dataset in ``path``; of a training run's replay what the run's configuration says; else None.

        Raises:
            DatasetError: it cannot be read.
        """
        file = path / _ABOUT
        if not file.exists():
            if not (path.parent / "config.json").exists():
                return None
            run = read_config(path.parent)
            return cls(policy=str(path.parent), task=run.task, env=run.env, seed=run.seed, command="", date="")
        try:
            values = json.loads(file.read_bytes())
            values["env"] = None if values["env"] is None else EnvConfig(**values["env"])
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(f"{path} is damaged: {_ABOUT} cannot be read ({error!r})") from error


def write_dataset(path: Path, episodes: Iterable[Episode], about: About) -> None:
    """Write all ``episodes`` into the new folder ``path``, whole or not at all.

    Args:
        about: what it says of returns, lengths and starts is filled in.

    Raises:
        DatasetError: ``path`` exists; no episodes; one that breaks the timeline.
        DiskFull: nothing is left behind.
    """
    if path.exists():
        raise DatasetError(f"{path} exists; choose another --out, or remove it")
    with clear_disk_full(path), new_folder(path) as folder, ExitStack() as opened:
        arrays: dict[str, _GrowingArray] = {}
        for number, episode in enumerate(episodes):
            rows = _rows(episode, number)
            if not arrays:
                arrays = {name: _GrowingArray(folder / f"{name}.npy", rows[name]) for name in rows}
                for array in arrays.values():
                    opened.callback(array.close)
            if rows.keys() != arrays.keys():
                raise DatasetError(f"episode {number} has the parts {', '.join(rows)}, the others {', '.join(arrays)}")
            for name, array in arrays.items():
                array.append(rows[name], number)
            about.returns.append(float(episode.reward.sum()))
            about.lengths.append(len(episode.obs))
            if episode.start is not None:
                about.starts = [*(about.starts or []), list(episode.start)]
        if not arrays:
            raise DatasetError(f"there is no complete episode to write, so {path} was not made")
        about.episodes, about.rows = len(about.lengths), sum(about.lengths)
        for name in Batch._fields:
            arrays[name].append_blank()  # the replay keeps at least one spare row
        index = Index(1, about.rows, about.rows + 1, 1, {n: arrays[n].row for n in Batch._fields}, written=about.rows)
        replace_file(folder / "index.json", index.to_json())
        replace_file(folder / _ABOUT, json.dumps(dataclasses.asdict(about), indent=1).encode())


def _rows(episode: Episode, number: int) -> dict[str, np.ndarray]:
    """An episode as rows of the timeline, each field (L, …); replay fields get an axis for their one stream."""
    length = len(episode.obs)
    if length < 2 or len(episode.action) != length - 1 or len(episode.reward) != length - 1:
        raise DatasetError(
            f"episode {number} has {length} observations, {len(episode.action)} actions and {len(episode.reward)} "
            "rewards; it takes at least 2 observations and one action and reward between any two"
        )
    action = np.asarray(episode.action, np.float32)
    for name, values in (("actions", action), ("rewards", episode.reward)):
        if not np.isfinite(values).all():
            raise DatasetError(f"episode {number} has NaN or inf among its {name}")
    if np.abs(action).max(initial=0) > 1 + 1e-5:
        raise DatasetError(f"episode {number} has actions up to {np.abs(action).max():g}, but they must lie in [-1, 1]")
    step = np.arange(length)
    fields = {
        "obs": episode.obs if episode.obs.dtype == np.uint8 else episode.obs.astype(np.float32),
        "action": np.concatenate([action.clip(-1, 1), np.zeros_like(action[:1])]),
        "reward": np.concatenate([[0], episode.reward]).astype(np.float32),
        "is_first": step == 0,
        "is_last": step == length - 1,
        "is_terminal": (step == length - 1) & bool(episode.terminated),
    }
    rows = {name: values[:, None] for name, values in fields.items()}
    return rows if episode.physics is None else rows | {"physics": np.asarray(episode.physics, np.float64)}


class _GrowingArray:
    """An ``.npy`` file whose number of rows is known at its end only."""

    def __init__(self, path: Path, like: np.ndarray) -> None:
        self._name, self._dtype, self._shape, self._length = path.stem, like.dtype, like.shape[1:], 0
        self._file = path.open("xb")
        self._write_header()
        self._start = self._file.tell()

    @property
    def row(self) -> tuple[str, tuple[int, ...]]:
        """dtype, and shape of one row in one stream."""
        return self._dtype.name, self._shape[1:]

    def append(self, rows: np.ndarray, number: int) -> None:
        if rows.dtype != self._dtype or rows.shape[1:] != self._shape:
            raise DatasetError(
                f"{self._name} of episode {number} is {rows.dtype} {rows.shape[1:]}, but that of the first one is "
                f"{self._dtype} {self._shape}"
            )
        self._file.write(np.ascontiguousarray(rows).tobytes())
        self._length += len(rows)

    def append_blank(self) -> None:
        self.append(np.zeros((1, *self._shape), self._dtype), -1)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._start  # NumPy leaves room for the first axis to grow
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write_header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._length, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)

"""The replay's folder: one ``.npy`` file for each field, shaped (slots, streams, …), and ``index.json``.

Row t of all streams lies in slot ``t % slots``, and rows are numbered without end. The index says which of them are
whole; it is replaced atomically, after the rows it speaks of are on the disk.

Of ``slots`` at most ``capacity`` hold rows to read; the rest is spare. So a writer that was killed ``flush_every`` rows
after its last flush has overwritten only spare slots, and what the index says is true without any repair.

Rows are written with ``pwrite``, where a full disk is an error and not a fatal signal, and read through read-only maps.
What the kernel caches of them counts as file pages of the process (RssFile), which it takes back when memory runs
short, never as the process's own (RssAnon).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from runners.disk import DiskFull, clear_disk_full, discard_folder, new_folder, replace_file
from worldmodels.interface import Batch

_FORMAT = "ledream-replay"
_VERSION = 1
_INDEX = "index.json"
_LOCK = "writer.lock"


class ReplayError(RuntimeError):
    """A folder is not a replay, or a damaged one, or in use. The message says which."""


@dataclass
class Index:
    """What index.json says. Everything counts rows of one stream: every row has one part in each stream."""

    streams: int
    capacity: int
    slots: int
    flush_every: int
    fields: dict[str, tuple[str, tuple[int, ...]]]
    """dtype, and shape of one row in one stream."""
    written: int = 0
    floor: int = 0
    """Rows below it are gone, whatever the capacity says."""

    @property
    def oldest(self) -> int:
        """Rows oldest … written-1 are held."""
        return max(self.floor, self.written - self.capacity)

    @property
    def nbytes(self) -> int:
        row = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in self.fields.values())
        return row * self.streams * self.slots

    def to_json(self) -> bytes:
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=1).encode()

    @classmethod
    def read(cls, path: Path) -> Index:
        """Raises ReplayError unless ``path`` holds a sound index of this version."""
        file = path / _INDEX
        if not file.is_file():
            raise ReplayError(f"{path} is not a replay: it has no {_INDEX}")
        try:
            values = json.loads(file.read_bytes())
            if values.pop("format") != _FORMAT:
                raise ReplayError(f"{path} is not a replay: its {_INDEX} is of something else")
            if (version := values.pop("version")) != _VERSION:
                raise ReplayError(f"{path} is a replay of version {version}; this program reads version {_VERSION}")
            values["fields"] = {name: (str(dtype), tuple(shape)) for name, (dtype, shape) in values["fields"].items()}
            index = cls(**values)
            sound = index._is_sound()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReplayError(f"{path} is damaged: {_INDEX} cannot be read ({error!r})") from error
        if not sound:
            raise ReplayError(f"{path} is damaged: what {_INDEX} says contradicts itself")
        return index

    def _is_sound(self) -> bool:
        return (
            tuple(self.fields) == Batch._fields
            and all(dtype in ("uint8", "float32", "bool") for dtype, _ in self.fields.values())
            and min(self.streams, self.capacity, self.flush_every) >= 1
            and self.slots >= self.capacity + self.flush_every
            and 0 <= self.floor <= self.written
        )


class ReplayFolder:
    """The arrays of a replay. ``rows`` holds each field flattened to (slots·streams, …), read-only.

    Raises:
        ReplayError: no replay, a damaged one, one of another version; when ``writable``, one that is being written.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path = path
        self.index = Index.read(path)
        maps = {name: self._map(name) for name in self.index.fields}
        self._offsets = {name: array.offset for name, array in maps.items()}
        self.rows = {name: np.asarray(array).reshape(-1, *array.shape[2:]) for name, array in maps.items()}
        self._lock = _lock(path) if writable else None
        self._files = {name: os.open(path / f"{name}.npy", os.O_RDWR) for name in self.index.fields if writable}

    @classmethod
    def create(cls, path: Path, index: Index, *, replace: bool) -> ReplayFolder:
        """An empty one, made whole or not at all, and open for writing.

        Raises:
            ReplayError: ``path`` holds something else, or a replay and not ``replace``.
            DiskFull: the disk has no room for all of it.
        """
        occupied = path.exists() and not (path.is_dir() and not any(path.iterdir()))
        if occupied and not (path / _INDEX).is_file():
            raise ReplayError(f"{path} exists and is not a replay; choose another folder")
        if occupied and not replace:
            raise ReplayError(f"{path} already holds a replay; open it, or choose another folder")
        if occupied:
            os.close(_lock(path))
            discard_folder(path)
        with clear_disk_full(path), new_folder(path) as folder:
            free = shutil.disk_usage(folder).free
            if index.nbytes > free:
                raise DiskFull(
                    f"the replay {path} needs {index.nbytes / 1e9:.2f} GB, but its disk has only {free / 1e9:.2f} GB "
                    "left; lower its capacity or choose another disk"
                )
            for name, (dtype, shape) in index.fields.items():
                # Sparse: blocks are taken as rows come.
                np.lib.format.open_memmap(
                    folder / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=(index.slots, index.streams, *shape)
                )
            replace_file(folder / _INDEX, index.to_json())
        return cls(path, writable=True)

    def row(self, name: str, number: int) -> Shaped[np.ndarray, "E ..."]:
        """One row of all streams."""
        first = number % self.index.slots * self.index.streams
        return self.rows[name][first : first + self.index.streams]

    def write(self, number: int, values: Mapping[str, Shaped[np.ndarray, "E ..."]]) -> None:
        """Write fields of one row, of the arrays' own dtypes. The index stays as it is.

        Raises:
            DiskFull: parts of the row may have been written.
        """
        self.require_writable()
        slot = number % self.index.slots
        with clear_disk_full(self.path):
            for name, value in values.items():
                data, offset = value.tobytes(), self._offsets[name] + slot * value.nbytes
                while data:  # a write may stop short; the next one says why
                    done = os.pwrite(self._files[name], data, offset)
                    data, offset = data[done:], offset + done

    def flush(self) -> None:
        """Wait until all rows are on the disk, then replace the index.

        Raises:
            DiskFull: the index on the disk is still the old one.
        """
        self.require_writable()
        with clear_disk_full(self.path):
            for file in self._files.values():
                os.fsync(file)
            replace_file(self.path / _INDEX, self.index.to_json())

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        if self._lock is not None:
            os.close(self._lock)
        self._files, self._lock, self.rows = {}, None, {}

    def require_writable(self) -> None:
        if not self._files:
            raise ReplayError(f"{self.path} is closed or open for reading only; open it with mode 'r+' to change it")

    def _map(self, name: str) -> np.memmap:
        dtype, shape = self.index.fields[name]
        expected = (self.index.slots, self.index.streams, *shape)
        try:
            array = np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError, TypeError, SyntaxError) as error:
            raise ReplayError(f"{self.path} is damaged: {name}.npy cannot be read ({error})") from error
        found = (getattr(array, "dtype", None), getattr(array, "shape", None))
        if found != (np.dtype(dtype), expected) or not array.flags.c_contiguous:
            raise ReplayError(f"{self.path} is damaged: {name}.npy is not the {dtype} array {expected} of its {_INDEX}")
        return array


def _lock(path: Path) -> int:
    """A lock that lasts until it is closed or the process ends, however it ends; child processes do not inherit it."""
    fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        os.close(fd)
        raise ReplayError(f"{path} is being written by another process; wait for it or stop it") from error
    return fd

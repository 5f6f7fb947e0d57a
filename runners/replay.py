"""The replay: a ring of rows from several environment streams, sampled as sequences.

It lives in a folder of memory-mapped arrays (``replay_folder`` says how), which is buffer, resume point and dataset at
once: ``Replay.open("runs/a/replay")`` is all it takes to read one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from agents.captured import send
from runners.replay_folder import Index, ReplayError, ReplayFolder
from worldmodels.interface import Batch

__all__ = ["Replay", "ReplayError"]

_COPY_ROWS = 1024


class Replay:
    """Rows of several environment streams, the oldest overwritten first, sampled as sequences.

    Made by :meth:`create` or :meth:`open`. ``streams`` is the number E of environments; ``device`` is where samples
    arrive, the CPU until :meth:`place` says otherwise.
    """

    def __init__(self, folder: ReplayFolder, *, writable: bool) -> None:
        self.path = folder.path
        self.streams = folder.index.streams
        self.device = torch.device("cpu")
        self._folder = folder
        self._index = folder.index
        self._flushed = self._index.written
        # Rows from here on were never written. Whoever wrote last may have been killed in the middle of its interval.
        self._high = self._index.written + (self._index.flush_every if writable else 0)
        self._mirror: dict[str, Tensor] | None = None
        self._travels: torch.cuda.Stream | None = None
        self._unfinished = self._read_unfinished()

    # -- making and opening --------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        capacity: int,
        num_envs: int,
        obs_shape: tuple[int, ...],
        obs_dtype: Any,
        action_dim: int,
        spare: int | None = None,
        flush_every: int = 1000,
        replace: bool = False,
    ) -> Replay:
        """A new, empty replay in the folder ``path``, open for writing.

        Args:
            capacity: rows over all streams.
            obs_dtype: uint8 for pixels; everything else is stored as float32.
            spare: rows over all streams that the disk holds beyond ``capacity``, so that going back to a checkpoint up
                to so many rows old loses nothing; at least ``flush_every``, by default 5 % of the capacity.
            flush_every: rows over all streams between flushes, the most that kill -9 loses.
            replace: delete the replay that ``path`` may hold.

        Raises:
            ReplayError: ``path`` holds something else, or a replay and not ``replace``.
            DiskFull: the disk has no room for all of it.
            ValueError: numbers that make no replay.
        """
        if min(num_envs, action_dim, flush_every) < 1 or capacity < num_envs:
            raise ValueError(
                f"a replay needs room for a row of each environment, got capacity {capacity}, num_envs {num_envs}, "
                f"action_dim {action_dim}, flush_every {flush_every}"
            )
        rows, interval = capacity // num_envs, -(-flush_every // num_envs)
        extra = max(interval, -(-(capacity // 20 if spare is None else spare) // num_envs))
        fields: dict[str, tuple[str, tuple[int, ...]]] = {
            "obs": ("uint8" if np.dtype(obs_dtype) == np.uint8 else "float32", tuple(obs_shape)),
            "action": ("float32", (action_dim,)),
            "reward": ("float32", ()),
            "is_first": ("bool", ()),
            "is_last": ("bool", ()),
            "is_terminal": ("bool", ()),
        }
        index = Index(num_envs, rows, rows + extra, interval, fields)
        return cls(ReplayFolder.create(Path(path), index, replace=replace), writable=True)

    @classmethod
    def open(cls, path: str | Path, mode: Literal["r", "r+"] = "r") -> Replay:
        """An existing replay as of its last flush. ``r`` never writes; ``r+`` goes on where it stopped.

        Going on means that the next row continues each stream's episode, or begins a new one by ``is_first``. A reader
        keeps the view it opened with, which stays right until a writer has added as many rows as are spare.

        Raises:
            ReplayError: no replay, a damaged one, one of another version, or for ``r+`` one that is being written.
        """
        if mode not in ("r", "r+"):
            raise ValueError(f"mode is {mode!r}, but must be 'r' or 'r+'")
        writable = mode == "r+"
        return cls(ReplayFolder(Path(path), writable=writable), writable=writable)

    def place(self, device: torch.device | str, *, mirror: bool | None = None) -> None:
        """Let samples arrive on ``device``.

        Args:
            mirror: keep a copy of all rows there, so that sampling is a gather on the device without a trip through the
                host. None: on a GPU, if the copy fits into half of its free memory.
        """
        self.device = torch.device(device)
        self._travels = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if mirror is None:
            mirror = self.device.type == "cuda" and self.nbytes <= torch.cuda.mem_get_info(self.device)[0] // 2
        self._mirror = None  # frees an old copy before the new one is made
        if mirror:
            held = min(self._high, self._index.slots) * self.streams
            self._mirror = {name: _copy_to(array, held, self.device) for name, array in self._folder.rows.items()}

    # -- what it holds -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows over all streams."""
        return self.rows_per_stream * self.streams

    @property
    def rows_per_stream(self) -> int:
        return self._index.written - self._index.oldest

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, filled or not."""
        return self._index.nbytes

    def sample(self, batch: int, length: int, generator: np.random.Generator) -> Batch:
        """``batch`` sequences of ``length`` consecutive rows, uniform over all starts in all streams.

        They may span episodes, as ``is_first`` marks, but never the seam between the newest row and the oldest. The
        same generator state gives the same batch.

        Raises:
            ValueError: sequences longer than what a stream holds.
        """
        if batch < 1 or length < 1:
            raise ValueError(f"a sample is at least 1 sequence of 1 row, got batch {batch}, length {length}")
        starts = self.rows_per_stream - length + 1
        if starts < 1:
            raise ValueError(
                f"T={length} is longer than the replay, which holds {self.rows_per_stream} rows per stream; collect "
                "more (prefill) or lower the batch length"
            )
        stream, start = np.divmod(generator.integers(0, self.streams * starts, size=batch), starts)
        return self.take(stream, start, length)

    def take(self, stream: Int64[np.ndarray, " B"], start: Int64[np.ndarray, " B"], length: int) -> Batch:
        """The ``length`` consecutive rows of each ``stream`` from ``start`` on, counted from the oldest row.

        Raises:
            ValueError: rows or streams that are not there.
        """
        known = (stream >= 0) & (stream < self.streams) & (start >= 0) & (start + length <= self.rows_per_stream)
        if not known.all():
            raise ValueError(f"{length} rows from {start} on are not within {self.rows_per_stream} rows per stream")
        return self._gather(self._places(start[:, None] + np.arange(length), stream[:, None]))

    def spans(self) -> Int64[np.ndarray, "N 3"]:
        """Where every complete episode lies, stream by stream, oldest first: its stream, its first row counted from the
        oldest one held, and how many rows it has."""
        every, spans = np.arange(self.rows_per_stream), []
        for stream in range(self.streams):
            places = self._places(every, np.array(stream))
            ends = np.flatnonzero(self._folder.rows["is_last"][places])
            for first in np.flatnonzero(self._folder.rows["is_first"][places]):
                after = ends[np.searchsorted(ends, first) :]
                if len(after):
                    spans.append((stream, first, after[0] + 1 - first))
        return np.array(spans, np.int64).reshape(-1, 3)

    def episodes(self) -> Iterator[dict[str, Shaped[np.ndarray, "L ..."]]]:
        """Every complete episode, stream by stream, oldest first: each field of a Batch as (L, …)."""
        for stream, first, length in self.spans():
            episode = self._places(first + np.arange(length), stream)
            yield {name: array[episode] for name, array in self._folder.rows.items()}

    def _places(self, row: Int64[np.ndarray, "..."], stream: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
        """Where rows, counted from the oldest, lie in the arrays flattened over slots and streams."""
        return (self._index.oldest + row) % self._index.slots * self.streams + stream

    def _gather(self, places: Int64[np.ndarray, "B T"]) -> Batch:
        if self._mirror is not None:
            index = send(places.reshape(-1), self.device)
            return Batch(*(x.index_select(0, index).view(*places.shape, *x.shape[1:]) for x in self._mirror.values()))
        fields, on_gpu = [], self.device.type == "cuda"
        for array in self._folder.rows.values():
            out = torch.empty((*places.shape, *array.shape[1:]), dtype=_torch_type(array), pin_memory=on_gpu)
            # Every place is valid; mode "raise" would go through a second buffer.
            np.take(array, places, axis=0, out=out.numpy(), mode="clip")
            fields.append(out)
        return self._prefetch(Batch(*fields))

    def _prefetch(self, batch: Batch) -> Batch:
        """On a GPU the batch travels beside the updates that are still queued; only the next one waits for it."""
        if self._travels is None:
            return batch
        with torch.cuda.stream(self._travels):
            arrived = [send(x, self.device) for x in batch]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._travels)
        for x in arrived:
            x.record_stream(current)
        return Batch(*arrived)

    # -- writing -------------------------------------------------------------------------------------------------------

    def add(
        self,
        *,
        obs: Shaped[np.ndarray, "E ..."],
        action: Float[np.ndarray, "E A"],
        reward: Float[np.ndarray, " E"],
        is_first: Bool[np.ndarray, " E"],
        is_last: Bool[np.ndarray, " E"],
        is_terminal: Bool[np.ndarray, " E"],
    ) -> None:
        """One row for every stream, aligned as ``worldmodels.interface`` says.

        Where an episode begins although the one before has no last row, the newest row becomes its last, truncated.

        Raises:
            ValueError: shapes or flags that break the timeline.
            DiskFull: the row is not added; everything before stays readable.
        """
        given = dict(zip(Batch._fields, (obs, action, reward, is_first, is_last, is_terminal), strict=True))
        row = {name: self._convert(name, value) for name, value in given.items()}
        if not (row["is_first"] | self._unfinished).all():
            raise ValueError("a row without is_first must continue an episode, but there is none or it has ended")
        if (row["is_terminal"] & ~row["is_last"]).any():
            raise ValueError("is_terminal without is_last: a terminal row is the last one of its episode")
        if self._index.written - self._flushed >= self._index.flush_every:
            self.flush()  # before the row: more unflushed ones than the spare could not be told from old ones
        self._high = max(self._high, self._index.written + 1)
        self._write(self._index.written, row)
        self._end_episode(row["is_first"] & self._unfinished)
        self._unfinished = ~row["is_last"]
        self._index.written += 1

    def _convert(self, name: str, value: np.ndarray) -> np.ndarray:
        dtype, shape = self._index.fields[name]
        array = np.ascontiguousarray(value, dtype)
        if array.shape != (self.streams, *shape):
            raise ValueError(f"{name} has the shape {array.shape}, but this replay takes {(self.streams, *shape)}")
        return array

    def _end_episode(self, streams: Bool[np.ndarray, " E"]) -> None:
        """Make the newest row of these streams the last of its episode."""
        if streams.any():
            newest = self._index.written - 1
            action = np.where(streams[:, None], np.float32(0), self._folder.row("action", newest))
            self._write(newest, {"action": action, "is_last": self._folder.row("is_last", newest) | streams})

    def _write(self, number: int, values: Mapping[str, np.ndarray]) -> None:
        self._folder.write(number, values)
        if self._mirror is not None:
            first = number % self._index.slots * self.streams
            for name, value in values.items():
                self._mirror[name][first : first + self.streams] = send(value, self.device)

    def _read_unfinished(self) -> Bool[np.ndarray, " E"]:
        """Streams that the next row may continue: their newest row is not the last of its episode, or it is gone."""
        if not self.rows_per_stream:
            return np.full(self.streams, self._index.written > 0)
        return ~self._folder.row("is_last", self._index.written - 1)

    def flush(self) -> None:
        """Make all rows outlive the process and the machine.

        Raises:
            DiskFull: the rows since the last flush are lost when the process ends.
        """
        self._folder.flush()
        self._flushed = self._index.written

    def close(self) -> None:
        """Flush what was written and let go of the files. A closed replay cannot be used."""
        try:
            if self._flushed != self._index.written:
                self.flush()
        finally:
            self._folder.close()
            self._flushed, self._mirror = self._index.written, None

    def __enter__(self) -> Replay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def position(self) -> dict[str, int]:
        """Where it stands, for :meth:`truncate_to`. Flush first, so that the position outlives a crash."""
        return {"written": self._index.written}

    def truncate_to(self, position: Mapping[str, int]) -> None:
        """Forget the rows added since ``position``. What they overwrote beyond the spare is gone as well.

        Raises:
            ReplayError: the replay does not reach ``position``.
        """
        self._folder.require_writable()
        index, written = self._index, position["written"]
        if not 0 <= written <= index.written:
            raise ReplayError(
                f"{self.path} holds rows up to {index.written} of each stream, but the checkpoint needs {written}; "
                "they do not belong together"
            )
        if written == index.written:
            return
        # Row r shares its slot with row r + slots.
        index.floor = min(written, max(index.floor, self._high - index.slots))
        index.written = written
        # Before the next row: it would stand among the forgotten ones if the old index came back after a crash.
        self.flush()
        self._unfinished = self._read_unfinished()


def _torch_type(array: np.ndarray) -> torch.dtype:
    return {"uint8": torch.uint8, "float32": torch.float32, "bool": torch.bool}[array.dtype.name]


def _copy_to(array: np.ndarray, held: int, device: torch.device) -> Tensor:
    """The first ``held`` rows on ``device``; in pieces, so that no second copy of them all stands in memory."""
    out = torch.empty(array.shape, dtype=_torch_type(array), device=device)
    for i in range(0, held, _COPY_ROWS):
        out[i : i + _COPY_ROWS] = torch.from_numpy(array[i : i + _COPY_ROWS].copy())
    return out

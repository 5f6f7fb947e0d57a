"""A run folder's records: metrics.jsonl, evals.jsonl, TensorBoard events, videos, and the line a person watches.

The two JSONL files are the record; TensorBoard and the terminal are ways to look at it. Every row is flushed when it is
written, so a killed process loses at most the row it was writing, and reading skips that half row.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from rich.console import Console
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from runners.progress import Display

_VIDEO_MIN_SIDE = 256  # players blur and compress a 64x64 video beyond recognition


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, oldest first; none if the file does not exist. A line that is not an object is skipped.

    A process that was killed leaves half a line at the end. It is no row yet, so leaving it out loses nothing.
    """
    if not path.exists():
        return []
    rows = (_parse_row(line) for line in path.read_bytes().splitlines())
    return [row for row in rows if row is not None]


class NoVideo(RuntimeError):
    """What encodes videos is not installed."""


class Logger:
    """Writes one run folder's records and shows its progress.

    Args:
        run_dir: the run's folder, made if it is not there.
        resume_env_steps: the env_steps of the checkpoint this session goes on from. Rows and events after it are
            dropped, since they will be written again. None starts a new record and drops every older row.
        total_env_steps: the run's budget, for the bar and the time left.
        resume_wall_s: seconds that the sessions up to that checkpoint took.
        counter: the name under which rows hold what is called env_steps here: where no environment is stepped they are
            counted by updates.
        quiet: prints nothing. The records are the same.
        console: where to print; by default stdout, with a live line on a terminal and a plain line now and then
            anywhere else.
        clock: seconds, monotonic.

    Raises:
        OSError: the folder cannot be written or the disk is full; from the constructor and every method that records.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_env_steps: int | None,
        total_env_steps: int,
        resume_wall_s: float = 0.0,
        counter: str = "env_steps",
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = -1 if resume_env_steps is None else resume_env_steps
        self._metrics = _RowFile(run_dir / "metrics.jsonl", counter, keep=kept)
        self._evals = _RowFile(run_dir / "evals.jsonl", counter, keep=kept)
        # TensorBoard forgets events from purge_step on, so the checkpoint's own step is kept.
        self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=kept + 1, flush_secs=30)
        self._clock = clock
        self._start_s = clock() - resume_wall_s
        self._counter = counter
        self._display = None if quiet else Display(total_env_steps, counter, "updates", console, clock)

    @property
    def wall_s(self) -> float:
        """Seconds this run has taken, over all its sessions."""
        return self._clock() - self._start_s

    def metrics(self, values: Mapping[str, SupportsFloat], *, env_steps: int) -> None:
        """One row ``{"env_steps", "wall_s", **values}`` in metrics.jsonl, and each value as a TensorBoard scalar.

        A value that is not finite is ``null`` in the row, because JSON has no name for it.
        """
        scalars = {name: float(value) for name, value in values.items()}
        row = {name: _finite_or_none(value) for name, value in scalars.items()}
        self._metrics.append({self._counter: env_steps, "wall_s": round(self.wall_s, 3), **row})
        self._scalars(scalars, env_steps)

    def evaluation(self, *, env_steps: int, returns: Sequence[float], lengths: Sequence[int], wall_s: float) -> None:
        """One row in evals.jsonl and the episodes' statistics in TensorBoard under ``eval/``.

        Args:
            env_steps: training env_steps behind the policy that was evaluated.
            returns: undiscounted return of each episode.
            lengths: env_steps of each episode.
            wall_s: seconds the run had taken when the evaluation began, so a curve over time leaves evaluations out
                or in as the caller decides.

        Raises:
            ValueError: no episodes, or not one length for each return.
        """
        if len(returns) == 0 or len(returns) != len(lengths):
            raise ValueError(f"an evaluation needs one length for each return, got {len(returns)} and {len(lengths)}")
        row = {
            "env_steps": env_steps,
            "returns": [_finite_or_none(float(value)) for value in returns],
            "lengths": [int(length) for length in lengths],
            "wall_s": round(wall_s, 3),
        }
        self._evals.append(row)
        with np.errstate(invalid="ignore"):  # a return that is not finite makes NaN statistics, as it should
            statistics = {
                "eval/return_mean": float(np.mean(returns)),
                "eval/return_std": float(np.std(returns)),
                "eval/return_min": float(np.min(returns)),
                "eval/return_max": float(np.max(returns)),
                "eval/length_mean": float(np.mean(lengths)),
            }
        self._scalars(statistics, env_steps)

    def image(self, tag: str, image: UInt8[np.ndarray, "H W 3"], *, env_steps: int) -> None:
        """An RGB picture for TensorBoard."""
        frame = _as_frames(image[None])[0]
        self._encoded_image(tag, frame.shape, _encode(Image.fromarray(frame), format="PNG"), env_steps)

    def video(self, tag: str, frames: UInt8[np.ndarray, "T H W 3"], fps: float, *, env_steps: int) -> None:
        """An RGB video for TensorBoard, as an animated GIF: the one moving picture its image page plays."""
        # An octree finds a frame's 256 colours ten times as fast as what is done when nothing is said.
        octree = Image.Quantize.FASTOCTREE
        first, *more = (Image.fromarray(frame).quantize(method=octree) for frame in _as_frames(frames))
        # GIF counts in hundredths of a second, and browsers slow a frame of less than two down to ten.
        frame_ms = max(20, 10 * round(100 / fps))
        gif = _encode(first, format="GIF", save_all=True, append_images=more, duration=frame_ms, loop=0)
        self._encoded_image(tag, frames.shape[1:], gif, env_steps)

    def progress(
        self, *, env_steps: int, updates: int, return_: float | None = None, eval_return: float | None = None
    ) -> None:
        """Shows how far the run is. Cheap enough for every step: it draws at most every quarter of a second.

        Args:
            env_steps, updates: the run's counters.
            return_: return of the latest training episode, or a mean over a few; None before the first one ended.
            eval_return: mean return of the latest evaluation.
        """
        if self._display is not None:
            text = f"return {_number(return_)}"
            if eval_return is not None:
                text += f" · eval {_number(eval_return)}"
            self._display.progress(env_steps, updates, text)

    def message(self, text: str) -> None:
        """Prints a line without breaking the live one."""
        if self._display is not None:
            self._display.message(text)

    def close(self) -> None:
        """Writes out what is pending and gives the terminal back. Closing twice is fine."""
        if self._display is not None:
            self._display.close()
        try:
            self._events.close()
        finally:
            self._metrics.close()
            self._evals.close()

    def __enter__(self) -> Logger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _scalars(self, values: Mapping[str, float], env_steps: int) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, env_steps)

    def _encoded_image(self, tag: str, shape: tuple[int, ...], encoded: bytes, env_steps: int) -> None:
        # Written as the bare summary, because SummaryWriter encodes a video only if moviepy is installed.
        image = Summary.Image(height=shape[0], width=shape[1], colorspace=3, encoded_image_string=encoded)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._events._get_file_writer().add_summary(summary, env_steps)


class Silence:
    """Takes what a :class:`Logger` takes and records nothing: for a rank whose run the first one records."""

    wall_s = 0.0

    def _ignore(self, *values: Any, **named: Any) -> None:
        pass

    metrics = evaluation = image = video = progress = message = _ignore


def write_video(path: Path, frames: UInt8[np.ndarray, "T H W 3"], fps: float) -> None:
    """Writes RGB frames as an H.264 mp4 that browsers play, making the folder if need be.

    Small frames are enlarged by a whole factor, without smoothing, until their shorter side has 256 pixels.

    Raises:
        ValueError: no frames, or not (T,H,W,3) uint8.
        NoVideo: without PyAV, whose wheel is larger than all else that a run needs beside PyTorch.
    """
    try:
        import av
    except ImportError as error:
        raise NoVideo(f"{path} cannot be written without PyAV: pip install av ({error})") from error
    video = _as_frames(frames)
    scale = math.ceil(_VIDEO_MIN_SIDE / min(video.shape[1:3]))
    height, width = (side * scale + side * scale % 2 for side in video.shape[1:3])  # yuv420p halves both sides
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in video:
            large = frame.repeat(scale, axis=0).repeat(scale, axis=1)
            even = np.pad(large, ((0, height - large.shape[0]), (0, width - large.shape[1]), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode(None))


class _RowFile:
    """Appends rows to a JSONL file, after dropping those whose ``counter`` lies beyond ``keep``."""

    def __init__(self, path: Path, counter: str, *, keep: int) -> None:
        found = path.read_bytes() if path.exists() else b""
        rows = ((line, _parse_row(line)) for line in found.splitlines())
        good = [line for line, row in rows if row is not None and row.get(counter, math.inf) <= keep]
        kept = b"".join(line + b"\n" for line in good)
        if kept != found:
            # Written aside and renamed: a full disk or a kill must not cost the rows that are good.
            aside = path.with_name(path.name + ".tmp")
            with aside.open("wb") as file:
                file.write(kept)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        self._file = path.open("ab")

    def append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return row if isinstance(row, dict) else None


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _as_frames(frames: Iterable[Any]) -> UInt8[np.ndarray, "T H W 3"]:
    array = np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or array.size == 0:
        raise ValueError(f"expected (T, H, W, 3) uint8 frames, at least one; got {array.shape} {array.dtype}")
    return array


def _encode(image: Image.Image, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()

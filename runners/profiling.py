"""A trace of the loop at work: where the time of an update goes, and what waits for what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 10
"""Updates that pass before the recording: the first ones allocate and choose kernels."""

_ROWS = 25
"""Operators in the table."""


class Trace:
    """While entered, records the loop over ``updates`` updates, once. Then writes ``profile/trace.json``, for
    https://ui.perfetto.dev, and ``profile/operators.txt``, a table of the dearest operators. Leaving it earlier writes
    what there is.

    Args:
        folder: of the run.
        updates: to record; 0 records nothing.
        device: what the agent learns on.
        say: told where the files are.
    """

    def __init__(self, folder: Path, updates: int, device: torch.device, say: Callable[[str], None]) -> None:
        self._folder, self._updates, self._device, self._say = folder / "profile", updates, device, say
        self._first: int | None = None
        self._newest = 0
        self._profile: profile | None = None
        self._done = updates == 0

    def follow(self, updates: int) -> None:
        """Call after each step of the loop, with the updates that the run has made."""
        if self._done:
            return
        self._newest = updates
        if self._first is None:
            self._first = updates + WARM_UP
        elif self._profile is None and updates >= self._first:
            self._first = updates
            cuda = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profile.start()
        elif self._profile is not None and updates >= self._first + self._updates:
            self._write()

    def _write(self) -> None:
        assert self._profile is not None
        assert self._first is not None
        self._done = True
        self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=order, row_limit=_ROWS)
        text = f"{self._newest - self._first} updates, and the steps between them\n{table}\n"
        (self._folder / "operators.txt").write_text(text, encoding="utf-8")
        self._profile.export_chrome_trace(str(self._folder / "trace.json"))
        self._say(f"profile: {self._folder}, trace.json for ui.perfetto.dev and operators.txt")

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profile is not None and not self._done:
            self._write()

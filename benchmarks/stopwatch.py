"""A figure, how it is timed, and a table of several."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Group
from rich.table import Table


@dataclass(frozen=True)
class Measurement:
    """A figure: the median of its repeats with the lowest and the highest, or a single reading with neither."""

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    note: str = ""


Results = dict[str, Measurement]


class Cost(NamedTuple):
    """What some calls took."""

    wall_s: float
    cpu_s: float
    """Of all threads of the process: what else the machine does hardly changes it."""


def cost_of(work: Callable[[], Any], calls: int, device: torch.device) -> Cost:
    """Of that many calls, the device waited for."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        work()
    _wait(device)
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def _wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Times a piece of work: warmed up, repeated, the device waited for.

    Args:
        repeats: how often each measurement is repeated, at least once.
        seconds: length of one repeat, above 0.
        device: where the work runs.
    """

    def __init__(self, repeats: int, seconds: float, device: torch.device) -> None:
        self.repeats = repeats
        self.seconds = seconds
        self.device = device

    def calls_per_s(self, work: Callable[[], Any]) -> list[float]:
        """Calls of ``work`` a second, one figure for each repeat, lowest first."""
        work()
        calls, elapsed = 0, 0.0
        while elapsed < self.seconds / 2:
            calls, elapsed = calls + 1, elapsed + self._time(work, 1)
        calls = max(1, round(calls / elapsed * self.seconds))
        return sorted(calls / self._time(work, calls) for _ in range(self.repeats))

    def rate(self, work: Callable[[], Any], unit: str, per_call: float = 1.0) -> Measurement:
        """``per_call`` units for each call, in units a second."""
        rates = [per_call * calls for calls in self.calls_per_s(work)]
        return Measurement(median(rates), unit, rates[0], rates[-1])

    def latency(self, work: Callable[[], Any]) -> Measurement:
        """Milliseconds a call."""
        times = [1000 / calls for calls in reversed(self.calls_per_s(work))]
        return Measurement(median(times), "ms", times[0], times[-1])

    def in_turn(self, works: Sequence[Callable[[], Any]]) -> list[Measurement]:
        """Milliseconds a call of each, one call of every work after the other, so that what else the machine does meets
        all of them alike."""
        for work in works:
            work()
        times = [[1000 * self._time(work, 1) for work in works] for _ in range(self.repeats)]
        return [Measurement(median(each), "ms", min(each), max(each)) for each in zip(*times, strict=True)]

    def _time(self, work: Callable[[], Any], calls: int) -> float:
        return cost_of(work, calls, self.device).wall_s


def as_table(results: Results, title: str) -> Group:
    """One row for each figure, with its unit, lowest and highest; below it what they are of, on lines of their own,
    because beside them a note would be folded into a column of a few letters."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("what", "median", "unit", "low – high"):
        table.add_column(column, justify="right" if column in ("median", "low – high") else "left", no_wrap=True)
    notes = Table(box=None, show_header=False, padding=(0, 1))
    notes.add_column(no_wrap=True)
    notes.add_column()
    suite = None
    for name, one in results.items():
        if suite not in (None, name.partition("/")[0]):
            table.add_section()
        suite = name.partition("/")[0]
        spread = "" if one.low is None or one.high is None else f"{_short(one.low)} – {_short(one.high)}"
        table.add_row(name, _short(one.value), one.unit, spread)
        if one.note:
            notes.add_row(name, one.note)
    return Group(table, notes)


def _short(value: float) -> str:
    """Three digits and more where they are before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

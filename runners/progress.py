"""The one line of a program that a person watches: how far it is, how fast, and how long it still takes."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_PLAIN_LINE_EVERY_S = 30.0
_LIVE_LINE_EVERY_S = 0.25
_RATE_WINDOW_S = 60.0  # long enough that one evaluation does not swing the time left, short enough to follow a change


class Display:
    """A live line on a terminal; elsewhere a plain line at most every half minute.

    Args:
        total: what the work ends at, in ``unit``.
        unit: what the bar counts.
        pace: what the speed counts, as ``12.3 <pace>/s``.
        console: where to print; by default stdout.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        pace: str,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # isatty is asked here because rich also believes FORCE_COLOR, which CI sets for colours, not for live lines.
        # Soft wrap leaves a redirected line whole whatever width rich assumes for a file.
        self._console = console or Console(force_terminal=sys.stdout.isatty(), soft_wrap=True)
        self._total, self._unit, self._pace = total, unit, pace
        self._clock = clock
        self._history: deque[tuple[float, int, int]] = deque()  # (seconds, done, worked), the last minute's
        self._last_draw_s = -math.inf
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # No refresh thread: environments may be forked while it holds the terminal's lock.
            columns = BarColumn(bar_width=20), TextColumn("{task.description}", markup=False)
            self._bar = Progress(*columns, console=self._console, auto_refresh=False)
            self._task = self._bar.add_task("starting", total=total)
            self._bar.start()

    def progress(self, done: int, worked: int, text: str) -> None:
        """Shows ``text``, then how far it is. Cheap enough for every step: it draws at most every quarter of a second.

        Args:
            done: of ``total``.
            worked: the counter whose speed is shown.
        """
        now = self._clock()
        self._history.append((now, done, worked))
        while len(self._history) > 2 and self._history[0][0] < now - _RATE_WINDOW_S:
            self._history.popleft()
        interval = _PLAIN_LINE_EVERY_S if self._bar is None else _LIVE_LINE_EVERY_S
        if now - self._last_draw_s < interval and done < self._total:
            return
        self._last_draw_s = now
        line = f"{text} · {self._line()}"
        if self._bar is None:
            self.message(line)
        else:
            self._bar.update(self._task, completed=done, description=line, refresh=True)

    def message(self, text: str) -> None:
        """Prints a line without breaking the live one."""
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Gives the terminal back. Closing twice is fine."""
        if self._bar is not None:
            self._bar.stop()

    def _line(self) -> str:
        (then, old_done, old_worked), (now, done, worked) = self._history[0], self._history[-1]
        elapsed, made = now - then, done - old_done
        pace = f"{(worked - old_worked) / elapsed:.1f}" if elapsed > 0 else "–"
        left_s = (self._total - done) * elapsed / made if made > 0 else None
        return f"{self._unit} {done:,}/{self._total:,} · {pace} {self._pace}/s · {duration(left_s)} left"


def duration(seconds: float | None) -> str:
    """``1:05:09`` or ``5:09``, and a dash for None."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

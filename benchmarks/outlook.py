"""How far a grid is and how long it still takes: in words before it starts, and on the screen while it runs."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from benchmarks.grid import Cell, Grid, GridFolder
from benchmarks.grid import Progress as Reached
from runners.progress import duration

ENOUGH = 0.1
"""Part of its budget after which a run tells how fast its kind is; before, most of it is prefill."""
_PLAIN_EVERY_S = 60.0
_LIVE_EVERY_S = 2.0
_SHOWN = 20
"""Running ones on the screen at once; a cluster may run hundreds."""


@dataclass(frozen=True)
class Plan:
    """The cells of a grid: finished; marked as failed, to be left; to be trained, in this order."""

    done: Sequence[Cell]
    failed: Sequence[Cell]
    todo: Sequence[Cell]

    def __str__(self) -> str:
        failed = f", {len(self.failed)} marked as failed" if self.failed else ""
        return f"{len(self.done)} runs finished{failed}, {len(self.todo)} to be trained"


class Outlook:
    """What the runs in the folder tell about those to come.

    The rate of a run is that of its agent on its task so far, else of its agent on other tasks (whose simulators and
    action repeats may cost something else), else unknown. Runs beside each other, other machines and the end of the
    prefill change rates, so all of it is rough.

    Args:
        slots: runs at once; None where a cluster decides.
    """

    def __init__(self, folder: GridFolder, grid: Grid, slots: int | None) -> None:
        self.budget = grid.env_steps
        self._folder, self._slots = folder, slots
        self._reached: dict[Cell, Reached] = {}
        self._rates: dict[tuple[str, str] | str, float] = {}
        self.look(grid.cells())

    def look(self, cells: Sequence[Cell]) -> None:
        """Read again how far these runs are."""
        for cell in cells:
            found = self._folder.progress(cell)
            if found is not None:
                self._reached[cell] = found
        seconds = defaultdict(list)
        for cell, one in self._reached.items():
            if one.env_steps >= max(1.0, ENOUGH * self.budget):
                for kind in (cell[:2], cell.agent):
                    seconds[kind].append(one.wall_s / one.env_steps)
        self._rates = {kind: median(found) for kind, found in seconds.items()}

    def env_steps(self, cell: Cell) -> int | None:
        """None before the run's first record."""
        found = self._reached.get(cell)
        return None if found is None else found.env_steps

    def seconds(self, cell: Cell) -> tuple[float | None, bool]:
        """What the rest of a run takes, None if unknown; whether that is from runs of the same task."""
        rate = self._rates.get(cell[:2], self._rates.get(cell.agent))
        left = max(0, self.budget - (self.env_steps(cell) or 0))
        return (None if rate is None else rate * left), cell[:2] in self._rates

    def left(self, cells: Sequence[Cell]) -> str:
        """How long these take, as words."""
        known = [seconds for cell in cells for seconds, _ in [self.seconds(cell)] if seconds is not None]
        unknown = len(cells) - len(known)
        if not known:
            return "unknown: no run of these agents has come far enough here to tell" if unknown else "nothing"
        total = sum(known)
        if self._slots is None:
            said = f"about {duration(total)} of runs' time, divided by how many the cluster runs at once"
        else:
            said = f"about {duration(max(total / self._slots, max(known)))}"
        return said + (f", and {unknown} runs of which nothing is known" if unknown else "")

    def lines(self, plan: Plan) -> list[str]:
        """What would be trained, a line each, and the sum of it."""
        out = []
        for cell in plan.todo:
            seconds, same_task = self.seconds(cell)
            about = "unknown" if seconds is None else f"~{duration(seconds)}{'' if same_task else ' (by other tasks)'}"
            reached = self.env_steps(cell)
            out.append(f"{'missing' if reached is None else f'at {reached:,}':>12}  {cell}  {about}")
        out += [f"{'failed':>12}  {cell}  left; --retry-failed tries it again" for cell in plan.failed]
        at_once = "a cluster" if self._slots is None else f"{self._slots} at once"
        return [*out, str(plan), f"to be trained, {at_once}: {self.left(plan.todo)}"]


class Board:
    """The screen: on a terminal a bar for the grid and one for each run, elsewhere a plain line a minute."""

    def __init__(
        self,
        outlook: Outlook,
        plan: Plan,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outlook, self._total = outlook, len(plan.done) + len(plan.failed) + len(plan.todo)
        self._budget = outlook.budget
        self._clock = clock
        self._drawn_s = clock()
        # As in runners.progress: isatty, because rich also believes FORCE_COLOR; no width for redirected lines.
        self._console = console or Console(force_terminal=sys.stdout.isatty(), soft_wrap=True)
        self._bars: Progress | None = None
        self._bar: dict[Cell, TaskID] = {}
        self.message(str(plan))
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = TextColumn("{task.description}", markup=False), BarColumn(20), TextColumn("{task.fields[text]}")
            self._bars = Progress(*columns, console=self._console, auto_refresh=False)
            self._whole = self._bars.add_task("grid", total=self._total, text="")
            self._bars.start()

    def draw(self, running: Sequence[Cell], waiting: Sequence[Cell]) -> None:
        """Show how far these are. Cheap enough for every moment: it looks every two seconds, or every minute."""
        now = self._clock()
        if now - self._drawn_s < (_PLAIN_EVERY_S if self._bars is None else _LIVE_EVERY_S):
            return
        self._drawn_s = now
        self._outlook.look(running)
        left = self._outlook.left([*running, *waiting])
        over = self._total - len(running) - len(waiting)
        if self._bars is None:
            steps = ", ".join(f"{cell} {self._steps(cell)}" for cell in running[:_SHOWN])
            self.message(f"{over}/{self._total} runs · {steps} · left: {left}")
            return
        for cell in running[:_SHOWN]:
            if cell not in self._bar:
                self._bar[cell] = self._bars.add_task(str(cell), total=self._budget, text="")
            self._bars.update(self._bar[cell], completed=self._outlook.env_steps(cell) or 0, text=self._steps(cell))
        self._bars.update(self._whole, completed=over, text=f"{over}/{self._total} runs · left: {left}", refresh=True)

    def _steps(self, cell: Cell) -> str:
        reached = self._outlook.env_steps(cell)
        return "starting" if reached is None else f"{reached:,}/{self._budget:,}"

    def ended(self, cell: Cell) -> None:
        """Take a run off the screen."""
        self._outlook.look([cell])
        if self._bars is not None and cell in self._bar:
            self._bars.remove_task(self._bar.pop(cell))

    def message(self, text: str) -> None:
        """Print a line without breaking the live ones."""
        self._console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

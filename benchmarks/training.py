"""One run of a grid in a process of its own: how it is started and stopped, and the program that runs in it.

The program is runners.train, except that it ends when whoever started it does, however that ended, and that it waits
for a process that still holds the run: a predecessor that lost its parent is saving. What starts it is imported on
clusters' machines, and so imports no more than it needs.
"""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

POLL_S = 0.2
_TOLD_LINES = 12
"""Of what a failed process printed last, to be kept with the failure."""
_TOLD_BYTES = 20_000


@dataclass(frozen=True)
class Job:
    """A run to be trained, here or on any machine that sees the grid's folder under the same path."""

    name: str
    arguments: tuple[str, ...]
    """Of runners.train."""
    run_dir: str
    log: str
    grid: str
    """The grid's file, by which a machine knows that it sees the folder."""
    cwd: str
    """Where relative paths among the arguments start."""


class NotShared(RuntimeError):
    """This machine does not see the grid's folder."""


class Training:
    """The process of a job. It leads a group of its own, so that Ctrl-C reaches it through its parent alone.

    Raises:
        NotShared: this is a machine without the grid's folder.
    """

    def __init__(self, job: Job) -> None:
        if not Path(job.grid).exists():
            here = platform.node()
            raise NotShared(
                f"{job.grid} is not there on {here}: every machine must see the grid's folder, at this path"
            )
        self.job = job
        log = Path(job.log)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.training", *job.arguments]
        root = str(Path(__file__).parents[1])
        known = os.environ.get("PYTHONPATH")
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=job.cwd,
                env=os.environ | {"PYTHONPATH": root + (os.pathsep + known if known else ""), "PYTHONUNBUFFERED": "1"},
                process_group=0,
            )
            when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            title = f"# {when}, process {self._process.pid} on {platform.node()}: {shlex.join(job.arguments)}\n"
            out.write(title.encode())
            self._begin = out.tell()

    def ended(self) -> bool:
        if self._process.poll() is None:
            return False
        assert self._process.stdin is not None
        self._process.stdin.close()
        return True

    def terminate(self) -> None:
        """Ask it to save and end."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        # Not Popen.wait: a signal's handler may wait too, while what it interrupted is in there and holds its lock.
        while not self.ended():
            time.sleep(POLL_S)

    def error(self) -> str | None:
        """What went wrong, by its exit code and then its last lines; None if it reached the end of its budget."""
        code = self._process.returncode
        if code == 0:
            return None
        ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "\n".join([f"({ending})", *last_lines(Path(self.job.log), self._begin)])


def last_lines(file: Path, begin: int = 0) -> list[str]:
    """The last lines of a text that is going on to be written, from a byte on."""
    with file.open("rb") as text:
        size = text.seek(0, os.SEEK_END)
        text.seek(max(begin, size - _TOLD_BYTES))
        lines = text.read().decode(errors="replace").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-_TOLD_LINES:]


def execute(job: Job) -> str | None:
    """Train to the end, on whatever machine this is; what went wrong."""
    try:
        return see_through(Training(job))
    except NotShared as error:
        return str(error)


def see_through(training: Training) -> str | None:
    """Wait until it ended; what went wrong. Interrupted, it first lets the run save."""
    try:
        training.wait()
    except BaseException:
        training.terminate()
        training.wait()
        raise
    return training.error()


class Resubmitted:
    """A job as submitit takes it: what it calls, and what it calls before the time is over."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._training: Training | None = None

    def __call__(self) -> None:
        self._training = Training(self._job)
        error = see_through(self._training)
        if error is not None:
            print(error, file=sys.stderr)

    def checkpoint(self) -> Any:
        """Let the run save; what goes on with it."""
        if self._training is not None:
            self._training.terminate()
            self._training.wait()
        return importlib.import_module("submitit").helpers.DelayedSubmission(Resubmitted(self._job))


# -- in the process ----------------------------------------------------------------------------------------------------


def _follow_parent() -> None:
    """End with the process that holds the other end of stdin."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_for_predecessor(run_dir: Path) -> None:
    """Return once no other process trains the run."""
    from runners.disk import lock_file
    from runners.session import LOCK

    file = run_dir / LOCK
    said = False
    while file.exists():  # not made here: the folder must be empty for a new run
        held = lock_file(file)
        if held is not None:
            os.close(held)
            return
        if not said:
            print("another process still trains this run; waiting for it", flush=True)
            said = True
        time.sleep(POLL_S)


def main(args: Sequence[str] | None = None) -> int:
    """As runners.train."""
    # Slurm sends this one before its time limit to every process of a job; the one that started this answers it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    # Imported so late because it takes seconds, in which the parent may end.
    from runners.config import parse_args
    from runners.train import main as train

    args = sys.argv[1:] if args is None else args
    _wait_for_predecessor(Path(parse_args(args).run_dir))
    return train(args)


if __name__ == "__main__":
    sys.exit(main())

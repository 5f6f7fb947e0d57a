"""Disks that fill up and processes that die while they write, for the tests of what must survive both."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
_DISK_CALLS = ("pwrite", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


@contextlib.contextmanager
def tiny_disk(path: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of that size, mounted at ``path``; the test is skipped where mounting is not allowed."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs privileges; the same path is tested with an injected ENOSPC")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill_disk(folder: Path) -> Path:
    """Write a file into ``folder`` until its disk is full."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as out, contextlib.suppress(OSError):
        while out.write(bytes(512)):
            pass
    return filler


def disk_full_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """From its ``call``-th call on, counted from 0, ``os.<name>`` fails as on a full disk."""
    real, calls = getattr(os, name), iter(range(sys.maxsize))

    def full(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, full)


def kill_at_every_disk_call(base: Path, work: str) -> list[Path]:
    """Copies of ``base`` as SIGKILL leaves them: copy k after ``work(copy)`` was killed at its k-th call to the disk.

    A killed ``pwrite`` has written half. The last copy is of the run that reached its end. ``work`` is the full name of
    a function, ``tests.test_x.work``; it runs in processes forked from a fresh interpreter.
    """
    module, _, name = work.rpartition(".")
    code = f"from pathlib import Path; from tests.disk_helpers import _kill_each; from {module} import {name}; "
    code += f"_kill_each(Path({str(base)!r}), {name})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return sorted(base.parent.glob(f"{base.name}-killed-*"))


def _kill_each(base: Path, work: Callable[[Path], None]) -> None:
    for k in range(100_000):
        copy = base.with_name(f"{base.name}-killed-{k:05d}")
        shutil.copytree(base, copy)
        child = os.fork()
        if child == 0:
            _die_at(k)
            work(copy)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise RuntimeError(f"the worker was not killed but ended by itself with status {status}")


def _die_at(call: int) -> None:
    calls = iter(range(sys.maxsize))

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def mortal(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                if name == "pwrite":
                    file, data, offset = args
                    real(file, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return mortal

    os.fsync = lambda file: None  # the kernel keeps a killed process's writes, so syncing them only takes time
    for name in _DISK_CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))

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


def crash_at_every_disk_call(base: Path, work: Callable[[Path], None]) -> list[Path]:
    """Copies of ``base`` as a crash of ``work(base)`` leaves them: copy k is taken at its k-th call that writes.

    What a killed process leaves is what its last call left, since the kernel keeps the writes. Of a ``pwrite`` one half
    is done. The last copy is of the finished work.
    """
    copies: list[Path] = []
    copying = False

    def snapshot() -> None:
        nonlocal copying
        copying = True
        copies.append(base.with_name(f"{base.name}-crashed-{len(copies):04d}"))
        shutil.copytree(base, copies[-1])
        copying = False

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def crashing(*args: Any, **kwargs: Any) -> Any:
            if not copying:
                if name == "pwrite":
                    file, data, offset = args
                    real(file, data[: len(data) // 2], offset)
                snapshot()
            # Syncing takes long and changes nothing for a process that is killed.
            return None if name == "fsync" else real(*args, **kwargs)

        return crashing

    with pytest.MonkeyPatch.context() as patch:
        for name in _DISK_CALLS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        work(base)
    snapshot()
    return copies


def kill_after_lines(code: str, lines: int) -> None:
    """Run Python code in a process of its own and SIGKILL it when it has printed so many lines."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-uc", code], cwd=ROOT, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        for _ in range(lines):
            assert process.stdout.readline(), "it ended before it was killed"
        process.kill()
        assert process.wait() == -signal.SIGKILL

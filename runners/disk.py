"""Writing files that survive a crash: synced, replaced whole, and one clear error for a full disk."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ASIDE = ".tmp"
"""Suffix of what is being written or deleted. Whatever bears it after a crash is a leftover."""


class DiskFull(RuntimeError):
    """The disk has no room for what was to be written. What was there before is untouched."""


@contextmanager
def clear_disk_full(path: Path) -> Iterator[None]:
    """Turn the system's error for a full disk or quota into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            f"the disk is full: {path} could not be written; free some space, then run the same command again"
        ) from error


def lock_file(file: Path) -> int | None:
    """Hold the file, made if it is not there, until the returned descriptor is closed or the process ends, however it
    ends. None if another process holds it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def write_file(file: Path, data: bytes) -> None:
    """Write and wait until it is on the disk."""
    with open(file, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def replace_file(file: Path, data: bytes) -> None:
    """Give ``file`` new content; whoever reads it, now or after a crash, finds all of the old or all of the new."""
    aside = file.with_name(file.name + ASIDE)
    try:
        write_file(aside, data)
        aside.replace(file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` at the end of the block, or vanishes if the block fails.

    Raises:
        OSError: ``path`` exists and is not an empty folder.
    """
    aside = path.with_name(path.name + ASIDE)
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_folder(aside)
        aside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(path.parent)


def discard_folder(path: Path) -> None:
    """Delete; if that is cut short, what remains is a leftover and not half a folder under its name."""
    aside = path.with_name(path.name + ASIDE)
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    shutil.rmtree(aside)


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""Training runs small enough for tests, what they left, and signals at an exact row."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from runners.checkpoint import Checkpoints
from runners.config import Config, parse_args
from runners.replay import Replay

ROOT = Path(__file__).resolve().parents[1]

SMALL_AGENT = {
    "model.latent-dim": 8,
    "model.keypoint.stem": 8,
    "model.keypoint.keypoints": 8,
    "model.keypoint.hidden": 16,
    "model.conv.hidden": 16,  # of the encoder of states, too
    "model.window.hidden": (16, 16),
    "model.sigreg-directions": 8,
    "model.rollout": 3,
    "model.head-units": 16,
    "dreamer.policy.units": 16,
    "dreamer.critic.units": 16,
    "dreamer.horizon": 3,
    "dreamer.starts": 16,
}
TINY = SMALL_AGENT | {
    "task": "dmc/cartpole-swingup",
    "device": "cpu",
    "threads": 1,
    "num-envs": 1,
    "seed": 3,
    "env-steps": 960,
    "env.size": 32,
    "env.time-limit": 160,
    "loop.prefill": 320,
    "loop.pretrain": 4,
    "loop.batch": 4,
    "loop.length": 8,
    "loop.train-ratio": 32,  # one update for each agent step
    "loop.capacity": 2_000,
    "loop.log-every": 80,
    "loop.eval-every": 320,
    "loop.eval-episodes": 3,
    "loop.checkpoint-every": 240,
    "loop.view-steps": 4,
}
"""Ten seconds of cartpole in 120 agent steps: six episodes of 20, two of them random; 84 updates; three evaluations."""

COUNTING = TINY | {
    "task": "gym/tests.envs_helpers:Counting-v0",
    "env.obs": "state",
    "env.time-limit": None,
    "env-steps": 120,
    "loop.train-ratio": 12,  # three updates for eight agent steps: parts of updates are owed at most moments
    "loop.prefill": 40,
    "loop.log-every": 10,
    "loop.eval-every": 40,
    "loop.checkpoint-every": 30,
}
"""The same learner on the counting environment, with 34 updates: a run of a second, or a few with checked shapes."""


def flags(run_dir: Path, settings: dict[str, Any], **changes: Any) -> list[str]:
    """A command line. In ``changes``, ``env__size=32`` stands for ``--env.size 32``; None leaves a flag out."""
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    words = ["--run-dir", str(run_dir)]
    for name, value in (settings | named).items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def config(run_dir: Path, settings: dict[str, Any], **changes: Any) -> Config:
    """The same as the parsed configuration."""
    folder, *rest = flags(run_dir, settings, **changes)[1:]
    return dataclasses.replace(_parsed(tuple(rest)), run_dir=folder)


@functools.cache
def _parsed(words: tuple[str, ...]) -> Config:
    """Most trainings here differ in nothing but their folder, and the command line takes a quarter of a second."""
    return parse_args(words)


def program(module: str, *args: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """``python -m module args`` to its end, in a process of its own. ``before`` is a statement to run in it first."""
    start = ["-m", module]
    if before:
        code = f"import sys; from tests import loop_helpers; {before}; from {module} import main; sys.exit(main())"
        start = ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *args],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


class Finished(NamedTuple):
    """A training that ran to its end from the command line, untouched since. Copy the folder before changing it."""

    path: Path
    process: subprocess.CompletedProcess[str]


def finished_run(factory: pytest.TempPathFactory) -> Finished:
    """One run of TINY for the whole test session: of several processes that share the tests, the first to ask trains
    it, and the others wait for it."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "finished"
    folder.mkdir(exist_ok=True)
    path, told = folder / "run", folder / "process.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            process = program("runners.train", *flags(path, TINY))
            told.write_text(json.dumps([process.args, process.returncode, process.stdout, process.stderr]))
    return Finished(path, subprocess.CompletedProcess(*json.loads(told.read_text())))


# -- what a run left ---------------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, Any]]:
    """A JSONL file, strictly read."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_wall_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "wall_s"} for row in records]


def contents(folder: Path) -> dict[str, str]:
    """The checksum of every file under ``folder``."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def newest_state(run_dir: Path) -> dict[str, Any]:
    """What the newest checkpoint holds."""
    found = Checkpoints(run_dir / "checkpoints").latest()
    assert found is not None
    return found[0]


def replay_rows(run_dir: Path) -> dict[str, np.ndarray]:
    """Every row that the replay holds, each field as (rows, …), of a run with one environment."""
    replay = Replay.open(run_dir / "replay")
    assert replay.streams == 1
    whole = replay.sample(1, len(replay), np.random.default_rng(0))
    return {name: value[0].numpy() for name, value in whole._asdict().items()}


def differing(first: Any, second: Any, place: str = "state") -> list[str]:
    """Where two nested states differ, compared bit for bit."""
    if type(first) is not type(second):
        return [f"{place}: {type(first).__name__} and {type(second).__name__}"]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{place}: other keys {sorted(map(str, first.keys() ^ second.keys()))}"]
        return [found for key in first for found in differing(first[key], second[key], f"{place}.{key}")]
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return [f"{place}: {len(first)} and {len(second)} items"]
        pairs = enumerate(zip(first, second, strict=True))
        return [found for i, (a, b) in pairs for found in differing(a, b, f"{place}.{i}")]
    if isinstance(first, torch.Tensor | np.ndarray):
        same = first.dtype == second.dtype and first.shape == second.shape and _bytes(first) == _bytes(second)
    else:
        same = first == second
    return [] if same else [place]


def _bytes(array: torch.Tensor | np.ndarray) -> bytes:
    """Bit for bit: NaN equals NaN, and -0 differs from 0."""
    if isinstance(array, torch.Tensor):  # through bytes, because numpy has no bfloat16
        array = array.detach().contiguous().flatten().view(torch.uint8).numpy()
    return array.tobytes()


# -- stopping at an exact row ------------------------------------------------------------------------------------------


@contextmanager
def signal_at_row(number: int, row: int) -> Iterator[None]:
    """While entered, this process gets the signal right after the replay took in its ``row``-th row, counted from 1."""
    real, taken = Replay.add, 0

    def add(self: Replay, **fields: Any) -> None:
        nonlocal taken
        real(self, **fields)
        taken += 1
        if taken == row:
            os.kill(os.getpid(), number)

    Replay.add = add  # type: ignore[method-assign]
    try:
        yield
    finally:
        Replay.add = real  # type: ignore[method-assign]

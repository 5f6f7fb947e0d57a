"""The whole loop at work: how fast it collects while it learns, and how busy that keeps a GPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd import DeviceType

from benchmarks.stopwatch import Measurement, Results, Stopwatch
from benchmarks.update_parts import profiled
from runners.config import Config
from runners.run import Run
from runners.train import Meter, advance

WARM_UP = 12
"""Steps of all environments before the measurement, which see the first updates: they record or compile."""


def time_loop(config: Config, watch: Stopwatch) -> Results:
    """Env_steps and updates a second while learning, without evaluations, checkpoints and records.

    On a GPU also the part of the time that a kernel runs, in a profiled stretch of as many steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        loop = replace(config.loop, pretrain=1)
        config = replace(config, run_dir=str(Path(folder) / "run"), loop=loop, env_steps=10**9)
        with Run(config, quiet=True) as run:
            meter = Meter()
            while not run.learning:
                advance(run, meter)
            for _ in range(WARM_UP):
                advance(run, meter)
            steps, results = _rates(run, meter, watch)
            if watch.device.type == "cuda":
                results["loop/gpu_busy"] = _busy(lambda: _advance(run, meter, steps))
    return results


def _advance(run: Run, meter: Meter, steps: int) -> None:
    for _ in range(steps):
        advance(run, meter)


def _rates(run: Run, meter: Meter, watch: Stopwatch) -> tuple[int, Results]:
    """How many steps of all environments were timed, and what they came to."""
    env_steps, updates, steps, start = run.env_steps, run.updates, 0, time.perf_counter()
    while time.perf_counter() - start < watch.repeats * watch.seconds:
        advance(run, meter)
        steps += 1
    run.wait()
    if watch.device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    config = run.config
    env = f"{config.num_envs} environments, {config.env.render}, train_ratio {config.loop.train_ratio:g}"
    return steps, {
        "loop/collect": Measurement(
            (run.env_steps - env_steps) / elapsed, "env_steps/s", note=f"while learning; {env}"
        ),
        "loop/learn": Measurement((run.updates - updates) / elapsed, "updates/s", note="while collecting"),
    }


def _busy(work: Callable[[], object]) -> Measurement:
    start = time.perf_counter()
    events = profiled(work, on_gpu=True)
    elapsed = 1e6 * (time.perf_counter() - start)
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type == DeviceType.CUDA)
    busy, until = 0.0, 0.0
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return Measurement(100 * busy / elapsed, "%", note="of the time a kernel or a copy runs, under the profiler")

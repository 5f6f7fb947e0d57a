"""The whole loop at work: how fast it collects while it learns, and how busy that keeps a GPU."""

from __future__ import annotations

import tempfile
import time
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

TRACED = 50
"""Updates under the profiler, each of thousands of kernels that it takes the host some microseconds to look through."""


def time_loop(config: Config, watch: Stopwatch) -> Results:
    """Env_steps and updates a second while learning, without evaluations, checkpoints and records.

    On a GPU also the part of the time that a kernel runs, in a profiled stretch of ``TRACED`` updates.
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
            results = _rates(run, meter, watch)
            if watch.device.type == "cuda":
                results["loop/gpu_busy"] = _busy(run, meter)
    return results


def _rates(run: Run, meter: Meter, watch: Stopwatch) -> Results:
    env_steps, updates, start = run.env_steps, run.updates, time.perf_counter()
    while time.perf_counter() - start < watch.repeats * watch.seconds:
        advance(run, meter)
    run.wait()
    if watch.device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    config = run.config
    env = f"{config.num_envs} environments, {config.env.render}, train_ratio {config.loop.train_ratio:g}"
    return {
        "loop/collect": Measurement(
            (run.env_steps - env_steps) / elapsed, "env_steps/s", note=f"while learning; {env}"
        ),
        "loop/learn": Measurement((run.updates - updates) / elapsed, "updates/s", note="while collecting"),
    }


def _busy(run: Run, meter: Meter) -> Measurement:
    elapsed = 0.0

    def work() -> None:  # timed in here: the profiler takes seconds to begin and to end
        nonlocal elapsed
        start, last = time.perf_counter(), run.updates + TRACED
        while run.updates < last:
            advance(run, meter)
        torch.cuda.synchronize()
        elapsed = 1e6 * (time.perf_counter() - start)

    events = profiled(work, on_gpu=True)
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type == DeviceType.CUDA)
    busy, until = 0.0, 0.0
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return Measurement(100 * busy / elapsed, "%", note="of the time a kernel or a copy runs, under the profiler")

"""What an update asks of the device: arithmetic, launches, and the host's time to ask for it."""

from __future__ import annotations

import time
from dataclasses import replace
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from agents.beside import one_after_the_other
from agents.dreamer import DreamerAgent
from benchmarks.stopwatch import Measurement, Results, Stopwatch
from benchmarks.update_parts import profiled
from worldmodels.interface import Batch

MATRIX = {"cuda": 8192, "cpu": 2048}
"""Rows and columns of the square product that the device's matrix rate is measured with."""


def measure_cost(agent: DreamerAgent, batch: Batch, total_ms: float, watch: Stopwatch) -> Results:
    """The arithmetic of an update that takes ``total_ms``, against the device's matrix rate in the same precision; the
    kernels or operators that it launches; on a GPU, how long the host is busy with it."""
    on_gpu, cycle = watch.device.type == "cuda", agent.config.behaviour_every
    flop = count_flop(agent, batch) / cycle
    dtype = torch.bfloat16 if agent.bf16 else torch.float32
    peak, rate = matrix_rate(watch, dtype), flop / total_ms / 1e6
    product = f"a product of {MATRIX[watch.device.type]}² in {str(dtype).removeprefix('torch.')}"
    launched = Measurement(count_launches(agent, batch) / cycle, "kernels" if on_gpu else "operators", note="an update")
    results = {
        "update/arithmetic": Measurement(flop / 1e9, "GFLOP", note="products and convolutions, forward and backward"),
        "update/flop_rate": Measurement(rate, "GFLOP/s", note=f"{rate / peak.value:.0%} of the matrix rate"),
        "update/matrix_rate": replace(peak, note=product),
        "update/launches": launched,
    }
    if on_gpu:
        busy = host_ms(agent, batch, watch.repeats)
        idle = max(0.0, 1 - busy / total_ms)
        results["update/host"] = Measurement(busy, "ms", note=f"to ask for an update; idle for {idle:.0%} of it")
    return results


def count_flop(agent: DreamerAgent, batch: Batch) -> int:
    """Floating-point operations of a cycle's products and convolutions, a multiplication and an addition each."""
    counter = FlopCounterMode(display=False)
    # It counts in this thread alone.
    with patch.object(agent, "beside", one_after_the_other), counter:
        for k in range(agent.config.behaviour_every):
            agent._learn(batch, k == 0)  # as it is, in no graph
    return counter.get_total_flops()


def matrix_rate(watch: Stopwatch, dtype: torch.dtype) -> Measurement:
    """GFLOP/s of one large square product."""
    size = MATRIX[watch.device.type]
    left = torch.randn(size, size, device=watch.device, dtype=dtype)
    right = torch.randn_like(left)
    return watch.rate(lambda: left @ right, "GFLOP/s", 2 * size**3 / 1e9)


def count_launches(agent: DreamerAgent, batch: Batch) -> int:
    """Kernels that a cycle of updates runs on a GPU, or operators on a processor that call no other."""
    on_gpu, cycle = agent.device.type == "cuda", range(agent.config.behaviour_every)
    with patch.object(agent, "beside", one_after_the_other):
        for _ in cycle:
            agent.update(batch)
        events = profiled(lambda: [agent.update(batch) for _ in cycle], on_gpu)
    if on_gpu:
        return sum(event.device_type == DeviceType.CUDA for event in events)
    return sum(event.name.startswith("aten::") and not event.cpu_children for event in events)


def host_ms(agent: DreamerAgent, batch: Batch, repeats: int) -> float:
    """Milliseconds in which the host has asked a GPU for one update, which then still runs."""
    times = []
    for _ in range(max(3, repeats)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        agent._learn_on_device(batch, True)
        times.append(1000 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return sorted(times)[len(times) // 2]

"""How fast everything runs: environments, replay, updates and their parts, acting; and how much memory it takes.

    python -m benchmarks.speed --suite update --preset cpu --json speed.json

Every flag of runners.train works too (--task, --preset, --device, --threads, --model.latent-dim, ...): what is timed is
what a training with those flags would run.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from agents.dreamer import DreamerAgent
from agents.random import RandomAgent
from benchmarks.provenance import command_line, core_count, machine, machine_line, now
from benchmarks.update_parts import PARTS, time_parts
from envs import EnvConfig, action_repeat_of, make_vector_env
from runners.config import Config, ConfigError, build_agent, check, parse_args, resolve_device
from runners.replay import Replay
from runners.rollout import Collector
from runners.run import configure_torch
from runners.train import USER_ERRORS
from worldmodels.interface import Batch


@dataclass(frozen=True)
class SpeedConfig:
    """Time environments, replay, updates and acting. Every flag of runners.train works too: --task, --preset, --device,
    --threads, --model.latent-dim and so on; what is timed is what a training with those flags would run."""

    suite: Literal["all", "env", "replay", "update", "act"] = "all"
    """What to measure."""
    json: Path | None = None
    """Write the figures here too, with the command, the date, the machine and the whole configuration."""
    processes: int = 0
    """Environments stepped in processes of their own in the vectorised measurement. 0: one for each core, at least 2."""
    replay_rows: int = 20_000
    """Rows in the measured replay; 12.3 kB each at 64×64 pixels, in the system's folder for temporary files."""
    repeats: int = 7
    """Repeats of each measurement; the median is reported, with the lowest and the highest."""
    seconds: float = 0.4
    """Length of one repeat."""


@dataclass(frozen=True)
class Measurement:
    """A figure: the median of its repeats with the lowest and the highest, or a single reading with neither."""

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    note: str = ""


Results = dict[str, Measurement]


class Stopwatch:
    """Times a piece of work: warmed up, repeated, the device waited for."""

    def __init__(self, repeats: int, seconds: float, device: torch.device) -> None:
        if repeats < 1 or seconds <= 0:
            raise ConfigError(f"--repeats {repeats} and --seconds {seconds:g} must be at least 1 and above 0")
        self.repeats = repeats
        self.seconds = seconds
        self.device = device

    def calls_per_s(self, work: Callable[[], Any]) -> list[float]:
        """Calls of ``work`` a second, one figure for each repeat, lowest first."""
        work()
        calls, elapsed = 0, 0.0
        while elapsed < self.seconds / 2:
            calls, elapsed = calls + 1, elapsed + self._time(work, 1)
        calls = max(1, round(calls / elapsed * self.seconds))
        return sorted(calls / self._time(work, calls) for _ in range(self.repeats))

    def rate(self, work: Callable[[], Any], unit: str, per_call: float = 1.0) -> Measurement:
        """``per_call`` units for each call, in units a second."""
        rates = [per_call * calls for calls in self.calls_per_s(work)]
        return Measurement(median(rates), unit, rates[0], rates[-1])

    def latency(self, work: Callable[[], Any]) -> Measurement:
        """Milliseconds a call."""
        times = [1000 / calls for calls in reversed(self.calls_per_s(work))]
        return Measurement(median(times), "ms", times[0], times[-1])

    def _time(self, work: Callable[[], Any], calls: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# -- the suites --------------------------------------------------------------------------------------------------------


def measure_env(run: Config, options: SpeedConfig, watch: Stopwatch) -> Results:
    """Frames a second, resets included, with random actions."""
    processes = options.processes or max(2, core_count())
    repeat = action_repeat_of(run.task, run.env)

    def frames(env: EnvConfig, num_envs: int) -> Measurement:
        envs = make_vector_env(run.task, env, num_envs, run.seed)
        try:
            envs.reset()
            drawn = np.random.default_rng(run.seed).uniform(-1, 1, (64, *envs.action_space.shape)).astype(np.float32)
            actions = itertools.cycle(drawn)
            speed = watch.rate(lambda: envs.step(next(actions)), "frames/s", num_envs)
        finally:
            envs.close()
        where = f"{num_envs} processes, {env.render}; " if num_envs > 1 else ""
        note = f"{where}{speed.value * repeat:,.0f} env_steps/s at action repeat {repeat}"
        return replace(speed, note=note)

    return {
        "env/canonical": frames(replace(run.env, render="canonical"), 1),
        "env/fast": frames(replace(run.env, render="fast"), 1),
        "env/vector": frames(run.env, processes),
    }


def measure_replay(run: Config, options: SpeedConfig, watch: Stopwatch) -> Results:
    """Adding rows, and sampling batches from the memory-mapped files and from a copy on the device that learns."""
    loop, generator = run.loop, np.random.default_rng(run.seed)
    streams, steps = run.num_envs, max(loop.length, options.replay_rows // run.num_envs)
    with tempfile.TemporaryDirectory() as folder, _new_replay(Path(folder), run, streams * steps) as (replay, spaces):
        rows = itertools.cycle(_random_rows(*spaces, streams, generator))
        flags = {name: np.zeros(streams, bool) for name in ("is_last", "is_terminal")}

        def add(*, is_first: bool = False) -> None:
            obs, action, reward = next(rows)
            replay.add(obs=obs, action=action, reward=reward, is_first=np.full(streams, is_first), **flags)

        def sample() -> Batch:
            return replay.sample(loop.batch, loop.length, generator)

        add(is_first=True)
        for _ in range(steps - 1):
            add()
        results = {"replay/add": replace(watch.rate(add, "rows/s", streams), note=f"{streams} streams, flushed to disk")}
        for name, mirror in (("replay/sample", False), ("replay/sample_mirror", True)):
            replay.place(watch.device, mirror=mirror)
            speed = watch.rate(sample, "batches/s")
            source = f"from a copy on {watch.device}" if mirror else "from memory-mapped files"
            note = f"{loop.batch}×{loop.length} {source}; {speed.value * loop.batch * loop.length:,.0f} rows/s"
            results[name] = replace(speed, note=note)
    return results


def measure_update(run: Config, options: SpeedConfig, watch: Stopwatch) -> Results:
    """Updates a second on one batch, the milliseconds of each part, and the memory that all this has taken."""
    on_gpu = watch.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(watch.device)
    with _learner(run, watch.device) as (agent, batch):
        total = watch.rate(lambda: agent.update(batch), "updates/s")
        total_ms = 1000 / total.value
        parts = time_parts(agent, batch, total_ms, options.repeats)
    note = f"{total_ms:.1f} ms; batch {run.loop.batch}×{run.loop.length}, gradient {run.gradient}"
    results = {"update/total": replace(total, note=note)}
    for part, ms in parts.items():
        results[f"update/{part}"] = Measurement(ms, "ms", note=f"{ms / total_ms:.0%} · {PARTS[part]}")
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(watch.device)
        results["memory/cuda_peak"] = Measurement(peak / 2**20, "MiB", note="largest allocation of the updates")
    return results


def measure_act(run: Config, options: SpeedConfig, watch: Stopwatch) -> Results:
    """Milliseconds from an observation to an action, for one environment and for ten."""
    results = {}
    with _learner(run, watch.device) as (agent, batch):
        frames = batch.obs.flatten(0, 1).cpu().numpy()
        for envs in (1, 10):
            obs, later = np.resize(frames, (envs, *frames.shape[1:])), np.zeros(envs, bool)
            _, carry = agent.act(obs, ~later, agent.initial(envs), explore=True)

            def act(obs: np.ndarray = obs, later: np.ndarray = later, carry: Any = carry) -> None:
                agent.act(obs, later, carry, explore=True)

            latency = watch.latency(act)
            note = f"{envs} {'environment' if envs == 1 else 'environments'}; {1000 * envs / latency.value:,.0f} actions/s"
            results[f"act/{envs}"] = replace(latency, note=note)
    return results


SUITES: dict[str, Callable[[Config, SpeedConfig, Stopwatch], Results]] = {
    "env": measure_env,
    "replay": measure_replay,
    "update": measure_update,
    "act": measure_act,
}


def measure_memory() -> Results:
    """The most memory that this process has held so far."""
    kib = 1 if sys.platform != "darwin" else 1 / 1024  # macOS counts bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib / 1024
    note = "this process, over all that was measured; cached pages of the replay's files included"
    results = {"memory/peak_rss": Measurement(peak, "MiB", note=note)}
    status = Path("/proc/self/status")
    if status.exists():
        anonymous = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon:"))
        own = int(anonymous.split()[1]) / 1024
        results["memory/own_rss"] = Measurement(own, "MiB", note="this process's own at the end, without file pages")
    return results


# -- what the suites time ----------------------------------------------------------------------------------------------


@contextmanager
def _learner(run: Config, device: torch.device) -> Iterator[tuple[DreamerAgent, Batch]]:
    """The agent of a configuration and a batch of what a random policy saw, as training would meet them."""
    steps = 2 * run.loop.length
    envs = make_vector_env(run.task, run.env, run.num_envs, run.seed)
    try:
        with tempfile.TemporaryDirectory() as folder, _new_replay(Path(folder), run, run.num_envs * steps) as (replay, spaces):
            torch.manual_seed(run.seed)
            agent = build_agent(run, *spaces, device)
            if not isinstance(agent, DreamerAgent):
                raise ConfigError(f"--agent {run.agent} learns nothing that could be timed; use --agent dreamer or --suite env")
            collector = Collector(envs, replay, spaces[1].shape[0])
            prefiller = RandomAgent(spaces[1].shape[0], run.seed)
            for _ in range(steps):
                collector.step(prefiller)
            replay.place(device)
            batch = replay.sample(run.loop.batch, run.loop.length, np.random.default_rng(run.seed))
    finally:
        envs.close()
    agent.start(batch.obs.flatten(0, 1))
    yield agent, batch

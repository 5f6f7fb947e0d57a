"""How fast everything runs: environments, replay, updates and their parts, acting, planning; and the memory it takes.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box
from rich.console import Console

from agents.dreamer import DreamerAgent, computes_bf16
from agents.mpc import MPCAgent
from agents.random import RandomAgent
from benchmarks.decision import published_peer, time_decision, time_published_decision
from benchmarks.loop import time_loop
from benchmarks.peer_updates import compare_peers, contests
from benchmarks.peers import PeerUnavailable
from benchmarks.provenance import command_line, machine, machine_line, now
from benchmarks.reference_size import reference
from benchmarks.stopwatch import Measurement, Results, Stopwatch, as_table
from benchmarks.update_cost import measure_cost
from benchmarks.update_parts import PARTS, time_parts
from envs import EnvConfig, action_repeat_of, make_vector_env
from runners.checks import check, refuse_below
from runners.config import Config, ConfigError, build_agent, parse_args, resolve_device
from runners.cores import cores
from runners.replay import Replay
from runners.rollout import Collector
from runners.session import configure_torch
from runners.train import USER_ERRORS
from worldmodels.interface import Batch


@dataclass(frozen=True)
class SpeedConfig:
    """Time environments, replay, updates and acting. Every flag of runners.train works too: --task, --preset, --device,
    --threads, --model.latent-dim and so on; what is timed is what a training with those flags would run."""

    suite: Literal["all", "env", "replay", "update", "act", "plan", "loop", "published", "peers"] = "all"
    """What to measure. plan is one decision of the planning agent, loop is collecting and learning together. published
    is one decision of LeWorldModel as published, which takes a processor a minute or more. peers is an update at the
    reference size, and LeWorldModel's published training step and decision, in turn with sheeprl's and
    stable-worldmodel's, which takes a processor a quarter of an hour. all leaves both out."""
    size: Literal["preset", "reference"] = "preset"
    """Sizes of the networks and of a batch: what the flags say, or those that updates are compared at, about 12M
    parameters, 16×64 rows, 1,024 starts × 15."""
    peers: bool = False
    """Time stable-worldmodel's LeWM and CEM in turn with --suite published, and print its time over ours. Needs the
    extra `.[peers]`."""
    peer_python: Path = Path(sys.executable)
    """Python of the environment with the extra `.[peers]`, for --suite peers. Its pins are not ours: install them into
    one of its own, without constraints.txt."""
    json: Path | None = None
    """Write the figures here too, with the command, the date, the machine and the whole configuration."""
    processes: int = 0
    """Environments stepped in processes of their own in the vectorised measurement. 0: one a core, at least 2."""
    replay_rows: int = 20_000
    """Rows in the measured replay; 12.3 kB each at 64×64 pixels, in the system's folder for temporary files."""
    repeats: int = 7
    """Repeats of each measurement; the median is reported, with the lowest and the highest."""
    seconds: float = 0.4
    """Length of one repeat."""


# -- the suites --------------------------------------------------------------------------------------------------------


def measure_env(run: Config, options: SpeedConfig, watch: Stopwatch) -> Results:
    """Frames a second, resets included, with random actions."""
    processes = options.processes or max(2, cores())
    repeat = action_repeat_of(run.task, run.env)

    def frames(env: EnvConfig, num_envs: int) -> Measurement:
        envs = make_vector_env(run.task, env, num_envs, run.seed)
        try:
            envs.reset()
            shape = (64, num_envs, envs.single_action_space.shape[0])
            actions = itertools.cycle(np.random.default_rng(run.seed).uniform(-1, 1, shape).astype(np.float32))
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
    observations, actions = _spaces(run)
    with _scratch_replay(run, streams * steps, observations, actions) as replay:
        drawn = np.random.default_rng(run.seed)
        rows = itertools.cycle([_random_row(observations, actions, streams, drawn) for _ in range(64)])
        never = np.zeros(streams, bool)

        def add(*, is_first: bool = False) -> None:
            replay.add(**next(rows), is_first=np.full(streams, is_first), is_last=never, is_terminal=never)

        def sample() -> Batch:
            return replay.sample(loop.batch, loop.length, generator)

        add(is_first=True)
        for _ in range(steps - 1):
            add()
        results = {"replay/add": replace(watch.rate(add, "rows/s", streams), note="flushed to disk on the way")}
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
    agent, batch = _learner(run, watch.device)
    cycle = run.dreamer.behaviour_every

    def learn() -> None:
        for _ in range(cycle):
            agent.update(batch)

    total = watch.rate(learn, "updates/s", cycle)
    total_ms = 1000 / total.value
    memory = _memory()  # before the profiler takes its own
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(watch.device)
        memory["memory/cuda_peak"] = Measurement(peak / 2**20, "MiB", note="allocated at once by the updates")
    parts = time_parts(agent, batch, total_ms, options.repeats)
    note = f"{total_ms:.1f} ms; batch {run.loop.batch}×{run.loop.length}, {run.gradient}, behaviour in 1 of {cycle}"
    results = {"update/total": replace(total, note=note)} | measure_cost(agent, batch, total_ms, watch)
    for part, ms in parts.items():
        results[f"update/{part}"] = Measurement(ms, "ms", note=f"{ms / total_ms:.0%} · {PARTS[part]}")
    return results | memory


def measure_act(run: Config, options: SpeedConfig, watch: Stopwatch) -> Results:
    """Milliseconds from an observation to an action, for one environment and for ten."""
    results = {}
    agent, batch = _learner(run, watch.device)
    frames = batch.obs.flatten(0, 1).cpu().numpy()
    for envs in (1, 10):
        obs, later = np.resize(frames, (envs, *frames.shape[1:])), np.zeros(envs, bool)
        _, carry = agent.act(obs, ~later, agent.initial(envs), explore=True)

        def act(obs: np.ndarray = obs, later: np.ndarray = later, carry: Any = carry) -> None:
            agent.act(obs, later, carry, explore=True)

        latency = watch.latency(act)
        note = f"E={envs}; {1000 * envs / latency.value:,.0f} actions/s"
        results[f"act/{envs}"] = replace(latency, note=note)
    return results


def measure_plan(run: Config, options: SpeedConfig, watch: Stopwatch) -> Results:
    """Milliseconds of one decision by the planning agent, and of its parts."""
    agent, batch = _learner(replace(run, agent="mpc"), watch.device)
    assert isinstance(agent, MPCAgent)
    return time_decision(agent, batch.obs[0, :1].cpu().numpy(), watch)


def measure_published(run: Config, options: SpeedConfig, watch: Stopwatch) -> Results:
    """Milliseconds of one decision at the published LeWorldModel's setting, and of its parts."""
    peer = None
    if options.peers:
        try:
            peer = published_peer(watch.device)
        except PeerUnavailable as error:
            print(error, file=sys.stderr)
    return time_published_decision(watch, bf16=computes_bf16(watch.device), peer=peer)


def measure_loop(run: Config, options: SpeedConfig, watch: Stopwatch) -> Results:
    """Env_steps and updates a second of the whole loop, and how busy it keeps a GPU."""
    return time_loop(run, watch)


def measure_peers(run: Config, options: SpeedConfig, watch: Stopwatch) -> Results:
    """Ours beside what other packages do."""
    return compare_peers(contests(run), options.peer_python, watch)


SUITES: dict[str, Callable[[Config, SpeedConfig, Stopwatch], Results]] = {
    "env": measure_env,
    "update": measure_update,
    "act": measure_act,
    "plan": measure_plan,
    "loop": measure_loop,
    "published": measure_published,
    "peers": measure_peers,
    "replay": measure_replay,
}
"""In the order of measuring: the copy of the replay comes last, or it would count among the updates' memory."""


def measure(run: Config, options: SpeedConfig, watch: Stopwatch, said: Callable[[str], Any] = print) -> Results:
    """All that ``options.suite`` asks for, by name. ``said`` is told what is being measured.

    Raises one of ``runners.train.USER_ERRORS``.
    """
    results: Results = {}
    everything = [name for name in SUITES if name not in ("published", "peers")]
    for name in everything if options.suite == "all" else [options.suite]:
        said(f"measuring {name} …")
        results |= SUITES[name](run, options, watch)
    return dict(sorted(results.items(), key=lambda item: item[0].startswith("memory/")))


def _memory() -> Results:
    """The most memory this process has held, and, where the system tells, what it holds of its own now."""
    kib = 1024 if sys.platform != "darwin" else 1  # macOS counts bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib / 2**20
    results = {"memory/peak_rss": Measurement(peak, "MiB", note="most held so far, with pages of mapped files")}
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon:"))
        note = "held after the updates, without file pages"
        results["memory/own_rss"] = Measurement(int(line.split()[1]) / 1024, "MiB", note=note)
    return results


# -- what the suites time ----------------------------------------------------------------------------------------------


def _learner(run: Config, device: torch.device) -> tuple[DreamerAgent, Batch]:
    """The agent of a configuration and a batch of what a random policy met, as training would make them."""
    steps = 2 * run.loop.length
    envs = make_vector_env(run.task, run.env, run.num_envs, run.seed)
    try:
        observations, actions = _boxes(envs.single_observation_space, envs.single_action_space)
        torch.manual_seed(run.seed)
        agent = build_agent(run, observations, actions, device)
        if not isinstance(agent, DreamerAgent):
            raise ConfigError(f"--agent {run.agent} does not learn; time --agent dreamer, or --suite env or replay")
        with _scratch_replay(run, run.num_envs * steps, observations, actions) as replay:
            collector, prefiller = Collector(envs, replay, agent.action_dim), RandomAgent(agent.action_dim, run.seed)
            for _ in range(steps):
                collector.step(prefiller)
            replay.place(device)
            batch = replay.sample(run.loop.batch, run.loop.length, np.random.default_rng(run.seed))
    finally:
        envs.close()
    agent.start(batch.obs.flatten(0, 1))
    return agent, batch


@contextmanager
def _scratch_replay(run: Config, rows: int, observations: Box, actions: Box) -> Iterator[Replay]:
    """A replay among the system's temporary files, deleted afterwards."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Replay.create(
            Path(folder) / "replay",
            capacity=rows,
            num_envs=run.num_envs,
            obs_shape=observations.shape,
            obs_dtype=observations.dtype,
            action_dim=actions.shape[0],
        ) as replay,
    ):
        yield replay


def _spaces(run: Config) -> tuple[Box, Box]:
    envs = make_vector_env(run.task, run.env, 1, run.seed)
    try:
        return _boxes(envs.single_observation_space, envs.single_action_space)
    finally:
        envs.close()


def _boxes(observations: gym.Space, actions: gym.Space) -> tuple[Box, Box]:
    if not isinstance(observations, Box) or not isinstance(actions, Box):
        raise ConfigError(f"a replay holds --env.obs pixels or state, not {observations}")
    return observations, actions


def _random_row(observations: Box, actions: Box, streams: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """obs, action and reward of one row for every stream."""
    shape = (streams, *observations.shape)
    pixels = observations.dtype == np.uint8
    obs = generator.integers(0, 256, shape, np.uint8) if pixels else generator.standard_normal(shape, np.float32)
    action = generator.uniform(-1, 1, (streams, *actions.shape)).astype(np.float32)
    return {"obs": obs, "action": action, "reward": generator.random(streams, np.float32)}


# -- what a person sees ------------------------------------------------------------------------------------------------


def report(run: Config, results: Results, command: str) -> dict[str, Any]:
    """The figures and where they come from, as JSON."""
    provenance = {"command": command, "date": now(), "machine": machine(), "config": asdict(run)}
    return provenance | {"results": {name: asdict(one) for name, one in results.items()}}


def _check_options(options: SpeedConfig) -> None:
    if options.peers and options.suite != "published":
        raise ConfigError(f"--peers is of --suite published; --suite {options.suite} has no peer")
    refuse_below(
        [
            ("--processes", options.processes, 0),
            ("--replay-rows", options.replay_rows, 1),
            ("--repeats", options.repeats, 1),
            ("--seconds", options.seconds, 0.001),
        ]
    )


def main(args: Sequence[str] | None = None) -> int:
    """0, or 1 after an error."""
    args = sys.argv[1:] if args is None else args
    options, others = tyro.cli(SpeedConfig, args=args, prog="python -m benchmarks.speed", return_unknown_args=True)
    console = Console()
    try:
        run = parse_args(others)
        if options.size == "reference" or options.suite == "peers":
            run = reference(run)
        check(run)
        _check_options(options)
        device = resolve_device(run.device)
        configure_torch(run.threads)
        watch = Stopwatch(options.repeats, options.seconds, device)
        results = measure(run, options, watch, lambda text: console.print(text, highlight=False))
        content = report(run, results, command_line("benchmarks.speed", args))
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(content, indent=2) + "\n")
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    threads = torch.get_num_threads()
    on = "" if device.type == "cuda" else f", {threads} {'thread' if threads == 1 else 'threads'}"
    console.print(as_table(results, f"{run.task}, preset {run.preset}, on {device.type}{on}"))
    console.print(f"{machine_line()} · torch {torch.__version__} · {content['date']}", highlight=False)
    if options.json is not None:
        console.print(f"written to {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

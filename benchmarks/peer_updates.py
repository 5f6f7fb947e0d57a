"""Ours beside its peers, call by call in turn, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch

from agents.dreamer import DreamerAgent, computes_bf16
from benchmarks.decision import PUBLISHED_ACTIONS, PUBLISHED_BLOCK, published_decision
from benchmarks.peer_process import PeerProcess, PeerTask
from benchmarks.peers import PeerUnavailable
from benchmarks.reference_size import random_batch
from benchmarks.stopwatch import Cost, Measurement, Results, Stopwatch, cost_of
from runners.config import Config, ConfigError, build_agent
from runners.pretrain import gradient_step
from runners.pretrain_config import presets as pretrain_presets
from worldmodels.lewm import build_world_model

ROUNDS = 3
"""At most: a call may take a minute."""
_LONG = 20
"""Turns."""
WALKER_ACTIONS = 6
LEWM_BATCH = 16
"""Sequences of a step at LeWorldModel's published sizes, of whose 128 two cores would need minutes."""

Party = Callable[[int], Cost]
"""Does its work that often and says what it took."""


class Ours(NamedTuple):
    """Our way of doing what peers do."""

    work: Callable[[], Any]
    parameters: int
    """Those that it learns."""
    note: str


@dataclass(frozen=True)
class Contest:
    """One piece of work, done by us and by others."""

    ours: Callable[[torch.device, bool], Ours]
    """Builds it, for a device, with the networks in bfloat16 or float32."""
    peers: Mapping[str, PeerTask]
    """By the names that the results have."""


def compare_peers(contests: Mapping[str, Contest], python: Path, watch: Stopwatch) -> Results:
    """Milliseconds and CPU milliseconds of ours and of each peer, and its over ours, for every contest. Peers run by
    ``python``, with as many threads. Each is named; one that cannot be used is said on stderr and left out.

    Raises:
        ConfigError: none can be used.
    """
    results: Results = {}
    for name, contest in contests.items():
        with ExitStack() as running:
            peers = dict(_start(contest, python, watch.device, running))
            if peers:
                results |= _compare(f"peers/{name}", contest, peers, watch)
    if not results:
        raise ConfigError(
            f"{python} can use none of the peers; say --peer-python with an environment into which "
            "pip install -e '.[peers]' was done, without constraints.txt"
        )
    return results


def _start(
    contest: Contest, python: Path, device: torch.device, running: ExitStack
) -> Iterator[tuple[str, PeerProcess]]:
    for name, task in contest.peers.items():
        task = replace(task, device=device.type, threads=torch.get_num_threads(), bf16=computes_bf16(device))
        try:
            peer = running.enter_context(PeerProcess(python, task))
        except PeerUnavailable as error:
            print(error, file=sys.stderr)
            continue
        print(f"beside {peer.name}: {peer.parameters / 1e6:.1f}M parameters", flush=True)
        yield name, peer


def _compare(name: str, contest: Contest, peers: Mapping[str, PeerProcess], watch: Stopwatch) -> Results:
    ours = contest.ours(watch.device, computes_bf16(watch.device))
    parties: dict[str, Party] = {"": lambda calls: cost_of(ours.work, calls, watch.device), **peers}
    costs = in_turn(parties, min(watch.repeats, ROUNDS), watch.seconds)
    results = _times(name, costs[""], f"{ours.parameters / 1e6:.1f}M parameters; {ours.note}")
    for label, peer in peers.items():
        if label in costs:
            key, note = f"{name}_{label}", f"{peer.parameters / 1e6:.1f}M parameters; {peer.name}"
            results |= _times(key, costs[label], note) | ratios(key, costs[""], costs[label])
    return results


def in_turn(parties: Mapping[str, Party], rounds: int, seconds: float) -> dict[str, list[Cost]]:
    """What a call of each took, in every round; ours is "". A turn is as many calls as fill ``seconds``, at least one.
    A peer that ends is said on stderr and left out."""
    calls: dict[str, int] = {}
    costs: dict[str, list[Cost]] = {name: [] for name in parties}
    for turn in range(rounds + 1):
        for name in list(costs):
            try:
                if turn == 0:
                    calls[name] = _calls(parties[name], seconds)
                    continue
                wall_s, cpu_s = parties[name](calls[name])
                costs[name].append(Cost(wall_s / calls[name], cpu_s / calls[name]))
            except PeerUnavailable as error:
                print(error, file=sys.stderr)
                del costs[name]
    return costs


def _calls(party: Party, seconds: float) -> int:
    """How many calls fill that time. The first call also does what is only done once, such as loading kernels; of work
    that takes so much longer than a turn, it tells enough."""
    first = party(1).wall_s
    return max(1, round(seconds / (first if first > _LONG * seconds else party(1).wall_s)))


def _times(key: str, costs: list[Cost], note: str) -> Results:
    wall, cpu = ([1000 * each for each in of] for of in zip(*costs, strict=True))
    return {key: _median(wall, "ms", note), f"{key}_cpu": _median(cpu, "CPU ms")}


def ratios(key: str, ours: list[Cost], theirs: list[Cost]) -> Results:
    """A peer's time over ours in each round."""
    wall = [their.wall_s / our.wall_s for our, their in zip(ours, theirs, strict=True)]
    cpu = [their.cpu_s / our.cpu_s for our, their in zip(ours, theirs, strict=True)]
    return {f"{key}_ratio": _median(wall, "×"), f"{key}_cpu_ratio": _median(cpu, "×")}


def _median(values: list[float], unit: str, note: str = "") -> Measurement:
    return Measurement(median(values), unit, min(values), max(values), note)


# -- ours --------------------------------------------------------------------------------------------------------------


def our_update(run: Config, device: torch.device, bf16: bool) -> Ours:
    """An update of the imagination agent on random rows of walker-walk's sizes."""
    torch.manual_seed(run.seed)
    run = replace(run, dreamer=replace(run.dreamer, precision="bf16" if bf16 else "float32"))
    size, loop, dreamer = run.env.size, run.loop, run.dreamer
    frames, actions = gym.spaces.Box(0, 255, (3, size, size), np.uint8), gym.spaces.Box(-1, 1, (WALKER_ACTIONS,))
    agent = build_agent(run, frames, actions, device)
    assert isinstance(agent, DreamerAgent)
    batch = random_batch(loop.batch, loop.length, size, WALKER_ACTIONS, device)
    agent.start(batch.obs.flatten(0, 1))
    learned = sum(p.numel() for group in agent.groups.values() for p in group)
    note = f"{loop.batch}×{loop.length} of {size}×{size}, {dreamer.starts:,} starts × {dreamer.horizon}, "
    return Ours(lambda: agent.update(batch), learned, f"{note}rollout {run.model.rollout}, {dreamer.precision}")


def our_lewm_update(batch: int, device: torch.device, bf16: bool) -> Ours:
    """A step of ``runners.pretrain --preset paper`` on random frames of 224×224."""
    torch.manual_seed(0)
    paper = pretrain_presets()["paper"]
    actions = PUBLISHED_BLOCK * PUBLISHED_ACTIONS
    model = build_world_model((3, 224, 224), actions, paper.model).to(device)
    rows = random_batch(batch, paper.length, 224, actions, device)
    model.fit_normaliser(rows.obs.flatten(0, 1))
    optimiser = torch.optim.AdamW(model.parameters(), lr=paper.lr, weight_decay=paper.weight_decay, fused=True)
    # The heads are there but learn nothing without rewards.
    used = ("encoder.", "predictor.")
    learned = sum(p.numel() for name, p in model.named_parameters() if name.startswith(used))
    note = f"{batch}×{paper.length} of 224×224, {'bf16' if bf16 else 'float32'}"
    return Ours(lambda: gradient_step(model, optimiser, rows, clip=paper.clip, bf16=bf16), learned, note)


def our_decision(device: torch.device, bf16: bool) -> Ours:
    """A decision of LeWorldModel as published."""
    decision = published_decision(device, bf16=bf16)
    return Ours(decision.decide, decision.parameters, decision.note)


def contests(run: Config) -> dict[str, Contest]:
    """An update of this size, LeWorldModel's training step at its published sizes, and its decision.

    Raises:
        ConfigError: the update is not one that the peers have.
    """
    if (run.agent, run.env.obs, run.env.size) != ("dreamer", "pixels", 64):
        raise ConfigError(
            f"--suite peers compares --agent dreamer on 64×64 pixels, not {run.agent} on {run.env.obs} of size "
            f"{run.env.size}; leave these flags out"
        )
    paper = pretrain_presets()["paper"]
    of_run = PeerTask(
        "dreamer_v3_XS",
        batch=run.loop.batch,
        length=run.loop.length,
        horizon=run.dreamer.horizon,
        actions=WALKER_ACTIONS,
    )
    of_lewm = PeerTask(
        "lewm_update", batch=LEWM_BATCH, length=paper.length, actions=PUBLISHED_BLOCK * PUBLISHED_ACTIONS
    )
    sheeprl = {
        "xs": of_run,
        "nature_12m": replace(of_run, work="dreamer_v3_5_12M"),
    }
    return {
        "update": Contest(lambda device, bf16: our_update(run, device, bf16), sheeprl),
        "lewm": Contest(lambda device, bf16: our_lewm_update(LEWM_BATCH, device, bf16), {"swm": of_lewm}),
        "decision": Contest(our_decision, {"swm": replace(of_lewm, work="lewm_decision")}),
    }

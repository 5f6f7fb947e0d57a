"""Where the time of one planned decision goes: encoding what was seen, rolling candidates out, scoring, searching."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import median
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from agents.goals import GoalSearchConfig, NearnessToGoal
from agents.mpc import ImaginedReturn, MPCAgent
from agents.planner import CEM, CEMConfig
from benchmarks.peers import Peer, stable_worldmodel_decision
from benchmarks.stopwatch import Measurement, Results, Stopwatch
from worldmodels.lewm import PAPER, LeWorldModel, build_world_model

Part = Literal["encode", "rollout", "score", "search"]
Place = tuple[Any, str, Part]
"""An owner, the name of its function, and what the function's time counts as."""

PARTS: dict[Part, str] = {
    "encode": "what was seen, once",
    "rollout": "imagined steps of the candidates, and of the policy's proposals",
    "score": "rewards and values, or the distance to a goal",
    "search": "sampling, ranking, refitting, the policy, Python",
}

PUBLISHED = CEMConfig(samples=300, iterations=30, elites=30)
"""LeWorldModel's planner (arXiv 2603.19312)."""
PUBLISHED_HORIZON, PUBLISHED_BLOCK, PUBLISHED_ACTIONS = 5, 5, 2


class PartClock:
    """Charges time to the innermost part that is running."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent: dict[Part, float] = defaultdict(float)
        self._running: list[Part] = ["search"]
        self._since = time.perf_counter()

    def mark(self, function: Callable[..., Any], part: Part) -> Callable[..., Any]:
        """``function``, whose time counts as ``part``."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._running.pop()

        return marked

    def read(self) -> dict[Part, float]:
        """Seconds of each part since the last reading."""
        self._charge()
        spent, self.spent = self.spent, defaultdict(float)
        return spent

    def _charge(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.spent[self._running[-1]] += now - self._since
        self._since = now


def time_decision(agent: MPCAgent, obs: Any, watch: Stopwatch) -> Results:
    """One environment's decision by a planning agent with its own settings, and the milliseconds of each part."""
    _, carry = agent.act(obs, np.ones(1, bool), agent.initial(1), explore=False)

    def decide() -> None:
        agent.act(obs, np.zeros(1, bool), carry, explore=False)

    places: list[Place] = [
        (agent.model, "observe", "encode"),
        (agent.model, "imagine", "rollout"),
        (ImaginedReturn, "__call__", "score"),
    ]
    mpc = agent.mpc
    note = f"{mpc.planner}, H={mpc.horizon}, {mpc.proposals} proposals"
    return _timed("plan/agent", decide, places, watch, note)


def published_peer(device: torch.device) -> Peer:
    """stable-worldmodel's decision at the same setting. Raises PeerUnavailable."""
    return stable_worldmodel_decision(
        PAPER,
        PUBLISHED,
        horizon=PUBLISHED_HORIZON,
        block=PUBLISHED_BLOCK,
        actions=PUBLISHED_ACTIONS,
        device=device,
    )


class Decision(NamedTuple):
    """One decision of the published LeWorldModel, with untrained weights, which take the same time."""

    model: LeWorldModel
    decide: Callable[[], None]
    note: str

    @property
    def parameters(self) -> int:
        """Of encoder and predictor."""
        used = ("encoder.", "predictor.")
        return sum(p.numel() for name, p in self.model.named_parameters() if name.startswith(used))


def published_decision(device: torch.device, *, bf16: bool) -> Decision:
    """ViT-tiny at 224×224, predictor of depth 6, CEM of 300 × 30 plans of 5 action blocks."""
    torch.manual_seed(0)
    model = build_world_model((3, 224, 224), PUBLISHED_BLOCK * PUBLISHED_ACTIONS, PAPER).to(device).eval()
    planner = CEM(PUBLISHED)
    frames = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, device=device)
    action = torch.zeros(1, PUBLISHED_BLOCK * PUBLISHED_ACTIONS, device=device)
    mean = torch.zeros(1, PUBLISHED_HORIZON, action.shape[1], device=device)
    first = torch.ones(1, dtype=torch.bool, device=device)

    @torch.no_grad()
    def decide() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            state = model.observe(model.initial(1), action, frames[:1], first)
            goal = model.encode(frames[1:])
            planner.plan(NearnessToGoal(model, state, goal, GoalSearchConfig()), mean, torch.ones_like(mean))

    note = f"{PUBLISHED.samples}×{PUBLISHED.iterations}, H={PUBLISHED_HORIZON}, {'bf16' if bf16 else 'float32'}"
    return Decision(model, decide, note)


def time_published_decision(watch: Stopwatch, *, bf16: bool, peer: Peer | None = None) -> Results:
    """The published decision, and the milliseconds of each part. A peer is timed in turn with it."""
    decision = published_decision(watch.device, bf16=bf16)
    places: list[Place] = [
        (decision.model, "encode", "encode"),
        (decision.model, "imagine", "rollout"),
        (NearnessToGoal, "__call__", "score"),
    ]
    # It takes seconds: one call is a repeat.
    watch = Stopwatch(min(watch.repeats, 3), 1e-3, watch.device)
    results = _timed("plan/published", decision.decide, places, watch, decision.note)
    if peer is None:
        return results
    ours, theirs = watch.in_turn([decision.decide, peer.work])
    sizes = f"{peer.parameters / 1e6:.1f}M parameters, ours {decision.parameters / 1e6:.1f}M"
    ratio = f"lowest of each: {theirs.low / ours.low:.2f}"  # type: ignore[operator]
    results["plan/published"] = replace(ours, note=decision.note)
    results["plan/published_peer"] = replace(theirs, note=f"{peer.name}, LeWM and CEM as it ships; {sizes}")
    results["plan/published_ratio"] = Measurement(theirs.value / ours.value, "×", note=f"its time over ours; {ratio}")
    return results


def _timed(name: str, work: Callable[[], None], places: list[Place], watch: Stopwatch, note: str) -> Results:
    total = watch.latency(work)
    results = {name: replace(total, note=note)}
    with _marked(places, watch.device) as clock:
        work()
        clock.read()
        readings = []
        for _ in range(watch.repeats):
            work()
            readings.append(clock.read())
    for part, says in PARTS.items():
        ms = 1000 * median(reading[part] for reading in readings)
        results[f"{name}_{part}"] = Measurement(ms, "ms", note=f"{ms / total.value:.0%} · {says}")
    return results


@contextmanager
def _marked(places: list[Place], device: torch.device) -> Iterator[PartClock]:
    """Every place's function charged to its part; all as before afterwards."""
    clock = PartClock(device)
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, clock.mark(getattr(owner, name), part)))
        yield clock

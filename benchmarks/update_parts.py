"""Where the time of an agent's update goes, measured on the very update that training runs.

The parts are marked from outside, by wrapping methods of one agent while PyTorch's profiler listens, so nothing in the
update knows of it. The backward pass comes out of one call for all parts: each of its steps is charged to the part that
made it in the forward pass, which autograd's sequence numbers tell.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import fmean, median
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from agents import dreamer
from agents.beside import one_after_the_other
from agents.dreamer import DreamerAgent
from worldmodels.interface import Batch
from worldmodels.lewm import LeWorldModel

Part = Literal["encoder", "predictor", "heads", "imagination", "actor_critic", "optimiser", "other"]
PARTS: dict[Part, str] = {
    "encoder": "input normaliser and encoder",
    "predictor": "one step and rollout on replayed rows",
    "heads": "the rest of the model's loss: SIGReg, reward, continue",
    "imagination": "predictor steps from replayed states",
    "actor_critic": "policy, critic, imagined rewards, λ-returns",
    "optimiser": "clipping, Adam, slow copies",
    "other": "Python and launches between the operators",
}
"""The parts and what each comprises, forward and backward together."""

_MARK = "update:"
_OPTIMISER = "Optimizer."  # PyTorch marks step and zero_grad of every optimiser itself
_ENGINE = "autograd::engine::evaluate_function"


def time_parts(agent: DreamerAgent, batch: Batch, total_ms: float, repeats: int) -> dict[Part, float]:
    """Milliseconds of each part in one update, the median over ``repeats`` updates (of cycles of them, where behaviour
    learns seldomer than the model).

    On the CPU they are shares of ``total_ms``, the update's time without the profiler, in the proportions that they
    have one after the other. On a GPU they are the time its
    kernels run, and ``other`` is what is left of ``total_ms``.

    Raises:
        TypeError: the agent's world model is not a LeWorldModel.
    """
    if not isinstance(agent.model, LeWorldModel):
        raise TypeError(f"only a LeWorldModel's update can be split into parts, not {type(agent.model).__name__}'s")
    on_gpu = agent.device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library writes its start and stop to stderr
    with _marked(agent, agent.model) as update:
        update(batch)
        profiled(lambda: update(batch), on_gpu)  # the first one loads the profiler
        # Behaviour learns in one of so many updates: only that many together show what an update takes.
        cycle = agent.config.behaviour_every
        runs = [[charge(profiled(lambda: update(batch), on_gpu), on_gpu) for _ in range(cycle)] for _ in range(repeats)]
    parts: dict[Part, float] = {part: median(fmean(one[part] for one in run) for run in runs) / 1000 for part in PARTS}
    if on_gpu:
        parts["other"] = max(0.0, total_ms - sum(value for part, value in parts.items() if part != "other"))
        return parts
    profiled_ms = sum(parts.values())
    return {part: value * total_ms / profiled_ms for part, value in parts.items()}


@contextmanager
def _marked(agent: DreamerAgent, model: LeWorldModel) -> Iterator[Callable[[Batch], Any]]:
    """``agent.update`` with every part marked for the profiler; the agent is as before afterwards."""
    places: list[tuple[Any, str, str]] = [
        (model, "embed", "loss"),
        (model, "losses", "loss"),
        (model, "backward_encoder", "loss"),
        (model.normaliser, "forward", "encoder"),
        (model.encoder, "forward", "encoder"),
        (model.predictor, "forward", "predictor"),
        (model.predictor, "sequence", "predictor"),
        (model, "imagine", "predictor"),
        (nn.utils, "clip_grad_norm_", "optimiser"),
        (agent.critic, "follow", "optimiser"),
        (dreamer, "follow", "optimiser"),
    ]
    with ExitStack() as stack:
        # What the other half of the update takes would otherwise be charged to waiting for it.
        stack.enter_context(patch.object(agent, "beside", one_after_the_other))
        # Neither a replayed graph nor compiled code passes the marks.
        stack.enter_context(patch.object(agent, "_learn_on_device", agent._learn))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for owner, name, mark in places:
            stack.enter_context(patch.object(owner, name, _mark(getattr(owner, name), mark)))
        yield _mark(agent.update, "update")


def _mark(function: Callable[..., Any], mark: str) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(_MARK + mark):
            return function(*args, **kwargs)

    return marked


def profiled(work: Callable[[], Any], on_gpu: bool) -> list[FunctionEvent]:
    """What PyTorch's profiler sees of ``work``."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities, acc_events=True) as profiler:
        work()
        if on_gpu:
            torch.cuda.synchronize()
    return list(profiler.events())


def charge(events: list[FunctionEvent], on_gpu: bool) -> dict[Part, float]:
    """Microseconds of each part in one profiled update: every operator's own time, charged to its part."""
    # A GPU's kernels are events, too; their time is also that of the operators that launched them.
    events = [event for event in events if event.device_type == DeviceType.CPU]
    lines = {id(event): _ancestry(event) for event in events}
    owner: dict[int, Part] = {}
    # An operator that makes no step of the backward pass bears the number of the next one that does: the last one wins.
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and _backward_step(lines[id(event)]) is None:
            owner[event.sequence_nr] = _forward_part(lines[id(event)])
    charged: dict[Part, float] = defaultdict(float)
    for event in events:
        line = lines[id(event)]
        step = _backward_step(line)
        if step is not None:
            # Adding a gradient up has no number of its own.
            part: Part = owner.get(step.sequence_nr, "other")
        else:
            part = "other" if event.name == f"{_MARK}update" else _forward_part(line)
        charged[part] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return charged


def _ancestry(event: FunctionEvent) -> list[FunctionEvent]:
    """The operator and all that called it, innermost first."""
    line: list[FunctionEvent] = []
    at: FunctionEvent | None = event
    while at is not None:
        line.append(at)
        at = at.cpu_parent
    return line


def _backward_step(line: list[FunctionEvent]) -> FunctionEvent | None:
    return next((event for event in line if event.name.startswith(_ENGINE)), None)


def _forward_part(line: list[FunctionEvent]) -> Part:
    marks = {event.name.removeprefix(_MARK) for event in line if event.name.startswith(_MARK)}
    if "optimiser" in marks or any(event.name.startswith(_OPTIMISER) for event in line):
        return "optimiser"
    if "encoder" in marks:
        return "encoder"
    if "predictor" in marks:
        return "predictor" if "loss" in marks else "imagination"
    return "heads" if "loss" in marks else "actor_critic"

"""What a GPU needs of an update: no wait of the host inside it, figures that are refused late, and the same numbers
compiled. Recording itself needs CUDA."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agents.actor_critic import Pathwise, Reinforce
from agents.captured import WARM_UP, Captured, NotRecordable, Watch
from agents.interface import NonFiniteLoss
from agents.mpc import MPCAgent, MPCConfig, build_planner
from agents.planner import CEMConfig, GradientConfig, ICEMConfig, MPPIConfig
from tests.test_dreamer import CONFIG, MODEL, awake, flat, frames, pixel_agent, pixel_batch
from worldmodels.lewm import build_world_model
from worldmodels.transformer import TransformerConfig

WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "multinomial", "unique")
"""Operators that answer the host, or whose answer's size depends on what a tensor holds."""
FROM_HOST = ("lift_fresh", "scalar_tensor")
"""Operators that make a tensor out of a number of the host: on a GPU a copy that waits, which no graph can hold."""


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING + FROM_HOST, f"{func} waits for the device"
        if name in ("index", "index_put"):
            assert all(x is None or x.dtype != torch.bool for x in args[1]), f"{func} by a mask waits for the device"
        return func(*args, **kwargs or {})


def test_the_refusal_sees_what_waits() -> None:
    x = torch.arange(3.0)
    for waits in (
        lambda: float(x.sum()),
        lambda: x[x > 1],
        lambda: torch.where(x > 1, x, 0.0),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: torch.multinomial(x, 1) if x.sum() > 0 else None,
    ):
        with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
            waits()


@pytest.mark.parametrize("behaviour", [True, False])
@pytest.mark.parametrize("gradient", ["pathwise", "reinforce"])
def test_nothing_in_an_update_waits_for_the_device(behaviour: bool, gradient: str) -> None:
    agent, batch = awake(pixel_agent(Pathwise() if gradient == "pathwise" else Reinforce())), pixel_batch()
    agent.update(batch)  # the optimisers' states are made at the first step
    with NoWaiting():
        agent._learn(batch, behaviour)


@pytest.mark.parametrize("explore", [True, False])
def test_nothing_in_acting_waits_for_the_device(explore: bool) -> None:
    agent = awake(pixel_agent(random_actions=0.5))
    obs, first = torch.as_tensor(frames(3, 1)[0]), torch.tensor([True, False, False])
    with NoWaiting():
        agent._act(obs, first, agent.initial(3), explore)


def planning_agent(planner: str = "mppi", predictor: str = "window") -> MPCAgent:
    torch.manual_seed(0)
    mpc = MPCConfig(
        planner=planner,  # type: ignore[arg-type]
        proposals=4,
        collecting_horizon=2,
        mppi=MPPIConfig(samples=16),
        cem=CEMConfig(samples=16),
        icem=ICEMConfig(samples=16),
        gradient=GradientConfig(starts=4, iterations=2),
    )
    transformer = TransformerConfig(history=3, depth=1, heads=2, head_dim=4, mlp=8, projector=8)
    model = replace(MODEL, predictor=predictor, transformer=transformer)  # type: ignore[arg-type]
    world_model = build_world_model((3, 16, 16), 2, model)
    return MPCAgent(world_model, 2, Pathwise(), CONFIG, mpc, build_planner(mpc))


@pytest.mark.parametrize("explore", [True, False])
@pytest.mark.parametrize("planner", ["mppi", "cem", "icem"])  # the gradient's Adam counts on the host, but not on a GPU
def test_nothing_in_planning_waits_for_the_device(planner: str, explore: bool) -> None:
    agent = planning_agent(planner)
    obs, first = torch.as_tensor(frames(3, 1)[0]), torch.tensor([True, False, False])
    agent.act(obs.numpy(), first.numpy(), agent.initial(3), explore=explore)
    with NoWaiting():
        agent._act(obs, first, agent.initial(3), explore)


@pytest.mark.parametrize("predictor", ["window", "transformer"])
def test_a_model_says_whether_its_futures_wait(predictor: str) -> None:
    model = planning_agent(predictor=predictor).model.eval()
    state = model.observe(
        model.initial(2), torch.zeros(2, 2), torch.as_tensor(frames(2, 1)[0]), torch.ones(2, dtype=torch.bool)
    )
    refused = pytest.raises(AssertionError, match="waits for the device") if model.futures_wait else nullcontext()
    with refused, NoWaiting():
        model.futures(state)(4)
    assert model.futures_wait == (predictor == "transformer")


def test_late_looks_refuse_late_and_name_what_was_not_finite() -> None:
    watch = Watch(torch.device("cpu"))
    watch.ahead = 2
    watch.look(["a", "b"], torch.tensor([1.0, torch.inf]))
    watch.look(["a", "b"], torch.tensor([1.0, 2.0]))
    with pytest.raises(NonFiniteLoss, match=r"^b became NaN or inf"):
        watch.look(["a", "b"], torch.tensor([1.0, 2.0]))
    watch.settle()
    watch.look(["a"], torch.tensor([torch.nan]))
    with pytest.raises(NonFiniteLoss, match=r"^a became NaN or inf"):
        watch.settle()


def test_a_nan_that_is_seen_late_has_changed_no_weight_and_is_not_saved() -> None:
    """As on a GPU, where the host is ahead of what it knows."""
    agent, batch = awake(pixel_agent()), pixel_batch()
    agent.update(batch)
    before = flat(agent.state_dict())
    agent._watch.ahead = Watch.AHEAD
    bad = batch._replace(reward=batch.reward * torch.nan)
    agent.update(bad)
    agent.update(bad)
    with pytest.raises(NonFiniteLoss, match="reward_loss"):
        agent.state_dict()
    agent._watch = Watch(torch.device("cpu"))
    kept = flat(agent.state_dict())
    assert {
        name for name in kept if not name.startswith(".scale") and not torch.equal(kept[name], before[name])
    } == set()


def test_what_is_not_enabled_is_called_as_it_is() -> None:
    calls: list[Tensor] = []
    captured = Captured(lambda x: calls.append(x) or x + 1, enabled=False)  # type: ignore[func-returns-value]
    x = torch.ones(2)
    for _ in range(WARM_UP + 2):
        assert torch.equal(captured(x), x + 1)
    assert len(calls) == WARM_UP + 2
    assert all(seen is x for seen in calls)


def test_what_cannot_be_recorded_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on after a recording that broke off is not possible: the GPU's random numbers are lost to it."""

    @contextmanager
    def graph(recorded: Any) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    captured = Captured(lambda x: x + 1, enabled=True)
    monkeypatch.setattr(captured, "_beside", lambda args: captured.function(*args))
    for _ in range(WARM_UP):
        assert captured(torch.ones(1)) == 2
    with pytest.raises(NotRecordable, match=r"--compile false \(operation not permitted"):
        captured(torch.ones(1))


def test_generators_are_known_to_the_graph_before_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or drawing from them would break the recording off."""
    events: list[str] = []

    class Graph:
        def register_generator_state(self, generator: torch.Generator) -> None:
            events.append(f"generator of seed {generator.initial_seed()}")

        def replay(self) -> None:
            events.append("replay")

    @contextmanager
    def graph(recorded: Any) -> Iterator[None]:
        events.append("record")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    drawn = torch.Generator().manual_seed(7)
    captured = Captured(lambda x: x + torch.rand(1, generator=drawn), enabled=True, generators=[drawn])
    monkeypatch.setattr(captured, "_beside", lambda args: captured.function(*args))
    for _ in range(WARM_UP + 2):
        captured(torch.ones(1))
    assert events == ["generator of seed 7", "record", "replay", "replay"]


@pytest.mark.slow
def test_compiled_updates_are_the_same_updates() -> None:
    """In a process of its own: torch.compile cannot see through the checks of shapes that the tests run under."""
    root = Path(__file__).parent.parent
    program = [sys.executable, "-m", "benchmarks.same_updates", "--device", "cpu", "--compiler", "aot_eager"]
    done = subprocess.run(program, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

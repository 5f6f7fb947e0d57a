"""Two halves of an update at the same time: the same numbers, every time, and no error lost."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from agents.actor_critic import CriticConfig, Pathwise, PolicyConfig
from agents.beside import SHARED, one_after_the_other, side_by_side
from agents.dreamer import DreamerAgent, DreamerConfig
from tests.test_lewm import SMALL, random_batch
from worldmodels.interface import Batch, State
from worldmodels.lewm import build_world_model

CONFIG = DreamerConfig(policy=PolicyConfig(units=16), critic=CriticConfig(units=16), horizon=3, starts=8)


@pytest.fixture
def two_threads() -> None:
    torch.set_num_threads(2)  # conftest takes it back before the next test


@pytest.mark.usefixtures("two_threads")
def test_both_run_at_the_same_time() -> None:
    met = threading.Barrier(2, timeout=30)  # which one thread alone would never pass
    first, second = side_by_side(lambda: met.wait() is not None, lambda: (met.wait(), torch.get_num_threads())[1])
    assert (first, second) == (True, 1)
    assert torch.get_num_threads() == 2


def test_one_thread_runs_them_in_order() -> None:
    seen: list[int] = []
    side_by_side(lambda: seen.append(threading.get_ident()), lambda: seen.append(threading.get_ident()))
    assert seen == [threading.get_ident()] * 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("fails", ["first", "second"])
def test_an_error_in_either_arrives_when_both_are_done(fails: str) -> None:
    ended: list[str] = []

    def run(name: str) -> None:
        if name == fails:
            raise ArithmeticError(name)
        ended.append(name)

    with pytest.raises(ArithmeticError, match=fails):
        side_by_side(lambda: run("first"), lambda: run("second"))
    assert len(ended) == 1
    assert torch.get_num_threads() == 2
    assert side_by_side(lambda: 1, lambda: 2) == (1, 2)


def learner(config: DreamerConfig = CONFIG) -> DreamerAgent:
    torch.manual_seed(7)
    agent = DreamerAgent(build_world_model((3, 16, 16), 2, replace(SMALL, encoder="keypoint")), 2, Pathwise(), config)
    agent.start(batches()[0].obs.flatten(0, 1))
    return agent


def batches() -> list[Batch]:
    torch.manual_seed(1)
    return [random_batch((3, 16, 16), 8) for _ in range(4)]


def learned(agent: DreamerAgent) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Metrics of the last update and all weights, after four updates."""
    torch.manual_seed(2)
    metrics = [agent.update(batch) for batch in batches()]
    weights = [*agent.model.parameters(), *agent.policy.parameters(), *agent.critic.parameters()]
    return metrics[-1], [*weights, *agent.scale.buffers()]


def test_an_update_is_the_same_bits_side_by_side_as_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever either half draws or adds up, the other does not come between. Both ways with one thread for each
    operator, as sums are grouped by thread."""
    ordered = learner()
    assert ordered.beside is side_by_side
    ordered.beside = one_after_the_other
    metrics, weights = learned(ordered)
    beside = learner()
    # Two threads for the two halves, one for whatever is computed by one alone.
    set_num_threads = torch.set_num_threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: set_num_threads(1))
    together, same = learned(beside)
    assert {name: float(x) for name, x in together.items()} == {name: float(x) for name, x in metrics.items()}
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def test_a_thread_that_leaves_autocast_meanwhile_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, precision="bf16")
    metrics, weights = learned(learner(config))
    disturbed = learner(config)
    imagine = disturbed.model.imagine

    def leave() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            pass

    def imagine_while_another_leaves(state: State, action: Tensor) -> State:
        other = threading.Thread(target=leave)
        other.start()
        other.join()
        return imagine(state, action)

    monkeypatch.setattr(disturbed.model, "imagine", imagine_while_another_leaves)
    again, same = learned(disturbed)
    assert {name: float(x) for name, x in again.items()} == {name: float(x) for name, x in metrics.items()}
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def test_a_model_that_trains_and_imagines_differently_is_not_shared() -> None:
    model = build_world_model((3, 16, 16), 2, replace(SMALL, encoder="keypoint", predictor="transformer"))
    assert DreamerAgent(model, 2, Pathwise(), CONFIG).beside is one_after_the_other


def test_large_operators_are_shared() -> None:
    model = build_world_model((4,), 2, SMALL)
    many = replace(CONFIG, starts=SHARED // min(p.numel() for p in model.parameters()))
    assert DreamerAgent(model, 2, Pathwise(), many).beside is one_after_the_other


@pytest.mark.parametrize("encoder", ["keypoint", "conv"])
def test_cutting_at_the_embedding_changes_no_gradient(encoder: str) -> None:
    model = build_world_model((3, 16, 16), 2, replace(SMALL, encoder=encoder))
    batch = batches()[0]
    torch.manual_seed(3)
    model.loss(batch)[0].backward()
    whole = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(3)
    embedded = model.embed(batch, cut=True)
    model.losses(batch, embedded)[0].backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    model.backward_encoder(embedded)
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_outcome_is_reward_and_continue() -> None:
    model = build_world_model((5,), 2, SMALL)
    for head in (model.reward_head, model.cont_head):
        torch.nn.init.normal_(head.net[-1].weight)  # type: ignore[union-attr]
    feat = torch.randn(6, model.feat_dim)
    reward, cont = model.outcome(feat)
    assert torch.equal(reward, model.reward(feat))
    assert torch.equal(cont, model.cont(feat))
    assert float(reward.detach().std()) > 0

"""The agent: acting, an update's gradients, returns on replayed rows, saving; control learned in an exact model."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.actor_critic import CriticConfig, Draw, Estimator, Pathwise, PolicyConfig, Reinforce, squashed_log_prob
from agents.dreamer import Compilation, DreamerAgent, DreamerConfig
from agents.interface import NonFiniteLoss
from tests.toys import Point, PointState
from worldmodels.encoder import ConvConfig
from worldmodels.interface import Batch, Predicted
from worldmodels.lewm import LeWMConfig, build_world_model
from worldmodels.predictor import WindowConfig
from worldmodels.transformer import TransformerConfig

CONFIG = DreamerConfig(
    policy=PolicyConfig(kind="squashed", units=16, layers=1, min_std=0.1, max_std=1.0),
    critic=CriticConfig(members=2, pessimism=0.5, units=16, layers=1, limit=6.0, slow_rate=0.02),
    horizon=3,
    starts=12,
    discount=0.9,
    lam=0.8,
    replay_lam=0.7,
    entropy=1e-3,
    replay_value_weight=0.3,
    rollout_value_weight=0.3,
    behaviour_every=1,
    policy_average=0.9,
    model_lr=1e-3,
    behaviour_lr=1e-3,
    final_lr=0.1,
    clip=10.0,
    precision="float32",
)
MODEL = LeWMConfig(
    latent_dim=6,
    encoder="conv",
    conv=ConvConfig(channels=(4, 6, 8), hidden=16, projector=False),
    predictor="window",
    window=WindowConfig(history=3, hidden=(16, 10)),
    sigreg_weight=0.05,
    sigreg_directions=16,
    rollout=3,
    rollout_weight=1.0,
    reward_weight=1.0,
    cont_weight=1.0,
    head_gradient=True,
    head_units=8,
    shift_pixels=0,
)


def pixel_agent(
    estimator: Estimator | None = None,
    *,
    model: LeWMConfig = MODEL,
    compilation: Compilation = "auto",
    device: str = "cpu",
    **changes: Any,
) -> DreamerAgent:
    """A small agent on 16×16 pixels with two action dimensions."""
    world_model = build_world_model((3, 16, 16), 2, model).to(device)
    agent = DreamerAgent(world_model, 2, estimator or Pathwise(), replace(CONFIG, **changes), compilation)
    agent.start(pixel_batch(2, 8).obs.flatten(0, 1).to(device))
    return agent


def pixel_batch(batch: int = 4, rows: int = 8) -> Batch:
    is_first = torch.zeros(batch, rows, dtype=torch.bool)
    is_first[0, 0] = is_first[1, 4] = True
    is_last = torch.cat([is_first[:, 1:], torch.zeros(batch, 1, dtype=torch.bool)], 1)
    action = torch.where(is_last[..., None], 0.0, torch.rand(batch, rows, 2) * 2 - 1)
    obs = torch.randint(0, 256, (batch, rows, 3, 16, 16), dtype=torch.uint8)
    return Batch(obs, action, torch.randn(batch, rows), is_first, is_last, is_last.clone())


def awake(agent: DreamerAgent) -> DreamerAgent:
    """Its policy, critics and heads begin at zero; this opens every path."""
    with torch.no_grad():
        for module in (agent.model, agent.policy, agent.average_policy, agent.critic):
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return agent


def flat(tree: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of a state_dict by name, copied."""
    if isinstance(tree, Tensor):
        return {name: tree.detach().clone()}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {k: v for key, value in items for k, v in flat(value, f"{name}.{key}").items()}


# -- acting ------------------------------------------------------------------------------------------------------------


def frames(envs: int, rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, envs, 3, 16, 16), dtype=np.uint8)


def act_along(agent: DreamerAgent, obs: np.ndarray, is_first: np.ndarray, *, explore: bool) -> np.ndarray:
    """Actions (rows, E, A) along a stream of observations."""
    carry, actions = agent.initial(obs.shape[1]), []
    for o, first in zip(obs, is_first, strict=True):
        action, carry = agent.act(o, first, carry, explore=explore)
        actions.append(action)
    return np.stack(actions)


def test_actions_are_numpy_in_the_box() -> None:
    agent, obs = awake(pixel_agent()), frames(5, 4)
    for explore in (False, True):
        actions = act_along(agent, obs, np.zeros((4, 5), bool), explore=explore)
        assert (actions.shape, actions.dtype) == ((4, 5, 2), np.float32)
        assert np.abs(actions).max() <= 1


def test_without_exploration_acting_is_deterministic_and_draws_nothing() -> None:
    agent, obs, first = awake(pixel_agent()), frames(3, 6), np.zeros((6, 3), bool)
    generator = torch.get_rng_state()
    one = act_along(agent, obs, first, explore=False)
    assert torch.equal(torch.get_rng_state(), generator)
    np.testing.assert_array_equal(one, act_along(agent, obs, first, explore=False))
    assert np.abs(np.diff(one, axis=0)).min() > 0, "it depends on what is seen"


def test_exploration_samples_around_the_mode() -> None:
    agent, obs, first = pixel_agent(), frames(3, 6), np.zeros((6, 3), bool)
    torch.manual_seed(5)
    one = act_along(agent, obs, first, explore=True)
    two = act_along(agent, obs, first, explore=True)
    torch.manual_seed(5)
    np.testing.assert_array_equal(one, act_along(agent, obs, first, explore=True))
    assert not np.array_equal(one, two)
    assert one.std() > 0.4, "at the start it explores widely"


def test_random_actions_are_as_frequent_as_each_episode_drew() -> None:
    """The policy is pinned at 0, so that what moves is random: in each episode with a probability of its own, uniform
    between 0 and 0.6."""
    agent = DreamerAgent(Point(), 1, Pathwise(), replace(CONFIG, random_actions=0.6))
    nothing = torch.zeros(300)
    draw = Draw(nothing[:, None], nothing, nothing)
    agent.policy.sample = lambda feat, generator=None: draw  # type: ignore[method-assign]
    obs, first = np.zeros((200, 300, 1), np.float32), np.zeros((200, 300), bool)
    first[0] = first[100, :150] = True
    actions = act_along(agent, obs, first, explore=True)[..., 0]
    share = (actions != 0).reshape(2, 100, 300).mean(1)
    assert share.mean() == pytest.approx(0.3, abs=0.03)
    assert share.std() == pytest.approx(0.6 / 12**0.5, rel=0.2)
    again, going = (np.corrcoef(share[:, rows])[0, 1] for rows in (slice(0, 150), slice(150, 300)))
    assert abs(again) < 0.3, "a new episode draws anew"
    assert going > 0.8
    random = actions[actions != 0]
    assert np.abs(random).max() <= 1
    assert (random.mean(), random.std()) == pytest.approx((0, 1 / 3**0.5), abs=0.02)
    assert not act_along(agent, obs[:9], first[:9], explore=False).std() > 0.1


def test_an_environment_is_answered_the_same_alone_and_among_others() -> None:
    agent, obs, first = awake(pixel_agent()), frames(3, 6), np.zeros((6, 3), bool)
    first[0], first[3, 1] = True, True
    together = act_along(agent, obs, first, explore=False)
    for e in range(3):
        alone = act_along(agent, obs[:, e : e + 1], first[:, e : e + 1], explore=False)
        np.testing.assert_allclose(alone[:, 0], together[:, e], rtol=1e-4, atol=1e-6)


def test_memory_matters_and_is_dropped_at_is_first() -> None:
    agent, obs = awake(pixel_agent()), frames(2, 8)
    first = np.zeros((8, 2), bool)
    going = act_along(agent, obs, first, explore=False)
    first[5, 0] = True
    reset = act_along(agent, obs, first, explore=False)
    fresh = act_along(agent, obs[5:], first[5:], explore=False)
    np.testing.assert_allclose(reset[5:, 0], fresh[:, 0], rtol=1e-5, atol=1e-6)
    assert np.abs(reset[5:, 0] - going[5:, 0]).min() > 1e-6
    np.testing.assert_array_equal(reset[:, 1], going[:, 1])
    np.testing.assert_array_equal(reset[:5], going[:5])


def test_the_action_that_left_is_remembered() -> None:
    agent, obs, first = awake(pixel_agent()), frames(2, 2), np.zeros(2, bool)
    _, carry = agent.act(obs[0], first, agent.initial(2), explore=False)
    before, _ = agent.act(obs[1], first, carry, explore=False)
    after, _ = agent.act(obs[1], first, carry._replace(action=-carry.action), explore=False)
    assert np.abs(after - before).min() > 1e-6


def test_acting_changes_neither_the_agent_nor_its_inputs() -> None:
    agent = DreamerAgent(build_world_model((5,), 2, MODEL), 2, Pathwise(), CONFIG)
    agent.start(10 * torch.randn(20, 5) + 3)
    obs = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    kept, before, carry = obs.copy(), flat(agent.state_dict()), agent.initial(3)
    agent.act(obs, np.zeros(3, bool), carry, explore=True)
    np.testing.assert_array_equal(obs, kept)
    assert all(torch.equal(value, before[name]) for name, value in flat(agent.state_dict()).items())
    assert not carry.state.z.any()
    assert not carry.state.valid.any()


# -- one update --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists a processor's instructions there")
def test_bfloat16_is_chosen_only_where_the_processor_computes_in_it() -> None:
    instructions = set(Path("/proc/cpuinfo").read_text().split())
    computes = bool(instructions & {"avx512_bf16", "amx_bf16"})
    assert pixel_agent(precision="auto").bf16 == computes
    assert pixel_agent(precision="bf16").bf16
    assert not pixel_agent(precision="float32").bf16


@pytest.mark.parametrize("estimator", [Pathwise(), Reinforce()], ids=["pathwise", "reinforce"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_update_moves_every_parameter_and_answers_finite_metrics(estimator: Estimator, precision: str) -> None:
    agent = awake(pixel_agent(estimator, precision=precision))
    groups = {name: getattr(agent, name) for name in ("model", "policy", "average_policy", "critic")}
    before = {f"{g}.{n}": p.detach().clone() for g, module in groups.items() for n, p in module.named_parameters()}
    metrics = agent.update(pixel_batch())
    for group, module in groups.items():
        for name, parameter in module.named_parameters():
            assert not torch.equal(parameter, before[f"{group}.{name}"]), f"{group}.{name}"
            assert parameter.dtype == torch.float32
            assert parameter.requires_grad != (group == "average_policy" or name.startswith("slow."))
    expected = {"model_loss", "pred_loss", "sigreg_loss", "reward_loss", "policy_loss", "critic_loss"}
    expected |= {"replay_value_loss", "rollout_value_loss", "imagined_return"}
    expected |= {f"{name}_grad_norm" for name in ("model", "policy", "critic")}
    assert expected <= set(metrics)
    for name, value in metrics.items():
        assert value.shape == (), name
        assert value.isfinite(), name
        assert not value.requires_grad, name


def test_the_first_update_moves_model_policy_and_critic() -> None:
    agent = pixel_agent()
    before = flat(agent.state_dict())
    agent.update(pixel_batch())
    after = flat(agent.state_dict())
    for group in ("model.encoder", "model.predictor", "model.reward_head", "policy", "critic.members"):
        names = [name for name in before if name.startswith(f".{group}.")]
        assert names
        assert any(not torch.equal(before[name], after[name]) for name in names), group


def test_policy_and_critic_learn_at_every_so_many_updates() -> None:
    agent = awake(pixel_agent(behaviour_every=3))
    behaviour = ("policy", "average_policy", "critic", "scale")
    for update in range(5):
        before = flat(agent.state_dict())
        metrics = agent.update(pixel_batch())
        after = flat(agent.state_dict())
        moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
        due = update % 3 == 0
        assert "model" in moved
        assert moved.issuperset(behaviour) if due else moved.isdisjoint(behaviour)
        assert ("policy_loss" in metrics) == ("policy_grad_norm" in metrics) == ("critic_grad_norm" in metrics) == due


def test_the_deterministic_policy_is_an_average_over_updates() -> None:
    agent = awake(pixel_agent(policy_average=0.75))
    before = [p.clone() for p in agent.average_policy.parameters()]
    agent.update(pixel_batch())
    for old, new, policy in zip(before, agent.average_policy.parameters(), agent.policy.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * policy)
    obs, first = frames(3, 2), np.zeros((2, 3), bool)
    known = act_along(agent, obs, first, explore=False)
    agent.policy.load_state_dict(pixel_agent().policy.state_dict())
    np.testing.assert_array_equal(act_along(agent, obs, first, explore=False), known)


def test_learning_rates_fall_linearly_to_their_last_fraction() -> None:
    agent = pixel_agent(model_lr=1e-2, behaviour_lr=1e-3, final_lr=0.2)
    for progress, factor in ((0.0, 1.0), (0.5, 0.6), (1.0, 0.2), (7.0, 0.2), (0.25, 0.8)):
        agent.anneal(progress)
        rates = {name: optimiser.param_groups[0]["lr"] for name, optimiser in agent.optimisers.items()}
        expected = {"model": 1e-2 * factor, "policy": 1e-3 * factor, "critic": 1e-3 * factor}
        assert rates == pytest.approx(expected)


def still_gradients(estimator: Estimator, **changes: Any) -> dict[str, list[Tensor]]:
    """Gradients of one update of a fixed agent, from fixed random numbers, whatever is changed about it."""
    torch.manual_seed(1)
    agent = awake(pixel_agent(estimator, clip=math.inf, **changes))
    batch = pixel_batch()
    torch.manual_seed(2)
    agent.update(batch)
    return {name: [p.grad.clone() for p in params] for name, params in agent.groups.items()}


def test_the_policy_s_gradient_leaves_none_in_the_model_or_the_critic() -> None:
    """Pathwise gradients pass through both; REINFORCE's do not. What reaches their parameters is the same."""
    one, other = still_gradients(Pathwise()), still_gradients(Reinforce())
    for name in ("model", "critic"):
        assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True)), name
    assert not any(torch.equal(a, b) for a, b in zip(one["policy"], other["policy"], strict=True))
    louder = still_gradients(Pathwise(), entropy=100.0)
    assert all(torch.equal(a, b) for a, b in zip(one["model"], louder["model"], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one["policy"], louder["policy"], strict=True))


@pytest.mark.parametrize("weight", ["replay_value_weight", "rollout_value_weight"])
def test_the_value_losses_reach_the_model_by_their_weights(weight: str) -> None:
    """Gradients are linear in the weight: g(0.6) − g(0.3) = g(0.3) − g(0), and not zero."""
    none, some, more = (still_gradients(Pathwise(), **{weight: w})["model"] for w in (0.0, 0.3, 0.6))
    for a, b, c in zip(none, some, more, strict=True):
        torch.testing.assert_close(c - b, b - a, rtol=1e-2, atol=1e-5)
    assert any(bool((b - a).abs().max() > 1e-4) for a, b in zip(none, some, strict=True))


def test_what_is_predicted_of_a_row_answers_for_its_value() -> None:
    """The loss on predictions alone, one step ahead, moves what turns a prediction's features into the next latent:
    on the rows themselves that changes nothing."""
    changes = {"model": replace(MODEL, rollout=1, rollout_weight=0.0), "replay_value_weight": 0.0}
    out = [name for name, _ in pixel_agent(**changes).model.named_parameters()].index("predictor.out.weight")
    with_it, without = (still_gradients(Pathwise(), **changes, rollout_value_weight=w) for w in (0.3, 0.0))
    of_rows = still_gradients(Pathwise(), **changes | {"replay_value_weight": 0.3}, rollout_value_weight=0.0)
    assert torch.equal(of_rows["model"][out], without["model"][out])
    assert float((with_it["model"][out] - without["model"][out]).abs().max()) > 1e-4


def test_gradients_are_clipped_for_each_part_alone() -> None:
    free, held = still_gradients(Pathwise()), {}
    torch.manual_seed(1)
    agent, batch = awake(pixel_agent(clip=0.01)), pixel_batch()
    torch.manual_seed(2)
    metrics = agent.update(batch)
    held = {name: [p.grad for p in params] for name, params in agent.groups.items()}
    for name in ("model", "policy", "critic"):
        norm = torch.cat([g.flatten() for g in free[name]]).norm()
        torch.testing.assert_close(metrics[f"{name}_grad_norm"], norm, rtol=1e-4, atol=1e-6)
        clipped = torch.cat([g.flatten() for g in held[name]]).norm()
        torch.testing.assert_close(clipped, norm.clamp(max=0.01), rtol=1e-3, atol=1e-6)


def test_gradients_do_not_accumulate_over_updates() -> None:
    """With learning rates of 0 the second update sees what the first saw."""
    still = replace(CONFIG.critic, slow_rate=0.0)
    agent, batch = awake(pixel_agent(model_lr=0.0, behaviour_lr=0.0, critic=still)), pixel_batch()
    norms = []
    for _ in range(2):
        torch.manual_seed(2)
        agent.scale = type(agent.scale)()
        norms.append([float(v) for k, v in agent.update(batch).items() if k.endswith("grad_norm")])
    assert norms[0] == norms[1]
    assert min(norms[0]) > 0


def test_imagining_and_acting_use_running_statistics_and_leave_them_alone() -> None:
    """An update moves them as its one call of the model's loss does, and nothing else moves them."""
    small = TransformerConfig(history=3, depth=1, heads=2, head_dim=4, mlp=16, dropout=0.0, projector=16)
    model = replace(MODEL, conv=replace(MODEL.conv, projector=True), predictor="transformer", transformer=small)
    agent, batch = pixel_agent(model=model, model_lr=0.0), pixel_batch()
    twin = copy.deepcopy(agent.model).train()
    twin.loss(batch)
    agent.update(batch)
    agent.monitors(batch)
    act_along(agent, frames(2, 3), np.zeros((3, 2), bool), explore=True)
    after = agent.model.state_dict()
    assert {name.split(".")[0] for name in after if name.endswith("running_mean")} == {"encoder", "predictor"}
    assert all(torch.equal(value, after[name]) for name, value in twin.state_dict().items())


@pytest.mark.parametrize(("field", "value"), [("reward", math.nan), ("obs", math.nan), ("obs", math.inf)])
def test_what_is_not_finite_stops_before_any_weight_has_changed(field: str, value: float) -> None:
    agent = DreamerAgent(build_world_model((5,), 2, MODEL), 2, Pathwise(), CONFIG)
    pixels = pixel_batch()
    batch = pixels._replace(obs=torch.randn(4, 8, 5))
    agent.start(batch.obs.flatten(0, 1).clone())
    agent.update(batch)
    before = flat(agent.state_dict())
    getattr(batch, field)[2, 5] = value
    with pytest.raises(NonFiniteLoss, match="became NaN or inf; training stopped before the weights were changed"):
        agent.update(batch)
    for name, kept in flat(agent.state_dict()).items():
        if not name.startswith(".scale"):
            assert torch.equal(kept, before[name]), name


def test_the_message_names_what_is_not_finite() -> None:
    agent, batch = pixel_agent(), pixel_batch()
    with torch.no_grad():
        agent.policy.net[-1].bias[0] = math.nan
    with pytest.raises(NonFiniteLoss) as error:
        agent.update(batch)
    assert "policy_loss" in str(error.value)
    assert "pred_loss" not in str(error.value)


# -- saving ------------------------------------------------------------------------------------------------------------


def test_a_restored_agent_goes_on_bit_by_bit() -> None:
    """From the third update on, where the next one leaves the policy alone."""
    batches = [pixel_batch() for _ in range(6)]
    agent = pixel_agent(behaviour_every=2)
    for batch in batches[:3]:
        agent.update(batch)
    saved = copy.deepcopy(agent.state_dict())
    other = awake(pixel_agent(behaviour_every=2))
    other.load_state_dict(saved)
    seen = []
    for one in (agent, other):
        torch.manual_seed(9)
        updates = [one.update(batch) for batch in batches[3:]]
        paths = [act_along(one, frames(2, 4), np.zeros((4, 2), bool), explore=e) for e in (False, True)]
        seen.append((flat(updates), flat(one.state_dict()), np.stack(paths)))
    (metrics, state, actions), (other_metrics, other_state, other_actions) = seen
    assert set(metrics) == set(other_metrics)
    assert set(state) == set(other_state)
    assert all(torch.equal(metrics[name], other_metrics[name]) for name in metrics)
    assert all(torch.equal(state[name], other_state[name]) for name in state)
    np.testing.assert_array_equal(actions, other_actions)


def test_a_loaded_state_is_a_copy() -> None:
    agent, other = pixel_agent(), pixel_agent()
    agent.update(pixel_batch())
    saved = agent.state_dict()
    before = flat(saved)
    other.load_state_dict(saved)
    other.update(pixel_batch())
    assert all(torch.equal(value, before[name]) for name, value in flat(saved).items())


def test_the_state_holds_optimiser_scale_and_the_input_s_fit() -> None:
    agent = awake(pixel_agent())
    agent.update(pixel_batch())
    state = agent.state_dict()
    assert state["model"]["normaliser.fitted"]
    assert state["model"]["normaliser.mean"].any()
    assert all(state["optimisers"][name]["state"] for name in ("model", "policy", "critic"))
    assert float(state["scale"]["high"]) != 0
    assert any(name.startswith("slow.") for name in state["critic"])


# -- in exact models ---------------------------------------------------------------------------------------------------


def point_batch(batch: int = 8, rows: int = 8) -> Batch:
    action = torch.rand(batch, rows, 1) * 2 - 1
    start = torch.rand(batch, 1, 1) * 2 - 1
    x = start + torch.cat([torch.zeros(batch, 1, 1), 0.3 * action[:, :-1].cumsum(1)], 1)
    no = torch.zeros(batch, rows, dtype=torch.bool)
    return Batch(x, action, -x[..., 0].square(), no, no, no)


def point_return(agent: DreamerAgent) -> float:
    """Of 20 steps from x = −1 and from x = 1, mean."""
    x: np.ndarray = np.array([[-1.0], [1.0]], np.float32)
    carry, total = agent.initial(2), 0.0
    for _ in range(20):
        action, carry = agent.act(x, np.zeros(2, bool), carry, explore=False)
        x = x + 0.3 * action
        total -= float((x**2).mean())
    return total


@pytest.mark.parametrize("estimator", [Pathwise(), Reinforce()], ids=["pathwise", "reinforce"])
def test_both_estimators_learn_to_control_a_point(estimator: Estimator) -> None:
    """Standing still returns −20, the best policy −0.66: it is at 0.7, 0.4, 0.1 and then 0."""
    config = replace(CONFIG, horizon=5, starts=64, behaviour_lr=3e-3, entropy=1e-3)
    agent = DreamerAgent(Point(), 1, estimator, config)
    assert point_return(agent) < -15
    for _ in range(80):
        agent.update(point_batch())
    assert point_return(agent) > -1.4


class KnownValue(nn.Module):
    """Stands for the critic: its value is a given function, and its loss is how far, squared, a target is from that."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.value = function
        self.unused = nn.Parameter(torch.zeros(()))

    def loss(self, feat: Tensor, target: Tensor) -> Tensor:
        return (self.value(feat) - target).square() + 0 * self.unused

    imagined_loss = loss

    def follow(self, part: Tensor) -> None:
        pass


def test_the_pathwise_gradient_equals_finite_differences_of_the_imagined_return() -> None:
    """A policy that ignores its input, so that its gradient has no path through the features it is given."""
    config = replace(CONFIG, horizon=3, starts=32, entropy=0.0, clip=math.inf, discount=0.9, lam=0.7)
    agent = DreamerAgent(Point(), 1, Pathwise(), replace(config, behaviour_lr=0.0))
    agent.critic = KnownValue(lambda feat: 2 * feat[..., 0])  # type: ignore[assignment]
    with torch.no_grad():
        agent.policy.net[-1].weight.zero_()
        agent.policy.net[-1].bias.copy_(torch.tensor([0.3, -2.0]))
    batch, bias = point_batch(), agent.policy.net[-1].bias

    def loss(mean: float, raw_std: float) -> float:
        """−Σ γ^k R_k / 3 worked out from the model's rules, with the agent's own random numbers."""
        torch.manual_seed(4)
        rows = (batch.obs.flatten() > 0).float() + 1e-6
        x = batch.obs.flatten()[torch.multinomial(rows, 32, replacement=False)].double()
        std, xs = 0.1 + 0.9 / (1 + math.exp(-(raw_std + 2))), []
        for _ in range(3):
            x = x + 0.3 * torch.tanh(mean + std * torch.randn(32, 1)[:, 0].double())
            xs.append(x)
        following, total = 2 * xs[-1], torch.zeros(32, dtype=torch.float64)
        for k in reversed(range(3)):
            following = -(xs[k] ** 2) + 0.9 * (0.3 * 2 * xs[k] + 0.7 * following)
            total = total + 0.9**k * following
        return float(-total.mean() / 3)

    torch.manual_seed(4)
    metrics = agent.update(batch)
    assert float(metrics["return_scale"]) == 1.0
    assert float(metrics["policy_loss"]) == pytest.approx(loss(0.3, -2.0), rel=1e-4)
    step = 1e-4
    known = [
        (loss(0.3 + step, -2.0) - loss(0.3 - step, -2.0)) / (2 * step),
        (loss(0.3, -2.0 + step) - loss(0.3, -2.0 - step)) / (2 * step),
    ]
    assert bias.grad.tolist() == pytest.approx(known, rel=1e-3)


def test_the_entropy_bonus_is_minus_the_mean_log_probability() -> None:
    agent = DreamerAgent(Point(), 1, Reinforce(), replace(CONFIG, horizon=1, starts=32, behaviour_lr=0.0))
    batch = point_batch()
    torch.manual_seed(4)
    metrics = agent.update(batch)
    torch.manual_seed(4)
    x = batch.obs.flatten(0, 1)
    start = x[torch.multinomial((x[:, 0] > 0).float() + 1e-6, 32)]
    mean, std = agent.policy(start)
    log_prob = squashed_log_prob(mean + std * torch.randn_like(std), mean, std)
    assert float(metrics["policy_entropy"]) == pytest.approx(-float(log_prob.mean().detach()), rel=1e-4)


def test_each_imagined_decision_is_taken_from_the_state_before_it() -> None:
    quiet = replace(CONFIG.policy, min_std=1e-5, max_std=2e-5)
    agent = awake(DreamerAgent(Point(), 1, Pathwise(), replace(CONFIG, policy=quiet, behaviour_lr=0.0, horizon=4)))
    with torch.no_grad():
        agent.policy.net[-1].weight.normal_()
    agent.update(point_batch())
    for x, following in itertools.pairwise(agent.model.begun):
        torch.testing.assert_close(following, x + 0.3 * agent.policy.mode(x), rtol=0.0, atol=1e-4)
    assert len(agent.model.begun) == 4


def test_entropy_alone_spreads_the_policy() -> None:
    """With rewards drowned in the bonus the action becomes nearly uniform, whose entropy is ln 2 = 0.693."""
    config = replace(CONFIG, entropy=100.0, behaviour_lr=1e-2, horizon=2, starts=32)
    agent = DreamerAgent(Point(), 1, Pathwise(), config)
    with torch.no_grad():
        agent.policy.net[-1].bias.copy_(torch.tensor([2.0, -4.0]))
    before = float(agent.update(point_batch())["policy_entropy"])
    for _ in range(100):
        after = float(agent.update(point_batch())["policy_entropy"])
    assert before < -0.5
    assert 0.5 < after < 0.75


@pytest.mark.parametrize(("starts", "rows"), [(12, 64), (64, 64), (100, 64)])
def test_imagination_starts_from_settled_states(starts: int, rows: int) -> None:
    """As many as asked for, from all settled ones; and it works where there are fewer, or none."""
    agent = DreamerAgent(Point(), 1, Pathwise(), replace(CONFIG, starts=starts))
    batch = point_batch()
    agent.update(batch)
    begun = agent.model.begun[0]
    assert begun.shape == (starts, 1)
    assert not begun.requires_grad
    assert bool(torch.isin(begun, batch.obs.flatten()).all())
    settled = int((batch.obs > 0).sum())
    assert 12 < settled < 52
    if starts != rows:
        assert bool((begun > 0).all())
    agent.update(batch._replace(obs=-batch.obs.abs()))


def test_starts_are_spread_over_all_settled_states() -> None:
    agent, batch = DreamerAgent(Point(), 1, Pathwise(), replace(CONFIG, starts=8)), point_batch()
    for _ in range(60):
        agent.update(batch)
    begun = torch.cat(agent.model.begun[:: CONFIG.horizon])
    assert set(begun.flatten().tolist()) == set(batch.obs[batch.obs > 0].tolist())


def test_no_imagination_starts_where_an_episode_ended_by_itself() -> None:
    agent, batch = DreamerAgent(Point(), 1, Pathwise(), replace(CONFIG, starts=8)), point_batch()
    terminal = torch.zeros_like(batch.is_terminal)
    terminal[:, -1] = True
    for _ in range(60):
        agent.update(batch._replace(is_last=terminal, is_terminal=terminal))
    begun = torch.cat(agent.model.begun[:: CONFIG.horizon])
    assert set(begun.flatten().tolist()) == set(batch.obs[:, :-1][batch.obs[:, :-1] > 0].tolist())


class Countdown(Point):
    """Reward 1 a step. Features (n, ends): n steps remain until a terminal state, or for ever where ends is 0."""

    feat_dim = 2

    def initial(self, batch: int) -> PointState:
        return PointState(torch.zeros(batch, 2))

    def imagine(self, state: PointState, action: Tensor) -> PointState:
        return PointState(state.x - state.x.new_tensor([1.0, 0.0]))

    def reward(self, feat: Tensor) -> Tensor:
        return torch.ones_like(feat[..., 0])

    def cont(self, feat: Tensor) -> Tensor:
        return 1 - ((feat[..., 1] == 1) & (feat[..., 0] <= 0)).float()

    def settled(self, state: PointState) -> Tensor:
        return state.x[:, 0] >= 3


def worth(feat: Tensor, gamma: float = 0.9) -> Tensor:
    """Σ_{i<n} γ^i, or 1/(1−γ) for ever; and nonsense in a terminal state, where no critic is taught anything."""
    value = torch.where(feat[..., 1] == 1, 1 - gamma ** feat[..., 0], 1.0) / (1 - gamma)
    return torch.where((feat[..., 1] == 1) & (feat[..., 0] <= 0), -50.0, value)


def countdown_batch() -> Batch:
    """Three episodes in one row of a sample: one ends, one is truncated, one goes on; and each in another order."""
    ends = [(5, 1), (5, 0), (3, 0)]
    rows = []
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 0, 2)):
        row: list[tuple[float, ...]] = []
        for length, terminates in (ends[i] for i in order):
            for t in range(length):
                last = t == length - 1
                row.append((length - 1 - t, terminates, float(t > 0), t == 0, last, last and terminates))
        rows.append(row[:11])
    table = torch.tensor(rows)
    flags = (table[..., i].bool() for i in (3, 4, 5))
    return Batch(table[..., :2].clone(), torch.zeros(4, 11, 1), table[..., 2].clone(), *flags)


def value_loss(
    name: str,
    batch: Batch,
    value: Callable[[Tensor], Tensor] = worth,
    model: Countdown | None = None,
    **lams: float,
) -> float:
    """The mean squared distance of the critic's targets, on replayed or on imagined rows, from a known value."""
    config = replace(CONFIG, discount=0.9, starts=4, horizon=3, **lams)
    agent = DreamerAgent(model or Countdown(), 1, Pathwise(), config)
    agent.critic = KnownValue(value)  # type: ignore[assignment]
    return float(agent.update(batch)[name])


ON_ROWS = pytest.mark.parametrize("name", ["replay_value_loss", "rollout_value_loss"])


@ON_ROWS
@pytest.mark.parametrize("lam", [0.0, 0.8, 1.0])
def test_returns_on_replayed_rows_are_the_true_values(lam: float, name: str) -> None:
    """Rewards, ends, cuts and bootstraps line up on every row that counts: the target is the true value whatever λ."""
    assert value_loss(name, countdown_batch(), replay_lam=lam) < 1e-9


class Jumpy(Countdown):
    """What it predicts of an episode's first row is far off."""

    def losses(self, batch: Batch, embedded: tuple[PointState, None]) -> tuple[Tensor, dict[str, Tensor], Predicted]:
        loss, metrics, predicted = super().losses(batch, embedded)
        rows, guesses = predicted.feat.split(len(predicted.row))
        wrong = torch.where(predicted.alive[:, None] == 1, guesses, guesses + 9)
        return loss, metrics, predicted._replace(feat=torch.cat([rows, wrong]))


def test_a_prediction_of_another_episode_does_not_count() -> None:
    assert value_loss("rollout_value_loss", countdown_batch(), model=Jumpy()) < 1e-9


@pytest.mark.parametrize("lam", [0.0, 0.8, 1.0])
def test_imagined_returns_are_the_true_values_of_the_states_decided_in(lam: float) -> None:
    assert value_loss("critic_loss", countdown_batch(), lam=lam) < 1e-9


def test_replayed_and_imagined_returns_have_a_lambda_each() -> None:
    """With a value of 0 and λ = 0 a target is the next reward, 1; a higher λ adds later ones."""
    one, other = {"replay_lam": 0.0, "lam": 1.0}, {"replay_lam": 1.0, "lam": 0.0}
    known = {"replay_value_loss": one, "critic_loss": other}
    for name in known:
        for lams in (one, other):
            loss = value_loss(name, countdown_batch(), lambda feat: 0 * feat[..., 0], **lams)
            # Later decisions count less, by γ^k where the episode goes on.
            scale = 1.0 if name == "replay_value_loss" else (1 + 0.9 + 0.81) / 3
            assert (loss == pytest.approx(scale)) == (lams == known[name]), name


@pytest.mark.parametrize(
    "wrong",
    [
        lambda b: b._replace(is_terminal=b.is_last),
        lambda b: b._replace(is_terminal=torch.zeros_like(b.is_last)),
        lambda b: b._replace(is_last=torch.zeros_like(b.is_last)),
        lambda b: b._replace(is_last=b.is_last.roll(1, 1)),
        lambda b: b._replace(reward=b.reward.roll(-1, 1)),
    ],
    ids=["truncation taken for an end", "an end taken for a truncation", "no cut", "cut a row late", "reward early"],
)
@ON_ROWS
def test_a_wrong_ending_makes_them_wrong(wrong: Any, name: str) -> None:
    assert value_loss(name, wrong(countdown_batch()), replay_lam=0.8) > 0.01

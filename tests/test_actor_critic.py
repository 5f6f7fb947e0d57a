"""The policy's density, the critics and their slow copies, the return scale, and the two estimators."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from agents.actor_critic import (
    Critic,
    CriticConfig,
    Imagined,
    Pathwise,
    Policy,
    PolicyConfig,
    Reinforce,
    ReturnScale,
    percentile,
    squashed_log_prob,
)
from worldmodels.heads import TwoHot

POLICY = PolicyConfig(kind="squashed", units=16, layers=2, min_std=0.1, max_std=1.0)


# -- the policy --------------------------------------------------------------------------------------------------------


def test_log_prob_equals_torch_distributions() -> None:
    mean = torch.randn(50, 3, dtype=torch.float64)
    std = 0.1 + torch.rand(50, 3, dtype=torch.float64)
    transform = TanhTransform(cache_size=1)
    known = TransformedDistribution(Independent(Normal(mean, std), 1), [transform])
    raw = mean + std * torch.randn_like(std)
    torch.testing.assert_close(squashed_log_prob(raw, mean, std), known.log_prob(transform(raw)))


def test_the_density_integrates_to_one() -> None:
    action = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    mean, std = torch.tensor([0.4], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    density = squashed_log_prob(action.atanh()[:, None], mean.expand(len(action), 1), std.expand(len(action), 1)).exp()
    assert float(torch.trapezoid(density, action)) == pytest.approx(1, abs=1e-4)


def test_log_prob_far_out_is_finite_and_so_is_its_gradient() -> None:
    raw = torch.tensor([[-60.0], [-12.0], [12.0], [60.0]], requires_grad=True)
    log_prob = squashed_log_prob(raw, raw.detach(), torch.ones(4, 1))
    log_prob.sum().backward()
    # There log(1 − tanh²x) = 2 log 2 − 2|x|.
    expected = -0.5 * math.log(2 * math.pi) - 2 * math.log(2) + 2 * raw.detach().abs().squeeze(1)
    torch.testing.assert_close(log_prob.detach(), expected)
    assert bool(raw.grad.isfinite().all())


def test_sample_returns_the_density_of_its_action() -> None:
    policy, feat = Policy(5, 2, POLICY), torch.randn(64, 5)
    mean, std = policy(feat)
    action, _, log_prob = policy.sample(feat)
    assert action.shape == (64, 2)
    assert bool((action.abs() < 1).all())
    known = TransformedDistribution(Independent(Normal(mean.double(), std.double()), 1), [TanhTransform()])
    torch.testing.assert_close(log_prob.double(), known.log_prob(action.double()), rtol=1e-3, atol=1e-3)


def test_samples_have_the_policy_s_mean_and_std() -> None:
    policy, feat = Policy(5, 2, POLICY), torch.randn(1, 5)
    mean, std = policy(feat)
    raw = policy.sample(feat.expand(20_000, 5))[0].detach().double().atanh()
    torch.testing.assert_close(raw.mean(0), mean[0].double(), atol=0.03, rtol=0.0, check_dtype=False)
    torch.testing.assert_close(raw.std(0), std[0].double(), atol=0.02, rtol=0.0, check_dtype=False)


def test_a_bounded_policy_is_a_clipped_normal_around_tanh_of_its_mean() -> None:
    policy, feat = Policy(5, 2, replace(POLICY, kind="bounded")), torch.randn(1, 5)
    with torch.no_grad():
        policy.net[-1].bias.copy_(torch.tensor([0.2, 3.0, -4.0, 1.0]))
    mean, std = policy(feat)
    draw = policy.sample(feat.expand(20_000, 5))
    known = Normal(mean.tanh(), std)
    assert float(draw.action.detach().min()) >= -1
    assert float(draw.action.detach().max()) == 1, "the second dimension is pinned near the edge"
    inside = (draw.action.abs() < 1).all(1)
    expected = known.log_prob(draw.action).sum(-1)
    torch.testing.assert_close(draw.log_prob[inside], expected[inside], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(draw.entropy, known.entropy().sum(-1).expand(20_000), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(draw.action[:, 0].mean(), mean.tanh()[0, 0], atol=0.01, rtol=0.0)


def test_a_clipped_action_keeps_its_gradient() -> None:
    policy, feat = Policy(5, 1, replace(POLICY, kind="bounded")), torch.randn(1, 5)
    with torch.no_grad():
        policy.net[-1].bias.copy_(torch.tensor([1.0, 5.0]))
    action = policy.sample(feat.expand(4_000, 5)).action
    clipped = action == 1
    assert 0.1 < float(clipped.float().mean()) < 0.9
    (gradient,) = torch.autograd.grad(action[clipped].mean(), policy.net[-1].bias)
    slope = 1 - policy(feat)[0].tanh().square().detach()
    torch.testing.assert_close(gradient[0], slope[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bounded", "squashed"])
def test_sampling_is_reparametrised(kind: Literal["bounded", "squashed"]) -> None:
    policy = Policy(5, 2, replace(POLICY, kind=kind))
    policy.sample(torch.randn(8, 5)).action.sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_mode_is_the_squashed_mean_and_draws_nothing() -> None:
    policy, feat = Policy(5, 2, POLICY), torch.randn(4, 3, 5)
    generator = torch.get_rng_state()
    assert torch.equal(policy.mode(feat), torch.tanh(policy(feat)[0]))
    assert torch.equal(torch.get_rng_state(), generator)
    assert policy.mode(feat).shape == (4, 3, 2)


def test_at_the_start_it_explores_widely_around_zero() -> None:
    with torch.no_grad():
        mean, std = Policy(5, 2, POLICY)(10 * torch.randn(256, 5))
    assert float(mean.abs().max()) < 0.1
    assert float(std.min()) > 0.8


def test_std_stays_within_its_bounds() -> None:
    policy = Policy(5, 2, PolicyConfig(units=16, layers=1, min_std=0.3, max_std=0.6))
    with torch.no_grad():
        policy.net[-1].weight.mul_(1e5)
    std = policy(torch.randn(256, 5))[1].detach()
    assert float(std.min()) == pytest.approx(0.3, abs=1e-4)
    assert float(std.max()) == pytest.approx(0.6, abs=1e-4)


# -- the critics -------------------------------------------------------------------------------------------------------


def critic_of(bins: list[int], pessimism: float) -> tuple[Critic, list[float]]:
    """A critic whose slow copies each give one bin's value, whatever the features; and those values."""
    critic = Critic(4, CriticConfig(members=len(bins), pessimism=pessimism, units=8, layers=1, limit=6.0))
    with torch.no_grad():
        for head, index in zip(critic.slow, bins, strict=True):
            head.net[-1].bias[index] = 1e3
    return critic, [float(TwoHot(101, 6.0).bins[index]) for index in bins]


def test_the_bootstrap_runs_from_the_mean_to_the_minimum_of_the_slow_copies() -> None:
    feat = torch.randn(7, 4)
    for pessimism in (0.0, 0.5, 1.0):
        critic, (a, b) = critic_of([60, 70], pessimism)
        assert a < b
        expected = (1 - pessimism) * (a + b) / 2 + pessimism * a
        assert critic.value(feat).tolist() == pytest.approx([expected] * 7, rel=1e-5)


def test_three_critics_lose_half_their_spread() -> None:
    critic, (a, b, c) = critic_of([55, 60, 75], 1.0)
    assert float(critic.value(torch.randn(1, 4))) == pytest.approx((a + b + c) / 3 - (c - a) / 2, rel=1e-5)


def test_one_critic_is_itself_whatever_the_pessimism() -> None:
    critic, (a,) = critic_of([64], 1.0)
    assert float(critic.value(torch.randn(1, 4))) == pytest.approx(a, rel=1e-5)


def test_the_slow_copy_follows_at_its_rate() -> None:
    critic = Critic(4, CriticConfig(members=2, units=8, layers=1, slow_rate=0.25))
    pairs = list(zip(critic.slow.parameters(), critic.members.parameters(), strict=True))
    assert all(torch.equal(slow, fast) for slow, fast in pairs), "it starts as a copy"
    assert not torch.equal(critic.members[0].net[0].weight, critic.members[1].net[0].weight), "members differ"
    with torch.no_grad():
        for fast in critic.members.parameters():
            fast.add_(1.0)
    before = [slow.clone() for slow, _ in pairs]
    critic.follow(torch.ones(()))
    for (slow, fast), old in zip(pairs, before, strict=True):
        torch.testing.assert_close(slow, old + 0.25 * (fast - old))
    for _ in range(60):
        critic.follow(torch.ones(()))
    for slow, fast in pairs:
        torch.testing.assert_close(slow, fast, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_members_mean_and_moves_them_alone() -> None:
    critic, feat, target = Critic(4, CriticConfig(members=3, units=8, layers=1)), torch.randn(5, 4), torch.randn(5)
    with torch.no_grad():
        for i, member in enumerate(critic.members):
            member.net[-1].bias.add_(torch.randn(101) * i)
    loss = critic.loss(feat, target)
    torch.testing.assert_close(loss, sum(member.loss(feat, target) for member in critic.members) / 3)
    loss.sum().backward()
    assert all(p.grad is not None for p in critic.members.parameters())
    assert all(p.grad is None and not p.requires_grad for p in critic.slow.parameters())


@pytest.mark.parametrize("rows", ["all", "split"])
def test_imagined_rows_teach_every_member_or_those_of_a_start_one_of_them(rows: str) -> None:
    critic = Critic(4, CriticConfig(rows=rows, units=8, layers=1))
    feat, target = torch.randn(3, 5, 4), torch.randn(3, 5)
    with torch.no_grad():
        for i, member in enumerate(critic.members):
            member.net[-1].bias.add_(torch.randn(101) * (i + 1))
    loss = critic.imagined_loss(feat, target)
    of_members = torch.stack([member.loss(feat, target) for member in critic.members])
    expected = of_members.mean(0) if rows == "all" else of_members[[0, 1, 0, 1, 0], :, range(5)].T
    torch.testing.assert_close(loss, expected)
    loss[:, 3].sum().backward()
    assert any(p.grad.any() for p in critic.members[0].parameters()) == (rows == "all")
    assert critic.members[1].net[-1].bias.grad.any()


def test_value_reads_the_slow_copies_only() -> None:
    critic, feat = Critic(4, CriticConfig(members=2, units=8, layers=1)), torch.randn(5, 4)
    with torch.no_grad():
        for member in critic.members:
            member.net[-1].bias[80] += 10
    assert not critic.value(feat).any()


def test_critics_learn_a_constant_return() -> None:
    critic = Critic(1, CriticConfig(members=2, units=8, layers=1, slow_rate=0.1))
    optimiser = torch.optim.Adam(critic.members.parameters(), 3e-2)
    for _ in range(100):
        optimiser.zero_grad()
        critic.loss(torch.zeros(1, 1), torch.tensor([50.0])).sum().backward()
        optimiser.step()
        critic.follow(torch.ones(()))
    assert float(critic.value(torch.zeros(1, 1)).detach()) == pytest.approx(50, rel=0.05)


# -- the return scale --------------------------------------------------------------------------------------------------


def test_scale_is_the_average_of_the_percentile_range() -> None:
    scale = ReturnScale(rate=0.5)
    returns = torch.arange(101.0)[torch.randperm(101)].view(1, 101)
    # p95 − p5 = 90: half of it, then three quarters, then seven eighths.
    assert [float(scale(returns)) for _ in range(3)] == pytest.approx([45, 67.5, 78.75])
    assert float(scale(1000 + returns)) == pytest.approx(84.375), "a shift of all returns changes no range"


@pytest.mark.parametrize("part", [0.0, 0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpy_s(part: float, count: int) -> None:
    numbers = torch.randn(count)
    assert float(percentile(numbers.sort().values, part)) == pytest.approx(np.quantile(numbers.numpy(), part), abs=1e-6)
    numbers[0] = torch.nan
    assert percentile(numbers.sort().values, part).isnan()


def test_scale_never_falls_below_one_and_forgets() -> None:
    scale = ReturnScale(rate=0.5)
    assert float(scale(0.01 * torch.randn(4, 8))) == 1.0
    scale(torch.linspace(-500, 500, 64))
    assert float(scale(torch.zeros(64))) > 100
    for _ in range(20):
        last = scale(torch.zeros(64))
    assert float(last) == 1.0


def test_an_outlier_has_no_effect_on_the_scale() -> None:
    returns = torch.cat([torch.linspace(0, 10, 999), torch.tensor([1e9])])
    assert float(ReturnScale(rate=1.0)(returns)) == pytest.approx(9, rel=0.01)


def test_scale_is_saved() -> None:
    one, other = ReturnScale(), ReturnScale()
    one(torch.linspace(0, 1e4, 100))
    other.load_state_dict(one.state_dict())
    returns = torch.linspace(0, 10, 100)
    assert torch.equal(one(returns), other(returns))
    assert float(one(returns)) > 1


# -- the estimators ----------------------------------------------------------------------------------------------------


def imagined(returns: Tensor, log_prob: Tensor, *, baseline: float = 0.0, scale: float = 1.0) -> Imagined:
    return Imagined(returns, torch.full_like(returns, baseline).detach(), log_prob, torch.tensor(scale))


def test_estimators_written_out() -> None:
    returns, log_prob = torch.tensor([[6.0, -2.0]], requires_grad=True), torch.tensor([[0.5, -3.0]], requires_grad=True)
    seen = imagined(returns, log_prob, baseline=2.0, scale=4.0)
    assert Pathwise().through_dynamics
    assert not Reinforce().through_dynamics
    assert Pathwise()(seen).tolist() == [[-1.5, 0.5]]
    assert Reinforce()(seen).tolist() == [[-0.5, -3.0]]
    Reinforce()(seen).sum().backward()
    assert log_prob.grad.tolist() == [[-1.0, 1.0]], "what did better than expected becomes likelier"
    assert returns.grad is None


def gradients(estimator: Pathwise | Reinforce, baseline: float) -> Tensor:
    """∂loss/∂(mean, std) for one decision of return a² + a, a = tanh(raw), raw ~ N(0.3, 0.5²)."""
    theta = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)
    mean, std = theta.expand(200_000, 2).split(1, 1)
    raw = mean + std * torch.randn_like(std)
    action = torch.tanh(raw)
    log_prob = squashed_log_prob(raw.detach(), mean, std)[:, None]
    estimator(imagined(action**2 + action, log_prob, baseline=baseline)).mean().backward()
    assert theta.grad is not None
    return theta.grad


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_both_estimators_agree_with_the_integral(baseline: float) -> None:
    noise = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    theta = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)
    action = torch.tanh(theta[0] + theta[1] * noise)
    density = torch.exp(-0.5 * noise**2) / math.sqrt(2 * math.pi)
    torch.trapezoid((action**2 + action) * density, noise).backward()
    assert theta.grad is not None
    # The standard errors are about 0.002 for the one and 0.006 for the other.
    torch.testing.assert_close(gradients(Pathwise(), baseline), -theta.grad, atol=0.01, rtol=0.0)
    torch.testing.assert_close(gradients(Reinforce(), baseline), -theta.grad, atol=0.03, rtol=0.0)


@pytest.mark.parametrize("estimator", [Pathwise(), Reinforce()], ids=["pathwise", "reinforce"])
def test_a_bandit_is_solved(estimator: Pathwise | Reinforce) -> None:
    """The best action is 0.5 in the first dimension, −0.8 in the second."""
    policy, feat, best = Policy(1, 2, POLICY), torch.ones(128, 1), torch.tensor([0.5, -0.8])
    optimiser = torch.optim.Adam(policy.parameters(), 1e-2)
    for _ in range(200):
        mean, std = policy(feat)
        raw = mean + std * torch.randn_like(std)
        returns = -(torch.tanh(raw) - best).square().sum(-1, keepdim=True)
        log_prob = squashed_log_prob(raw.detach(), mean, std)[:, None]
        optimiser.zero_grad()
        estimator(imagined(returns, log_prob, baseline=float(returns.detach().mean()))).mean().backward()
        optimiser.step()
    torch.testing.assert_close(policy.mode(feat[0]), best, atol=0.1, rtol=0.0)

"""Planners on scores whose best plan is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from agents.planner import (
    CEM,
    ICEM,
    MPPI,
    CEMConfig,
    GradientConfig,
    GradientPlanner,
    ICEMConfig,
    MPPIConfig,
    Planner,
    Score,
    coloured_noise,
    shift,
)

CEM_CONFIG = CEMConfig(samples=200, iterations=12, elites=20, min_std=0.01)
ICEM_CONFIG = ICEMConfig(samples=200, iterations=12, elites=20, min_std=0.01, colour=1.0, keep=0.3, decay=1.1)
MPPI_CONFIG = MPPIConfig(samples=200, iterations=12, elites=20, min_std=0.01, temperature=0.5)
GRADIENT_CONFIG = GradientConfig(starts=4, iterations=80, lr=0.05, min_std=0.05)
PLANNERS: dict[str, Planner] = {
    "cem": CEM(CEM_CONFIG),
    "icem": ICEM(ICEM_CONFIG),
    "mppi": MPPI(MPPI_CONFIG),
    "gradient": GradientPlanner(GRADIENT_CONFIG),
}
QUICK: dict[str, Planner] = {
    "cem": CEM(replace(CEM_CONFIG, samples=32, iterations=2, elites=6)),
    "icem": ICEM(replace(ICEM_CONFIG, samples=32, iterations=2, elites=6)),
    "mppi": MPPI(replace(MPPI_CONFIG, samples=32, iterations=2, elites=6)),
    "gradient": GradientPlanner(replace(GRADIENT_CONFIG, iterations=3)),
}
"""Budgets too small to arrive."""
every_planner = pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
every_quick_planner = pytest.mark.parametrize("planner", QUICK.values(), ids=QUICK)

GOAL = torch.tensor([[[0.5, -0.2], [0.1, 0.9], [-0.7, 0.3]], [[-0.4, 0.6], [0.0, -0.8], [0.2, 0.2]]])
"""(B,H,A): another best plan for each of two problems."""


def quadratic(goal: Tensor) -> Score:
    """−|plan − goal|²."""
    return lambda plans: -(plans - goal[:, None]).square().sum((-1, -2))


def start(goal: Tensor, std: float = 0.7) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(goal), torch.full_like(goal, std)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@every_planner
def test_the_best_plan_of_a_quadratic_is_found(planner: Planner) -> None:
    found = planner.plan(quadratic(GOAL), *start(GOAL), generator=seeded())
    assert found.shape == GOAL.shape
    assert (found - GOAL).abs().max() < 0.05


@every_planner
def test_a_batch_gives_what_its_problems_give_one_by_one(planner: Planner) -> None:
    together = planner.search(quadratic(GOAL), *start(GOAL), generator=seeded())
    for b in range(2):
        goal = GOAL[b : b + 1]
        alone = planner.search(quadratic(goal), *start(goal), generator=seeded())
        torch.testing.assert_close(alone.action[0], together.action[b])
        torch.testing.assert_close(alone.std[0], together.std[b])


@every_planner
def test_a_plan_stays_in_the_action_box(planner: Planner) -> None:
    beyond = 3.0 * GOAL.sign()
    seen: list[Tensor] = []

    def score(plans: Tensor) -> Tensor:
        seen.append(plans.detach().clone())
        return quadratic(beyond)(plans)

    found = planner.plan(score, *start(GOAL, std=2.0), proposals=5 * GOAL[:, None], generator=seeded())
    assert all(plans.abs().max() <= 1 for plans in seen)
    # The best plan in the box is its corner nearest to the goal; a goal of exactly 0 is its own best.
    assert (found - GOAL.sign()).abs().max() < 0.1
    assert found.abs().max() <= 1


@every_quick_planner
def test_a_warm_start_is_never_worse_than_a_cold_one(planner: Planner) -> None:
    for seed in range(20):
        goal = torch.rand(4, 5, 2, generator=seeded(seed)) * 2 - 1
        score = quadratic(goal)
        cold = planner.plan(score, *start(goal), generator=seeded(seed))
        warm = planner.plan(score, cold, start(goal)[1], generator=seeded(seed))
        assert (score(warm[:, None]) >= score(cold[:, None])).all()


@every_quick_planner
def test_a_good_start_is_not_lost_even_where_sampling_finds_nothing(planner: Planner) -> None:
    """A needle: one plan is good, all others are equally bad."""

    def needle(plans: Tensor) -> Tensor:
        return -(plans - GOAL[:, None]).abs().amax((-1, -2)).clamp(max=1e-3)

    assert needle(planner.plan(needle, GOAL, start(GOAL)[1], generator=seeded())[:, None]).max() == 0


@pytest.mark.parametrize("name", ["icem", "mppi", "gradient"])
def test_a_proposal_that_is_best_helps(name: str) -> None:
    planner = QUICK[name]
    proposals = torch.stack([torch.zeros_like(GOAL), GOAL], 1)
    score = quadratic(GOAL)
    with_it = score(planner.plan(score, *start(GOAL), proposals=proposals, generator=seeded())[:, None])
    without = score(planner.plan(score, *start(GOAL), generator=seeded())[:, None])
    assert (with_it > without).all()


@pytest.mark.parametrize("name", ["cem", "icem", "mppi"])
def test_the_seed_decides(name: str) -> None:
    found = [QUICK[name].plan(quadratic(GOAL), *start(GOAL), generator=seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@every_planner
def test_scores_that_are_no_numbers_count_as_worst(planner: Planner) -> None:
    def holed(plans: Tensor) -> Tensor:
        scores = quadratic(GOAL)(plans)
        return torch.where(plans[..., 0, 0] > 0.8, torch.nan, scores)

    found = planner.plan(holed, *start(GOAL), generator=seeded())
    assert (found - GOAL).abs().max() < 0.05


@every_quick_planner
def test_one_decision_of_one_action_can_be_planned(planner: Planner) -> None:
    goal = torch.tensor([[[0.3]]])
    assert planner.plan(quadratic(goal), *start(goal), generator=seeded()).shape == (1, 1, 1)


@every_quick_planner
def test_the_spread_answered_is_no_smaller_than_the_smallest(planner: Planner) -> None:
    std = planner.search(quadratic(GOAL), *start(GOAL), generator=seeded()).std
    assert std.shape == GOAL.shape
    assert (std >= 0.01).all()


@pytest.mark.parametrize("name", ["cem", "mppi"])
def test_the_mean_of_two_ways_round_an_obstacle_is_not_taken(name: str) -> None:
    """Full left and full right are good, straight on is the worst: their mean."""

    def obstacle(plans: Tensor) -> Tensor:
        return plans.square().sum((-1, -2))

    planner = {"cem": CEM(CEMConfig(64, 1, 16, 0.05)), "mppi": MPPI(MPPIConfig(64, 1, 16, 0.05, 10.0))}[name]
    begin = torch.full((1, 1, 1), 0.5)
    found = planner.plan(obstacle, begin, torch.full_like(begin, 1.0), generator=seeded(3))
    assert obstacle(found[:, None]) >= 0.25


def test_better_candidates_weigh_more_in_mppi() -> None:
    weight = MPPI(MPPI_CONFIG).weigh(torch.tensor([[3.0, 2.0, 1.0]]))
    spread = (2 / 3) ** 0.5
    expected = torch.tensor([0.0, -1.0, -2.0]).div(0.5 * spread).softmax(0)
    torch.testing.assert_close(weight[0], expected)


def test_the_gradient_planner_needs_no_sampling_to_arrive() -> None:
    planner = GradientPlanner(replace(GRADIENT_CONFIG, starts=1))
    found = planner.plan(quadratic(GOAL), *start(GOAL))
    assert (found - GOAL).abs().max() < 0.02


def test_the_gradient_planner_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        found = PLANNERS["gradient"].plan(quadratic(GOAL), *start(GOAL), generator=seeded())
    assert (found - GOAL).abs().max() < 0.05
    assert not found.requires_grad


def test_a_shifted_plan_forgets_the_first_action() -> None:
    shifted = shift(GOAL)
    assert torch.equal(shifted[:, :-1], GOAL[:, 1:])
    assert (shifted[:, -1] == 0).all()


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("horizon", [6, 7, 32])
def test_coloured_noise_has_unit_variance_and_the_right_spectrum(exponent: float, horizon: int) -> None:
    white = torch.randn(20_000, horizon, 1, generator=seeded())
    noise = coloured_noise(white, exponent)
    assert abs(float(noise.var()) - 1) < 0.03
    power = torch.fft.rfft(noise[..., 0], dim=1).abs().square().mean(0)
    # An octave up, the power of 1/f^exponent falls by 2^exponent.
    assert abs(float(power[1] / power[2]) / 2**exponent - 1) < 0.1
    if exponent == 0:
        torch.testing.assert_close(noise, white)


@pytest.mark.parametrize(
    "build",
    [
        lambda: CEM(replace(CEM_CONFIG, samples=0)),
        lambda: CEM(replace(CEM_CONFIG, elites=201)),
        lambda: ICEM(replace(ICEM_CONFIG, iterations=0)),
        lambda: MPPI(replace(MPPI_CONFIG, elites=0)),
        lambda: GradientPlanner(replace(GRADIENT_CONFIG, starts=0)),
        lambda: GradientPlanner(replace(GRADIENT_CONFIG, iterations=0)),
    ],
)
def test_an_impossible_budget_is_refused(build: Callable[[], Planner]) -> None:
    with pytest.raises(ValueError, match="a planner needs at least 1"):
        build()


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: ICEM(replace(ICEM_CONFIG, keep=1.5)), "keep must lie in 0 to 1"),
        (lambda: ICEM(replace(ICEM_CONFIG, decay=0.0)), "decay be at least 1"),
        (lambda: MPPI(replace(MPPI_CONFIG, temperature=0.0)), "temperature must be above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(build: Callable[[], Planner], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build()

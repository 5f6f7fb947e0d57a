"""The planning agent: its score, its proposals, acting in an exact model, and the runners that offer it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.actor_critic import CriticConfig, Pathwise, PolicyConfig
from agents.dreamer import DreamerAgent, DreamerConfig
from agents.mpc import ImaginedReturn, MPCAgent, MPCConfig, build_planner
from agents.planner import CEMConfig, GradientConfig, ICEMConfig, MPPIConfig, Plan, Planner, Score
from runners.config import ConfigError
from runners.evaluate import main as evaluate_main
from runners.train import train
from tests.loop_helpers import COUNTING, config
from tests.toys import Point, PointState

LEARNER = DreamerConfig(
    policy=PolicyConfig(units=16, layers=1), critic=CriticConfig(units=16, layers=1), discount=0.9, precision="float32"
)
MPC = MPCConfig(
    planner="mppi",
    horizon=4,
    proposals=4,
    terminal_value=True,
    std=1.0,
    noise=0.3,
    mppi=MPPIConfig(samples=64, iterations=3, elites=8, min_std=0.05, temperature=0.5),
    cem=CEMConfig(samples=64, iterations=4, elites=8, min_std=0.05),
    icem=ICEMConfig(samples=64, iterations=3, elites=8, min_std=0.05),
    gradient=GradientConfig(starts=4, iterations=10, lr=0.2),
)
PLANNERS = ["mppi", "cem", "icem", "gradient"]


class Ending(Point):
    """The point's episodes end where x is beyond 1: with probability 1/2 at each step."""

    def cont(self, feat: Tensor) -> Tensor:
        return torch.where(feat[..., 0] > 1, 0.5, 1.0)


def tenfold(feat: Tensor) -> Tensor:
    """A value of 10·x."""
    return 10 * feat[..., 0]


class KnownPlan(Planner):
    """Answers 0.1, 0.2, … with a given spread, and keeps what it was asked."""

    def __init__(self, std: float) -> None:
        self.std = std
        self.means: list[Tensor] = []
        self.proposals: list[Tensor | None] = []

    def search(
        self, score: Score, mean: Tensor, std: Tensor, *, proposals: Tensor | None = None, generator: Any = None
    ) -> Plan:
        self.means.append(mean)
        self.proposals.append(proposals)
        ramp = 0.1 * torch.arange(1, mean.shape[1] + 1).view(1, -1, 1)
        return Plan(ramp.expand_as(mean), torch.full_like(mean, self.std))


def point_agent(**changes: Any) -> MPCAgent:
    torch.manual_seed(0)
    mpc = replace(MPC, **changes)
    return MPCAgent(Point(), 1, Pathwise(), LEARNER, mpc, build_planner(mpc))


def play(agent: MPCAgent, steps: int = 8, *, explore: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """From x = −1 and x = 0.6 at once: the actions (2,steps) and the last places (2,)."""
    x: np.ndarray = np.array([[-1.0], [0.6]], np.float32)
    carry, actions = agent.initial(2), []
    for step in range(steps):
        action, carry = agent.act(x, np.full(2, step == 0), carry, explore=explore)
        actions.append(action[:, 0])
        x = x + 0.3 * action
    return np.stack(actions, 1), x[:, 0]


def test_a_candidate_scores_its_discounted_rewards_and_the_value_it_leads_to() -> None:
    state = PointState(torch.tensor([[0.0], [0.7]]))
    score = ImaginedReturn(Ending(), state, 0.9, tenfold)
    plans = torch.tensor([[[1.0], [1.0]], [[0.0], [-1.0]]]).expand(2, 2, 2, 1)
    # Problem 0: 0 → .3 → .6 and 0 → 0 → −.3. Problem 1: .7 → 1 → 1.3, where half of what follows is lost; .7 → .7 → .4.
    expected = [
        [-0.09 + 0.9 * (-0.36 + 0.9 * 6.0), 0.0 + 0.9 * (-0.09 - 0.9 * 3.0)],
        [-1.0 + 0.9 * (-1.69 + 0.45 * 13.0), -0.49 + 0.9 * (-0.16 + 0.9 * 4.0)],
    ]
    torch.testing.assert_close(score(plans), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_without_a_critic_rewards_alone_count() -> None:
    score = ImaginedReturn(Point(), PointState(torch.zeros(1, 1)), 0.9, None)
    assert score(torch.ones(1, 1, 2, 1)).item() == pytest.approx(-0.09 - 0.9 * 0.36)


@pytest.mark.parametrize("planner", PLANNERS)
def test_an_exact_model_is_controlled_without_having_learned_anything(planner: str) -> None:
    _, last = play(point_agent(planner=planner, terminal_value=False, proposals=0))
    assert np.abs(last).max() < 0.1


@pytest.mark.parametrize("planner", PLANNERS)
def test_environments_are_planned_for_as_if_alone(planner: str) -> None:
    agent = point_agent(planner=planner, proposals=0)
    together, _ = play(agent)
    x: np.ndarray = np.array([[0.6]], np.float32)
    carry = agent.initial(1)
    for step in range(3):
        action, carry = agent.act(x, np.full(1, step == 0), carry, explore=False)
        assert action[0, 0] == pytest.approx(together[1, step], abs=1e-5)
        x = x + 0.3 * action


def test_without_exploration_acting_is_deterministic_and_draws_nothing() -> None:
    agent = point_agent()
    first, _ = play(agent)
    before = torch.get_rng_state()
    second, _ = play(agent)
    assert np.array_equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_exploring_adds_noise_within_the_box() -> None:
    agent = point_agent(noise=0.2)
    for std, expected in ((1.0, 0.2), (0.05, 0.05)):
        agent.planner = KnownPlan(std)
        actions = np.concatenate([play(agent, explore=True)[0].flatten() for _ in range(25)])
        assert abs(float(actions.mean()) - 0.1) < 0.03
        assert abs(float(actions.std()) / expected - 1) < 0.15
    agent.planner = KnownPlan(std=9.0)
    agent.mpc = replace(agent.mpc, noise=9.0)
    assert np.abs(play(agent, explore=True)[0]).max() == 1


def test_a_search_starts_from_the_last_plan_shifted_and_from_nothing_in_a_new_episode() -> None:
    agent = point_agent()
    agent.planner = planner = KnownPlan(std=0.1)
    carry = agent.initial(2)
    for first in ([True, True], [False, True]):
        _, carry = agent.act(np.zeros((2, 1), np.float32), np.array(first), carry, explore=False)
    assert (planner.means[0] == 0).all()
    torch.testing.assert_close(planner.means[1][0, :, 0], torch.tensor([0.2, 0.3, 0.4, 0.0]))
    assert (planner.means[1][1] == 0).all()


def test_fewer_decisions_are_planned_while_collecting() -> None:
    agent = point_agent(collecting_horizon=2, proposals=3)
    agent.planner = planner = KnownPlan(std=0.1)
    carry = agent.initial(1)
    x = np.zeros((1, 1), np.float32)
    for first, explore in ((True, True), (False, True), (False, False)):
        _, carry = agent.act(x, np.array([first]), carry, explore=explore)
    assert [mean.shape[1] for mean in planner.means] == [2, 2, MPC.horizon]
    assert [plans.shape[2] for plans in planner.proposals] == [2, 2, MPC.horizon]
    for mean in planner.means[1:]:
        torch.testing.assert_close(mean.flatten(), torch.tensor([0.2, 0.0, 0.0, 0.0])[: mean.shape[1]])


def test_more_while_collecting_than_at_all_are_not_planned() -> None:
    agent = point_agent(collecting_horizon=9)
    agent.planner = planner = KnownPlan(std=0.1)
    agent.act(np.zeros((1, 1), np.float32), np.ones(1, bool), agent.initial(1), explore=True)
    assert planner.means[0].shape[1] == MPC.horizon


def test_the_policy_proposes_plans_the_first_by_its_most_likely_actions() -> None:
    agent = point_agent(proposals=3)
    agent.planner = planner = KnownPlan(std=0.1)
    nn.init.normal_(agent.policy.net[-1].weight)
    x = np.array([[0.5], [-0.5]], np.float32)
    agent.act(x, np.ones(2, bool), agent.initial(2), explore=False)
    (proposals,) = planner.proposals
    assert proposals.shape == (2, 3, MPC.horizon, 1)
    place = torch.from_numpy(x)
    for k in range(MPC.horizon):
        likely = agent.policy.mode(place)
        torch.testing.assert_close(proposals[:, 0, k], likely)
        place = place + 0.3 * likely
    assert len(proposals[0].flatten().unique()) == 3 * MPC.horizon


def test_both_ways_of_acting_share_a_checkpoint() -> None:
    mpc, dreamer = point_agent(), DreamerAgent(Point(), 1, Pathwise(), LEARNER)
    nn.init.normal_(dreamer.policy.net[-1].weight)
    mpc.load_state_dict(dreamer.state_dict())
    for ours, theirs in zip(mpc.policy.parameters(), dreamer.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    DreamerAgent(Point(), 1, Pathwise(), LEARNER).load_state_dict(mpc.state_dict())


# -- from the command line ---------------------------------------------------------------------------------------------


def test_the_loop_learns_acting_by_plans_and_either_acting_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second of training on the counting environment; then both ways of acting from its checkpoint."""
    plan = {"agent": "mpc", "mpc.mppi.samples": 16, "mpc.mppi.elites": 4, "mpc.horizon": 3}
    assert train(config(tmp_path / "run", COUNTING | plan), quiet=True) is not None
    for acting in ("mpc", "dreamer"):
        flags = ["--run-dir", str(tmp_path / "run"), "--agent", acting, "--episodes", "2", "--threads", "1"]
        capsys.readouterr()
        assert evaluate_main(flags) == 0
        answer = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert answer["env_steps"] == COUNTING["env-steps"]
        assert np.isfinite(answer["mean_return"])


def refusal(tmp_path: Path, settings: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        train(config(tmp_path / "run", COUNTING | {"agent": "mpc"} | settings), quiet=True)
    assert not (tmp_path / "run").exists()
    return str(caught.value)


def test_what_cannot_plan_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, {"mpc.horizon": 0}) == "--mpc.horizon is 0, but must be at least 1"
    assert refusal(tmp_path, {"mpc.collecting-horizon": 0}) == ("--mpc.collecting-horizon is 0, but must be at least 1")
    assert "--mpc.mppi: a planner needs at least 1" in refusal(tmp_path, {"mpc.mppi.samples": 0})
    assert "no reward was learned" in refusal(tmp_path, {"model.reward-weight": 0})


def test_the_random_agent_has_learned_nothing_to_plan_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path / "run", COUNTING | {"agent": "random"}), quiet=True)
    capsys.readouterr()
    assert evaluate_main(["--run-dir", str(tmp_path / "run"), "--agent", "mpc"]) == 1
    assert "it learned no world model that --agent mpc could use" in capsys.readouterr().err

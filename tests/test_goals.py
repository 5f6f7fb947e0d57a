"""Reaching goals given as images: the protocol against known answers, planners on exact models, the program."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from agents.amortised import Amortised, AmortisedConfig, AmortisedPolicy, HindsightRows, learn, relabel
from agents.goals import GoalSearch, GoalSearchConfig, NearnessToGoal, latent_distance
from agents.mpc import MPCConfig, build_planner
from agents.planner import CEMConfig, GradientConfig, ICEMConfig, MPPIConfig, Plan, Planner, Score
from envs import EnvConfig, make_env
from envs.physics import physical_names, physical_units
from runners import collect, plan, plan_config, pretrain
from runners.amortise import amortised_policy, hindsight_rows
from runners.attempts import Oracle, Randomly, Seeking, Still, attempt
from runners.config import ConfigError, to_json
from runners.dataset import Dataset
from runners.goal_report import wilson
from runners.goals import Match, Pairs, Tolerance, choose_pairs, split_like_pretraining
from runners.run import Run
from tests.loop_helpers import COUNTING, TINY, config, contents
from tests.test_offline import learn as learning
from tests.test_offline import refused
from tests.toys import Point, PointState

CPU = ["--device", "cpu", "--threads", "1"]
QUICK = [*CPU, "--goals", "3", "--apart", "3", "--horizon", "2", "--num-envs", "2"]
SMALL = ["--cem.samples", "16", "--cem.elites", "4", "--cem.iterations", "2"]
RECORD = ["--task", "dmc/reacher-easy", "--env.size", "32", "--env.time-limit", "80", "--episodes", "4", "--seed", "5"]
"""Four episodes of 21 rows."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy it before spoiling it."""
    out = tmp_path_factory.mktemp("recorded") / "reacher"
    assert collect.main([*RECORD, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def pretrained(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("pretrained") / "run"
    assert pretrain.main(learning(recorded, run_dir)) == 0
    return run_dir


# -- what counts as reached --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "tries", "low", "high"),
    [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (10, 10, 0.72247, 1.0), (45, 50, 0.78640, 0.95652)],
)
def test_wilson_interval(successes: int, tries: int, low: float, high: float) -> None:
    """(p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), z = 1.959964, by hand."""
    found = wilson(successes, tries)
    assert found.rate == successes / tries
    assert found[1:] == pytest.approx((low, high), abs=1e-5)


NAMES = ["qpos/hinge", "qpos/slide", "qvel/hinge", "qvel/slide"]
UNITS = ["rad", "m", "rad/s", "m/s"]


def test_angles_agree_modulo_full_turns_and_each_unit_has_its_tolerance() -> None:
    match = Match(NAMES, UNITS, (), Tolerance(angle=0.2, length=0.05))
    assert str(match) == "qpos/hinge within 0.2 rad, qpos/slide within 0.05 m"
    goal = np.array([np.pi - 0.05, 1.0, 0.0, 0.0])
    states = np.array(
        [
            [-np.pi + 0.1, 1.04, 9.0, 9.0],  # 0.15 rad away, across the seam
            [np.pi - 0.05 + 4 * np.pi, 1.0, 0.0, 0.0],
            [-np.pi + 0.2, 1.0, 0.0, 0.0],  # 0.25 rad
            [np.pi - 0.05, 1.06, 0.0, 0.0],
            [np.pi - 0.05, 1.0 + 2 * np.pi, 0.0, 0.0],  # a length has no full turns
        ]
    )
    assert match.reached(states, goal).tolist() == [True, True, False, False, False]
    np.testing.assert_allclose(match.errors(states[:1], goal), [[0.15, 0.04]], atol=1e-9)
    chosen = Match(NAMES, UNITS, ("qvel/slide",), Tolerance(other=1.0))
    assert chosen.reached(states, goal).tolist() == [False, True, True, True, True]


def test_units_of_every_kind_of_joint() -> None:
    """A free body with three joints of each other kind: 7 + 6 numbers for it, one of each for hinge and slide."""
    for task, position, unit in [
        ("mujoco/Ant-v5", "qpos/root[2]", "m"),
        ("mujoco/Ant-v5", "qpos/root[3]", ""),
        ("mujoco/Ant-v5", "qvel/root[5]", "rad/s"),
        ("mujoco/Ant-v5", "qpos/hip_1", "rad"),
        ("dmc/point_mass-easy", "qpos/root_x", "m"),
        ("dmc/point_mass-easy", "qvel/root_x", "m/s"),
    ]:
        env = make_env(task, EnvConfig(obs="state"))
        named = dict(zip(physical_names(env), physical_units(env), strict=True))
        assert named[position] == unit
        env.close()


# -- which starts and goals --------------------------------------------------------------------------------------------


def standing_still(recorded: Path, tmp_path: Path, rows: slice) -> Dataset:
    """A copy in which these rows of the first episode have all one physical state."""
    copy = shutil.copytree(recorded, tmp_path / "copy")
    physics = np.load(copy / "physics.npy")
    physics[rows] = physics[rows.start]
    np.save(copy / "physics.npy", physics)
    return Dataset(copy)


def pairs_of(data: Dataset, episodes: Sequence[int], count: int, *, apart: int = 4, seed: int = 0) -> Pairs:
    assert data.about is not None
    match = Match(data.about.physics or [], ["rad", "rad", "rad/s", "rad/s"], (), Tolerance(angle=1e-6))
    return choose_pairs(data, np.array(episodes), match, count=count, apart=apart, before=3, seed=seed)


def test_starts_that_satisfy_their_goal_are_left_out_and_counted(recorded: Path, tmp_path: Path) -> None:
    """Of starts 3 to 16, those up to row 6 have a goal up to row 10, where nothing has moved."""
    data = standing_still(recorded, tmp_path, slice(0, 11))
    every = pairs_of(data, [0], 100)
    assert sorted(every.start) == list(range(7, 17))
    assert (every.goal - every.start == 4).all()
    assert (every.drawn, every.solved) == (14, 4)
    few = pairs_of(data, [0], 5)
    assert few.start.tolist() == every.start[:5].tolist()
    assert few.drawn == 5 + few.solved
    with pytest.raises(ConfigError, match="all 14 starts satisfy their goals already"):
        pairs_of(standing_still(recorded, tmp_path / "more", slice(0, 21)), [0], 5)


def test_pairs_stay_within_the_given_episodes(recorded: Path) -> None:
    found = pairs_of(Dataset(recorded), [1, 3], 1000)
    possible = [*range(21 + 3, 21 + 17), *range(63 + 3, 63 + 17)]
    assert sorted(found.start) == possible
    assert not np.array_equal(found.start, pairs_of(Dataset(recorded), [1, 3], 1000, seed=1).start)
    with pytest.raises(ConfigError, match=r"takes an episode of 22 rows.*held-out one.* has 21"):
        pairs_of(Dataset(recorded), [1], 1, apart=18)


def test_goals_come_from_episodes_that_the_pretraining_did_not_learn_from(
    recorded: Path, pretrained: Path, tmp_path: Path
) -> None:
    data = Dataset(recorded)
    learned_from = pretrain.Pretraining(pretrain.parse_args(learning(recorded, tmp_path / "run")), quiet=True)
    with learned_from as run:
        windows = {int(row) for row in run.train._spans[:, 1]}
    found = split_like_pretraining(data, pretrained, seed=7)
    assert {int(row) for row in data.spans[found.train, 1]} == windows
    assert len(found.held_out) == 1
    assert set(found.held_out).isdisjoint(found.train)
    assert "validation split of the pretraining" in found.why
    online = config(tmp_path / "online", TINY, init_from=pretrained)
    (tmp_path / "online").mkdir()
    (tmp_path / "online" / "config.json").write_text(to_json(online))
    assert split_like_pretraining(data, tmp_path / "online", seed=7).held_out.tolist() == found.held_out.tolist()
    other = Dataset(shutil.copytree(recorded, tmp_path / "other"))
    assert "whether it saw these episodes is not known" in split_like_pretraining(other, pretrained, seed=7).why


# -- real physics ------------------------------------------------------------------------------------------------------


def test_the_recorded_actions_reach_every_goal_and_standing_still_reaches_none(recorded: Path) -> None:
    """Real physics, one and several goals at a time: the replay ends exactly in the recorded state."""
    data = Dataset(recorded)
    assert data.about is not None
    assert data.about.env is not None
    envs = [make_env("dmc/reacher-easy", replace(data.about.env, obs="state")) for _ in range(3)]
    match = Match(data.about.physics or [], physical_units(envs[0]), (), Tolerance(angle=0.02))
    pairs = choose_pairs(data, np.arange(4), match, count=8, apart=6, before=3, seed=0)
    oracle = attempt(Oracle(data, 6, 9), pairs, data, envs, match)
    assert oracle.reached.shape == (8, 6)
    assert oracle.reached[:, -1].all()
    np.testing.assert_allclose(oracle.error, 0, atol=1e-9)
    assert all(first is not None and first > 1 for first in oracle.first)
    assert oracle.decided == 48
    still = attempt(Still(2, 9), pairs, data, envs, match)
    assert still.reached.shape == (8, 9)
    assert still.reached[:, -1].mean() < 0.5
    alone = [attempt(Randomly(2, 5, 1), pairs, data, envs[:n], match) for n in (1, 3)]
    np.testing.assert_array_equal(alone[0].error, alone[1].error)
    for env in envs:
        env.close()


def test_an_episode_that_ends_by_itself_stays_where_it_ended(tmp_path: Path) -> None:
    """A pole that is not held falls: beyond 0.2 rad the episode is over, and nothing moves it further."""
    record = ["--task", "mujoco/InvertedPendulum-v5", "--env.obs", "state", "--policy", "random", "--episodes", "6"]
    assert collect.main([*record, "--out", str(tmp_path / "data")]) == 0
    data = Dataset(tmp_path / "data")
    assert data.about is not None
    envs = [make_env("mujoco/InvertedPendulum-v5", EnvConfig(obs="state")) for _ in range(2)]
    names = data.about.physics or []
    match = Match(names, physical_units(envs[0]), ["qpos/hinge"], Tolerance(angle=1e-9))
    pairs = choose_pairs(data, np.arange(6), match, count=4, apart=1, before=0, seed=0)
    fallen = attempt(Still(1, 300), pairs, data, envs, match)
    goal = data.physics[pairs.goal, names.index("qpos/hinge")]
    assert (fallen.error[:, 0] > 0.2 - np.abs(goal)).all()
    assert (fallen.error[:, 0] < 0.4 + np.abs(goal)).all()
    for env in envs:
        env.close()


class Recorder(Point):
    """Stands for a model with pixels: keeps what it observes. Its latent is the picture's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(self, state: PointState, prev_action: Tensor, obs: Tensor, is_first: Tensor) -> PointState:
        self.seen.append((prev_action, obs, is_first))
        return PointState(obs.float().mean((1, 2, 3))[:, None])


class Replaying:
    """A seeker that takes the recorded actions, and keeps what it was told."""

    def __init__(self, actions: Tensor) -> None:
        self.actions = actions
        self.told: list[tuple[Tensor, Tensor, int]] = []

    def begin(self) -> None:
        self.told = []

    def act(self, state: PointState, goal: Tensor, left: int) -> Tensor:
        self.told.append((state.x, goal, left))
        return self.actions[:, len(self.told) - 1]


def test_a_planner_sees_the_frames_before_its_start_and_those_its_actions_lead_to(recorded: Path) -> None:
    """Taking the recorded actions it observes, picture for picture, what was recorded."""
    data = Dataset(recorded)
    assert data.about is not None
    assert data.about.env is not None
    envs = [make_env("dmc/reacher-easy", replace(data.about.env, obs="state")) for _ in range(2)]
    match = Match(data.about.physics or [], physical_units(envs[0]), (), Tolerance())
    start = np.array([5, 30])
    taken = data.replay.take(np.zeros_like(start), start - 2, 7)
    model, seeker = Recorder(), Replaying(taken.action[:, 2:6])
    method = Seeking(model, seeker, data, budget=4, before=2, device=torch.device("cpu"), bf16=False)
    attempt(method, Pairs(start, start + 4, 2, 0), data, envs, match)
    goal, *seen = model.seen
    assert torch.equal(goal[1], taken.obs[:, 6])
    assert torch.equal(torch.stack([obs for _, obs, _ in seen], 1), taken.obs[:, :6])
    assert torch.equal(torch.stack([action for action, _, _ in seen[1:]], 1), taken.action[:, :5])
    assert [first.tolist() for _, _, first in seen] == [[True, True]] + [[False, False]] * 5
    assert [left for _, _, left in seeker.told] == [4, 3, 2, 1]
    brightness = taken.obs.float().mean((2, 3, 4))
    for t, (x, wanted, _) in enumerate(seeker.told):
        assert torch.equal(x[:, 0], brightness[:, 2 + t])
        assert torch.equal(wanted[:, 0], brightness[:, 6])
    for env in envs:
        env.close()


# -- searching ---------------------------------------------------------------------------------------------------------

SEARCH = MPCConfig(
    mppi=MPPIConfig(samples=64, iterations=3, elites=8),
    cem=CEMConfig(samples=64, iterations=4, elites=8),
    icem=ICEMConfig(samples=64, iterations=3, elites=8),
    gradient=GradientConfig(starts=4, iterations=10, lr=0.2),
)
GOALS = torch.tensor([[1.2], [-0.9], [0.1]])


def test_distances_between_latents() -> None:
    z, goal = torch.tensor([[1.0, -3.0]]), torch.tensor([[0.0, 1.0]])
    assert latent_distance(z, goal, "l2").tolist() == [8.5]
    assert latent_distance(z, goal, "l1").tolist() == [2.5]


def test_a_candidate_scores_by_where_it_ends_and_if_asked_by_its_path() -> None:
    plans = torch.tensor([[[1.0], [1.0]], [[-1.0], [1.0]]]).expand(2, 2, 2, 1)  # 0 → .3 → .6 and 0 → −.3 → 0
    state, goal = PointState(torch.zeros(2, 1)), torch.tensor([[0.6], [-1.0]])
    last = NearnessToGoal(Point(), state, goal, GoalSearchConfig(distance="l1"))
    torch.testing.assert_close(last(plans), -torch.tensor([[0.0, 0.6], [1.6, 1.0]]))
    path = NearnessToGoal(Point(), state, goal, GoalSearchConfig(distance="l1", path_weight=2.0))
    torch.testing.assert_close(path(plans), -torch.tensor([[0.3, 0.6 + 1.5], [1.6 + 2.9, 1.0 + 1.7]]))


def go(act: Any, steps: int = 8) -> Tensor:
    """From 0 towards GOALS in x' = x + 0.3·a: the last places."""
    x = torch.zeros(3, 1)
    for step in range(steps):
        x = x + 0.3 * act(PointState(x), GOALS, steps - step)
    return x


@pytest.mark.parametrize("distance", ["l2", "l1"])
@pytest.mark.parametrize("planner", ["mppi", "cem", "icem", "gradient"])
def test_an_exact_model_reaches_goals_that_chance_does_not(planner: Any, distance: Any) -> None:
    search = build_planner(replace(SEARCH, planner=planner))
    seeker = GoalSearch(Point(), search, 1, GoalSearchConfig(distance=distance, horizon=5, replan_every=2))
    reached = go(seeker.act)
    assert (reached - GOALS).abs().max() < 0.05
    seeker.begin()
    assert torch.equal(go(seeker.act), reached)  # the same problems, the same draws
    generator = torch.Generator().manual_seed(0)
    by_chance = [go(lambda *_: 2 * torch.rand(3, 1, generator=generator) - 1) for _ in range(20)]
    assert ((torch.stack(by_chance) - GOALS).abs() < 0.05).float().mean() < 0.3


class Counted(Planner):
    """Answers 0.1, 0.2, … and keeps where it was asked to start."""

    def __init__(self) -> None:
        self.starts: list[list[float]] = []

    def search(
        self, score: Score, mean: Tensor, std: Tensor, *, proposals: Tensor | None = None, generator: Any = None
    ) -> Plan:
        self.starts.append(mean[0, :, 0].tolist())
        ramp = 0.1 * torch.arange(1, mean.shape[1] + 1).view(1, -1, 1)
        return Plan(ramp.expand_as(mean), std)


def test_plans_are_carried_out_then_searched_again_from_what_is_left_and_never_beyond_the_end() -> None:
    planner = Counted()
    seeker = GoalSearch(Point(), planner, 1, GoalSearchConfig(horizon=4, replan_every=3))
    state = PointState(torch.zeros(3, 1))
    taken = [float(seeker.act(state, GOALS, left)[0]) for left in (6, 5, 4, 3, 2, 1)]
    assert taken == pytest.approx([0.1, 0.2, 0.3, 0.1, 0.2, 0.3])
    assert [len(start) for start in planner.starts] == [4, 3]
    assert planner.starts[0] == [0, 0, 0, 0]
    assert planner.starts[1] == pytest.approx([0.4, 0, 0])
    seeker.begin()
    seeker.act(state, GOALS, 1)
    assert planner.starts[2] == [0]


# -- the amortised planner ---------------------------------------------------------------------------------------------


def walks(episodes: int = 60, length: int = 21) -> HindsightRows:
    """Random walks of x' = x + 0.3·a, whose latent is x."""
    generator = torch.Generator().manual_seed(3)
    action = 2 * torch.rand(episodes, length, 1, generator=generator) - 1
    x = torch.cat([torch.zeros(episodes, 1, 1), 0.3 * action[:, :-1].cumsum(1)], 1).flatten(0, 1)
    ahead = torch.arange(length - 1, -1, -1).repeat(episodes)
    return HindsightRows(x, action.flatten(0, 1), ahead)


def test_goals_of_hindsight_lie_ahead_in_the_same_episode() -> None:
    """Rows whose latent is their number, in episodes of 3, 1 and 5 rows."""
    row = torch.arange(9.0)[:, None]
    rows = HindsightRows(row, row, torch.tensor([2, 1, 0, 0, 4, 3, 2, 1, 0]))
    found = relabel(rows, 2000, 3, torch.Generator().manual_seed(0))
    start, goal = found.z[:, 0].long(), found.goal[:, 0].long()
    assert torch.equal(goal - start, found.left.long())
    assert torch.equal(found.action, found.z)
    possible = {(s, g) for s, g in [(0, 1), (0, 2), (1, 2)]} | {(s, g) for s in range(4, 8) for g in range(s + 1, 9)}
    assert set(zip(start.tolist(), goal.tolist(), strict=True)) == {(s, g) for s, g in possible if g - s <= 3}
    with pytest.raises(ValueError, match="no episode has two rows"):
        relabel(rows._replace(ahead=torch.zeros(9, dtype=torch.long)), 4, 3, torch.Generator())


def test_the_amortised_planner_learns_what_is_linear_and_reaches_goals() -> None:
    """Of k exchangeable actions that moved x by d in all, each was d / 0.3k on average: that is what it must answer."""
    torch.manual_seed(0)
    rows, settings = walks(), AmortisedConfig(units=64, updates=400, batch=256, lr=3e-3)
    policy = AmortisedPolicy(1, 1, 8, settings)
    losses = torch.stack(list(learn(policy, rows, settings, torch.Generator().manual_seed(0))))
    assert losses[-50:].mean() < 0.8 * losses[:20].mean()
    x, k = torch.tensor([[-0.5], [0.0], [0.3], [0.5]]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    goal = x + torch.tensor([[0.2], [-0.3], [0.5], [-0.6]])
    expected = (goal - x)[:, 0] / (0.3 * k)
    with torch.no_grad():
        torch.testing.assert_close(policy(x, goal, k)[:, 0], expected, atol=0.12, rtol=0)
        torch.testing.assert_close(policy(x, goal, 100 * k), policy(x, goal, torch.full_like(k, 8.0)))
    reached = go(Amortised(Point(), policy).act)
    assert (reached - GOALS).abs().max() < 0.15


# -- the program -------------------------------------------------------------------------------------------------------


def answer(capsys: pytest.CaptureFixture[str], run_dir: Path, data: Path, *more: str) -> tuple[dict[str, Any], str]:
    """The JSON object, and all that was printed."""
    capsys.readouterr()
    assert plan.main(["--run-dir", str(run_dir), "--data", str(data), *QUICK, *SMALL, *more]) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1], parse_constant=pytest.fail), out


def test_a_film_that_cannot_be_written_costs_no_result(
    recorded: Path,
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_room(path: Path, *rest: object) -> None:
        raise PermissionError(f"{path} is read-only")

    monkeypatch.setattr("runners.film.write_video", no_room)
    found = tmp_path / "found.json"
    files = ["--video", str(tmp_path / "film.mp4"), "--json", str(found)]
    assert plan.main(["--run-dir", str(pretrained), "--data", str(recorded), *QUICK, *SMALL, *files]) == 1
    printed = capsys.readouterr()
    assert "film.mp4 cannot be written" in printed.err
    assert "oracle" in printed.out
    assert json.loads(found.read_text())["methods"]["oracle"]["at_the_end"]["rate"] == 1


def test_goals_from_the_command_line(
    recorded: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(pretrained, tmp_path / "run"))
    before = contents(run_dir)
    more = ["--planner", "cem", "amortised", "--amortised.updates", "5"]
    files = ["--video", str(tmp_path / "film.mp4"), "--json", str(tmp_path / "a" / "found.json")]
    found, out = answer(capsys, run_dir, recorded, *more, *files)
    assert json.loads((tmp_path / "a" / "found.json").read_text()) == found
    assert list(found["methods"]) == ["cem", "amortised", "random", "still", "oracle"]
    assert found["methods"]["oracle"]["at_the_end"]["rate"] == 1
    for figures in found["methods"].values():
        for rate in (figures["reached"], figures["at_the_end"]):
            assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1
        assert len(figures["first_reached_after"]) == 3
        assert figures["ms_per_decision"] > 0
    assert found["goals"] == 3
    assert found["drawn"] == 3 + found["excluded"]
    assert found["settings"]["budget"] == 6
    for words in ("validation split", "left out: ", "qpos/wrist within 0.15 rad", "3 goals are too few", "oracle"):
        assert words in out
    with av.open(str(tmp_path / "film.mp4")) as film:
        assert film.streams.video[0].frames == 3 * (7 + 5)

    after = contents(run_dir)
    assert {name for name in after if name not in before} == {
        f"amortised/{name}"
        for name in ("SHA256SUMS", "meta.json", "policy.safetensors", "state.json", "tensors.safetensors")
    }
    assert {name: after[name] for name in before} == before
    again, out = answer(capsys, run_dir, recorded, *more)
    assert "as saved with the run" in out
    assert contents(run_dir) == after
    assert without_time(again["methods"]) == without_time(found["methods"])


def test_the_amortised_planner_is_used_again_only_if_made_of_the_same(
    recorded: Path, pretrained: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(pretrained, tmp_path / "run"))
    loaded = plan.load(plan_config.parse_args(["--run-dir", str(run_dir), "--data", str(recorded), *CPU]))

    def made(data: Dataset = loaded.data, episodes: Sequence[int] = (0, 1, 2), **changes: Any) -> tuple[Tensor, bool]:
        policy, trained = amortised_policy(
            loaded.model,
            data,
            np.array(episodes),
            replace(AmortisedConfig(units=8, updates=3, batch=8), **changes),
            longest=8,
            seed=0,
            run_dir=run_dir,
            checkpoint=loaded.checkpoint,
            progress=lambda done, text: None,
        )
        return policy.state_dict()["net.0.weight"], trained

    first, trained = made()
    assert trained
    again, trained = made()
    assert not trained
    assert torch.equal(first, again)
    other = shutil.copytree(recorded, tmp_path / "other")
    about = json.loads((other / "dataset.json").read_text()) | {"date": "another"}
    (other / "dataset.json").write_text(json.dumps(about))
    assert [made(updates=4)[1], made()[1], made(episodes=(0, 1))[1], made(Dataset(other))[1]] == [True] * 4
    os.truncate(run_dir / "amortised" / "policy.safetensors", 100)
    assert made(Dataset(other))[1]
    again, trained = made()
    assert trained
    assert torch.equal(first, again)


def test_it_learns_from_whole_episodes_as_the_model_sees_them(recorded: Path, pretrained: Path) -> None:
    loaded = plan.load(plan_config.parse_args(["--run-dir", str(pretrained), "--data", str(recorded), *CPU]))
    model, data = loaded.model, loaded.data
    rows = hindsight_rows(model, data, np.array([2]), 1, seed=0)
    batch = data.replay.take(np.array([0]), data.spans[[2], 1], 21)
    state, first = model.initial(21), torch.ones(21, dtype=torch.bool)
    with torch.no_grad():
        alone = model.latent(model.observe(state, torch.zeros(21, 2), batch.obs[0], first))
    torch.testing.assert_close(rows.z, alone)
    assert torch.equal(rows.action, batch.action[0])
    assert rows.ahead.tolist() == list(range(20, -1, -1))
    several = hindsight_rows(model, data, np.arange(4), 50, seed=0)
    assert several.ahead.tolist() == 2 * rows.ahead.tolist()


def without_time(methods: dict[str, Any]) -> dict[str, Any]:
    return {name: {k: v for k, v in found.items() if k != "ms_per_decision"} for name, found in methods.items()}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--goals", "0"], "--goals is 0, but must be at least 1"),
        (["--apart", "0"], "--apart is 0, but must be at least 1"),
        (["--budget", "0"], "--budget is 0, but must be at least 1"),
        (["--horizon", "0"], "--horizon is 0, but must be at least 1"),
        (["--cem.samples", "0"], "--cem: a planner needs at least 1 iteration"),
        (["--apart", "50"], "lower --apart"),
        (["--match", "qpos/shuolder"], "no quantity 'qpos/shuolder'. The closest: qpos/shoulder"),
        (["--tolerance.angle", "7"], "starts satisfy their goals already"),
        (["--task", "dmc/reacher-hard"], "is a run on dmc/reacher-easy"),
        (["--task", "dmc/racher-easy"], "The closest: dmc/reacher-easy"),
        (["--data", "nowhere"], "there is no dataset in nowhere"),
        (["--run-dir", "nowhere"], "nowhere is not a run"),
        (["--planner", "cem", "cem"], "each once"),
        (["--json", str(Path(__file__).parent)], "cannot be a file there; choose another name"),
        (["--video", f"{__file__}/film.mp4"], "film.mp4 cannot be a file there"),
    ],
)
def test_a_command_that_cannot_be(
    more: list[str], message: str, recorded: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--run-dir", str(pretrained), "--data", str(recorded), *QUICK, *SMALL, *more]
    assert message in refused(capsys, plan.main(command))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "dmc/reacher-hard", "--env.size", "32"], "is of the task dmc/reacher-hard, but"),
        (["--task", "dmc/reacher-easy", "--env.size", "40"], "env.size: 32 there, 40 here"),
        (["--task", "gym/Pendulum-v1", "--env.obs", "state"], "is of the task gym/Pendulum-v1, but"),
    ],
)
def test_data_that_are_not_of_the_run(
    flags: list[str], message: str, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    assert collect.main([*flags, "--env.time-limit", "20", "--episodes", "2", "--out", str(data)]) == 0
    assert message in refused(capsys, plan.main(["--run-dir", str(pretrained), "--data", str(data), *QUICK]))


def test_a_task_without_a_physical_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = TINY | {"task": "gym/Pendulum-v1", "env.obs": "state", "env.time-limit": None}
    with Run(config(tmp_path / "run", settings), quiet=True) as run:
        run.save()
    record = ["--task", "gym/Pendulum-v1", "--env.obs", "state", "--env.time-limit", "20", "--episodes", "2"]
    assert collect.main([*record, "--out", str(tmp_path / "data")]) == 0
    command = ["--run-dir", str(tmp_path / "run"), "--data", str(tmp_path / "data"), *QUICK]
    error = refused(capsys, plan.main(command))
    assert "has no physical states, which tell whether a goal was reached" in error
    assert "gym/Pendulum-v1" in error


def test_data_that_are_empty_or_cut_off(
    recorded: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert plan.main(["--run-dir", str(pretrained), "--data", str(tmp_path / "empty"), *QUICK]) == 1
    assert "empty is not a replay" in capsys.readouterr().err
    cut = Path(shutil.copytree(recorded, tmp_path / "cut"))
    os.truncate(cut / "physics.npy", (cut / "physics.npy").stat().st_size // 2)
    assert "damaged: physics.npy" in refused(
        capsys, plan.main(["--run-dir", str(pretrained), "--data", str(cut), *QUICK])
    )


def test_a_run_without_a_world_model(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run(config(tmp_path / "run", COUNTING, agent="random"), quiet=True) as run:
        run.save()
    assert "no world model" in refused(
        capsys, plan.main(["--run-dir", str(tmp_path / "run"), "--data", str(recorded), *QUICK])
    )

"""Whole training runs, real environments included: what they leave, and that every number in it is counted right."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import av
import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.random import RandomAgent
from envs import EnvConfig, make_env, make_vector_env
from runners.checkpoint import Checkpoints
from runners.config import from_json
from runners.replay import Replay
from runners.rollout import Collector, evaluate
from runners.run import Run
from runners.train import main, train
from tests.envs_helpers import LENGTH
from tests.loop_helpers import (
    COUNTING,
    TINY,
    Finished,
    config,
    differing,
    finished_run,
    flags,
    newest_state,
    replay_rows,
    rows,
)
from worldmodels.interface import Batch

COUNTING_TASK = "gym/tests.envs_helpers:Counting-v0"
MOODY_TASK = "gym/tests.envs_helpers:Moody-v0"
STATE = EnvConfig(obs="state")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished_run(tmp_path_factory)


# -- a run from the command line ---------------------------------------------------------------------------------------


def test_command_runs_to_the_end(finished: Finished) -> None:
    process = finished.process
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert "evaluation: " in process.stdout
    assert f"tensorboard --logdir {finished.path}" in process.stdout


def test_config_of_a_run_is_what_was_asked_for(finished: Finished) -> None:
    assert from_json((finished.path / "config.json").read_text()) == config(finished.path, TINY)


def test_metrics_of_a_run(finished: Finished) -> None:
    metrics = rows(finished.path / "metrics.jsonl")
    steps = [row["env_steps"] for row in metrics]
    assert steps == sorted(set(steps))
    # One row in each interval of log_every that has learning in it.
    assert [step // TINY["loop.log-every"] for step in steps] == list(range(4, 13))
    for row in metrics:
        # Seven losses at least, each a number; what they are is the agent's affair.
        assert all(math.isfinite(value) for name, value in row.items() if value is not None), row
        assert sum(name.endswith("_loss") for name in row) >= 7
        assert {"env_steps", "wall_s", "updates", "agent_steps", "replay_rows"} < row.keys()
        assert {"train/pred_loss", "train/sigreg_loss", "train/model_grad_norm"} < row.keys()
        monitors = {"effective_rank", "latent_variance_mean", "sigreg", "open_loop_error_3", "copy_last_error_3"}
        assert {f"monitor/{name}" for name in monitors} < row.keys()
    assert metrics[-1]["wall_s"] > metrics[0]["wall_s"] > 0
    # The rewards of swingup are in [0, 1], so those of its episodes, 160 steps long, in [0, 160].
    returns = [row["train/return"] for row in metrics if "train/return" in row]
    assert len(returns) >= 3
    assert all(0 < value < 160 for value in returns)


def test_evaluations_of_a_run(finished: Finished) -> None:
    evaluations = rows(finished.path / "evals.jsonl")
    for row in evaluations:
        assert row.keys() == {"env_steps", "returns", "lengths", "wall_s"}
        assert row["lengths"] == [160, 160, 160]
        assert len(set(row["returns"])) == 3  # other starts, other returns
        assert all(0 <= value <= 160 for value in row["returns"])
    # Fixed env_steps: the first step in each interval of eval_every, and the last of all; none twice.
    steps = [row["env_steps"] for row in evaluations]
    assert [step // TINY["loop.eval-every"] for step in steps] == [1, 2, 3]


def test_tensorboard_of_a_run(finished: Finished) -> None:
    events = EventAccumulator(str(next(finished.path.rglob("events.out.tfevents*")).parent)).Reload()
    tags = events.Tags()
    assert {"eval/return_mean", "train/pred_loss", "monitor/effective_rank"} <= set(tags["scalars"])
    recorded = [(event.step, event.value) for event in events.Scalars("eval/return_mean")]
    evaluations = rows(finished.path / "evals.jsonl")
    assert [step for step, _ in recorded] == [row["env_steps"] for row in evaluations]
    assert [value for _, value in recorded] == pytest.approx([np.mean(row["returns"]) for row in evaluations])


def test_tensorboard_shows_an_evaluation_and_what_was_imagined(finished: Finished) -> None:
    events = EventAccumulator(str(next(finished.path.rglob("events.out.tfevents*")).parent)).Reload()
    pictures = [event for tag in events.Tags()["images"] for event in events.Images(tag)]
    kinds = {event.encoded_image_string[:4] for event in pictures}
    assert b"GIF8" in kinds, "no evaluation video"
    assert b"\x89PNG" in kinds, "no strip of real and imagined frames"


def test_video_of_a_run_is_one_episode(finished: Finished) -> None:
    with av.open(str(finished.path / "videos" / "final.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) in (20, 21)  # before each of 20 actions, and perhaps after the last
    assert frames[0].shape == (256, 256, 3)
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 20  # something moved


def test_checkpoints_of_a_run_are_the_last_two_and_the_best(finished: Finished) -> None:
    checkpoints = Checkpoints(finished.path / "checkpoints")
    assert 2 <= len(list(checkpoints.folder.iterdir())) <= 3
    best, latest = checkpoints.best(), checkpoints.latest()
    assert best is not None
    assert latest is not None
    evaluations = {row["env_steps"]: np.mean(row["returns"]) for row in rows(finished.path / "evals.jsonl")}
    step = max(evaluations, key=lambda step: (evaluations[step], step))
    assert best[1]["env_steps"] - step in (0, 8)  # the row that was on its way is part of the checkpoint
    assert latest[1]["env_steps"] >= 960
    assert latest[1]["task"] == TINY["task"]
    assert {path.suffix for path in finished.path.rglob("checkpoints/**/*")} <= {"", ".json", ".safetensors"}


def test_replay_of_a_run_is_its_episodes(finished: Finished) -> None:
    replay = Replay.open(finished.path / "replay")
    episodes = list(replay.episodes())
    assert len(episodes) >= 5
    for episode in episodes:
        assert episode["obs"].shape == (21, 3, 32, 32)
        assert episode["obs"].dtype == np.uint8
        assert episode["reward"][0] == 0
        assert not episode["is_terminal"].any()  # the time limit truncates
    # The first row of the log averages the prefill's two episodes, each later one tells of one episode.
    returns = [float(np.sum(episode["reward"], dtype=np.float64)) for episode in episodes]
    logged = [row["train/return"] for row in rows(finished.path / "metrics.jsonl") if "train/return" in row]
    assert logged == pytest.approx([np.mean(returns[:2]), *returns[2 : 1 + len(logged)]], abs=1e-4)


# -- counting ----------------------------------------------------------------------------------------------------------


def test_updates_are_exactly_as_many_as_promised(finished: Finished) -> None:
    """train_ratio 32 rows over 4·8 rows an update: one update for each agent step, and the pretraining before."""
    metrics = rows(finished.path / "metrics.jsonl")
    made = [(row["agent_steps"], row["updates"]) for row in metrics]
    for (steps, updates), (later_steps, later_updates) in itertools.pairwise(made):
        assert later_updates - updates == later_steps - steps
    # 320 env_steps of prefill are 40 agent steps. Learning starts with the step after them.
    steps, updates = made[-1]
    assert updates == 4 + (steps - 40)


@pytest.mark.parametrize(("ratio", "per_step"), [(8.0, 0.25), (80.0, 2.5)])
def test_train_ratio_is_updates_over_agent_steps(ratio: float, per_step: float, tmp_path: Path) -> None:
    train(config(tmp_path, COUNTING, loop__train_ratio=ratio, loop__pretrain=0), quiet=True)
    metrics = rows(tmp_path / "metrics.jsonl")
    first, last = metrics[0], metrics[-1]
    steps, updates = last["agent_steps"] - first["agent_steps"], last["updates"] - first["updates"]
    assert steps >= 60
    assert abs(updates - per_step * steps) <= 1
    # How old the policy was that chose what arrives: below what a step pays for, and one.
    assert all(0 <= row["train/policy_lag"] < per_step + 1 for row in metrics if "train/policy_lag" in row)
    assert metrics[-1]["train/policy_lag"] == pytest.approx(per_step, abs=0.5)


def test_several_environments_share_the_train_ratio(tmp_path: Path) -> None:
    """Two environments: two agent steps a row, two updates a row."""
    two = {"num-envs": 2, "env-steps": 240, "loop.prefill": 80, "loop.train-ratio": 32, "loop.eval-episodes": 1}
    train(config(tmp_path, COUNTING | two), quiet=True)
    metrics = rows(tmp_path / "metrics.jsonl")
    first, last = metrics[0], metrics[-1]
    assert last["agent_steps"] - first["agent_steps"] >= 100
    assert abs((last["updates"] - first["updates"]) - (last["agent_steps"] - first["agent_steps"])) <= 2
    assert Replay.open(tmp_path / "replay").streams == 2


def test_processes_that_draw_pictures_train_evaluate_and_are_filmed(tmp_path: Path) -> None:
    """The default of a user's run: several environments, and those of the evaluation, each a process."""
    result = train(config(tmp_path, TINY, num_envs=2, env_steps=480, loop__eval_every=480), quiet=True)
    assert result is not None
    assert len(result.returns) == 3
    assert (tmp_path / "videos" / "final.mp4").exists()


@pytest.mark.parametrize(("repeat", "lengths"), [(1, [1, 1, 1, 1, 1, 0]), (2, [2, 2, 1, 0]), (4, [4, 1, 0])])
def test_env_steps_count_simulator_steps(repeat: int, lengths: list[int], tmp_path: Path) -> None:
    """Episodes of five simulator steps, the last action cut short; the row that resets takes none."""
    envs = make_vector_env(COUNTING_TASK, EnvConfig(obs="state", action_repeat=repeat), 1, seed=0)
    collector = Collector(envs, new_replay(tmp_path, envs), 1)
    agent, seen = RandomAgent(1, 0), []
    for _ in range(2 * len(lengths)):
        before = collector.env_steps
        collector.step(agent)
        collector.wait()
        seen.append(collector.env_steps - before)
    assert seen == 2 * lengths
    assert collector.env_steps == 2 * LENGTH
    assert collector.agent_steps == 2 * (len(lengths) - 1)
    envs.close()


def test_budget_and_prefill_are_env_steps(tmp_path: Path) -> None:
    result = train(config(tmp_path, COUNTING, env__action_repeat=2, agent="random"), quiet=True)
    assert result is not None
    assert set(result.lengths) == {LENGTH}
    state = newest_state(tmp_path)
    # No row takes more than two simulator steps, and a checkpoint takes in the row on its way.
    assert 120 <= state["collector"]["env_steps"] <= 123
    assert state["collector"]["agent_steps"] * 5 / 3 == pytest.approx(state["collector"]["env_steps"], abs=3)


# -- alignment: environment → collector → replay → batch ---------------------------------------------------------------


def new_replay(path: Path, envs: Any, capacity: int = 400) -> Replay:
    space = envs.single_observation_space
    return Replay.create(
        path / "replay",
        capacity=capacity,
        num_envs=envs.num_envs,
        obs_shape=space.shape,
        obs_dtype=space.dtype,
        action_dim=envs.single_action_space.shape[0],
    )


class Watching(RandomAgent):
    """Acts at random and checks what it is shown: the observation is its memory plus one, unless an episode begins."""

    def initial(self, envs: int) -> tuple[torch.Tensor]:
        self.calls = 0
        return (torch.full((envs,), -1.0),)

    def act(self, obs: np.ndarray, is_first: np.ndarray, carry: tuple[torch.Tensor], *, explore: bool) -> Any:
        assert explore
        count = obs.reshape(len(obs), -1)[:, 0] / (10 if obs.dtype == np.uint8 else 1)
        expected = np.where(is_first, 0, carry[0].numpy() + 1)
        np.testing.assert_array_equal(count, expected)
        self.calls += 1
        return super().act(obs, is_first, (), explore=explore)[0], (torch.as_tensor(count),)


def assert_timeline(batch: Batch) -> set[bool]:
    """Every row as worldmodels.interface draws it, for the counting environment. Returns the ways episodes ended."""
    count = batch.obs.flatten(2)[:, :, 0].float() / (10 if batch.obs.dtype == torch.uint8 else 1)
    action, reward = batch.action[:, :, 0], batch.reward
    assert torch.equal(batch.is_first, count == 0)
    assert torch.equal(batch.is_last, count == LENGTH)
    assert not (batch.is_terminal & ~batch.is_last).any()
    assert (reward[batch.is_first] == 0).all()
    assert (action[batch.is_last] == 0).all()
    assert (action[~batch.is_last] != 0).all()
    goes_on = ~batch.is_first[:, 1:]
    assert torch.equal(count[:, 1:][goes_on], count[:, :-1][goes_on] + 1)
    # The environment rewards with the action it was given, which reaches from -2 to 2.
    assert torch.equal(reward[:, 1:][goes_on], 2 * action[:, :-1][goes_on])
    assert torch.equal(batch.is_last[:, :-1], batch.is_first[:, 1:])
    return set(batch.is_terminal[batch.is_last].tolist())


@pytest.mark.parametrize("obs", ["state", "pixels"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_alignment_from_environment_to_batch(num_envs: int, obs: Any, tmp_path: Path) -> None:
    """Several environments run in processes; the ring is overwritten more than once."""
    envs = make_vector_env(COUNTING_TASK, EnvConfig(obs=obs, size=8), num_envs, seed=0)
    replay = new_replay(tmp_path, envs, capacity=40 * num_envs)
    collector, agent = Collector(envs, replay, 1), Watching(1, seed=0)
    for _ in range(130):
        collector.step(agent)
    envs.close()
    assert agent.calls == 130
    endings = assert_timeline(replay.sample(256, 15, np.random.default_rng(0)))
    assert endings == {True, False}
    assert len(replay) == 40 * num_envs


@pytest.mark.parametrize("overlap", [True, False])
def test_an_answer_is_taken_in_a_step_later_where_learning_overlaps(overlap: bool, tmp_path: Path) -> None:
    envs = make_vector_env(COUNTING_TASK, STATE, 2, seed=0)
    replay = new_replay(tmp_path, envs)
    collector, agent = Collector(envs, replay, 1, overlap=overlap), RandomAgent(1, 0)
    for k in range(1, 4):
        collector.step(agent)
        assert collector.env_steps == 2 * (k - overlap)
        assert len(replay) == 2 * k, "the row that was acted on is there either way"
    envs.close()


def test_returns_are_those_of_whole_episodes(tmp_path: Path) -> None:
    envs = make_vector_env(COUNTING_TASK, STATE, 2, seed=0)
    replay = new_replay(tmp_path, envs)
    collector, agent = Collector(envs, replay, 1), RandomAgent(1, 0)
    for _ in range(4 * (LENGTH + 1)):
        collector.step(agent)
    collector.wait()
    envs.close()
    expected = sorted(float(episode["reward"].sum()) for episode in replay.episodes())
    assert len(expected) == 8
    assert sorted(collector.returns) == pytest.approx(expected)


def test_alignment_holds_through_a_whole_training(tmp_path: Path) -> None:
    train(config(tmp_path, COUNTING), quiet=True)
    whole = {name: torch.as_tensor(value)[None] for name, value in replay_rows(tmp_path).items()}
    assert len(whole["reward"][0]) > 120
    assert_timeline(Batch(**whole))


def test_collector_goes_on_in_the_middle_of_an_episode(tmp_path: Path) -> None:
    """Saved after 9 rows and put into a new collector, the next rows are the same as without."""

    def collect(folder: str, stop: int | None) -> dict[str, np.ndarray]:
        path = tmp_path / folder
        path.mkdir()
        envs = make_vector_env(COUNTING_TASK, STATE, 1, seed=4)
        replay, agent = new_replay(path, envs), Watching(1, seed=5)
        collector = Collector(envs, replay, 1)
        for row in range(20):
            if row == stop:
                state = collector.state_dict()
                envs.close()
                envs = make_vector_env(COUNTING_TASK, STATE, 1, seed=99)
                collector = Collector(envs, replay, 1)
                collector.load_state_dict(state, agent)
            collector.step(agent)
        envs.close()
        replay.close()
        return replay_rows(path)

    assert differing(collect("whole", None), collect("parts", 9)) == []


# -- evaluation --------------------------------------------------------------------------------------------------------


class Constant(RandomAgent):
    """Always the same action; counts how it was asked."""

    def __init__(self) -> None:
        super().__init__(1, 0)
        self.asked: set[bool] = set()

    def act(self, obs: np.ndarray, is_first: np.ndarray, carry: Any, *, explore: bool) -> Any:
        self.asked.add(explore)
        return np.full((len(obs), 1), 0.5, np.float32), carry


def test_evaluation_plays_its_quota_of_episodes() -> None:
    """Environment i plays the first episodes of seed + i, short or long; each step pays a half."""
    envs = make_vector_env(MOODY_TASK, STATE, 3, seed=0)
    agent = Constant()
    result = evaluate(agent, envs, 8, seed=70)
    envs.close()
    expected: dict[int, int] = {}
    for i in range(3):
        env = make_env(MOODY_TASK, STATE)
        for k in range(i, 8, 3):
            obs, _ = env.reset(seed=70 + i) if k == i else env.reset()
            expected[k] = int(obs[1])
        env.close()
    lengths = [expected[k] for k in range(8)]
    assert len(set(lengths)) > 2  # else the order would prove nothing
    assert result.lengths == lengths
    assert result.returns == pytest.approx([0.5 * length for length in lengths])
    assert result.mean == pytest.approx(0.5 * np.mean(lengths))
    assert result.frames is None
    assert agent.asked == {False}


def test_evaluation_films_the_first_episode() -> None:
    envs = make_vector_env(COUNTING_TASK, EnvConfig(size=8), 2, seed=0)
    frames = evaluate(Constant(), envs, 4, seed=1).frames
    envs.close()
    assert frames is not None
    assert [int(frame[0, 0, 0]) for frame in frames][:LENGTH] == [0, 10, 20, 30, 40]
    assert len(frames) in (LENGTH, LENGTH + 1)


def test_evaluation_is_the_same_each_time(tmp_path: Path) -> None:
    with Run(config(tmp_path, TINY), quiet=True) as run:
        first, again, other = (evaluate(run.agent, run.eval_envs, 4, seed=seed) for seed in (5, 5, 6))
        assert first.returns == again.returns
        assert first.returns != other.returns
        # Nothing of it shows in training: no random number was drawn, no weight moved.
        before = torch.get_rng_state()
        evaluate(run.agent, run.eval_envs, 2, seed=5)
        assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_refuses_no_episodes() -> None:
    envs = make_vector_env(COUNTING_TASK, STATE, 1)
    with pytest.raises(ValueError, match="at least 1 episode, got 0"):
        evaluate(Constant(), envs, 0, seed=0)
    envs.close()


# -- other shapes of a run ---------------------------------------------------------------------------------------------


def test_random_agent_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(tmp_path / "run", COUNTING, agent="random")) == 0
    assert len(rows(tmp_path / "run" / "evals.jsonl")) == 3
    assert rows(tmp_path / "run" / "metrics.jsonl")[-1]["agent_steps"] >= 115
    assert "evaluation: " in capsys.readouterr().out
    actions = replay_rows(tmp_path / "run")["action"]
    assert len(np.unique(actions[actions != 0])) == np.count_nonzero(actions)  # no stretch of it is repeated


def test_reinforce_and_transformer_run(tmp_path: Path) -> None:
    small = {
        "model.transformer.depth": 1,
        "model.transformer.heads": 2,
        "model.transformer.head-dim": 4,
        "model.transformer.mlp": 16,
        "model.transformer.projector": 16,
    }
    once_a_step = COUNTING | small | {"loop.train-ratio": 32}
    changes = config(tmp_path, once_a_step, gradient="reinforce", model__predictor="transformer", env_steps=60)
    assert train(changes, quiet=True) is not None
    assert rows(tmp_path / "metrics.jsonl")[-1]["updates"] >= 15


def test_state_of_a_real_task_and_two_environments_run(tmp_path: Path) -> None:
    changes = {"task": "mujoco/HalfCheetah-v5", "env.obs": "state", "num-envs": 2, "env-steps": 160}
    changes |= {"loop.prefill": 80, "loop.eval-episodes": 1}
    result = train(config(tmp_path, TINY | changes), quiet=True)
    assert result is not None
    assert result.frames is None
    assert not (tmp_path / "videos").exists()
    replay = Replay.open(tmp_path / "replay")
    assert replay.streams == 2
    batch = replay.sample(16, 8, np.random.default_rng(0))
    assert batch.obs.shape == (16, 8, 17)
    assert batch.action.shape == (16, 8, 6)


def test_both_observations_are_refused_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(tmp_path / "run", TINY, env__obs="both")) == 1
    assert "pixels or state" in capsys.readouterr().err


def test_same_seed_same_run_and_another_seed_another(tmp_path: Path) -> None:
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(config(tmp_path / folder, COUNTING, seed=seed, env_steps=80), quiet=True)
    a, b, c = (newest_state(tmp_path / folder) for folder in "abc")
    assert differing(a, b) == []
    assert differing(a["agent"], c["agent"])


def test_counting_task_is_what_the_tests_take_it_for() -> None:
    """The registered environment pays with its action, scaled to its own limits."""
    env = make_env(COUNTING_TASK, STATE)
    assert isinstance(env.action_space, gym.spaces.Box)
    env.reset(seed=0)
    obs, reward, *_ = env.step(np.array([0.25], np.float32))
    assert (float(obs[0]), reward) == (1.0, 0.5)
    env.close()

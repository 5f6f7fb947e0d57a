"""Stable-Baselines3's baselines behind runners.train: the data they learn from, their runs, and how these resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from agents.interface import Agent, NonFiniteLoss
from envs import EnvConfig, UnsupportedActionSpace
from envs.vector import VectorEnv
from runners.baseline_agent import BaselineAgent, build_baseline
from runners.baseline_buffer import RowBuffer
from runners.baseline_config import BASELINES
from runners.baselines import BaselineRun
from runners.checks import check
from runners.config import ConfigError, build_agent, parse_args
from runners.evaluate import main as evaluate_main
from runners.replay import Replay
from runners.train import main, train
from runners.vecenv import TaskVecEnv
from tests.envs_helpers import PREFIX
from tests.loop_helpers import config, contents, differing, flags, newest_state, replay_rows, rows, without_wall_time

COUNTING, MOODY = PREFIX + "Counting-v0", PREFIX + "Moody-v0"
CPU = torch.device("cpu")

SMALL: dict[str, Any] = {
    "task": "dmc/cartpole-swingup",
    "env.obs": "state",
    "env.time-limit": 160,  # 20 agent steps
    "device": "cpu",
    "threads": 1,
    "num-envs": 1,
    "seed": 3,
    "env-steps": 1600,
    "loop.prefill": 400,
    "loop.log-every": 160,
    "loop.eval-every": 640,
    "loop.eval-episodes": 2,
    "loop.checkpoint-every": 480,
}
for _agent in ("sac", "td3", "tqc"):
    SMALL |= {
        f"{_agent}.batch": 16,
        f"{_agent}.pixel-batch": 16,
        f"{_agent}.units": (16, 16),
        f"{_agent}.capacity": 120,
    }
SMALL |= {"ppo.rollout": 48, "ppo.batch": 16, "ppo.epochs": 2, "ppo.units": (16, 16)}
"""200 agent steps of cartpole, ten episodes; three evaluations."""

PIXELS = SMALL | {"env.obs": "pixels", "env.size": 36, "env-steps": 640, "loop.prefill": 160, "ppo.rollout": 24}
"""80 agent steps."""


# -- environments ------------------------------------------------------------------------------------------------------


def test_our_environments_as_stable_baselines_has_them() -> None:
    """The next episode begins at once; the last observation is in the infos, and why the episode ended."""
    with closing(TaskVecEnv(VectorEnv(COUNTING, EnvConfig(obs="state"), 2, seed=5, processes=False))) as env:
        assert env.reset().tolist() == [[0], [0]]
        endings = []
        for step in range(1, 21):
            obs, reward, done, infos = env.step(np.array([[0.25], [-1]], np.float32))
            assert reward.tolist() == [0.5, -2]
            assert done.tolist() == [step % 5 == 0] * 2
            assert obs.tolist() == [[step % 5]] * 2
            for info in infos:
                assert info["env_steps"] == 1
                assert ("terminal_observation" in info) == done[0]
                if done[0]:
                    assert info["terminal_observation"] == [5]
                    endings.append(info["TimeLimit.truncated"])
        assert env.env_steps == 40
        assert env.returns == [2.5, -10] * 4
        assert set(endings) == {True, False}
        again = VectorEnv(COUNTING, EnvConfig(obs="state"), 2, seed=5, processes=False)
        truncated = []
        with closing(again):
            again.reset()
            for _ in range(4):  # an episode, and the row that begins the next
                for _ in range(5):
                    *_, cut, _ = again.step(np.zeros((2, 1), np.float32))
                truncated += cut.tolist()
                again.step(np.zeros((2, 1), np.float32))
        assert endings == truncated


def test_environments_that_end_at_different_times_go_on_alone() -> None:
    with closing(TaskVecEnv(VectorEnv(MOODY, EnvConfig(obs="state"), 3, seed=1, processes=False))) as env:
        expected: Any = env.reset()
        seen = set()
        for _ in range(30):
            answer: Any = env.step(np.zeros((3, 1), np.float32))
            obs, _, done, infos = answer
            expected[:, 0] += 1
            for i in range(3):
                if done[i]:
                    assert infos[i]["terminal_observation"].tolist() == expected[i].tolist()
                    assert expected[i, 0] == expected[i, 1]
                    expected[i] = 0, obs[i, 1]
            assert obs.tolist() == expected.tolist()
            seen.add(tuple(done))
        assert any(0 < sum(done) < 3 for done in seen)


# -- the replay as a buffer --------------------------------------------------------------------------------------------


def collect(env: Any, buffer: RowBuffer, steps: int) -> list[tuple[bytes, ...]]:
    """Random steps into ``buffer``; every transition as Stable-Baselines3's own buffer would have it."""
    generator, transitions = np.random.default_rng(0), []
    obs = env.reset()
    for _ in range(steps):
        action = generator.uniform(-1, 1, (env.num_envs, 1)).astype(np.float32)
        before = obs.copy()
        obs, reward, done, infos = env.step(action)
        after = obs.copy()
        for i in np.flatnonzero(done):
            after[i] = infos[i]["terminal_observation"]
        buffer.add(before, after, action, reward, done, infos)
        ends = [bool(d) and not info["TimeLimit.truncated"] for d, info in zip(done, infos, strict=True)]
        transitions += [
            as_bytes(before[i], action[i], after[i], np.float32(ends[i]), reward[i]) for i in range(env.num_envs)
        ]
    return transitions


def as_bytes(*parts: Any) -> tuple[bytes, ...]:
    return tuple(np.asarray(part).tobytes() for part in parts)


def sampled(buffer: RowBuffer, count: int) -> set[tuple[bytes, ...]]:
    out = buffer.sample(count)
    assert out.dones.shape == out.rewards.shape == (count, 1)
    return {as_bytes(*(part[i].numpy() for part in out[:5])) for i in range(count)}


def open_buffer(path: Path, env: Any, frames: int | None = None, capacity: int = 1000) -> RowBuffer:
    inner = env.unwrapped.envs
    replay = Replay.create(
        path,
        capacity=capacity,
        num_envs=env.num_envs,
        obs_shape=inner.single_observation_space.shape,
        obs_dtype=inner.single_observation_space.dtype,
        action_dim=1,
        flush_every=10,
    )
    space, actions = env.observation_space, env.action_space
    return RowBuffer(replay, space, actions, frames=frames, shift=0, seed=0, device=CPU)


def test_every_transition_is_sampled_and_nothing_else(tmp_path: Path) -> None:
    """Of environments whose episodes end at different times, but for those whose next row is still to come."""
    vector = VectorEnv(MOODY, EnvConfig(obs="state"), 3, seed=1, processes=False)
    with closing(TaskVecEnv(vector)) as env:
        buffer = open_buffer(tmp_path / "replay", env)
        real = collect(env, buffer, 60)
        found = sampled(buffer, 8000)
    assert found <= set(real)
    assert len(found) >= len(set(real)) - 3 * 8


def test_transitions_know_a_termination_from_a_time_limit(tmp_path: Path) -> None:
    with closing(TaskVecEnv(VectorEnv(COUNTING, EnvConfig(obs="state"), 1, seed=5))) as env:
        buffer = open_buffer(tmp_path / "replay", env)
        real = collect(env, buffer, 100)
        out = buffer.sample(2000)
    assert (out.next_observations - out.observations == 1).all()
    assert (out.rewards == 2 * out.actions).all()
    assert (out.dones[out.next_observations < 5] == 0).all()
    last = {bytes(one[3]) for one in real if one[2] == np.float32(5).tobytes()}
    assert {bytes(flag.numpy().tobytes()) for flag in out.dones[out.next_observations == 5]} == last
    assert len(last) == 2


def test_stacked_pictures_are_those_of_vec_frame_stack(tmp_path: Path) -> None:
    """In the buffer and in what acts: zeros before an episode's first picture, none from the episode before."""
    inner = TaskVecEnv(VectorEnv(COUNTING, EnvConfig(size=36), 1, seed=5))
    with closing(VecFrameStack(inner, 3, channels_order="first")) as env:
        buffer = open_buffer(tmp_path / "replay", env, frames=3)
        real = collect(env, buffer, 23)
        found = sampled(buffer, 500)
        assert found == set(real[2:-1])  # two older pictures are asked for, and one newer
        agent = build_agent(
            parse_args(["--agent", "sac", "--env.size", "36", "--sac.units", "8"]),
            inner.observation_space,
            inner.action_space,
            CPU,
        )
        stacked: Any = env.reset()
        is_first, carry = np.array([True]), agent.initial(1)
        for _ in range(12):
            action, carry = agent.act(stacked[:, -3:].copy(), is_first, carry, explore=False)
            assert (carry.numpy() == stacked).all()
            assert action.shape == (1, 1)
            stacked, _, is_first, _ = env.step(action)


def test_sampled_pictures_are_shifted_whole_and_repeat_their_border(tmp_path: Path) -> None:
    picture = np.arange(3 * 6 * 6, dtype=np.uint8).reshape(3, 6, 6)
    replay = Replay.create(
        tmp_path / "replay", capacity=10, num_envs=1, obs_shape=(3, 6, 6), obs_dtype=picture.dtype, action_dim=1
    )
    pictures, actions = gym.spaces.Box(0, 255, (3, 6, 6), np.uint8), gym.spaces.Box(-1, 1, (1,))
    buffer = RowBuffer(replay, pictures, actions, frames=1, shift=2, seed=0, device=CPU)
    for _ in range(4):
        buffer.add(picture[None], picture[None], np.zeros((1, 1)), np.zeros(1), np.zeros(1, bool), [{}])
    padded = np.pad(picture, ((0, 0), (2, 2), (2, 2)), mode="edge")
    known = {padded[:, y : y + 6, x : x + 6].tobytes() for y in range(5) for x in range(5)}
    assert len(known) == 25
    out = buffer.sample(200)
    assert {image.numpy().tobytes() for image in out.observations} == known
    assert {image.numpy().tobytes() for image in out.next_observations} == known


# -- acting ------------------------------------------------------------------------------------------------------------


def test_states_are_normalised_as_vec_normalize_does() -> None:
    settings = parse_args(["--agent", "ppo", "--env.obs", "state", "--ppo.units", "8"])
    inner = TaskVecEnv(VectorEnv(MOODY, EnvConfig(obs="state"), 2, seed=1, processes=False))
    with closing(VecNormalize(inner)) as env:
        agent = build_baseline(settings, inner.observation_space, inner.action_space, CPU, 2)
        assert isinstance(agent, Agent)
        env.obs_rms = agent.obs_statistics  # type: ignore[assignment]
        env.reset()
        for _ in range(40):
            normalised = env.step(np.zeros((2, 1), np.float32))[0]
        obs = env.get_original_obs()
        assert (np.abs(normalised - obs) > 0.1).any()
        action, _ = agent.act(obs, np.zeros(2, bool), (), explore=False)
        expected, _ = agent.model.policy.predict(normalised, deterministic=True)
        assert (action == expected).all()


@pytest.mark.parametrize("name", ["sac", "td3", "tqc"])
def test_convolutions_learn_from_the_critic_alone(name: str) -> None:
    """And serve the policy, whose optimiser does not hold them."""
    settings = parse_args(["--agent", name, "--env.size", "36", f"--{name}.units", "8"])
    pictures, actions = gym.spaces.Box(0, 255, (3, 36, 36), np.uint8), gym.spaces.Box(-1, 1, (2,), np.float32)
    agent = build_agent(settings, pictures, actions, CPU)
    assert isinstance(agent, BaselineAgent)
    policy: Any = agent.model.policy
    weights = list(policy.critic.features_extractor.parameters())
    obs = torch.randint(0, 256, (4, 9, 36, 36), dtype=torch.uint8)
    chosen = policy.actor(obs)
    value = policy.critic.q1_forward(obs, chosen) if name == "td3" else policy.critic(obs, chosen)[0]
    value.sum().backward()
    assert all(weight.grad is None for weight in weights)
    assert all(weight.grad is not None for weight in policy.actor.mu.parameters())
    out = policy.critic(obs, chosen.detach())
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in weights)
    held = {id(weight) for group in policy.actor.optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in policy.actor.parameters()}
    assert not held & {id(weight) for weight in policy.critic.parameters()}


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=BASELINES)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An uninterrupted run of each algorithm from states."""
    path = tmp_path_factory.mktemp(request.param) / "run"
    assert train(config(path, SMALL, agent=request.param), quiet=True) is not None
    return request.param, path


def test_a_run_learns_and_its_folder_holds_what_ours_holds(finished: tuple[str, Path]) -> None:
    agent, path = finished
    written = {one.name for one in path.iterdir()}
    assert written - {"replay"} == {
        *("config.json", "metrics.jsonl", "evals.jsonl", "run.lock", "tensorboard", "checkpoints")
    }
    assert ("replay" in written) == (agent != "ppo")
    assert json.loads((path / "config.json").read_text())["agent"] == agent
    evaluations = rows(path / "evals.jsonl")
    assert [row["env_steps"] for row in evaluations] == [640, 1280, 1600]
    for row in evaluations:
        assert row.keys() == {"env_steps", "returns", "lengths", "wall_s"}
        assert row["lengths"] == [160, 160]
        assert all(0 <= value <= 160 for value in row["returns"])
    metrics = rows(path / "metrics.jsonl")
    assert [row["env_steps"] for row in metrics] == list(range(160, 1601, 160))
    assert metrics[-1]["agent_steps"] == 200
    # sac and its like: an update for each agent step after the 50 random ones; ppo: two passes over four rollouts
    assert metrics[-1]["updates"] == (8 if agent == "ppo" else 149)
    loss = "train/value_loss" if agent == "ppo" else "train/critic_loss"
    losses = [row[loss] for row in metrics if loss in row]
    assert len(losses) >= 3
    assert np.isfinite(losses).all()
    assert sum("train/return" in row for row in metrics) >= 5
    fresh = build_agent(config(path, SMALL, agent=agent), *spaces(), CPU)
    assert isinstance(fresh, BaselineAgent)
    before = {name: value.clone() for name, value in fresh.model.policy.state_dict().items()}
    fresh.load_state_dict(newest_state(path)["agent"])
    after = fresh.model.policy.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def spaces() -> tuple[gym.spaces.Box, gym.spaces.Box]:
    """Those of cartpole's state."""
    return gym.spaces.Box(-np.inf, np.inf, (5,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32)


def test_checkpoints_are_safetensors_and_json(finished: tuple[str, Path]) -> None:
    _, path = finished
    kinds = {file.suffix for file in (path / "checkpoints").rglob("*") if file.is_file() and file.name != "SHA256SUMS"}
    assert kinds == {".json", ".safetensors"}
    newest = max((path / "checkpoints").iterdir())
    assert load_file(newest / "policy.safetensors").keys() == newest_state(path)["agent"]["parameters"]["policy"].keys()


def test_evaluate_works_on_the_folder(finished: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, path = finished
    answers = []
    for _ in range(2):
        assert evaluate_main(["--run-dir", str(path), "--episodes", "3", "--num-envs", "2", "--threads", "1"]) == 0
        answers.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert answers[0] == answers[1]
    assert answers[0]["env_steps"] == 1600
    assert len(answers[0]["returns"]) == 3
    assert evaluate_main(["--run-dir", str(path), "--agent", "mpc"]) == 1
    assert "it learned no world model that --agent mpc could use" in capsys.readouterr().err


def test_a_finished_run_ends_at_once(finished: tuple[str, Path], tmp_path: Path) -> None:
    agent, path = finished
    again = shutil.copytree(path, tmp_path / "run")
    with failing_at_step(1):
        assert train(config(again, SMALL, agent=agent), quiet=True) is not None
    assert rows(again / "evals.jsonl") == rows(path / "evals.jsonl")
    assert differing(newest_state(again), newest_state(path)) == []


@pytest.mark.parametrize("agent", ["sac", "ppo"])
def test_pixels(agent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stacked pictures through CnnPolicy, and the last evaluation's video."""
    path = tmp_path / "run"
    assert main(flags(path, PIXELS, agent=agent)) == 0
    assert "evaluation: " in capsys.readouterr().out
    assert (path / "videos" / "final.mp4").stat().st_size > 0
    assert rows(path / "metrics.jsonl")[-1]["updates"] == (6 if agent == "ppo" else 59)
    weights = newest_state(path)["agent"]["parameters"]["policy"]
    first = [value.shape for name, value in weights.items() if name.endswith("features_extractor.cnn.0.weight")]
    assert {shape[1] for shape in first} == {9}
    if agent == "sac":
        with Replay.open(path / "replay") as replay:  # pictures once each, as ours
            assert replay.take(np.array([0]), np.array([0]), 2).obs.shape == (1, 2, 3, 36, 36)


# -- stopped and resumed -----------------------------------------------------------------------------------------------


@contextmanager
def at_step(step: int, action: Any) -> Iterator[None]:
    """While entered, ``action`` is called right after the environments' ``step``-th answer, counted from 1."""
    real, taken = TaskVecEnv.step_wait, 0

    def step_wait(self: TaskVecEnv) -> Any:
        nonlocal taken
        answer = real(self)
        taken += 1
        if taken == step:
            action()
        return answer

    TaskVecEnv.step_wait = step_wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        TaskVecEnv.step_wait = real  # type: ignore[method-assign]


class Killed(Exception):
    """Stands for the end of the process, at which nothing more is saved."""


def failing_at_step(step: int) -> Any:
    def fail() -> None:
        raise Killed

    return at_step(step, fail)


def stop_at_step(step: int) -> Any:
    return at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimisers, random states, environments, counters, normalisation and replay; and the record."""
    assert differing(newest_state(one), newest_state(other)) == []
    assert without_wall_time(rows(one / "evals.jsonl")) == without_wall_time(rows(other / "evals.jsonl"))
    if (one / "replay").exists():
        assert differing(replay_rows(one), replay_rows(other)) == []


def test_stopped_and_resumed_is_as_if_nothing_had_happened(finished: tuple[str, Path], tmp_path: Path) -> None:
    """Once in the random steps, or in the first rollout, and again later."""
    agent, whole = finished
    for step in (30, 61):
        with stop_at_step(step):
            assert train(config(tmp_path, SMALL, agent=agent), quiet=True) is None
    assert 0 < newest_state(tmp_path)["agent"]["updates"] < rows(whole / "metrics.jsonl")[-1]["updates"]
    assert train(config(tmp_path, SMALL, agent=agent), quiet=True) is not None
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize("agent", ["sac", "ppo"])
def test_killed_it_goes_on_from_the_last_checkpoint(agent: str, tmp_path: Path) -> None:
    """From pixels, so that stacks come back too."""
    settings = PIXELS | {"agent": agent, "loop.checkpoint-every": 200, "loop.eval-every": 400}
    assert train(config(tmp_path / "whole", settings), quiet=True) is not None
    with failing_at_step(60), pytest.raises(Killed):
        train(config(tmp_path / "parts", settings), quiet=True)
    assert train(config(tmp_path / "parts", settings), quiet=True) is not None
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_two_environments_whose_episodes_end_at_different_times_go_on(tmp_path: Path) -> None:
    settings = SMALL | {"task": MOODY, "env.time-limit": None, "num-envs": 2, "env-steps": 120}
    settings |= {"agent": "sac", "loop.prefill": 40, "loop.eval-every": 120, "loop.checkpoint-every": 50}
    settings |= {"loop.eval-episodes": 1}
    assert train(config(tmp_path / "whole", settings), quiet=True) is not None
    with stop_at_step(33):
        assert train(config(tmp_path / "parts", settings), quiet=True) is None
    assert train(config(tmp_path / "parts", settings), quiet=True) is not None
    assert differing(newest_state(tmp_path / "whole"), newest_state(tmp_path / "parts")) == []


def test_sigterm_says_how_to_go_on_and_another_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    with stop_at_step(30):
        assert main(flags(path, SMALL, agent="sac")) == 130
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "stopped at 240 env_steps and saved; the same command goes on from here"
    assert newest_state(path)["start"]["env_steps"] == 240
    before = contents(path)
    assert main(flags(path, SMALL, agent="sac", sac__tau=0.01)) == 1
    assert "sac.tau: 0.005 → 0.01" in capsys.readouterr().err
    assert contents(path) == before
    with BaselineRun(config(path, SMALL, agent="sac"), quiet=True):
        assert main(flags(path, SMALL, agent="sac")) == 1
    assert "being trained by another process" in capsys.readouterr().err


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"task": "gym/tests.envs_helpers:Discrete-v0"}, UnsupportedActionSpace, "discrete actions are not"),
        ({"env__obs": "both"}, ConfigError, "--agent sac learns from --env.obs pixels or state, not from both"),
        ({"env__obs": "pixels", "env__size": 32}, ConfigError, "--env.size 32 is too small for the convolutions"),
        ({"init_from": "runs/a"}, ConfigError, "--init-from gives a world model, which the sac agent does not have"),
        ({"sac__batch": 0}, ConfigError, "--sac.batch is 0, but must be at least 2"),
        ({"sac__units": (16, 0)}, ConfigError, "--sac.units[1] is 0, but must be at least 1"),
        ({"sac__discount": 1.5}, ConfigError, "--sac.discount is 1.5, but must lie in 0 to 1"),
        ({"sac__learning_rate": "nan"}, ConfigError, "--sac.learning-rate is nan, but must be finite"),
        ({"agent": "tqc", "tqc__dropped": 25}, ConfigError, "--tqc.dropped 25 leaves none of --tqc.quantiles 25"),
        ({"agent": "ppo", "ppo__clip": -1.0}, ConfigError, "--ppo.clip is -1.0, but must be at least 0"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    changes: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        train(config(tmp_path / "run", SMALL, **{"agent": "sac", **changes}), quiet=True)
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_unknown_agent_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--agent", "sacc"])
    assert caught.value.code == 2
    assert "sac" in capsys.readouterr().err


@pytest.mark.parametrize("agent", BASELINES)
def test_defaults_can_be_run(agent: str) -> None:
    for preset in ("cpu", "cuda"):
        check(parse_args(["--preset", preset, "--agent", agent]))


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As after config.json was edited by hand."""
    with stop_at_step(30):
        train(config(tmp_path, SMALL, agent="sac"), quiet=True)
    file = tmp_path / "config.json"
    about = json.loads(file.read_text())
    about["sac"]["units"] = [8, 8]
    file.write_text(json.dumps(about))
    assert evaluate_main(["--run-dir", str(tmp_path)]) == 1
    assert "is of another agent, task or size" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    settings = SMALL | {"agent": "sac", "sac.learning-rate": 1e30}
    with pytest.raises(NonFiniteLoss, match=r"loss of the baseline is|no longer finite"):
        train(config(tmp_path, settings), quiet=True)
    weights = newest_state(tmp_path)["agent"]["parameters"]["policy"].values() if saved(tmp_path) else []
    assert all(torch.isfinite(value).all() for value in weights)


def saved(path: Path) -> bool:
    return any((path / "checkpoints").glob("*-step-*"))

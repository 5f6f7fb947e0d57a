"""Tasks as Gymnasium environments: what every one of them obeys, seeds, time limits, action repeat, bad input."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from dm_control import suite
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

import envs
from envs import EnvConfig, EnvironmentFault, UnknownTask, UnsupportedActionSpace, UnsupportedSetting, make_env
from tests.envs_helpers import PREFIX

pytestmark = pytest.mark.usefixtures("compiled_once")

SUITE = [f"{domain}-{task}" for domain, task in suite.ALL_TASKS]
STATE = EnvConfig(obs="state")
CARTPOLE = "dmc/cartpole-swingup"


def rollout(env: gym.Env, steps: int, seed: int | None = None, options: dict | None = None) -> list[tuple[Any, ...]]:
    """(obs, reward, terminated, truncated) of a reset and of random steps, over as many episodes as it takes."""
    rng = np.random.default_rng(1)
    rows: list[tuple[Any, ...]] = [(env.reset(seed=seed, options=options)[0], 0.0, False, False)]
    for _ in range(steps):
        if rows[-1][2] or rows[-1][3]:
            rows.append((env.reset()[0], 0.0, False, False))
        else:
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            rows.append(env.step(action)[:4])
    return rows


def assert_same(first: list[tuple[Any, ...]], second: list[tuple[Any, ...]]) -> None:
    """Bit for bit."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:] == other[1:]


# --- what every task obeys ------------------------------------------------------------------------------------------


def assert_passes_both_checkers(env: gym.Env, obs: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the environment is wrapped, and that velocities have no bounds
        # Closing twice is tried below, on this environment and not on one more that is made for it.
        check_env(env, skip_render_check=obs == "state", skip_close_check=True)  # the picture is the same one
        check_env_sb3(env)
    env.close()
    env.close()


@pytest.mark.parametrize("obs", ["pixels", "state"])
@pytest.mark.parametrize("name", SUITE)
def test_every_suite_task_passes_both_checkers(name: str, obs: str) -> None:
    env = gym.make(f"dmc/{name}-v0", obs=obs, disable_env_checker=True)
    assert_passes_both_checkers(env, obs)
    low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
    assert env.action_space.dtype == np.float32
    assert (low == -1).all()
    assert (high == 1).all()


@pytest.mark.parametrize("name", SUITE)
def test_an_episode_is_a_function_of_its_seed_and_index_alone(name: str) -> None:
    config = EnvConfig(obs="both", time_limit=6, action_repeat=2)
    used, fresh = make_env(f"dmc/{name}", config, seed=3), make_env(f"dmc/{name}", config, seed=77)
    rollout(used, 3)
    straight = rollout(used, 3)  # episode 1 of seed 3, after episode 0
    jumped = rollout(fresh, 3, seed=3, options={"episode": 1})
    for one, other in zip(straight, jumped, strict=True):
        assert one[1:] == other[1:]
        for part in ("pixels", "state"):
            np.testing.assert_array_equal(one[0][part], other[0][part])
    used.close()
    fresh.close()


@pytest.mark.parametrize("name", ["cartpole-swingup", "finger-turn_hard", "fish-swim", "quadruped-escape"])
def test_an_episode_is_the_same_whether_its_state_is_looked_at(name: str) -> None:
    """A task that is seen alone does not work its state out."""
    config = EnvConfig(obs="both", time_limit=6, action_repeat=2)
    known = make_env(f"dmc/{name}", config, seed=3)
    seen = make_env(f"dmc/{name}", replace(config, obs="pixels"), seed=3)
    for one, other in zip(rollout(known, 4), rollout(seen, 4), strict=True):
        assert one[1:] == other[1:]
        np.testing.assert_array_equal(one[0]["pixels"], other[0])
    unseen = seen.unwrapped.step(np.zeros(seen.action_space.shape))[0]  # type: ignore[arg-type]
    assert known.unwrapped.step(np.zeros(seen.action_space.shape))[0].any()  # type: ignore[arg-type]
    assert not unseen.any()
    known.close()
    seen.close()


@pytest.mark.parametrize("task", [task for task in envs.tasks() if task.startswith("mujoco/")])
def test_every_mujoco_task_passes_the_checker_in_pixels_and_state(task: str) -> None:
    for obs in ("pixels", "state"):
        assert_passes_both_checkers(gym.make(task, obs=obs, disable_env_checker=True), obs)


def test_tasks_lists_the_whole_suite_and_the_mujoco_tasks() -> None:
    assert {f"dmc/{name}" for name in SUITE} <= set(envs.tasks())
    assert {"mujoco/HalfCheetah-v5", "mujoco/Hopper-v5", "mujoco/Humanoid-v5"} <= set(envs.tasks())


# --- spaces and actions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [CARTPOLE, "mujoco/Hopper-v5", PREFIX + "Counting-v0"])
def test_observation_spaces(task: str) -> None:
    both = make_env(task, EnvConfig(obs="both", size=32))
    obs, info = both.reset()
    assert obs in both.observation_space
    assert obs["pixels"].shape == (3, 32, 32)
    assert obs["pixels"].dtype == np.uint8
    assert obs["pixels"].flags.c_contiguous
    assert obs["state"].dtype == np.float32
    assert info["env_steps"] == 0
    for name in ("pixels", "state"):
        alone = make_env(task, EnvConfig(obs=name, size=32))  # type: ignore[arg-type]
        assert alone.observation_space == both.observation_space[name]  # type: ignore[index]
        np.testing.assert_array_equal(alone.reset()[0], obs[name])
        alone.close()
    both.close()


def test_state_is_the_observation_dict_in_its_own_order_and_rewards_are_dm_controls() -> None:
    seed = envs.episode_seed(5, 0)
    raw = suite.load("walker", "walk", task_kwargs={"random": np.random.RandomState(seed)})
    env = make_env("dmc/walker-walk", EnvConfig(obs="state", action_repeat=1), seed=5)
    rng = np.random.default_rng(0)
    row, (obs, _) = raw.reset(), env.reset()
    for _ in range(20):
        expected = np.concatenate([np.ravel(part) for part in row.observation.values()]).astype(np.float32)
        np.testing.assert_array_equal(obs, expected)
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        row = raw.step(action)
        obs, reward, *_ = env.step(action)
        assert reward == row.reward
    env.close()


def test_actions_are_scaled_to_the_tasks_own_range() -> None:
    env = make_env(PREFIX + "Counting-v0", STATE)  # its own range is [-2, 2] and its reward is the action
    env.reset()
    assert [env.step(np.array([action], np.float32))[1] for action in (-1.0, 0.5, 1.0)] == [-2.0, 1.0, 2.0]


def test_picture_of_any_other_task_is_resized() -> None:
    env = make_env(PREFIX + "Counting-v0", EnvConfig(size=16))
    env.reset()
    pixels = env.step(np.zeros(1, np.float32))[0]
    np.testing.assert_array_equal(pixels, np.full((3, 16, 16), 10, np.uint8))


# --- action repeat, time limits, termination ------------------------------------------------------------------------


def test_action_repeat_sums_rewards_and_stops_at_the_episodes_end() -> None:
    env = make_env(PREFIX + "Counting-v0", EnvConfig(obs="state", action_repeat=3))
    env.reset()
    action = np.array([0.5], np.float32)
    obs, reward, terminated, truncated, info = env.step(action)
    assert (obs[0], reward, terminated or truncated, info["env_steps"]) == (3.0, 3.0, False, 3)
    obs, reward, terminated, truncated, info = env.step(action)
    assert (obs[0], reward, terminated or truncated, info["env_steps"]) == (5.0, 2.0, True, 2)


def test_default_action_repeat() -> None:
    expected = {"dmc/cartpole-swingup": 8, "dmc/ball_in_cup-catch": 4, "dmc/walker-run": 2, "dmc/dog-run": 2}
    expected |= {"mujoco/Hopper-v5": 1, PREFIX + "Counting-v0": 1}
    assert {task: envs.default_action_repeat(task) for task in expected} == expected
    assert envs.action_repeat_of(CARTPOLE, EnvConfig(action_repeat=3)) == 3


@pytest.mark.parametrize("task", [CARTPOLE, "mujoco/HalfCheetah-v5"])
@pytest.mark.parametrize(("limit", "steps"), [(10, 3), (1200, 300)])
def test_time_limit_counts_simulator_steps_and_truncates(task: str, limit: int, steps: int) -> None:
    env = make_env(task, EnvConfig(obs="state", action_repeat=4, time_limit=limit))
    env.reset()
    rows = [env.step(np.zeros(env.action_space.shape, np.float32)) for _ in range(steps)]
    assert all(not (row[2] or row[3]) for row in rows[:-1])
    assert rows[-1][2:4] == (False, True)
    assert sum(row[4]["env_steps"] for row in rows) == limit


def test_own_time_limit_truncates() -> None:
    env = make_env(CARTPOLE, EnvConfig(obs="state", action_repeat=300))
    env.reset()
    rows = [env.step(np.zeros(1, np.float32)) for _ in range(4)]
    assert [row[2:4] for row in rows] == [(False, False)] * 3 + [(False, True)]
    assert rows[-1][4]["env_steps"] == 100
    assert rows[-1][4]["episode"]["l"] == 1000


def test_discount_zero_terminates() -> None:
    env = make_env("dmc/lqr-lqr_2_1", STATE)
    env.reset()
    task, physics = env.unwrapped._env.task, env.unwrapped._env.physics  # type: ignore[attr-defined]
    assert task.get_termination(physics) is None
    physics.data.qpos[:] = physics.data.qvel[:] = 0.0  # at rest at the origin, where the task ends
    physics.forward()
    _, _, terminated, truncated, info = env.step(np.zeros(env.action_space.shape, np.float32))
    assert (terminated, truncated, info["env_steps"]) == (True, False, 1)


def test_a_falling_hopper_terminates() -> None:
    rows = rollout(make_env("mujoco/Hopper-v5", STATE), 200)
    assert any(row[2] for row in rows)
    assert not any(row[3] for row in rows)


# --- seeds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [CARTPOLE, "mujoco/Hopper-v5", PREFIX + "Counting-v0"])
def test_same_seed_same_trajectory(task: str) -> None:
    config = EnvConfig(obs="pixels", time_limit=20)
    first, second, other = (
        make_env(task, config, seed=1),
        make_env(task, config, seed=1),
        make_env(task, config, seed=2),
    )
    rows = rollout(first, 60)
    assert_same(rows, rollout(second, 60))
    assert_same(rows, rollout(first, 60, seed=1))  # reset(seed=) starts the sequence again
    if not task.startswith("gym/"):
        assert not np.array_equal(rollout(other, 1)[1][0], rows[1][0])


def test_episodes_differ() -> None:
    env = make_env(CARTPOLE, STATE)
    assert not np.array_equal(env.reset()[0], env.reset()[0])


def test_registered_name_takes_the_configs_fields() -> None:
    env = gym.make("dmc/walker-walk-v0", obs="state", action_repeat=5, seed=4)
    env.reset()
    assert env.step(env.action_space.sample())[4]["env_steps"] == 5
    env.close()
    with pytest.raises(TypeError, match=r"'sise'.*size"):
        gym.make("dmc/walker-walk-v0", sise=64)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "closest"),
    [("dmc/walker-wlak", "dmc/walker-walk"), ("mujoco/Hoper-v5", "mujoco/Hopper-v5"), ("cartpole-swingup", CARTPOLE)],
)
def test_unknown_task_names_the_closest(task: str, closest: str) -> None:
    with pytest.raises(UnknownTask, match=closest) as error:
        make_env(task)
    assert "dmc/<domain>-<task>" in str(error.value)


@pytest.mark.parametrize(
    "task", ["gym/Nothing-v0", "gym/no.such.module:Id-v0", "gym/", "", "dmc/", "mujoco/CartPole-v1"]
)
def test_unknown_task(task: str) -> None:
    with pytest.raises(UnknownTask):
        envs.resolve_task(task)


@pytest.mark.parametrize(("task", "why"), [("Discrete-v0", "discrete"), ("Unbounded-v0", "unbounded")])
def test_unsupported_actions(task: str, why: str) -> None:
    with pytest.raises(UnsupportedActionSpace, match=why):
        make_env(PREFIX + task, STATE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 7},
        {"size": 1025},
        {"action_repeat": 0},
        {"time_limit": 0},
        {"camera": -2},
        {"obs": "sound"},
        {"render": "pretty"},
    ],
)
def test_impossible_config(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        EnvConfig(**wrong)


@pytest.mark.parametrize("task", [CARTPOLE, "mujoco/Hopper-v5", PREFIX + "Counting-v0"])
def test_camera_that_does_not_exist(task: str) -> None:
    with pytest.raises(UnsupportedSetting, match="camera"):
        make_env(task, EnvConfig(camera=9))


@pytest.mark.parametrize(("task", "what"), [("BadReward-v0", "reward is inf"), ("BadObs-v0", "observation has NaN")])
def test_not_finite_is_a_fault_that_says_where(task: str, what: str) -> None:
    env = make_env(PREFIX + task, STATE, seed=6)
    env.reset()
    for _ in range(2):
        env.step(np.zeros(1, np.float32))
    with pytest.raises(EnvironmentFault, match=what) as error:
        env.step(np.zeros(1, np.float32))
    for part in (PREFIX + task, "step 3", "episode 0", str(envs.episode_seed(6, 0))):
        assert part in str(error.value)


@pytest.mark.parametrize("task", ["dmc/walker-walk", "mujoco/HalfCheetah-v5"])
def test_diverged_physics_is_a_fault(task: str) -> None:
    env = make_env(task, STATE)
    env.reset()
    inner = env.unwrapped
    data = inner._env.physics.data if task.startswith("dmc") else inner.data  # type: ignore[attr-defined]
    data.qvel[0] = np.nan
    with pytest.raises(EnvironmentFault, match="diverged"):
        env.step(np.zeros(6, np.float32))
    env.reset()  # the next episode is sound
    assert np.isfinite(env.step(np.zeros(6, np.float32))[0]).all()

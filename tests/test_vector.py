"""The vector environment: its rows' timeline, its workers' deaths and ends, and being put back anywhere."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import envs
from envs import EnvConfig, UnsupportedActionSpace, VectorEnv, WorkerFailure, make_env, make_vector_env
from tests.envs_helpers import LENGTH, PREFIX

COUNTING = PREFIX + "Counting-v0"
STATE = EnvConfig(obs="state")
both_ways = pytest.mark.parametrize("processes", [False, True])


def actions(number: int, num_envs: int, size: int = 1) -> list[np.ndarray]:
    """The same random actions each time."""
    rng = np.random.default_rng(0)
    return [rng.uniform(-1, 1, (num_envs, size)).astype(np.float32) for _ in range(number)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def pids(vector: VectorEnv) -> list[int]:
    """The workers' process ids."""
    return [slot.pid for slot in vector._slots]


def same(first: Any, second: Any) -> bool:
    """Bit for bit, also for dicts of arrays."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return np.array_equal(first, second)


# --- rows -----------------------------------------------------------------------------------------------------------


@both_ways
def test_rows_follow_the_timeline(processes: bool) -> None:
    """Observation: the step's number. Reward: twice the previous action. An ended episode's next row is a first row."""
    vector = VectorEnv(COUNTING, STATE, 2, seed=0, processes=processes)
    assert vector.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    obs, infos = vector.reset()
    assert obs.tolist() == [[0.0], [0.0]]
    assert infos["env_steps"].tolist() == [0, 0]
    endings: set[tuple[bool, bool]] = set()
    for step, action in enumerate(actions(4 * (LENGTH + 1), 2), start=1):
        obs, reward, terminated, truncated, infos = vector.step(action)
        count = step % (LENGTH + 1)
        assert obs.tolist() == [[count], [count]]
        np.testing.assert_array_equal(reward, 2 * action[:, 0] if count else [0.0, 0.0])
        np.testing.assert_array_equal(terminated | truncated, [count == LENGTH] * 2)
        assert not (terminated & truncated).any()
        assert infos["env_steps"].tolist() == [int(count > 0)] * 2
        endings |= {(bool(one), bool(other)) for one, other in zip(terminated, truncated, strict=True)}
    assert endings == {(False, False), (True, False), (False, True)}
    assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float64, np.bool_, np.bool_)
    vector.close()


def test_processes_and_one_process_give_the_same_rows() -> None:
    config = EnvConfig(obs="both", size=16, time_limit=40)
    apart = VectorEnv("dmc/cartpole-swingup", config, 2, seed=3, processes=True)
    here = VectorEnv("dmc/cartpole-swingup", config, 2, seed=3, processes=False)
    assert apart.observation_space == here.observation_space
    assert apart.metadata == here.metadata
    assert apart.action_space.shape == (2, 1)
    assert same(apart.reset()[0], here.reset()[0])
    for action in actions(14, 2):
        first, second = apart.step(action), here.step(action)
        assert first[0] in apart.observation_space
        assert same(first[0], second[0])
        assert all(np.array_equal(one, other) for one, other in zip(first[1:4], second[1:4], strict=True))
        assert same(first[4], second[4])
    apart.close()
    here.close()


@both_ways
def test_some_environments_are_reset_and_the_others_go_on(processes: bool) -> None:
    config = EnvConfig(obs="state", time_limit=40)
    vector = VectorEnv("dmc/cartpole-swingup", config, 2, seed=3, processes=processes)
    undisturbed = VectorEnv("dmc/cartpole-swingup", config, 2, seed=3, processes=False)
    with pytest.raises(gym.error.ResetNeeded):
        vector.reset(options={"reset_mask": np.array([True, False])})
    vector.reset()
    undisturbed.reset()
    first, second, third = actions(3, 2)
    before = vector.step(first)[0]
    undisturbed.step(first)
    obs, infos = vector.reset(options={"reset_mask": np.array([True, False])})
    assert infos["env_steps"].tolist() == [0, 0]
    assert [env["episode"] for env in vector.get_state()["envs"]] == [1, 0]
    assert same(obs[1], before[1])
    assert same(vector.step(second)[0][1], undisturbed.step(second)[0][1])
    assert same(obs[0], undisturbed.reset()[0][0])
    undisturbed.step(second)
    assert same(vector.step(third)[0][0], undisturbed.step(third)[0][0])
    vector.close()
    undisturbed.close()


def test_environments_play_different_episodes_that_make_env_can_play_too() -> None:
    vector = make_vector_env("dmc/cartpole-swingup", STATE, 2, seed=3)
    obs, _ = vector.reset()
    assert not np.array_equal(obs[0], obs[1])
    seeds = [one["seed"] for one in vector.get_state()["envs"]]
    for row, seed in zip(obs, seeds, strict=True):
        np.testing.assert_array_equal(row, make_env("dmc/cartpole-swingup", STATE, seed=seed).reset()[0])
    again, _ = vector.reset(seed=3)
    np.testing.assert_array_equal(obs, again)
    by_list, _ = vector.reset(seed=seeds)
    np.testing.assert_array_equal(obs, by_list)
    vector.close()


def test_returned_observations_are_the_callers_own() -> None:
    vector = make_vector_env(COUNTING, STATE, 2)
    first, _ = vector.reset()
    assert isinstance(first, np.ndarray)
    first[:] = 99
    second, *_ = vector.step(actions(1, 2)[0])
    vector.step(actions(1, 2)[0])
    assert second.tolist() == [[1.0], [1.0]]
    vector.close()


def test_step_in_two_halves() -> None:
    vector = make_vector_env(COUNTING, STATE, 2)
    vector.reset()
    vector.step_async(actions(1, 2)[0])
    with pytest.raises(gym.error.AlreadyPendingCallError):
        vector.get_state()
    assert vector.step_wait()[0].tolist() == [[1.0], [1.0]]  # type: ignore[union-attr]
    with pytest.raises(gym.error.NoAsyncCallError):
        vector.step_wait()
    vector.close()


# --- being put back -------------------------------------------------------------------------------------------------


# An episode is 10 agent steps: after 10 its last row is held, after 11 the next one's first.
@pytest.mark.parametrize(
    ("processes", "steps"), [(False, 0), (False, 7), (False, 10), (False, 11), (False, 25), (True, 7), (True, 10)]
)
def test_state_puts_every_environment_back_bit_for_bit(processes: bool, steps: int) -> None:
    config = EnvConfig(obs="both", size=32, action_repeat=2, time_limit=20)
    first = VectorEnv("dmc/walker-walk", config, 2, seed=3, processes=processes)
    held, _ = first.reset()
    plan = actions(steps + 15, 2, 6)
    for action in plan[:steps]:
        held, *_ = first.step(action)
    state = json.loads(json.dumps(first.get_state()))
    second = VectorEnv("dmc/walker-walk", config, 2, seed=77, processes=processes)
    assert same(second.set_state(state), held)
    for action in plan[steps:]:
        one, other = first.step(action), second.step(action)
        assert same(one[0], other[0])
        assert all(np.array_equal(a, b) for a, b in zip(one[1:4], other[1:4], strict=True))
        assert same(one[4], other[4])
    first.close()
    second.close()


def test_state_of_another_vector_is_refused() -> None:
    first, second = make_vector_env(COUNTING, STATE, 1), VectorEnv(COUNTING, STATE, 2, processes=False)
    first.reset()
    with pytest.raises(ValueError, match="1 environments"):
        second.set_state(first.get_state())
    with pytest.raises(gym.error.ResetNeeded):
        second.get_state()


# --- deaths ---------------------------------------------------------------------------------------------------------


def test_killed_worker_is_restarted_and_its_episode_closed_as_truncated(caplog: pytest.LogCaptureFixture) -> None:
    vector = make_vector_env(COUNTING, STATE, 2, seed=1)
    vector.reset()
    plan = actions(8, 2)
    vector.step(plan[0])
    os.kill(pids(vector)[0], signal.SIGKILL)
    with caplog.at_level(logging.WARNING, logger="envs.vector"):
        obs, reward, terminated, truncated, infos = vector.step(plan[1])
    assert "environment 0" in caplog.text
    assert obs.tolist() == [[1.0], [2.0]]  # the dead one's last known
    assert reward.tolist() == [0.0, 2 * float(plan[1][1, 0])]
    assert (terminated.tolist(), truncated.tolist()) == ([False, False], [True, False])
    assert infos["env_steps"].tolist() == [0, 1]
    assert infos["_fault"].tolist() == [True, False]
    assert "-9" in infos["fault"][0]
    assert [one["ended"] for one in vector.get_state()["envs"]] == [True, False]
    obs, reward, terminated, truncated, infos = vector.step(plan[2])  # the next episode's first row
    assert obs.tolist() == [[0.0], [3.0]]
    assert not truncated.any()
    assert "fault" not in infos
    assert vector.step(plan[3])[0].tolist() == [[1.0], [4.0]]  # type: ignore[union-attr]
    assert [one["episode"] for one in vector.get_state()["envs"]] == [1, 0]
    vector.close()


def test_worker_killed_between_episodes_loses_nothing() -> None:
    vector = make_vector_env(COUNTING, STATE, 2)
    vector.reset()
    for action in actions(LENGTH, 2):
        *_, truncated, _ = vector.step(action)
    os.kill(pids(vector)[1], signal.SIGKILL)
    obs, _, terminated, truncated, _ = vector.step(actions(1, 2)[0])
    assert obs.tolist() == [[0.0], [0.0]]
    assert not (terminated | truncated).any()
    vector.close()


def test_a_signal_to_all_processes_of_a_job_leaves_the_workers_to_the_program() -> None:
    """As schedulers send SIGTERM: the program still steps its environments until it has saved."""
    vector = make_vector_env(COUNTING, STATE, 2)
    vector.reset()
    running = pids(vector)
    for pid in running:
        os.kill(pid, signal.SIGTERM)
    for count, action in enumerate(actions(3, 2), start=1):
        obs, _, _, _, infos = vector.step(action)
        assert obs.tolist() == [[count], [count]]
        assert "fault" not in infos
    assert pids(vector) == running
    vector.close()
    assert not any(alive(pid) for pid in running)


@both_ways
@pytest.mark.parametrize("task", ["BadReward-v0", "BadObs-v0"])
def test_fault_closes_the_episode_with_a_finite_row(processes: bool, task: str) -> None:
    vector = VectorEnv(PREFIX + task, STATE, 1, processes=processes)
    vector.reset()
    rows = [vector.step(action) for action in actions(4, 1)]
    assert [row[0].tolist() for row in rows] == [[[1.0]], [[2.0]], [[2.0]], [[0.0]]]
    assert [row[3].tolist() for row in rows] == [[False], [False], [True], [False]]
    assert rows[2][1].tolist() == [0.0]
    assert "step 3" in rows[2][4]["fault"][0]
    vector.close()


@both_ways
def test_dying_again_and_again_is_an_error(processes: bool) -> None:
    vector = VectorEnv(PREFIX + "BadReward-v0", STATE, 1, processes=processes)
    vector.reset()
    for action in actions(14, 1):  # it dies at steps 3, 7, 11 and then at 15
        vector.step(action)
    with pytest.raises(WorkerFailure, match="died 4 times within 100 steps") as error:
        vector.step(actions(1, 1)[0])
    assert "reward is inf" in str(error.value)
    assert vector.closed


def test_any_error_in_a_worker_is_its_death_with_the_reason() -> None:
    vector = make_vector_env(PREFIX + "Crash-v0", STATE, 2)
    vector.reset()
    rows = [vector.step(action) for action in actions(3, 2)]
    assert rows[-1][3].tolist() == [True, True]
    assert "ArithmeticError: step three is out of order" in rows[-1][4]["fault"][0]
    vector.close()


# --- the workers' end -----------------------------------------------------------------------------------------------

PROGRAM = """
import signal
import torch
import envs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
config = envs.EnvConfig(size=16)
envs.make_env("dmc/cartpole-swingup", config).reset()  # OpenGL is loaded here when the workers start
vector = envs.make_vector_env("dmc/cartpole-swingup", config, 2)
vector.reset()
print(*[slot.pid for slot in vector._slots], flush=True)
while True:
    vector.step(vector.action_space.sample())
"""


def test_workers_exit_on_close() -> None:
    vector = make_vector_env(COUNTING, STATE, 2)
    running = pids(vector)
    assert all(alive(pid) for pid in running)
    vector.close()
    vector.close()
    assert not any(alive(pid) for pid in running)
    with pytest.raises(gym.error.ClosedEnvironmentError):
        vector.step(actions(1, 2)[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_exit_with_the_program_and_say_nothing(number: signal.Signals) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    running = [int(pid) for pid in program.stdout.readline().split()]
    assert len(running) == 2
    if number == signal.SIGINT:
        for pid in running:
            os.kill(pid, number)  # ignored by workers, whoever sends it
    program.send_signal(number)
    _, errors = program.communicate(timeout=60)
    assert wait_until(lambda: not any(alive(pid) for pid in running))
    assert errors.count("Traceback") == (number == signal.SIGINT)  # the program's own
    assert errors.strip().endswith("KeyboardInterrupt") == (number == signal.SIGINT)


def test_workers_do_not_import_the_program() -> None:
    vector = make_vector_env(COUNTING, STATE, 2)
    for pid in pids(vector):
        with open(f"/proc/{pid}/maps") as file:
            assert "libtorch" not in file.read()
    vector.close()


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, -1])
def test_no_environments(number: int) -> None:
    with pytest.raises(ValueError, match="num_envs must be at least 1"):
        make_vector_env(COUNTING, STATE, number)


def test_errors_of_make_env_come_through_the_workers() -> None:
    with pytest.raises(UnsupportedActionSpace, match="discrete"):
        make_vector_env(PREFIX + "Discrete-v0", STATE, 2)
    with pytest.raises(ValueError, match="camera 9 does not exist"):
        make_vector_env("dmc/cartpole-swingup", EnvConfig(camera=9), 2)
    with pytest.raises(envs.UnknownTask, match="dmc/cartpole-swingup"):
        make_vector_env("dmc/cartpole-swing", num_envs=2)


def test_wrong_actions_or_no_reset() -> None:
    vector = VectorEnv(COUNTING, STATE, 2, processes=False)
    with pytest.raises(gym.error.ResetNeeded):
        vector.step(actions(1, 2)[0])
    vector.reset()
    with pytest.raises(ValueError, match=r"\(2, 3\), not \(2, 1\)"):
        vector.step(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="3 seeds"):
        vector.reset(seed=[1, 2, 3])

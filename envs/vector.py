"""Several copies of a task stepped together, each in its own process, that outlive their workers.

The rows obey NEXT_STEP autoreset: after a row that ends an episode, the next call to ``step`` ignores that
environment's action and returns the first row of its next episode, with reward 0 and no flag set. The final
observation is an ordinary row.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Int64, Shaped, UInt8

from envs.factory import DEFAULT, EnvConfig, action_repeat_of, resolve_task
from envs.worker import LocalSlot, ObservationBuffer, ProcessSlot, Restore, Row, Slot, Step, WorkerDied, shared_file
from envs.wrappers import episode_seed

_LOG = logging.getLogger(__name__)

MAX_DEATHS = 3
DEATH_WINDOW = 100
"""More than ``MAX_DEATHS`` deaths of one worker within this many vector steps are no accident."""

Observations = Shaped[np.ndarray, "E ..."] | dict[str, Shaped[np.ndarray, "E ..."]]


class WorkerFailure(RuntimeError):
    """One environment of a vector dies again and again. The message says why it died last."""


class _Stream:
    """Where one environment stands: enough to put a fresh one in the same place."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.episode = -1
        self.actions: list[np.ndarray] = []
        self.ended = False
        self.deaths: deque[int] = deque()

    def go_to(self, seed: int, episode: int, actions: Sequence[np.ndarray] = ()) -> Restore:
        self.seed, self.episode, self.actions, self.ended = seed, episode, list(actions), False
        return Restore(seed, episode, tuple(actions))


class VectorEnv(gym.vector.VectorEnv):
    """E copies of a task. Environment i plays the episodes of a seed derived from (seed, first + i).

    A worker that dies, or whose simulation gives NaN or inf, is restarted: its episode is closed by a row with
    truncated set, the last known observation and reward 0, ``infos["fault"][i]`` says why, a warning is logged.

    Args:
        task: see ``make_env``.
        num_envs: E, at least 1.
        seed: fixes every episode of every environment.
        processes: one process per environment; None: where there is more than one environment.
        first: the number of the first environment among all that several of these step between them.

    Raises:
        ValueError: no environments, or what ``make_env`` raises.
    """

    def __init__(
        self,
        task: str,
        config: EnvConfig = DEFAULT,
        num_envs: int = 1,
        seed: int = 0,
        processes: bool | None = None,
        first: int = 0,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, not {num_envs}")
        resolve_task(task)
        self.num_envs, self._task, self._first = num_envs, task, first
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}
        self._slots: list[Any] = []
        self._file: int | None = None
        self._pending: list[Restore | Step] | None = None
        self._clock = 0
        try:
            self._open(task, config, num_envs > 1 if processes is None else processes)
        except BaseException:
            self.close()
            raise
        self._obs = {name: part.copy() for name, part in self._buffer.parts.items()}
        self._streams = [_Stream(each) for each in self._seeds(seed)]

    def _seeds(self, seed: int) -> list[int]:
        return [episode_seed(seed, self._first + index) for index in range(self.num_envs)]

    def _open(self, task: str, config: EnvConfig, processes: bool) -> None:
        if processes:
            self._file = shared_file()
            self._slots += [ProcessSlot(task, config, i, self.num_envs, self._file) for i in range(self.num_envs)]
            for slot in self._slots:
                slot.connect()
        else:
            for index in range(self.num_envs):
                self._slots.append(LocalSlot(task, config, index))
        first: Slot = self._slots[0]
        self.metadata["render_fps"] = first.render_fps / action_repeat_of(task, config)
        self.single_observation_space, self.single_action_space = first.observation_space, first.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._buffer = ObservationBuffer(self.single_observation_space, self.num_envs, self._file)
        for slot in self._slots:
            slot.attach(self._buffer)

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Starts the next episode of every environment; with a seed, episode 0 of the seeds derived from it (an int)
        or of these (E ints). As in Gymnasium, ``options["reset_mask"]`` (E,) bool resets these environments alone, to
        their next episodes."""
        self._assert_idle()
        if options is not None and "reset_mask" in options:
            return self._reset_some(np.flatnonzero(options["reset_mask"]))
        if isinstance(seed, (int, np.integer)):
            seeds: list[int] | None = self._seeds(int(seed))
        else:
            seeds = None if seed is None else [int(each) for each in seed]
        if seeds is not None and len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds were given for {self.num_envs} environments")
        if seeds is None:
            commands = [stream.go_to(stream.seed, stream.episode + 1) for stream in self._streams]
        else:
            commands = [stream.go_to(each, 0) for stream, each in zip(self._streams, seeds, strict=True)]
        obs, _, _, _, infos = self._finish(commands)
        return obs, infos

    def _reset_some(self, which: Int64[np.ndarray, " N"]) -> tuple[Observations, dict[str, Any]]:
        if self._streams[0].episode < 0:
            raise gym.error.ResetNeeded("reset every environment before resetting some")
        commands = {i: self._streams[i].go_to(self._streams[i].seed, self._streams[i].episode + 1) for i in which}
        for i, command in commands.items():
            self._slots[i].send(command)
        for i, command in commands.items():
            self._row(i, command)
        return self._copy_obs(), {"env_steps": np.zeros(self.num_envs, np.int64)}

    def step(
        self, actions: Float[np.ndarray, "E A"]
    ) -> tuple[
        Observations,
        Float[np.ndarray, " E"],
        Bool[np.ndarray, " E"],
        Bool[np.ndarray, " E"],
        dict[str, Any],
    ]:
        """One agent step of every environment: (observations, reward, terminated, truncated, infos).

        ``infos["env_steps"]`` (E,) int is how many simulator steps each took, 0 on the first row of an episode.

        Raises:
            WorkerFailure: an environment dies again and again.
        """
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: Float[np.ndarray, "E A"]) -> None:
        """Starts a step; with processes, the caller goes on while they work."""
        self._assert_idle()
        if self._streams[0].episode < 0:
            raise gym.error.ResetNeeded("call reset before step")
        actions = np.array(actions, np.float32)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions have shape {actions.shape}, not {self.action_space.shape}")
        self._pending = [
            stream.go_to(stream.seed, stream.episode + 1) if stream.ended else Step(action)
            for stream, action in zip(self._streams, actions, strict=True)
        ]
        self._clock += 1
        for slot, command in zip(self._slots, self._pending, strict=True):
            slot.send(command)

    def step_wait(
        self,
    ) -> tuple[
        Observations,
        Float[np.ndarray, " E"],
        Bool[np.ndarray, " E"],
        Bool[np.ndarray, " E"],
        dict[str, Any],
    ]:
        """Ends the step that ``step_async`` started; returns what ``step`` does."""
        if self._pending is None:
            raise gym.error.NoAsyncCallError("call step_async before step_wait", "step")
        commands, self._pending = self._pending, None
        return self._collect(commands)

    def picture(self, index: int) -> UInt8[np.ndarray, "size size 3"]:
        """What environment ``index``, which has to be in this process, looks like now, whatever it observes.

        Raises:
            NoOpenGL: there is nothing to draw with.
            UnsupportedSetting: it makes none.
            ValueError: it is in a process of its own.
        """
        slot = self._slots[index]
        if not isinstance(slot, LocalSlot):
            raise ValueError(f"environment {index} is in a process of its own and cannot be drawn from here")
        return slot.picture()

    def get_state(self) -> dict[str, Any]:
        """Where every environment stands, as JSON: seed, episode, this episode's actions so far, whether it ended."""
        self._assert_idle()
        if self._streams[0].episode < 0:
            raise gym.error.ResetNeeded("there is no state before reset")
        return {
            "task": self._task,
            "envs": [
                {
                    "seed": stream.seed,
                    "episode": stream.episode,
                    "actions": [action.tolist() for action in stream.actions],
                    "ended": stream.ended,
                }
                for stream in self._streams
            ],
        }

    def set_state(self, state: dict[str, Any]) -> Observations:
        """Puts every environment back where ``get_state`` found it, bit for bit, by repeating its episode's actions.

        Returns:
            The observations that the loop held then.

        Raises:
            ValueError: the state is of another task or another number of environments.
        """
        self._assert_idle()
        saved = state["envs"]
        if state["task"] != self._task or len(saved) != self.num_envs:
            raise ValueError(
                f"the state is of {len(saved)} environments of {state['task']}, not of {self.num_envs} of {self._task}"
            )
        commands = [
            stream.go_to(one["seed"], one["episode"], [np.array(action, np.float32) for action in one["actions"]])
            for stream, one in zip(self._streams, saved, strict=True)
        ]
        obs, *_ = self._finish(commands)
        for stream, one in zip(self._streams, saved, strict=True):
            stream.ended = one["ended"]
        return obs

    def _finish(self, commands: Sequence[Restore | Step]) -> tuple[Any, ...]:
        for slot, command in zip(self._slots, commands, strict=True):
            slot.send(command)
        return self._collect(commands)

    def _collect(self, commands: Sequence[Restore | Step]) -> tuple[Any, ...]:
        rows: list[Row] = []
        faults = np.full(self.num_envs, None, object)
        for index, command in enumerate(commands):
            row, faults[index] = self._row(index, command)
            rows.append(row)
            self._streams[index].ended = row.terminated or row.truncated
        infos: dict[str, Any] = {"env_steps": np.array([row.env_steps for row in rows], np.int64)}
        if any(faults):
            infos["fault"], infos["_fault"] = faults, np.array([fault is not None for fault in faults])
        return (
            self._copy_obs(),
            np.array([row.reward for row in rows], np.float64),
            np.array([row.terminated for row in rows], np.bool_),
            np.array([row.truncated for row in rows], np.bool_),
            infos,
        )

    def _row(self, index: int, command: Restore | Step) -> tuple[Row, str | None]:
        """One environment's row, and why it died if it did. Retries a reset; closes the episode of a step."""
        stream, slot = self._streams[index], self._slots[index]
        while True:
            try:
                row = slot.receive()
            except WorkerDied as death:
                self._bury(index, str(death))
                if isinstance(command, Step):
                    return Row(0.0, False, True, 0), str(death)
                if not command.actions:  # perhaps this episode cannot start: go to the next
                    command = stream.go_to(stream.seed, stream.episode + 1)
                slot.send(command)
                continue
            for name, part in self._buffer.parts.items():
                self._obs[name][index] = part[index]
            if isinstance(command, Step):
                stream.actions.append(command.action)
            return row, None

    def _bury(self, index: int, reason: str) -> None:
        """Restarts a dead worker, or gives up on it."""
        deaths = self._streams[index].deaths
        deaths.append(self._clock)
        while deaths[0] <= self._clock - DEATH_WINDOW:
            deaths.popleft()
        if len(deaths) > MAX_DEATHS:
            self.close()
            raise WorkerFailure(
                f"environment {index} of {self._task} died {len(deaths)} times within {DEATH_WINDOW} steps; "
                f"the last time: {reason}"
            )
        _LOG.warning("environment %d of %s died and is restarted: %s", index, self._task, reason)
        self._slots[index].restart()

    def _copy_obs(self) -> Observations:
        return self._obs[""].copy() if "" in self._obs else {name: part.copy() for name, part in self._obs.items()}

    def _assert_idle(self) -> None:
        if self.closed:
            raise gym.error.ClosedEnvironmentError("the vector environment is closed")
        if self._pending is not None:
            raise gym.error.AlreadyPendingCallError("step_wait must be called first", "step")

    def close_extras(self, **kwargs: Any) -> None:
        """Ends every worker; ``close`` calls it once."""
        for slot in self._slots:
            slot.close()
        if self._file is not None:
            os.close(self._file)
            self._file = None


def make_vector_env(task: str, config: EnvConfig = DEFAULT, num_envs: int = 1, seed: int = 0) -> VectorEnv:
    """``num_envs`` copies of a task: in this process when it is one, else in a process each. See ``VectorEnv``."""
    return VectorEnv(task, config, num_envs, seed)

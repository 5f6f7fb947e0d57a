"""One environment behind a small protocol, in this process or in its own: commands go in, rows come out.

Observations do not travel with the rows; they are written into a buffer that both sides map. A worker is a plain
``python -c`` process and not a ``multiprocessing`` one, so it imports this package and nothing of the program that
started it (no torch, no ``__main__``), and any program may start workers at any time, whatever it has loaded.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import create_empty_array
from jaxtyping import UInt8

from envs.factory import EnvConfig, make_env
from envs.wrappers import EnvironmentFault, UnsupportedSetting

_ALIGN = 64
_CLOSE_SECONDS = 5.0


class Restore(NamedTuple):
    """Go to this episode of this seed and repeat these actions."""

    seed: int
    episode: int
    actions: Sequence[np.ndarray]


class Step(NamedTuple):
    """Take one agent step."""

    action: np.ndarray


class Row(NamedTuple):
    """What came back, beside the observation in the buffer."""

    reward: float
    terminated: bool
    truncated: bool
    env_steps: int


class WorkerDied(RuntimeError):
    """This environment is gone, with the reason; its slot can restart it."""


class ObservationBuffer:
    """The newest observation of each environment, (E, …) per part, in memory that processes may share.

    Args:
        space: a Box, or a Dict of Boxes, of one environment.
        file: descriptor of a file to map, which is made long enough; None for memory of this process only.
    """

    def __init__(self, space: gym.Space, num_envs: int, file: int | None = None) -> None:
        boxes = space.spaces if isinstance(space, gym.spaces.Dict) else {"": space}
        empty = {name: create_empty_array(box, num_envs) for name, box in boxes.items()}
        offsets, end = {}, 0
        for name, part in empty.items():
            offsets[name] = end
            end += -(-part.nbytes // _ALIGN) * _ALIGN
        if file is not None:
            os.ftruncate(file, end)
        memory = mmap.mmap(-1 if file is None else file, end)
        self.parts: dict[str, np.ndarray] = {
            name: np.frombuffer(memory, part.dtype, part.size, offsets[name]).reshape(part.shape)
            for name, part in empty.items()
        }

    def write(self, index: int, obs: Any) -> None:
        """Puts one environment's observation in its place."""
        for name, part in self.parts.items():
            part[index] = obs[name] if name else obs


class Slot(Protocol):
    """One environment's place in a vector: it can die and be started again."""

    observation_space: gym.Space
    action_space: gym.Space
    render_fps: float
    """Simulator steps a second of real time."""

    def attach(self, buffer: ObservationBuffer) -> None:
        """Says where observations go. Once, before the first command."""

    def send(self, command: Restore | Step) -> None:
        """Starts a command. Never raises for a dead worker; ``receive`` does."""

    def receive(self) -> Row:
        """Waits for the command to end. Raises WorkerDied."""

    def restart(self) -> None:
        """Replaces the environment by a fresh one, at no episode yet."""

    def close(self) -> None:
        """Ends it. May be called twice."""


def _handle(env: gym.Env, command: Restore | Step, buffer: ObservationBuffer, index: int) -> Row:
    actions: Sequence[np.ndarray]
    if isinstance(command, Restore):
        obs, _ = env.reset(seed=command.seed, options={"episode": command.episode})
        row, actions = Row(0.0, False, False, 0), command.actions
    else:
        actions = (command.action,)
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        row = Row(float(reward), terminated, truncated, info["env_steps"])
    buffer.write(index, obs)
    return row


class LocalSlot:
    """An environment in this process. A fault of the simulation counts as its death; other errors pass through."""

    def __init__(self, task: str, config: EnvConfig, index: int) -> None:
        self._task, self._config, self._index = task, config, index
        self._env = make_env(task, config)
        self.observation_space, self.action_space = self._env.observation_space, self._env.action_space
        self.render_fps = render_fps(self._env)
        """Simulator steps in a second of simulated time."""
        self._command: Restore | Step | None = None

    def attach(self, buffer: ObservationBuffer) -> None:
        """See Slot."""
        self._buffer = buffer

    def send(self, command: Restore | Step) -> None:
        """See Slot."""
        self._command = command

    def receive(self) -> Row:
        """See Slot."""
        assert self._command is not None
        try:
            return _handle(self._env, self._command, self._buffer, self._index)
        except EnvironmentFault as fault:
            raise WorkerDied(str(fault)) from fault

    def picture(self) -> UInt8[np.ndarray, "size size 3"]:
        """The environment as it stands.

        Raises:
            UnsupportedSetting: it makes none.
        """
        if self._env.render_mode != "rgb_array":
            raise UnsupportedSetting(f"{self._task} makes no pictures: it has no rgb_array rendering")
        frame = self._env.render()
        assert isinstance(frame, np.ndarray)
        return frame

    def restart(self) -> None:
        """See Slot."""
        self._env.close()
        self._env = make_env(self._task, self._config)

    def close(self) -> None:
        """See Slot."""
        self._env.close()


class _Setup(NamedTuple):
    task: str
    config: EnvConfig
    place: int
    num_envs: int


class _Built(NamedTuple):
    observation_space: gym.Space
    action_space: gym.Space
    render_fps: float


class _Failure(NamedTuple):
    error: Exception


class ProcessSlot:
    """An environment in its own process, which ends when this one closes the slot or dies in any way.

    The constructor does not wait, so that several start at once; ``connect`` does.

    Args:
        file: descriptor of the buffer's file.
    """

    observation_space: gym.Space
    action_space: gym.Space
    render_fps: float

    def __init__(self, task: str, config: EnvConfig, index: int, num_envs: int, file: int) -> None:
        self._setup, self._file = _Setup(task, config, index, num_envs), file
        self._connected = False
        self._start()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        run = f"from envs.worker import main; main({theirs.fileno()}, {self._file})"
        # A session of its own: Ctrl-C at the terminal is for the program, which closes its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {run}"],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), self._file),
            start_new_session=True,
            # One thread each, Mesa's drawing too: side by side the workers fill the cores.
            env={"OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "0", **os.environ},
        )
        theirs.close()
        self._pipe = Connection(ours.detach())
        self._connected = False
        self._put(self._setup)

    def _put(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it died; the next read says so
            self._pipe.send(message)

    def _get(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(f"process {self.pid} ended with status {self._process.wait()}") from error
        return answer

    def connect(self) -> None:
        """Waits until the environment is built.

        Raises:
            Exception: whatever ``make_env`` raised.
            WorkerDied: the process ended without a word.
        """
        answer = self._get()
        if isinstance(answer, _Failure):
            raise answer.error
        self.observation_space, self.action_space, self.render_fps = answer
        self._connected = True

    def attach(self, buffer: ObservationBuffer) -> None:
        """Nothing to do: the worker maps the same file."""

    def send(self, command: Restore | Step) -> None:
        """See Slot. A worker still starting takes it when it is ready."""
        self._put(command)

    def receive(self) -> Row:
        """See Slot."""
        if not self._connected:
            try:
                self.connect()
            except Exception as error:
                raise WorkerDied(f"it could not be started again: {error}") from error
        answer = self._get()
        if isinstance(answer, _Failure):
            raise WorkerDied(f"{type(answer.error).__name__}: {answer.error}") from answer.error
        return answer

    def restart(self) -> None:
        """See Slot. Does not wait."""
        self._end(0.0)
        self._start()

    def close(self) -> None:
        """See Slot."""
        self._end(_CLOSE_SECONDS)

    def _end(self, patience: float) -> None:
        self._pipe.close()  # the worker reads the end of file and leaves
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def render_fps(env: gym.Env) -> float:
    """Simulator steps a second of real time; 30 where the environment does not say."""
    return float(env.metadata.get("render_fps", 30))


def shared_file() -> int:
    """Descriptor of a file with no name, in memory where the system can; it goes when its last user does."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("observations")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def main(pipe_fd: int, file: int) -> None:
    """The worker's process: builds the environment, says what it is, obeys until the pipe ends."""
    # Whoever stops a job signals all of its processes; the program still needs this one until it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe = Connection(pipe_fd)
    env: gym.Env | None = None
    try:
        setup = pipe.recv()
        env = make_env(setup.task, setup.config)
        buffer = ObservationBuffer(env.observation_space, setup.num_envs, file)
        pipe.send(_Built(env.observation_space, env.action_space, render_fps(env)))
        while True:
            pipe.send(_handle(env, pipe.recv(), buffer, setup.place))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the program closed the slot, or died
    except Exception as error:
        _report(pipe, error)
    finally:
        if env is not None:
            env.close()


def _report(pipe: Connection, error: Exception) -> None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    with contextlib.suppress(OSError):  # nobody is left to tell
        pipe.send(_Failure(error))

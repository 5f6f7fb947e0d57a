"""A run's folder while one process holds it: what every training shares, whoever learns."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gymnasium as gym
import torch

from agents.interface import Agent
from envs import action_repeat_of
from envs.vector import VectorEnv
from runners.checkpoint import Checkpoints
from runners.checks import check, check_parts
from runners.config import Config, ConfigError, advice, differences, read_config, resolve_device, to_json
from runners.cores import cores, others_at_work
from runners.disk import lock_file, replace_file
from runners.logger import Logger, Silence
from runners.replay import Replay
from worldmodels import ranks

EVALUATION_SEED = 1_000_003
"""Added to a run's seed for its evaluation environments, so that training never sees their episodes."""

LOCK = "run.lock"
"""In the run's folder: held by the process that trains it."""
FLUSH_EVERY = 500
"""Rows between flushes of the replay: what kill -9 loses at most."""
HEAP = 512 << 20
"""Bytes of a process's heap that lie in large pages."""


class Session:
    """A run's folder while a process holds it: its records, its checkpoints, its evaluations, and what is due.

    What learns is the subclass's: :class:`Run` the agents here, ``runners.baselines`` Stable-Baselines3's. It sets
    ``agent``, ``env_steps`` and ``last`` (env_steps at which each periodic thing was last due), and saves them.

    Raises:
        ConfigError: impossible settings; a folder that is not a run, or holds a run with another configuration.
        CheckpointError, ReplayError: what the folder holds is damaged beyond its fallbacks.
    """

    agent: Agent
    logger: Logger | Silence

    def __init__(self, config: Config, *, quiet: bool = False) -> None:
        self.device = resolve_device(config.device)
        if config.replay_device == "cuda" and self.device.type != "cuda":
            raise ConfigError("--replay-device cuda needs --device cuda; use --replay-device auto or host")
        check(config)
        check_parts(config, ranks.size())
        self.config = config
        self.path = Path(config.run_dir)
        configure_torch(config.threads)
        self.last: dict[str, int] = {}
        self.last_return: float | None = None
        self.last_evaluation: float | None = None
        with ExitStack() as opened:
            self._open(opened, resumed=ranks.done_by_first(lambda: holds_run(self.path, config)), quiet=quiet)
            self._opened = opened.pop_all()

    def _open(self, opened: ExitStack, *, resumed: bool, quiet: bool) -> None:
        """Build or bring back everything; whatever has been opened is on ``opened``."""
        raise NotImplementedError

    def _open_envs(self, opened: ExitStack) -> None:
        """The environments to learn in, of which each rank has its part, and others to evaluate in."""
        config, own = self.config, ranks.part(self.config.num_envs)
        self.first_env = ranks.rank() * own
        self.envs = VectorEnv(config.task, config.env, own, config.seed, first=self.first_env)
        opened.callback(self.envs.close)
        if ranks.is_first():
            episodes, seed = min(config.loop.eval_episodes, 5), config.seed + EVALUATION_SEED
            self.eval_envs = VectorEnv(config.task, config.env, episodes, seed, processes=config.num_envs > 1)
            opened.callback(self.eval_envs.close)
        self.checkpoints = Checkpoints(self.path / "checkpoints")

    def _open_logger(self, opened: ExitStack, saved: tuple[Any, dict[str, Any], Path] | None, *, quiet: bool) -> None:
        """The records, up to the checkpoint that the run goes on from."""
        if not ranks.is_first():
            self.logger = Silence()
            return
        self.logger = Logger(
            self.path,
            resume_env_steps=None if saved is None else self.env_steps,
            total_env_steps=self.config.env_steps,
            resume_wall_s=0.0 if saved is None else saved[1]["wall_s"],
            quiet=quiet,
        )
        opened.callback(self.logger.close)
        if saved is None and self.config.threads == 0 and self.device.type == "cpu" and (busy := others_at_work()):
            self.logger.message(busy)
        if saved is None and (better := advice(self.config)):
            self.logger.message(better)
        if saved is not None:
            self.logger.message(f"resuming {self.path} at {self.env_steps:,} env_steps")

    def _open_replay(self, capacity: int, *, fresh: bool) -> Replay:
        path = self.path / (f"replay-{ranks.rank()}" if ranks.rank() else "replay")
        space, config = self.envs.single_observation_space, self.config
        if not fresh:
            return Replay.open(path, "r+")
        assert isinstance(space, gym.spaces.Box)
        # Going back to the last checkpoint must not reach into rows that were overwritten since.
        between = min(config.loop.checkpoint_every, config.loop.eval_every) // action_repeat_of(config.task, config.env)
        return Replay.create(
            path,
            capacity=ranks.part(capacity),
            num_envs=self.envs.num_envs,
            obs_shape=space.shape,
            obs_dtype=space.dtype,
            action_dim=self.envs.single_action_space.shape[0],
            spare=between + FLUSH_EVERY,
            flush_every=FLUSH_EVERY,
            replace=True,
        )

    @property
    def env_steps(self) -> int:
        """Simulator steps so far, over all environments."""
        raise NotImplementedError

    @property
    def frame_rate(self) -> float:
        """Agent steps in a second of simulated time, for videos at real speed."""
        return float(self.envs.metadata["render_fps"])

    def due(self, name: str, every: int) -> bool:
        """Whether the counter has entered a new interval of ``every`` env_steps since ``name`` was last due."""
        now = self.env_steps // every
        if now == self.last.get(name, 0):
            return False
        self.last[name] = now
        return True

    def wait(self) -> None:
        """Take in what the environments still have to answer."""

    def draw(self) -> None:
        """Pictures of what was learned, beside an evaluation."""

    def save(self, score: float | None = None) -> None:
        """Write a checkpoint of everything. ``score`` is the evaluation's mean return, if this state was evaluated."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()


def lock_run(path: Path) -> int:
    """Hold the folder until the descriptor is closed or the process ends, however it ends.

    Raises:
        ConfigError: another process holds it.
    """
    descriptor = lock_file(path / LOCK)
    if descriptor is None:
        raise ConfigError(f"{path} is being trained by another process; wait for it, or choose another --run-dir")
    return descriptor


def refuse_changes(found: str, changed: Sequence[str]) -> None:
    """To go on with what was ``found``, if any setting has changed.

    Raises:
        ConfigError: names what has, and what to do.
    """
    if changed:
        lines = "\n  ".join(changed)
        raise ConfigError(
            f"{found}:\n  {lines}\nRepeat its own command to go on with it, or choose another --run-dir. "
            "Where only a default is another one in this version, add the old value as a flag."
        )


def holds_run(path: Path, config: Config) -> bool:
    """Whether the folder already holds this very run, to be resumed. Changes nothing."""
    if (path / "config.json").exists():
        refuse_changes(f"{path} holds a run with another configuration", differences(read_config(path), config))
        return True
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not a run (it has no config.json); choose another --run-dir")
    return False


def claim_run(path: Path, config: Config) -> None:
    """Make the folder this run's."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{path} cannot be a run's folder: {error}; choose another --run-dir") from error
    replace_file(path / "config.json", to_json(config).encode())


def torch_random(device: torch.device) -> dict[str, Any]:
    """PyTorch's random states, for a checkpoint."""
    cuda = torch.cuda.get_rng_state() if device.type == "cuda" else None
    return {"torch_random": torch.get_rng_state(), "cuda_random": cuda}


def set_torch_random(state: dict[str, Any], device: torch.device) -> None:
    """The inverse, from a checkpoint's dict with other things in it. One that was written without a GPU has no state
    for one."""
    torch.set_rng_state(state["torch_random"])
    if device.type == "cuda" and state.get("cuda_random") is not None:
        torch.cuda.set_rng_state(state["cuda_random"])


def configure_torch(threads: int) -> None:
    """Threads and memory of this process."""
    torch.set_num_threads(threads or max(1, ranks.part(cores())))
    if sys.platform == "linux":
        _keep_memory()


@cache
def _keep_memory() -> None:
    """Has glibc keep what is freed, and lays its heap out in pages of 2 MB where the kernel has them.

    glibc gives every block above 128 kB back to the system when it is freed, and a training step frees hundreds:
    keeping them made the input normaliser ten times faster on two cores. Large pages made an update 4 % faster.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 1 << 30)
        libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
        here = ctypes.c_ssize_t(0)
        begin = libc.sbrk(here)
        # The heap grows by as much as this, of addresses: memory is taken where something is written.
        libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(HEAP))))
        begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        size = libc.sbrk(here) - begin
        if size > 0:
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    except (OSError, AttributeError):
        pass  # another libc, with other habits

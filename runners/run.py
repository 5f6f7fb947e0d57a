"""A run: its folder, the objects that its configuration describes, and how they are saved and brought back."""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from agents.dreamer import DreamerAgent
from agents.interface import Agent
from agents.random import RandomAgent
from envs import action_repeat_of
from envs.vector import VectorEnv
from runners.checkpoint import CheckpointError, Checkpoints
from runners.config import (
    Config,
    ConfigError,
    build_agent,
    check,
    check_parts,
    differences,
    read_config,
    resolve_device,
    to_json,
)
from runners.disk import replace_file
from runners.logger import Logger, Silence
from runners.replay import Replay
from runners.rollout import Collector
from runners.transfer import take_world_model
from runners.viewer import Viewer
from worldmodels import ranks
from worldmodels.lewm import LeWorldModel

EVALUATION_SEED = 1_000_003
"""Added to a run's seed for its evaluation environments, so that training never sees their episodes."""

FLUSH_EVERY = 500
"""Rows between flushes of the replay: what kill -9 loses at most."""
PREFILL_SEED = 2_000_003
"""Added to a run's seed for the prefill's actions, so that the random agent does not repeat them."""
RANK_SEED = 3_000_017
"""Added to a run's seed once for each rank before this one, for what every rank draws by itself."""


class Run:
    """Everything of one training run. Entering it creates or resumes the folder; leaving it closes what is open.

    Of several ranks (:mod:`worldmodels.ranks`) each has one, with its part of the environments, of the replay and of
    each batch; the configuration and all counters are the whole run's. The first rank's keeps the folder.

    Attributes that :meth:`save` keeps: the agent, the collector with its environments, ``updates``, ``credit`` (the
    part of an update that collected rows have paid for), ``learning`` (the prefill is over), ``last`` (env_steps at
    which each periodic thing was last due), the viewer and the random states.

    Raises:
        ConfigError: impossible settings; a folder that is not a run, or holds a run with another configuration.
        CheckpointError, ReplayError: what the folder holds is damaged beyond its fallbacks.
    """

    def __init__(self, config: Config, *, quiet: bool = False) -> None:
        self.device = resolve_device(config.device)
        if config.replay_device == "cuda" and self.device.type != "cuda":
            raise ConfigError("--replay-device cuda needs --device cuda; use --replay-device auto or host")
        check(config)
        check_parts(config, ranks.size())
        self.config = config
        self.path = Path(config.run_dir)
        configure_torch(config.threads)
        self.updates = 0
        self.credit = 0.0
        self.learning = False
        self.last: dict[str, int] = {}
        self.last_return: float | None = None
        self.last_evaluation: float | None = None
        with ExitStack() as opened:
            self._open(opened, resumed=ranks.done_by_first(lambda: holds_run(self.path, config)), quiet=quiet)
            self._opened = opened.pop_all()

    def _open(self, opened: ExitStack, *, resumed: bool, quiet: bool) -> None:
        """Build or bring back everything; whatever has been opened is on ``opened``."""
        config = self.config
        torch.manual_seed(config.seed)
        own_seed = config.seed + RANK_SEED * ranks.rank()
        self.generator = np.random.default_rng(own_seed)
        own_envs = ranks.part(config.num_envs)
        first = ranks.rank() * own_envs
        self.envs = VectorEnv(config.task, config.env, own_envs, config.seed, first=first)
        opened.callback(self.envs.close)
        if ranks.is_first():
            episodes, seed = min(config.loop.eval_episodes, 5), config.seed + EVALUATION_SEED
            self.eval_envs = VectorEnv(config.task, config.env, episodes, seed, processes=own_envs > 1)
            opened.callback(self.eval_envs.close)
        self.agent = build_agent(config, self.envs.single_observation_space, self.envs.single_action_space, self.device)
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        if config.init_from is not None and not any(self.checkpoints.folder.glob("*")):
            self._take_world_model(Path(config.init_from))
        if not ranks.is_first():
            torch.manual_seed(own_seed)  # only now: all have drawn the same first weights
        # No rank may touch its replay before the first one has the folder.
        ranks.done_by_first(lambda: self._take_folder(opened, claim=not resumed))
        self.viewer = self._build_viewer()
        action_dim, seed = self.envs.single_action_space.shape[0], config.seed + PREFILL_SEED
        self.prefiller = RandomAgent(action_dim, seed, first=first, total=config.num_envs)
        saved = self.checkpoints.latest() if resumed else None
        if saved is not None:
            self._refuse_other_size(saved[0])
        self.replay = self._open_replay(fresh=saved is None)
        opened.callback(self.replay.close)
        self.replay.place(self.device, mirror={"auto": None, "host": False, "cuda": True}[config.replay_device])
        self.collector = Collector(self.envs, self.replay, action_dim)
        if saved is not None:
            self._load(saved[0])
        self.logger = self._open_logger(opened, None if saved is None else saved[1]["wall_s"], quiet=quiet)
        if saved is not None:
            self.logger.message(f"resuming {self.path} at {self.collector.env_steps:,} env_steps")

    def _take_folder(self, opened: ExitStack, *, claim: bool) -> None:
        if claim:
            claim_run(self.path, self.config)
        opened.callback(os.close, lock_run(self.path))

    def _open_logger(self, opened: ExitStack, wall_s: float | None, *, quiet: bool) -> Logger | Silence:
        """``wall_s``: what the resumed run had taken; None for a new one."""
        if not ranks.is_first():
            return Silence()
        logger = Logger(
            self.path,
            resume_env_steps=None if wall_s is None else self.collector.env_steps,
            total_env_steps=self.config.env_steps,
            resume_wall_s=wall_s or 0.0,
            quiet=quiet,
        )
        opened.callback(logger.close)
        return logger

    @property
    def world_model(self) -> LeWorldModel | None:
        """The agent's model, if it has one that can be looked into."""
        model = self.agent.model if isinstance(self.agent, DreamerAgent) else None
        return model if isinstance(model, LeWorldModel) else None

    def _take_world_model(self, source: Path) -> None:
        model = self.world_model
        if model is None:
            raise ConfigError(f"--init-from gives a world model, which the {self.config.agent} agent does not have")
        take_world_model(model, self.config, source)

    @property
    def progress(self) -> float:
        """The part of the budget that is used."""
        return self.collector.env_steps / self.config.env_steps

    @property
    def frame_rate(self) -> float:
        """Agent steps in a second of simulated time, for videos at real speed."""
        return float(self.eval_envs.metadata["render_fps"])

    def due(self, name: str, every: int) -> bool:
        """Whether the counter has entered a new interval of ``every`` env_steps since ``name`` was last due."""
        now = self.collector.env_steps // every
        if now == self.last.get(name, 0):
            return False
        self.last[name] = now
        return True

    def save(self, score: float | None = None) -> None:
        """Write a checkpoint of everything. ``score`` is the evaluation's mean return, if this state was evaluated."""
        self.replay.flush()
        first, *others = ranks.of_each(self._own_state())
        if not ranks.is_first():
            return
        state = {
            "agent": self.agent.state_dict(),
            **first,
            "others": others,
            "viewer": None if self.viewer is None else self.viewer.state_dict(),
            "updates": self.updates,
            "credit": self.credit,
            "learning": self.learning,
            "last": dict(self.last),
        }
        meta = {"env_steps": self.collector.env_steps, "wall_s": self.logger.wall_s, "task": self.config.task}
        self.checkpoints.save(self.collector.env_steps, state, meta, score)

    def _own_state(self) -> dict[str, Any]:
        """What differs between ranks."""
        return {
            "collector": self.collector.state_dict(),
            "replay": self.replay.position(),
            "prefiller": self.prefiller.state_dict(),
            "torch_random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
            "generator": self.generator.bit_generator.state,
        }

    def _refuse_other_size(self, state: dict[str, Any]) -> None:
        """Raises ConfigError where the checkpoint is of another number of ranks: their replays are not to be mixed."""
        saved = 1 + len(state.get("others", ()))  # checkpoints of before there were ranks have none
        if saved != ranks.size():
            command = "python" if saved == 1 else f"torchrun --nproc-per-node {saved}"
            raise ConfigError(
                f"{self.path} is learned by {saved} process{'es' * (saved > 1)} side by side, not by {ranks.size()}; "
                f"go on with {command} -m runners.train, or choose another --run-dir"
            )

    def _load(self, state: dict[str, Any]) -> None:
        load_agent(self.agent, state["agent"], self.path)
        own = state if ranks.is_first() else state["others"][ranks.rank() - 1]
        self.replay.truncate_to(own["replay"])
        try:
            self.collector.load_state_dict(own["collector"], self.agent)
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint in {self.path} is of another agent, task or size: {error}"
            ) from error
        self.updates, self.credit, self.learning = state["updates"], state["credit"], state["learning"]
        self.last = dict(state["last"])
        self.prefiller.load_state_dict(own["prefiller"])
        if self.viewer is not None:
            self.viewer.load_state_dict(state["viewer"])
        self.generator.bit_generator.state = own["generator"]
        torch.set_rng_state(own["torch_random"])
        if own["cuda_random"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_random"])

    def _build_viewer(self) -> Viewer | None:
        shape = self.envs.single_observation_space.shape
        if (
            not ranks.is_first()
            or self.config.loop.view_steps == 0
            or self.world_model is None
            or shape is None
            or len(shape) != 3
        ):
            return None
        return Viewer(self.config.model.latent_dim, shape, self.device, seed=self.config.seed)

    def _open_replay(self, *, fresh: bool) -> Replay:
        path = self.path / (f"replay-{ranks.rank()}" if ranks.rank() else "replay")
        space, config = self.envs.single_observation_space, self.config
        if not fresh:
            return Replay.open(path, "r+")
        assert isinstance(space, gym.spaces.Box)
        # Going back to the last checkpoint must not reach into rows that were overwritten since.
        between = min(config.loop.checkpoint_every, config.loop.eval_every) // action_repeat_of(config.task, config.env)
        return Replay.create(
            path,
            capacity=ranks.part(config.loop.capacity),
            num_envs=self.envs.num_envs,
            obs_shape=space.shape,
            obs_dtype=space.dtype,
            action_dim=self.envs.single_action_space.shape[0],
            spare=between + FLUSH_EVERY,
            flush_every=FLUSH_EVERY,
            replace=True,
        )

    def __enter__(self) -> Run:
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
    descriptor = os.open(path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"{path} is being trained by another process; wait for it, or choose another --run-dir"
        ) from None
    return descriptor


def find_checkpoint(path: Path, config: Config, *, best: bool = False) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """State, description and place of the newest checkpoint, or of the best, of the run in the folder ``path``.

    Raises:
        CheckpointError: there is none that can be used, or it is of another task.
    """
    checkpoints = Checkpoints(path / "checkpoints")
    found = checkpoints.best() if best else checkpoints.latest()
    if found is None:
        raise CheckpointError(f"{path} has no checkpoint yet; let runners.train reach its first one")
    _, meta, where = found
    if meta["task"] != config.task:
        raise CheckpointError(
            f"{where} is of another agent, task or size: of {meta['task']}, but {path} is a run on {config.task}"
        )
    return found


def load_agent(agent: Agent, state: dict[str, Any], path: Path) -> None:
    """Give ``agent`` the weights of a checkpoint.

    Raises:
        CheckpointError: they are of another kind or size of agent; says which parts do not fit.
    """
    try:
        agent.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint in {path} is of another agent, task or size: {error}") from error


def configure_torch(threads: int) -> None:
    """Threads and memory of this process.

    glibc gives every block above 128 kB back to the system when it is freed, and a training step frees hundreds:
    keeping them made the input normaliser ten times faster on two cores.
    """
    torch.set_num_threads(threads or max(1, ranks.part(os.cpu_count() or 1)))
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL(None)
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_mmap_threshold, 1 << 30)
            libc.mallopt(m_trim_threshold, 1 << 30)
        except (OSError, AttributeError):
            pass  # another libc, with other habits


def holds_run(path: Path, config: Config) -> bool:
    """Whether the folder already holds this very run, to be resumed. Changes nothing."""
    if (path / "config.json").exists():
        changed = differences(read_config(path), config)
        if changed:
            lines = "\n  ".join(changed)
            raise ConfigError(
                f"{path} holds a run with another configuration:\n  {lines}\n"
                f"Repeat its own command to go on with it, or choose another --run-dir."
            )
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

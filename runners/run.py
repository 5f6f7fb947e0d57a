"""A run: its folder, the objects that its configuration describes, and how they are saved and brought back."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.dreamer import DreamerAgent
from agents.interface import Agent
from agents.random import RandomAgent
from runners.checkpoint import CheckpointError, Checkpoints
from runners.config import Config, ConfigError, build_agent
from runners.rollout import Collector
from runners.session import Session, claim_run, lock_run, set_torch_random, torch_random
from runners.transfer import take_world_model
from runners.viewer import CONTEXT, Viewer
from worldmodels import ranks
from worldmodels.lewm import LeWorldModel

PREFILL_SEED = 2_000_003
"""Added to a run's seed for the prefill's actions, so that the random agent does not repeat them."""
RANK_SEED = 3_000_017
"""Added to a run's seed once for each rank before this one, for what every rank draws by itself."""


class Run(Session):
    """Everything of one training run. Entering it creates or resumes the folder; leaving it closes what is open.

    Of several ranks (:mod:`worldmodels.ranks`) each has one, with its part of the environments, of the replay and of
    each batch; the configuration and all counters are the whole run's. The first rank's keeps the folder.

    Attributes that :meth:`save` keeps: the agent, the collector with its environments, ``updates``, ``credit`` (the
    part of an update that collected rows have paid for), ``learning`` (the prefill is over), ``last``, the viewer and
    the random states.
    """

    def __init__(self, config: Config, *, quiet: bool = False) -> None:
        self.updates = 0
        self.credit = 0.0
        self.learning = False
        super().__init__(config, quiet=quiet)

    def _open(self, opened: ExitStack, *, resumed: bool, quiet: bool) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        own_seed = config.seed + RANK_SEED * ranks.rank()
        self.generator = np.random.default_rng(own_seed)
        self._open_envs(opened)
        self.agent = build_agent(config, self.envs.single_observation_space, self.envs.single_action_space, self.device)
        if config.init_from is not None and not any(self.checkpoints.folder.glob("*")):
            self._take_world_model(Path(config.init_from))
        if not ranks.is_first():
            torch.manual_seed(own_seed)  # only now: all have drawn the same first weights
        # No rank may touch its replay before the first one has the folder.
        ranks.done_by_first(lambda: self._take_folder(opened, claim=not resumed))
        self.viewer = self._build_viewer()
        action_dim, seed = self.envs.single_action_space.shape[0], config.seed + PREFILL_SEED
        self.prefiller = RandomAgent(action_dim, seed, first=self.first_env, total=config.num_envs)
        saved = self.checkpoints.latest() if resumed else None
        if saved is not None:
            self._refuse_other_size(saved[0])
        self.replay = self._open_replay(config.loop.capacity, fresh=saved is None)
        opened.callback(self.replay.close)
        self.replay.place(self.device, mirror={"auto": None, "host": False, "cuda": True}[config.replay_device])
        self.collector = Collector(self.envs, self.replay, action_dim, overlap=config.overlap)
        if saved is not None:
            self._load(saved[0])
        self._open_logger(opened, saved, quiet=quiet)

    @property
    def env_steps(self) -> int:
        return self.collector.env_steps

    def _take_folder(self, opened: ExitStack, *, claim: bool) -> None:
        if claim:
            claim_run(self.path, self.config)
        opened.callback(os.close, lock_run(self.path))

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

    def wait(self) -> None:
        self.collector.wait()

    def draw(self) -> None:
        """Real frames against what the model imagined."""
        loop, model = self.config.loop, self.world_model
        if self.viewer is None or model is None or self.replay.rows_per_stream <= CONTEXT:
            return
        self.viewer.fit(model, self.replay, loop.view_steps)
        generator = np.random.default_rng(self.env_steps)
        rows = self.replay.sample(loop.batch, min(20, self.replay.rows_per_stream), generator)
        strip = self.viewer.strip(model, rows)
        self.logger.image("model/real-imagined-difference", strip, env_steps=self.env_steps)

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
            **torch_random(self.device),
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
        set_torch_random(own, self.device)

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

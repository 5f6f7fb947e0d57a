"""What is diagnosed: what can be asked of a run, its world model from a checkpoint, and the episodes it is asked on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Int64

from agents.interface import Agent
from envs.edits import angles
from envs.physics import NoPhysics, physical_names
from runners.config import Config, ConfigError, build_agent
from runners.questions import NEEDS_PHYSICS, QUESTIONS, PartName
from runners.recordings import Followed, Recordings
from runners.report_page import Section
from runners.run import find_checkpoint, load_agent
from runners.viewer import Viewer
from worldmodels.lewm import LeWorldModel


class Plan(NamedTuple):
    """What can be asked. ``names`` and ``angles`` are of the physical state, if there is one."""

    names: list[str]
    angles: list[bool]
    parts: list[PartName]
    notes: list[str]


def plan(env: gym.Env, run: Config, wanted: Sequence[PartName]) -> Plan:
    """Every part that the task and the run allow, or those that are wanted.

    Raises:
        ConfigError: a part is wanted that they do not allow.
    """
    impossible: dict[PartName, str] = {}
    names: list[str] = []
    turning: list[bool] = []
    try:
        names, turning = physical_names(env), angles(env)
    except NoPhysics as error:
        impossible |= dict.fromkeys(NEEDS_PHYSICS, str(error))
    if run.model.reward_weight == 0:
        impossible.setdefault("effects", "the run learned no reward (--model.reward-weight is 0)")
    possible = [part for part in QUESTIONS if part not in impossible]
    for part in wanted:
        if part in impossible:
            raise ConfigError(
                f"--parts {part} cannot be asked on {run.task}: {impossible[part]}; ask for {', '.join(possible)}"
            )
    notes = [f"{QUESTIONS[part].title} ({part}) is left out: {why}." for part, why in impossible.items()]
    if wanted:
        return Plan(names, turning, [part for part in possible if part in wanted], [])
    return Plan(names, turning, possible, notes)


class Loaded(NamedTuple):
    """A run's checkpoint as objects."""

    run: Config
    agent: Agent
    model: LeWorldModel
    untrained: LeWorldModel
    viewer: Viewer | None
    env_steps: int
    checkpoint: Path


def load(
    path: Path, run: Config, env: gym.Env, device: torch.device, *, best: bool, random_actions: float, seed: int
) -> Loaded:
    """The agent and the viewer of the run in ``path`` with their weights, and its world model without.

    Args:
        best: take the checkpoint with the highest score, not the latest.
        random_actions: see ``DreamerConfig``.

    Raises:
        CheckpointError: no usable checkpoint, or one of another task or size.
    """
    state, meta, where = find_checkpoint(path, run, best=best)
    # Whatever planned on this model, its policy acts here: it has learned with the rest, and is quick.
    acting = dataclasses.replace(
        run, agent="dreamer", dreamer=dataclasses.replace(run.dreamer, random_actions=random_actions)
    )
    agents = [build_agent(acting, env.observation_space, env.action_space, device) for _ in range(2)]
    load_agent(agents[0], state["agent"], path)
    model, untrained = (agent.model for agent in agents)  # type: ignore[attr-defined]
    untrained.normaliser.load_state_dict(model.normaliser.state_dict())
    viewer = None
    shape = env.observation_space.shape
    if state.get("viewer") is not None and shape is not None:  # a pretrained model has none
        viewer = Viewer(run.model.latent_dim, shape, device, seed=seed)
        viewer.load_state_dict(state["viewer"])
        viewer = viewer if viewer.decoder.started else None
    return Loaded(run, agents[0], model, untrained, viewer, meta["env_steps"], where)


class Subject(NamedTuple):
    """A trained world model, and the episodes that it is asked about."""

    run: Config
    model: LeWorldModel
    untrained: LeWorldModel
    """The same architecture with random weights, and the trained one's input normaliser."""
    viewer: Viewer | None
    recordings: Recordings
    followed: Followed
    names: list[str]
    """Of the numbers of the physical state; none where there is no such state."""
    angles: list[bool]
    make_env: Callable[[Literal["as trained", "state"]], gym.Env]
    """An environment as the episodes were played in, or one that observes the state and so draws no pictures."""
    seed: int

    @property
    def scale(self) -> float:
        """The latents' variance in the held-out episodes, a mean over dimensions."""
        held_out = self.recordings.rows(before=0, after=0, among=self.recordings.split.held_out)
        return max(float(self.followed.z[held_out].var(0).mean()), 1e-8)

    def held_out_rows(self, what: str, before: int, after: int) -> Int64[np.ndarray, " S"]:
        """Held-out rows with so many rows before and after them in their episode.

        Raises:
            ConfigError: the episodes of one part of the split are too short for any.
        """
        parts = [self.recordings.rows(before=before, after=after, among=part) for part in self.recordings.split]
        if not all(map(len, parts)):
            raise ConfigError(
                f"{what} takes episodes of {before + after + 1} rows, and the longest one here has "
                f"{self.recordings.length.max()}; lower --horizon, or play more or longer --episodes"
            )
        return parts[2]


class Finding(NamedTuple):
    """An answer for people, and its numbers for programs."""

    section: Section
    figures: dict[str, Any]

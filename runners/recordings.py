"""Episodes played to look into a world model: their rows, their physical states, and what the model made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from agents.interface import Agent
from envs.physics import geom_places, physical_state, put_back
from runners.probes import quantities
from worldmodels.interface import Batch, State
from worldmodels.lewm import LeWorldModel

_SMALL = 16
"""Side of the pictures that stand for pixels without a model."""


class Split(NamedTuple):
    """Indices of whole episodes."""

    train: Int64[np.ndarray, " N"]
    validation: Int64[np.ndarray, " M"]
    held_out: Int64[np.ndarray, " L"]


class Recordings(NamedTuple):
    """N episodes, one after another: R rows in all, aligned as ``worldmodels.interface`` says."""

    obs: Shaped[np.ndarray, "R *obs"]
    action: Float[np.ndarray, "R A"]
    reward: Float[np.ndarray, " R"]
    physical: Float[np.ndarray, "R P"] | None
    """The simulator's state at each row, where it can be read."""
    drawn: dict[str, Float[np.ndarray, " R"]]
    """By name, what differs from episode to episode in the model, as a target's place, and is not in the state."""
    is_terminal: Shaped[np.ndarray, " R"]
    episode: Int64[np.ndarray, " R"]
    """Which episode of ``seed`` a row belongs to."""
    step: Int64[np.ndarray, " R"]
    """Agent steps since its episode's start."""
    length: Int64[np.ndarray, " N"]
    """Rows of each episode."""
    seed: int
    split: Split

    def rows(self, *, before: int, after: int, among: Int64[np.ndarray, " N"] | None = None) -> Int64[np.ndarray, " S"]:
        """The rows with so many rows before and after them in their episode, of the episodes ``among``."""
        ahead = self.length[self.episode] - 1 - self.step
        found = (self.step >= before) & (ahead >= after)
        if among is not None:
            found &= np.isin(self.episode, among)
        return np.flatnonzero(found)

    def quantities(self, names: list[str], angles: list[bool]) -> tuple[list[str], Float[np.ndarray, "R Q"]]:
        """What of the physics changed: the parts of the state, which are called ``names``, and what was drawn."""
        assert self.physical is not None
        values = np.column_stack([self.physical, *self.drawn.values()])
        return quantities([*names, *self.drawn], values, [*angles, *[False] * len(self.drawn)])

    def restore(self, env: gym.Env, row: int) -> None:
        """Put ``env``, made with the recorded task and settings, where the episode stood at ``row``."""
        assert self.physical is not None
        put_back(env, self.seed, int(self.episode[row]), self.physical[row])

    def batch(self, rows: Int64[np.ndarray, " N"], length: int) -> Batch:
        """The sequences that begin at ``rows``, each within one episode."""
        at = rows[:, None] + np.arange(length)
        flags = self.step == 0, self.step == self.length[self.episode] - 1, self.is_terminal
        fields = (self.obs, self.action, self.reward, *flags)
        return Batch(*(torch.from_numpy(np.asarray(field)[at]) for field in fields))


def split_episodes(episodes: int, *, seed: int) -> Split:
    """A quarter (at least one) judges, a quarter of the others (at least one) validates, the rest trains."""
    order = np.random.default_rng(seed).permutation(episodes)
    held_out = max(1, episodes // 4)
    validation = max(1, (episodes - held_out) // 4)
    return Split(
        np.sort(order[held_out + validation :]),
        np.sort(order[held_out : held_out + validation]),
        np.sort(order[:held_out]),
    )


def play(
    env: gym.Env,
    agent: Agent,
    episodes: int,
    longest: int,
    *,
    seed: int,
    physical: bool,
    after_episode: Callable[[], None] = lambda: None,
) -> Recordings:
    """Fresh episodes, explored, cut at ``longest`` agent steps.

    Args:
        env: one environment, as ``envs.make_env`` builds it.
        physical: whether to read the simulator's state at each row.
        after_episode: called as each one ends.
    """
    fields: dict[str, list[Any]] = {name: [] for name in ("obs", "action", "reward", "physical", "is_terminal")}
    length, no_action = [], np.zeros(env.action_space.shape or (), np.float32)
    places: list[dict[str, float]] = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed, options={"episode": episode})
        places.append(geom_places(env) if physical else {})
        carry, reward, terminated, over, step = agent.initial(1), 0.0, False, False, 0
        while True:
            last = over or step == longest
            action, carry = agent.act(np.asarray(obs)[None], np.array([step == 0]), carry, explore=True)
            row = {
                "obs": obs,
                "action": no_action if last else action[0],
                "reward": reward,
                "physical": physical_state(env) if physical else (),
                "is_terminal": terminated,
            }
            for name, value in row.items():
                fields[name].append(np.array(value))
            if last:
                break
            obs, gained, terminated, truncated, _ = env.step(action[0])
            reward, over, step = float(gained), terminated or truncated, step + 1
        length.append(step + 1)
        after_episode()
    return Recordings(
        obs=np.stack(fields["obs"]),
        action=np.stack(fields["action"]).astype(np.float32),
        reward=np.stack(fields["reward"]).astype(np.float32),
        physical=np.stack(fields["physical"]) if physical else None,
        drawn={
            name: np.repeat([of[name] for of in places], length)
            for name in places[0]
            if len({of[name] for of in places}) > 1
        },
        is_terminal=np.stack(fields["is_terminal"]).astype(bool),
        episode=np.repeat(np.arange(episodes), length),
        step=np.concatenate([np.arange(n) for n in length]),
        length=np.array(length),
        seed=seed,
        split=split_episodes(episodes, seed=seed),
    )


class Followed(NamedTuple):
    """What a model made of each row, on the CPU in float32."""

    z: Float[Tensor, "R D"]
    feat: Float[Tensor, "R F"]
    states: State
    """Its memory after each row."""


@torch.no_grad()
def follow(model: LeWorldModel, recordings: Recordings) -> Followed:
    """Let the model observe every episode from its start, all episodes side by side."""
    model.eval()
    device = next(model.parameters()).device
    first = np.cumsum(recordings.length) - recordings.length
    state = model.initial(len(first))
    action = torch.zeros(len(first), recordings.action.shape[1], device=device)
    parts, order = [], []
    for t in range(recordings.length.max()):
        # A shorter episode stays at its last row; what is seen there again is dropped.
        at = first + np.minimum(t, recordings.length - 1)
        obs = torch.from_numpy(recordings.obs[at]).to(device)
        state = model.observe(state, action, obs, torch.full((len(first),), t == 0, device=device))
        action = torch.from_numpy(recordings.action[at]).to(device)
        alive = torch.from_numpy(t < recordings.length)
        parts.append(type(state)(*(x.cpu()[alive] for x in state)))
        order.append(at[t < recordings.length])
    back = torch.from_numpy(np.argsort(np.concatenate(order)))
    states = type(state)(*(torch.cat(fields)[back] for fields in zip(*parts, strict=True)))
    feat = torch.cat([model.feat(type(state)(*(x.to(device) for x in part))).float().cpu() for part in parts])[back]
    return Followed(states.z[:, -1].float(), feat, states)


def at_rows(states: State, rows: Int64[np.ndarray, " N"]) -> State:
    """The memories after these rows."""
    index = torch.from_numpy(rows)
    return type(states)(*(x[index] for x in states))


def plain_observations(recordings: Recordings) -> tuple[str, Float[Tensor, "R F"]]:
    """What is observed without any model, and the same a row before; pixels in grey and averaged down. And its name."""
    x, name = torch.from_numpy(recordings.obs).float(), "observation"
    if x.ndim == 4:
        x, name = F.adaptive_avg_pool2d(x.mean(1, keepdim=True) / 255, (_SMALL, _SMALL)), f"pixels {_SMALL}×{_SMALL}"
    x = x.flatten(1)
    return name, torch.cat([x, x.roll(1, 0)], 1)

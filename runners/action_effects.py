"""Does the model know what an action does? Imagined reward under opposite actions, against the simulator's own.

From the same state, the reward is summed over the next steps under constant action +1 and under −1; the difference is
the action's effect. A policy that learns in imagination climbs the imagined effect, so an effect that is imagined too
small, or with the wrong sign, is a policy that stops improving.
"""

from __future__ import annotations

from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from runners.recordings import Recordings, at_rows
from worldmodels.interface import State, WorldModel

STEPS = 6
"""Agent steps that rewards are summed over, at most."""
MOST_DIRECTIONS = 6


class Agreement(NamedTuple):
    """How predicted effects go with real ones."""

    correlation: float | None
    """None where one of them never differs, as with a reward that was always 0."""
    slope: float | None
    """Of the predicted effect over the real one, by least squares: 1 is the right size, less is too small."""


class ActionEffects(NamedTuple):
    """Differences in summed reward between +1 and −1."""

    directions: list[list[float]]
    """The action taken for +1, one for each kind of effect."""
    predicted: Float[np.ndarray, "N A H"]
    real: Float[np.ndarray, "N A H"]
    """Each over 1..H steps, for N starts and A directions."""

    def agreement(self, steps: int, direction: int | None = None) -> Agreement:
        """Over ``steps`` steps, of one direction or of all together."""
        chosen = slice(None) if direction is None else direction
        return agreement(self.predicted[:, chosen, steps - 1].reshape(-1), self.real[:, chosen, steps - 1].reshape(-1))


def agreement(predicted: Float[np.ndarray, " N"], real: Float[np.ndarray, " N"]) -> Agreement:
    """Pearson's correlation, and the slope of the predicted over the real."""
    p, r = predicted - predicted.mean(), real - real.mean()
    floor = 1e-12 * len(p)
    if (r @ r) < floor:
        return Agreement(None, None)
    slope = float(p @ r / (r @ r))
    return Agreement(None if p @ p < floor else float(p @ r / np.sqrt((p @ p) * (r @ r))), slope)


def directions(action_dim: int, *, seed: int) -> Float[np.ndarray, "N A"]:
    """Each dimension of the action by itself, the others 0; where these are many, random corners of the box."""
    if action_dim <= MOST_DIRECTIONS:
        return np.eye(action_dim, dtype=np.float32)
    signs = np.random.default_rng(seed).integers(0, 2, (MOST_DIRECTIONS, action_dim))
    return (2 * signs - 1).astype(np.float32)


def action_effects(
    model: WorldModel,
    states: State,
    recordings: Recordings,
    starts: Int64[np.ndarray, " N"],
    env: gym.Env,
    *,
    seed: int,
) -> ActionEffects:
    """Imagined and real effects from the rows ``starts``.

    Args:
        states: the model's memory after every row.
        env: of the same task and action repeat; what it observes does not matter.
    """
    kinds = directions(recordings.action.shape[1], seed=seed)
    predicted, real = [], []
    for direction in kinds:
        imagined = [imagined_rewards(model, at_rows(states, starts), sign * direction) for sign in (1, -1)]
        predicted.append(imagined[0] - imagined[1])
        simulated = [
            np.stack([real_rewards(env, recordings, row, sign * direction) for row in starts]) for sign in (1, -1)
        ]
        real.append(simulated[0] - simulated[1])
    return ActionEffects(kinds.tolist(), np.stack(predicted, 1), np.stack(real, 1))


@torch.no_grad()
def imagined_rewards(model: WorldModel, state: State, action: Float[np.ndarray, " A"]) -> Float[np.ndarray, "N H"]:
    """Rewards summed over 1..H steps of this action, each as likely to arrive as the steps before are not the end."""
    device = next(model.parameters()).device
    state = type(state)(*(x.to(device) for x in state))
    going: Tensor | float = 1.0
    rewards = []
    actions = torch.from_numpy(action).to(device).expand(len(state[0]), -1)
    for _ in range(STEPS):
        state = model.imagine(state, actions)
        reward, cont = model.outcome(model.feat(state))
        rewards.append(going * reward.float())
        going = going * cont.float()
    return torch.stack(rewards, 1).cumsum(1).cpu().numpy()


def real_rewards(
    env: gym.Env, recordings: Recordings, row: int, action: Float[np.ndarray, " A"]
) -> Float[np.ndarray, " H"]:
    """The simulator's rewards from the state of this row, summed over 1..H steps; none after an end."""
    recordings.restore(env, row)
    rewards = np.zeros(STEPS)
    for step in range(STEPS):
        _, rewards[step], terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
    return rewards.cumsum()

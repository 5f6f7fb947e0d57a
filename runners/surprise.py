"""Surprise (violation of expectation): does the model notice when something impossible happens?

The score of a row is the squared error of the model's one-step prediction of its latent, relative to the latents'
variance. Plausible episodes are held against edited ones: what was simulated goes on from a recorded state after an
edit of the simulator, what is an edit of time rearranges the recorded rows. AUROC tells how well the score separates
edited rows from plausible ones: 1 always, 0.5 not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped

from envs.edits import recoloured, switched_gravity
from envs.physics import set_physical_state
from runners.latents import actions_ahead, imagine_ahead
from runners.recordings import Followed, Recordings, at_rows
from worldmodels.interface import State
from worldmodels.lewm import LeWorldModel

BEFORE = 4
"""Recorded rows shown before an edit, the one it acts on included."""
AFTER = 8
"""Rows that follow an edit."""
FROZEN = 3
"""Rows for which the picture stands still."""
_DONORS = 16

EditName = Literal["teleport", "colour", "gravity", "freeze", "skip"]
EDITED_ROWS: dict[EditName, int] = {"teleport": 1, "colour": 1, "gravity": 5, "freeze": FROZEN, "skip": 1}
"""How many rows after the edit break what was expected."""


class Clips(NamedTuple):
    """What followed each start: AFTER rows, and the actions that led to them."""

    obs: Shaped[np.ndarray, "N W *obs"]
    action: Float[np.ndarray, "N W A"]
    alive: Bool[np.ndarray, "N W"]
    """Whether the episode had not ended before."""


class Edited(NamedTuple):
    """One kind of edit and how surprising it was."""

    name: EditName
    clips: Clips
    scores: Float[np.ndarray, "N W"]
    auroc: float


class Surprise(NamedTuple):
    """Scores of plausible rows and of each edit. ``left_out`` says why an edit could not be made."""

    starts: Int64[np.ndarray, " N"]
    """The last row before each edit."""
    plausible: Float[np.ndarray, " R"]
    """Of all held-out rows whose memory is full."""
    around: Float[np.ndarray, "N B+W"]
    """Of the recorded rows about each start, which nothing has edited."""
    edits: list[Edited]
    left_out: dict[str, str]


def surprise(
    model: LeWorldModel,
    followed: Followed,
    recordings: Recordings,
    scale: float,
    clips: int,
    env: gym.Env | None,
    *,
    seed: int,
) -> Surprise:
    """Scores of plausible and edited rows of the held-out episodes.

    Args:
        scale: the latents' variance.
        clips: edits of each kind, at random rows.
        env: one as the episodes were played in, whose physical state can be set; None: only time is edited.
    """
    rng = np.random.default_rng(seed)
    scores = one_step_scores(model, followed, recordings, scale)
    held_out = recordings.split.held_out
    memory = max(model.history, BEFORE)
    possible = recordings.rows(before=memory, after=AFTER + 1, among=held_out)
    starts = np.sort(rng.choice(possible, min(clips, len(possible)), replace=False))
    before = at_rows(followed.states, starts)
    made, left_out = _clips(env, recordings, starts, rng)
    plausible = scores[recordings.rows(before=model.history, after=0, among=held_out)]
    edits = []
    for name, clip in made.items():
        found = clip_scores(model, before, clip, scale)
        first = EDITED_ROWS[name]
        edits.append(Edited(name, clip, found, auroc(found[:, :first][clip.alive[:, :first]], plausible)))
    around = scores[starts[:, None] + np.arange(1 - BEFORE, AFTER + 1)]
    return Surprise(starts, plausible, around, edits, left_out)


def auroc(positive: Float[np.ndarray, " P"], negative: Float[np.ndarray, " N"]) -> float:
    """The chance that a positive scores higher than a negative, ties counted half (Mann and Whitney's U)."""
    everyone, places = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    counts = np.bincount(places, minlength=len(everyone))
    rank = np.cumsum(counts) - (counts - 1) / 2
    u = rank[places[: len(positive)]].sum() - len(positive) * (len(positive) + 1) / 2
    return float(u / (len(positive) * len(negative)))


def one_step_scores(
    model: LeWorldModel, followed: Followed, recordings: Recordings, scale: float
) -> Float[np.ndarray, " R"]:
    """Of every row; NaN on the first of an episode, which nothing predicts."""
    rows = recordings.rows(before=0, after=1)
    predicted = imagine_ahead(model, at_rows(followed.states, rows), actions_ahead(recordings, rows, 1))[:, 0]
    scores = np.full(len(recordings.obs), np.nan)
    scores[rows + 1] = (predicted - followed.z[rows + 1]).square().mean(1).numpy() / scale
    return scores


@torch.no_grad()
def clip_scores(model: LeWorldModel, before: State, clips: Clips, scale: float) -> Float[np.ndarray, "N W"]:
    """Of every row of the clips; ``before`` is the memory that they follow."""
    device = next(model.parameters()).device
    state = type(before)(*(x.to(device) for x in before))
    going_on = torch.zeros(len(clips.obs), dtype=torch.bool, device=device)
    scores = []
    for step in range(clips.obs.shape[1]):
        action = torch.from_numpy(clips.action[:, step]).to(device)
        predicted = model.latent(model.imagine(state, action))
        state = model.observe(state, action, torch.from_numpy(clips.obs[:, step]).to(device), going_on)
        scores.append((predicted - state.z[:, -1]).float().square().mean(1).cpu().numpy() / scale)
    return np.stack(scores, 1)


# -- edits -------------------------------------------------------------------------------------------------------------


def _clips(
    env: gym.Env | None, recordings: Recordings, starts: Int64[np.ndarray, " N"], rng: np.random.Generator
) -> tuple[dict[EditName, Clips], dict[str, str]]:
    """The clips of every edit that can be made, and why others cannot."""
    made: dict[EditName, Clips] = {}
    left_out: dict[str, str] = {}
    if env is None:
        reason = "the physical state of this task cannot be set"
        left_out = {"teleport": reason, "colour": reason, "gravity": reason}
    else:
        untouched = simulate(env, recordings, starts, lambda env: nullcontext())
        donors = iter(_donors(recordings, starts, rng))
        edits: dict[EditName, Callable[[gym.Env], AbstractContextManager[None]]] = {
            "teleport": lambda env: _teleported(env, next(donors)),
            "colour": recoloured,
            "gravity": switched_gravity,
        }
        for name, edit in edits.items():
            clips = simulate(env, recordings, starts, edit)
            if np.array_equal(clips.obs, untouched.obs):
                left_out[name] = "it changes nothing that is observed in this task"
            else:
                made[name] = clips
    return made | {"freeze": frozen(recordings, starts), "skip": skipped(recordings, starts)}, left_out


def simulate(
    env: gym.Env,
    recordings: Recordings,
    starts: Int64[np.ndarray, " N"],
    edit: Callable[[gym.Env], AbstractContextManager[None]],
) -> Clips:
    """The simulation goes on from each start with the recorded actions, after the edit and under it."""
    action = actions_ahead(recordings, starts, AFTER).numpy()
    obs = np.empty((len(starts), AFTER, *recordings.obs.shape[1:]), recordings.obs.dtype)
    alive = np.ones((len(starts), AFTER), bool)
    for i, row in enumerate(starts):
        recordings.restore(env, row)
        over = False
        with edit(env):
            for step in range(AFTER):
                alive[i, step] = not over
                if not over:
                    latest, _, terminated, truncated, _ = env.step(action[i, step])
                    over = terminated or truncated
                obs[i, step] = latest
    return Clips(obs, action, alive)


@contextmanager
def _teleported(env: gym.Env, state: Float[np.ndarray, " P"]) -> Iterator[None]:
    set_physical_state(env, state)
    yield


def _donors(
    recordings: Recordings, starts: Int64[np.ndarray, " N"], rng: np.random.Generator
) -> Float[np.ndarray, "N P"]:
    """For each start a state that was really visited, the farthest of a few at random."""
    physical = recordings.physical
    assert physical is not None
    held_out = recordings.rows(before=0, after=0, among=recordings.split.held_out)
    spread = physical[held_out].std(0) + 1e-6
    some = rng.choice(held_out, (len(starts), _DONORS))
    distance = np.abs((physical[some] - physical[starts][:, None]) / spread).sum(-1)
    return physical[some[np.arange(len(starts)), distance.argmax(1)]]


def frozen(recordings: Recordings, starts: Int64[np.ndarray, " N"]) -> Clips:
    """The picture stands still for FROZEN rows while the actions go on, then it catches up."""
    ahead = np.arange(1, AFTER + 1)
    shown = starts[:, None] + np.where(ahead <= FROZEN, 0, ahead)
    return Clips(
        recordings.obs[shown],
        actions_ahead(recordings, starts, AFTER).numpy(),
        np.ones(shown.shape, bool),
    )


def skipped(recordings: Recordings, starts: Int64[np.ndarray, " N"]) -> Clips:
    """One row is missing: the row after next follows at once, and the action between them was never told."""
    shown = starts[:, None] + np.arange(2, AFTER + 2)
    led = np.concatenate([starts[:, None], shown[:, :-1]], 1)
    return Clips(recordings.obs[shown], recordings.action[led], np.ones(shown.shape, bool))

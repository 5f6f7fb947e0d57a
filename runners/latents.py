"""The shape of a latent space, and how far ahead its model sees: geometry and open-loop errors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from runners.probes import Sets, linear_probe
from runners.recordings import Recordings, at_rows
from worldmodels.interface import State
from worldmodels.lewm import LeWorldModel
from worldmodels.sigreg import effective_rank, expected_sigreg, per_dimension_variance, random_directions, sigreg

_DIRECTIONS = 256
_SAMPLES = 20
"""Random samples that the SIGReg statistic is averaged over."""
_CHUNK = 512
"""States imagined from at once."""


class Geometry(NamedTuple):
    """How the latents of all rows lie."""

    latent_dim: int
    effective_rank: float
    """Between 1 and the latent's size."""
    sigreg: float
    """Of samples as large as the run's batches; it grows with their size unless the latents are Gaussian."""
    sigreg_rows: int
    sigreg_of_gaussian: float
    straightness: float
    """Mean cosine between one latent step and the next."""
    variance_mean: float
    variance_min: float
    """Of the dimensions."""
    pca_share: list[float]
    """Part of the variance along each of the first two principal axes."""


def geometry(z: Float[Tensor, "R D"], recordings: Recordings, sample: int, *, seed: int) -> Geometry:
    """What can be said of the latents alone. ``sample`` is the number of rows in one sample of SIGReg."""
    generator = torch.Generator().manual_seed(seed)
    rows = min(sample, len(z))
    statistics = [
        sigreg(
            z[torch.randperm(len(z), generator=generator)[:rows]],
            random_directions(z.shape[1], _DIRECTIONS, device="cpu", generator=generator),
        )
        for _ in range(_SAMPLES)
    ]
    variance = per_dimension_variance(z)
    middle = torch.from_numpy(recordings.rows(before=1, after=1))
    return Geometry(
        latent_dim=z.shape[1],
        effective_rank=float(effective_rank(z)),
        sigreg=float(torch.stack(statistics).mean()),
        sigreg_rows=rows,
        sigreg_of_gaussian=expected_sigreg(),
        straightness=straightness(z[middle - 1], z[middle], z[middle + 1]),
        variance_mean=float(variance.mean()),
        variance_min=float(variance.min()),
        pca_share=principal_axes(z)[1],
    )


def straightness(before: Float[Tensor, "N D"], now: Float[Tensor, "N D"], after: Float[Tensor, "N D"]) -> float:
    """Mean cosine between successive differences: 1 on a straight line, 0 where each step forgets the last, −0.5 for
    independent points, −1 back and forth. Where nothing moved, no direction is counted; NaN if nothing ever did."""
    first, second = now - before, after - now
    length = first.norm(dim=1) * second.norm(dim=1)
    moving = length > 1e-12
    return float(((first * second).sum(1)[moving] / length[moving]).mean())


def principal_axes(z: Float[Tensor, "R D"]) -> tuple[Float[Tensor, "R 2"], list[float]]:
    """Each row on the two principal axes, and the part of the variance along each."""
    centred = z - z.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    axes = vectors[:, -2:].flip(1)
    if axes.shape[1] == 1:  # a latent of one dimension
        axes = torch.cat([axes, torch.zeros_like(axes)], 1)
    return centred @ axes, share[-2:].flip(0).tolist()


# -- open loop ---------------------------------------------------------------------------------------------------------


class OpenLoop(NamedTuple):
    """Mean squared errors in the latent 1..H steps ahead, relative to the latents' variance: 1 is what the mean latent
    would give. ``starts`` rows of held-out episodes were started from."""

    starts: int
    model: list[float]
    copy_last: list[float]
    linear: list[float]
    """Least squares from the last two latents and the actions up to then, one fit for each number of steps."""


def open_loop(
    model: LeWorldModel,
    z: Float[Tensor, "R D"],
    states: State,
    recordings: Recordings,
    scale: float,
    horizon: int,
) -> OpenLoop:
    """The model's errors beside those of two that know nothing of it. ``scale`` is the latents' variance."""
    before = model.history - 1
    starts = recordings.rows(before=before, after=horizon, among=recordings.split.held_out)
    imagined = imagine_ahead(model, at_rows(states, starts), actions_ahead(recordings, starts, horizon))
    wanted = torch.stack([z[starts + k] for k in range(1, horizon + 1)], 1)
    last = z[starts]
    return OpenLoop(
        starts=len(starts),
        model=(_errors(imagined, wanted) / scale).tolist(),
        copy_last=(_errors(last[:, None].expand_as(wanted), wanted) / scale).tolist(),
        linear=[linear_baseline(z, recordings, starts, k, before) / scale for k in range(1, horizon + 1)],
    )


def _errors(predicted: Float[Tensor, "N H D"], wanted: Float[Tensor, "N H D"]) -> Float[Tensor, " H"]:
    return (predicted - wanted).square().mean((0, 2))


def linear_baseline(
    z: Float[Tensor, "R D"], recordings: Recordings, starts: Int64[np.ndarray, " N"], steps: int, before: int
) -> float:
    """Mean squared error on ``starts`` of least squares from (z_{t−1}, z_t, a_{t−1..t+steps−1}) to z_{t+steps}, with
    a penalty chosen on the validation episodes."""
    before = max(before, 1)
    split = recordings.split
    rows = [recordings.rows(before=before, after=steps, among=part) for part in (split.train, split.validation)]
    rows.append(starts[recordings.step[starts] >= 1])

    def read(at: Int64[np.ndarray, " N"]) -> Tensor:
        actions = actions_ahead(recordings, at - 1, steps + 1).flatten(1)
        return torch.cat([z[at - 1], z[at], actions], 1)

    x, y = Sets(*(read(at) for at in rows)), Sets(*(z[at + steps] for at in rows))
    return float((linear_probe(x, y) - y.held_out).square().mean())


def actions_ahead(recordings: Recordings, rows: Int64[np.ndarray, " N"], steps: int) -> Float[Tensor, "N H A"]:
    """The actions taken at each row and the ``steps`` − 1 after it."""
    return torch.from_numpy(recordings.action[rows[:, None] + np.arange(steps)])


@torch.no_grad()
def imagine_ahead(model: LeWorldModel, state: State, actions: Float[Tensor, "N H A"]) -> Float[Tensor, "N H D"]:
    """The latents that follow, on the CPU, when the model is only told the actions."""
    device = next(model.parameters()).device
    out = []
    for rows in torch.arange(len(actions)).split(_CHUNK):
        now = type(state)(*(x[rows].to(device) for x in state))
        latents = []
        for action in actions[rows].to(device).unbind(1):
            now = model.imagine(now, action)
            latents.append(model.latent(now).cpu())
        out.append(torch.stack(latents, 1))
    return torch.cat(out)

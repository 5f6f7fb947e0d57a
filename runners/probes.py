"""Probes: how well a simple reader finds quantities in features that were never trained to show them.

A linear probe is ridge regression in closed form, a second one a small MLP that stops early. Both are judged by R² on
episodes that neither was fitted to: 1 is perfect, 0 is no better than always answering the mean.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldmodels.heads import mlp

STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1000.0)
"""Ridge penalties that are tried, for features of variance 1 and the mean squared error; the last leaves the mean."""
_EPOCHS, _PATIENCE, _BATCH, _UNITS = 150, 15, 256, 128
_SMALLEST_SPREAD = 1e-6


class Sets(NamedTuple):
    """The same rows' features or targets, split by whole episodes."""

    train: Float[Tensor, "N F"]
    validation: Float[Tensor, "M F"]
    """Chooses the penalty and the moment to stop."""
    held_out: Float[Tensor, "L F"]
    """Judges."""


class ProbeScores(NamedTuple):
    """R² of every quantity, on the held-out episodes."""

    linear: list[float]
    mlp: list[float]


def probe(features: Mapping[str, Sets], targets: Sets, *, seed: int) -> dict[str, ProbeScores]:
    """Both probes from each kind of features to all targets. ``seed`` fixes the MLP's weights and batches."""
    return {
        name: ProbeScores(
            r_squared(targets.held_out, linear_probe(x, targets)).tolist(),
            r_squared(targets.held_out, mlp_probe(x, targets, seed=seed)).tolist(),
        )
        for name, x in features.items()
    }


def r_squared(target: Float[Tensor, "N Q"], predicted: Float[Tensor, "N Q"]) -> Float[Tensor, " Q"]:
    """1 − (squared error) / (variance), for each column. A column that never changes gives NaN."""
    spread = (target - target.mean(0)).square().sum(0)
    error = (target - predicted).square().sum(0)
    return torch.where(spread > 0, 1 - error / spread, torch.nan)


def linear_probe(x: Sets, y: Sets) -> Float[Tensor, "L Q"]:
    """Ridge regression's answers on the held-out rows.

    The penalty of each target is the one that is best on the validation rows; the fit is then of both, train and
    validation.
    """
    fitted = fit_ridge(x.train, y.train, STRENGTHS)
    errors = torch.stack([(y.validation - each(x.validation)).square().mean(0) for each in fitted])
    best = errors.argmin(0)
    both = fit_ridge(torch.cat([x.train, x.validation]), torch.cat([y.train, y.validation]), STRENGTHS)
    answers = torch.stack([each(x.held_out) for each in both])
    return answers[best, :, torch.arange(len(best))].T


class Affine(NamedTuple):
    """y = (x − mean) · weight + bias."""

    mean: Float[Tensor, " F"]
    weight: Float[Tensor, "F Q"]
    bias: Float[Tensor, " Q"]

    def __call__(self, x: Float[Tensor, "N F"]) -> Float[Tensor, "N Q"]:
        return ((x.double() - self.mean) @ self.weight + self.bias).float()


def fit_ridge(x: Float[Tensor, "N F"], y: Float[Tensor, "N Q"], strengths: Sequence[float]) -> list[Affine]:
    """One fit for each penalty, from one eigendecomposition, in float64. Features are scaled to variance 1 first."""
    x, y = x.double(), y.double()
    mean, bias = x.mean(0), y.mean(0)
    spread = x.std(0, correction=0)
    scale = torch.where(spread > _SMALLEST_SPREAD, 1 / spread, 0.0)
    scaled = (x - mean) * scale
    values, vectors = torch.linalg.eigh(scaled.T @ scaled / len(x))
    projected = vectors.T @ (scaled.T @ (y - bias) / len(x))
    weights = [vectors @ (projected / (values.clamp(min=0) + strength)[:, None]) for strength in strengths]
    return [Affine(mean, weight * scale[:, None], bias) for weight in weights]


def mlp_probe(x: Sets, y: Sets, *, seed: int) -> Float[Tensor, "L Q"]:
    """A small MLP's answers on the held-out rows, with the weights that were best on the validation rows."""
    (x_mean, x_scale), (y_mean, y_scale) = _standard(x.train), _standard(y.train)
    inputs, wanted = (x.train - x_mean) * x_scale, (y.train - y_mean) * y_scale
    seen, judged = (x.validation - x_mean) * x_scale, (y.validation - y_mean) * y_scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = mlp([inputs.shape[1], _UNITS, _UNITS, wanted.shape[1]])
        best, best_error, waited = copy.deepcopy(net.state_dict()), float("inf"), 0
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
        for _ in range(_EPOCHS):
            _epoch(net, optimiser, inputs, wanted)
            with torch.no_grad():
                error = float((net(seen) - judged).square().mean())
            waited += 1
            if error < best_error:
                best, best_error, waited = copy.deepcopy(net.state_dict()), error, 0
            if waited >= _PATIENCE:
                break
    net.load_state_dict(best)
    with torch.no_grad():
        answer = net((x.held_out - x_mean) * x_scale)
    return answer / torch.where(y_scale > 0, y_scale, 1.0) + y_mean


def _standard(x: Float[Tensor, "N F"]) -> tuple[Float[Tensor, " F"], Float[Tensor, " F"]]:
    """Mean, and one over the spread, or 0 where there is none."""
    spread = x.std(0, correction=0)
    return x.mean(0), torch.where(spread > _SMALLEST_SPREAD, 1 / spread, 0.0)


def _epoch(net: nn.Module, optimiser: torch.optim.Optimizer, inputs: Tensor, wanted: Tensor) -> None:
    for rows in torch.randperm(len(inputs)).split(_BATCH):
        loss = (net(inputs[rows]) - wanted[rows]).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()


# -- what is probed for ------------------------------------------------------------------------------------------------


def quantities(
    names: Sequence[str], values: Float[np.ndarray, "R P"], angles: Sequence[bool]
) -> tuple[list[str], Float[np.ndarray, "R Q"]]:
    """The physical state as what a reader could find: angles, which jump when they wrap, become their sine and cosine,
    and what never changed in these rows is left out."""
    columns: dict[str, np.ndarray] = {}
    for i, name in enumerate(names):
        if angles[i]:
            columns |= {f"sin {name}": np.sin(values[:, i]), f"cos {name}": np.cos(values[:, i])}
        else:
            columns[name] = values[:, i]
    moving = {name: column for name, column in columns.items() if column.std() > _SMALLEST_SPREAD}
    return list(moving), np.stack(list(moving.values()), 1) if moving else np.empty((len(values), 0))

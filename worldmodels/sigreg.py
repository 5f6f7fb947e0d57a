"""SIGReg, the regulariser that keeps latents from collapsing, and the monitors that show whether it does.

SIGReg (LeJEPA, arXiv 2511.08544; used per time step in LeWorldModel, arXiv 2603.19312) projects the latents on random
unit directions and holds each projection's empirical characteristic function against that of N(0, 1), φ(t) = exp(−t²/2)
(the Epps–Pulley test). The quadrature is that of the published code of both: 17 knots on [0, 3], trapezoid weights
**doubled** because the integrand is even in t (2·dt inside, dt at both ends, dt = 3/16), times the window exp(−t²/2).

The statistic carries a factor N. So its expectation on N(0, I) is the same for every N (:func:`expected_sigreg`), and a
sample's pull on one latent does not shrink with N as that of a mean (the prediction loss) does: whoever changes how
many latents make one sample changes what a given loss weight means.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldmodels import ranks


def sigreg(
    z: Float[Tensor, "*T N D"],
    directions: Float[Tensor, "D M"],
    knots: int = 17,
    t_max: float = 3.0,
    *,
    over_ranks: bool = False,
) -> Float[Tensor, ""]:
    """The SIGReg statistic of the sample ``z``, a mean over the unit columns of ``directions``.

    For each direction it is N · Σ_t w_t (|mean cos(t·x) − φ(t)|² + |mean sin(t·x)|²) with x = z·direction and the means
    over N. Leading axes are separate samples whose statistics are averaged: (B·T, D) makes one sample of everything,
    (T, B, D) one for each time step as in LeWorldModel. Arithmetic is in float32 (float64 for float64 input), whatever
    autocast says. The gradient reaches ``z`` only, and once (no second derivative).

    With ``over_ranks`` the sample is the rows of all ranks, N of each and along the same directions; the answer is this
    rank's share of the statistic, and its gradient that of the whole statistic (:mod:`worldmodels.ranks`).

    Raises ValueError where fewer than 2 knots or a ``t_max`` that is not positive are asked for.
    """
    if knots < 2 or t_max <= 0:
        raise ValueError(f"SIGReg needs at least 2 knots and a positive t_max, got knots={knots}, t_max={t_max}")
    dtype = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        x = z.to(dtype) @ directions.detach().to(dtype)
        return _EppsPulley.apply(x, knots, t_max / (knots - 1), over_ranks)


class _EppsPulley(torch.autograd.Function):
    """Σ_t w_t N |φ̂(t) − φ(t)|² of each column of x (…,N,M), averaged over the columns and the leading axes.

    The knots are multiples of dt, so cos(k·dt·x) and sin(k·dt·x) come from one cos and one sin by rotation; and the
    gradient is a weighted sum of the same cosines and sines, so it is computed here and no graph of 17 knots is kept.
    Together that is several times faster on CPU than autograd through the formula, at the same float32 error.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, knots: int, dt: float, over_ranks: bool) -> Tensor:
        cosines, sines = _harmonics(x * dt, knots - 1)
        # The knot t = 0 is left out: both functions are 1 there.
        t = dt * torch.arange(1, knots, device=x.device, dtype=x.dtype)
        phi = torch.exp(-0.5 * t * t)
        w = torch.cat([2 * dt * phi[:-1], dt * phi[-1:]])
        per_knot = (-1, *[1] * (x.ndim - 1))
        means, rows = torch.cat([cosines.mean(-2), sines.mean(-2)]), x.shape[-2]
        if over_ranks:
            means, rows = ranks.sum_over_ranks(ranks.share(means)), rows * ranks.size()
        real, imag = means[: knots - 1] - phi.view(per_knot), means[knots - 1 :]
        statistic = rows * torch.tensordot(w, real.square() + imag.square(), 1)

        if ctx.needs_input_grad[0]:
            # d/dx_n of N·w(real² + imag²) = 2·w·t(imag·cos(t·x_n) − real·sin(t·x_n)): the N and the mean's 1/N cancel.
            scale = (2 * w * t / statistic.numel()).view(per_knot)
            of_cos, of_sin = (imag * scale).unsqueeze(-2), (real * scale).unsqueeze(-2)
            ctx.save_for_backward(cosines.mul_(of_cos).addcmul_(sines, of_sin, value=-1).sum(0))
        return ranks.share(statistic.mean()) if over_ranks else statistic.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None, None


def _harmonics(angle: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """cos(k·angle) and sin(k·angle) for k = 1 … count: those of n + 1 … 2n from the first n and the n-th, by the
    angle-addition formulas."""
    cosines, sines = (angle.new_empty(count, *angle.shape) for _ in range(2))
    torch.cos(angle, out=cosines[0])
    torch.sin(angle, out=sines[0])
    done = 1
    while done < count:
        c, s, more = cosines[done - 1], sines[done - 1], slice(done, min(2 * done, count))
        first = slice(0, more.stop - done)
        torch.mul(cosines[first], c, out=cosines[more]).addcmul_(sines[first], s, value=-1)
        torch.mul(sines[first], c, out=sines[more]).addcmul_(cosines[first], s)
        done = more.stop
    return cosines, sines


def random_directions(
    dim: int,
    num: int,
    *,
    device: torch.device | str,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "D M"]:
    """``num`` directions uniform on the unit sphere in ``dim`` dimensions, as columns. Draw them afresh each update.

    ``generator``, if given, lives on ``device``.
    """
    directions = torch.randn(dim, num, generator=generator, device=device, dtype=dtype)
    return directions / directions.norm(dim=0, keepdim=True)


def expected_sigreg(knots: int = 17, t_max: float = 3.0) -> float:
    """The statistic's expectation on N(0, I), for any N, D and M: Σ_t w_t (1 − exp(−t²)), about 1.052 by default.

    N·E|φ̂ − φ|² is the variance of cos(tX) plus that of sin(tX), which is 1 − φ(t)².
    """
    dt = t_max / (knots - 1)
    ts = [k * dt for k in range(knots)]
    terms = [2 * dt * math.exp(-t * t / 2) * (1 - math.exp(-t * t)) for t in ts]
    return sum(terms) - (terms[0] + terms[-1]) / 2


@torch.no_grad()
def effective_rank(z: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """exp of the entropy of the normalised singular values of the centred ``z`` (Roy & Vetterli, EUSIPCO 2007).

    Between 1 (one line, or one point) and D. It takes a singular value decomposition: for log points, not every update.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    values = torch.linalg.svdvals(z - z.mean(0))
    # What centring leaves of a constant is rounding: without a floor a collapsed batch would look full of directions.
    floor = torch.finfo(z.dtype).eps * max(z.shape) * z.abs().max()
    values = torch.where(values > floor, values, 0.0)
    p = values / values.sum().clamp_min(torch.finfo(z.dtype).tiny)
    return torch.special.entr(p).sum().exp()


@torch.no_grad()
def per_dimension_variance(z: Float[Tensor, "N D"]) -> Float[Tensor, " D"]:
    """The variance of each latent dimension over the batch, in float32. SIGReg wants them all near 1."""
    return z.float().var(0, correction=0)

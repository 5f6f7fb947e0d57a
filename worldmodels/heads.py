"""Output heads: small MLPs, and the two-hot symexp regression of DreamerV3 (arXiv 2301.04104)."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def symlog(x: Tensor) -> Tensor:
    """sign(x) · ln(|x| + 1)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """The inverse of :func:`symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def mlp_trunk(sizes: list[int]) -> nn.Sequential:
    """Linear → LayerNorm → SiLU from each size to the next."""
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.LayerNorm(o), nn.SiLU()]
    return nn.Sequential(*layers)


def mlp(sizes: list[int], *, last_scale: float | None = None) -> nn.Sequential:
    """Linear → LayerNorm → SiLU for each hidden size, then a plain Linear.

    ``sizes`` is [input, hidden…, output]; ``last_scale`` multiplies the last layer's first weights, its bias is 0 then.
    """
    last = nn.Linear(sizes[-2], sizes[-1])
    if last_scale is not None:
        with torch.no_grad():
            last.weight.mul_(last_scale)
            last.bias.zero_()
    return nn.Sequential(*mlp_trunk(sizes[:-1]), last)


class TwoHot(nn.Module):
    """A scalar as a softmax over ``bins`` fixed points, evenly spaced in symlog space over [-limit, limit].

    Targets beyond ±symexp(limit) are clamped to the last bin.
    """

    bins: Tensor

    def __init__(self, bins: int = 101, limit: float = 6.0) -> None:
        super().__init__()
        if bins < 3 or bins % 2 == 0:
            raise ValueError(f"two-hot bins must be an odd number of at least 3 (so that one bin is 0), got {bins}")
        self.step = 2 * limit / (bins - 1)
        self.limit = limit
        self.register_buffer("bins", symexp(torch.linspace(-limit, limit, bins)), persistent=False)

    def mean(self, logits: Float[Tensor, "*N bins"]) -> Float[Tensor, "*N"]:
        """The expected value. A uniform softmax gives exactly 0: positive and negative halves are summed pairwise."""
        probs = logits.float().softmax(-1)
        middle = self.bins.shape[0] // 2
        difference = probs[..., middle + 1 :] - probs[..., :middle].flip(-1)
        # Not a matrix product: autocast would run that in bfloat16, with an error as large as an advantage.
        return (difference * self.bins[middle + 1 :]).sum(-1)

    def loss(self, logits: Float[Tensor, "*M bins"], target: Float[Tensor, "*N"]) -> Float[Tensor, "*M"]:
        """Cross entropy with the two-hot code of ``target``: the two bins around it, weighted so that, in symexp space,
        their mean is the target. Logits may have leading axes that targets have not."""
        target = target.detach().float()
        count = self.bins.shape[0]
        position = (symlog(target).clamp(-self.limit, self.limit) + self.limit) / self.step
        # A NaN has no bin, but its weight below is NaN and so is its loss.
        low = position.nan_to_num().floor().clamp(0, count - 2).long()
        left, right = self.bins[low], self.bins[low + 1]
        weight = ((target - left) / (right - left)).clamp(0, 1)
        return _CrossEntropy.apply(logits, torch.stack([low, low + 1], -1), torch.stack([1 - weight, weight], -1))


class _CrossEntropy(torch.autograd.Function):
    """Of a softmax and a code of few bins, in float32; its gradient is their difference."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, bins: Tensor, code: Tensor) -> Tensor:
        log_probs, shape = logits.float().log_softmax(-1), (*logits.shape[:-1], bins.shape[-1])
        bins, code = bins.expand(shape), code.expand(shape)
        ctx.save_for_backward(log_probs, bins, code)
        ctx.dtype = logits.dtype
        return -(log_probs.gather(-1, bins) * code).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        log_probs, bins, code = ctx.saved_tensors
        return (log_probs.exp().scatter_add_(-1, bins, -code) * grad.unsqueeze(-1)).to(ctx.dtype), None, None


class ScalarHead(nn.Module):
    """feat (…,F) → the expected value of a scalar, learned with the two-hot symexp loss. It starts at exactly 0."""

    def __init__(
        self, feat_dim: int, hidden: int = 128, *, layers: int = 1, bins: int = 101, limit: float = 6.0
    ) -> None:
        super().__init__()
        self.net = mlp([feat_dim, *[hidden] * layers, bins], last_scale=0.0)
        self.code = TwoHot(bins, limit)

    def forward(self, feat: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        return self.code.mean(self.net(feat))

    def loss(self, feat: Float[Tensor, "*N F"], target: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Cross entropy a row."""
        return self.code.loss(self.net(feat), target)


class ContinueHead(nn.Module):
    """feat (…,F) → 1 − P(terminal), learned as a Bernoulli."""

    def __init__(self, feat_dim: int, hidden: int = 128, *, layers: int = 1) -> None:
        super().__init__()
        self.net = mlp([feat_dim, *[hidden] * layers, 1], last_scale=0.0)

    def forward(self, feat: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        return self.net(feat).squeeze(-1).float().sigmoid()

    def loss(self, feat: Float[Tensor, "*N F"], target: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Binary cross entropy a row; ``target`` is 1 where the episode goes on."""
        logits = self.net(feat).squeeze(-1).float()
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")

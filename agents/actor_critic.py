"""The policy, the critics, and the two ways of turning imagined returns into a policy gradient."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from worldmodels import ranks
from worldmodels.heads import ScalarHead, mlp


@dataclass(frozen=True)
class PolicyConfig:
    """The policy: a normal distribution over actions, kept in the box."""

    kind: Literal["bounded", "squashed"] = "squashed"
    """bounded: tanh bounds the mean and actions are clipped, so that the noise keeps its size at the box's edge.
    squashed: tanh bounds the sample, as in SAC, and the noise dies where the mean saturates."""

    units: int = 128
    """Units of each hidden layer."""
    layers: int = 2
    """Hidden layers."""
    min_std: float = 0.1
    """Smallest standard deviation."""
    max_std: float = 1.0
    """Largest standard deviation."""


class Draw(NamedTuple):
    """One sample of a policy."""

    action: Float[Tensor, "*N A"]
    """In [-1, 1], with the gradient of reparametrisation."""
    entropy: Float[Tensor, "*N"]
    """An estimate of the entropy whose gradient is the entropy's."""
    log_prob: Float[Tensor, "*N"]
    """Of this very action, held fixed: what REINFORCE differentiates."""


class Policy(nn.Module):
    """feat (…,F) → a distribution over actions in [-1, 1]; see :class:`PolicyConfig`."""

    def __init__(self, feat_dim: int, action_dim: int, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.net = mlp([feat_dim, *[config.units] * config.layers, 2 * action_dim], last_scale=0.01)

    def forward(self, feat: Float[Tensor, "*N F"]) -> tuple[Float[Tensor, "*N A"], Float[Tensor, "*N A"]]:
        """Mean, before tanh, and standard deviation."""
        mean, raw = self.net(feat).float().chunk(2, -1)
        lowest, highest = self.config.min_std, self.config.max_std
        # At the start raw is near 0: the shift makes the first std close to the largest one.
        return mean, lowest + (highest - lowest) * torch.sigmoid(raw + 2.0)

    def mode(self, feat: Float[Tensor, "*N F"]) -> Float[Tensor, "*N A"]:
        """The deterministic action."""
        return torch.tanh(self(feat)[0])

    def sample(self, feat: Float[Tensor, "*N F"], generator: torch.Generator | None = None) -> Draw:
        """A random action."""
        mean, std = self(feat)
        noise = torch.empty_like(std).normal_(generator=generator)
        return Draw(self.action(mean, std, noise), *self.densities(mean, std, noise))

    def action(
        self, mean: Float[Tensor, "*N A"], std: Float[Tensor, "*N A"], noise: Float[Tensor, "*N A"]
    ) -> Float[Tensor, "*N A"]:
        """The action that standard normal ``noise`` leads to."""
        if self.config.kind == "squashed":
            return torch.tanh(mean + std * noise)
        free = torch.tanh(mean) + std * noise
        # Clipped in value but not in gradient: a sample beyond the edge still tells the mean where to go.
        return free + (free.clamp(-1, 1) - free).detach()

    def densities(
        self, mean: Float[Tensor, "*N A"], std: Float[Tensor, "*N A"], noise: Float[Tensor, "*N A"]
    ) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
        """Entropy and log probability of that action, as :class:`Draw` has them."""
        if self.config.kind == "squashed":
            raw = mean + std * noise
            return -squashed_log_prob(raw, mean, std), squashed_log_prob(raw.detach(), mean, std)
        centre = torch.tanh(mean)
        drawn = (centre + std * noise).detach()
        log_prob = -0.5 * ((drawn - centre) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        return (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1), log_prob.sum(-1)


def squashed_log_prob(
    raw: Float[Tensor, "*N A"], mean: Float[Tensor, "*N A"], std: Float[Tensor, "*N A"]
) -> Float[Tensor, "*N"]:
    """log p(tanh(raw)) for raw ~ N(mean, std²): Haarnoja et al. 2018 (arXiv 1812.05905), appendix C, stably."""
    normal = -0.5 * ((raw - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    jacobian = 2 * (math.log(2) - raw - F.softplus(-2 * raw))
    return (normal - jacobian).sum(-1)


@dataclass(frozen=True)
class CriticConfig:
    """The critics: two-hot symexp heads, each with a slowly following copy."""

    members: int = 2
    """Critics; what bootstraps is the mean of the slow copies less ``pessimism`` times their half spread."""
    pessimism: float = 1.0
    """0: the mean of the slow copies; 1: their minimum (with two members)."""
    rows: Literal["all", "split"] = "all"
    """all: every imagined row teaches every member. split: all rows that follow from a start teach one of them, in turn
    with those from other starts, which is that much cheaper. Replayed rows teach every member."""
    units: int = 128
    """Units of each hidden layer."""
    layers: int = 2
    """Hidden layers."""
    limit: float = 6.0
    """The bins span ±symexp(limit), in return."""
    slow_rate: float = 0.02
    """How far the slow copy moves towards the critic at each update."""


class Critic(nn.Module):
    """feat (…,F) → expected λ-return of the current policy, with a slow copy that gives the targets."""

    def __init__(self, feat_dim: int, config: CriticConfig) -> None:
        super().__init__()
        self.config = config
        self.members = nn.ModuleList(
            ScalarHead(feat_dim, config.units, layers=config.layers, limit=config.limit) for _ in range(config.members)
        )
        self.slow = copy.deepcopy(self.members).requires_grad_(False)
        self.code = cast(ScalarHead, self.members[0]).code

    @staticmethod
    def _logits(members: nn.ModuleList, feat: Float[Tensor, "*N F"]) -> Float[Tensor, "members *N bins"]:
        return torch.stack([member.net(feat) for member in members])  # type: ignore[operator]

    def loss(self, feat: Float[Tensor, "*N F"], target: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Two-hot cross entropy a row, the mean over the members."""
        return self.code.loss(self._logits(self.members, feat), target).mean(0)

    def imagined_loss(self, feat: Float[Tensor, "H N F"], target: Float[Tensor, "H N"]) -> Float[Tensor, "H N"]:
        """The same, of rows that were imagined from N starts: see ``rows`` of :class:`CriticConfig`.

        Split, several ranks learn what one would if each has a multiple of as many starts as there are members; else
        other starts teach each of them.
        """
        if self.config.rows == "all":
            return self.loss(feat, target)
        loss, count = torch.empty_like(target), len(self.members)
        for i, member in enumerate(self.members):
            own = target[:, i::count]
            rows = feat[:, i::count].flatten(0, 1)  # of three axes, a layer's bias would be an operator of its own
            loss[:, i::count] = self.code.loss(member.net(rows), own.flatten()).view(own.shape)  # type: ignore[operator]
        return loss

    def value(self, feat: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        """What bootstraps: see :class:`CriticConfig`."""
        values = self.code.mean(self._logits(self.slow, feat))
        if len(self.slow) == 1 or self.config.pessimism == 0:
            return values.mean(0)
        return values.mean(0) - self.config.pessimism * 0.5 * (values.amax(0) - values.amin(0))

    def follow(self, part: Float[Tensor, ""]) -> None:
        """Move the slow copy towards the critic, by ``part`` of its rate."""
        follow(self.slow, self.members, self.config.slow_rate * part)


@torch.no_grad()
def follow(slow: nn.Module, module: nn.Module, rate: Float[Tensor, ""]) -> None:
    """Move ``slow``'s parameters the fraction ``rate`` of the way towards ``module``'s."""
    own: list[Tensor] = list(slow.parameters())
    leading: list[Tensor] = list(module.parameters())
    torch._foreach_lerp_(own, leading, [rate] * len(own))


class ReturnScale(nn.Module):
    """max(1, EMA of the 5th to 95th percentile range of returns): DreamerV3's return normalisation (eq. 7)."""

    low: Tensor
    high: Tensor

    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    @torch.no_grad()
    def forward(self, returns: Float[Tensor, "*N"]) -> Float[Tensor, ""]:
        """Take in a batch of returns, of all ranks together; answer the scale."""
        ordered = ranks.all_rows(returns.flatten()).sort().values
        low, high = percentile(ordered, 0.05), percentile(ordered, 0.95)
        # A batch that is refused for a NaN must leave no trace.
        self.low.lerp_(torch.where(low.isfinite(), low, self.low), self.rate)
        self.high.lerp_(torch.where(high.isfinite(), high, self.high), self.rate)
        return (self.high - self.low).clamp(min=1.0) + 0 * (low + high)


def percentile(ordered: Float[Tensor, " N"], part: float) -> Float[Tensor, ""]:
    """Interpolated linearly; NaN where any of the numbers, in ascending order, is. ``torch.quantile`` answers the same,
    and in some releases waits for the device."""
    at = part * (len(ordered) - 1)
    below = int(at)
    # A NaN is sorted to the end.
    return torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], at - below) + 0 * ordered[-1]


class Imagined(NamedTuple):
    """What a policy-gradient estimator sees, for N starts and H imagined decisions."""

    returns: Float[Tensor, "N H"]
    """λ-returns that follow each decision; they carry gradients when the imagination did."""
    baseline: Float[Tensor, "N H"]
    """The critic's value of the state each decision was made in; no gradient."""
    log_prob: Float[Tensor, "N H"]
    """Of the chosen action, given a fixed action; gradient to the policy."""
    scale: Float[Tensor, ""]


@runtime_checkable
class Estimator(Protocol):
    """A policy-gradient estimator. ``through_dynamics``: whether imagination has to carry gradients."""

    through_dynamics: bool

    def __call__(self, imagined: Imagined) -> Float[Tensor, "N H"]:
        """A loss for each imagined decision."""
        ...


class Pathwise:
    """Gradients of the returns through the imagined dynamics into the actions (Dreamer, arXiv 1912.01603)."""

    through_dynamics = True

    def __call__(self, imagined: Imagined) -> Float[Tensor, "N H"]:
        return -imagined.returns / imagined.scale


class Reinforce:
    """Score-function gradients with the critic as a baseline (DreamerV3, arXiv 2301.04104, eq. 6)."""

    through_dynamics = False

    def __call__(self, imagined: Imagined) -> Float[Tensor, "N H"]:
        advantage = ((imagined.returns - imagined.baseline) / imagined.scale).detach()
        return -advantage * imagined.log_prob

"""Planners: find actions that score high. A planner sees a score and nothing else: no model, environment or logger.

``score`` takes candidates (B,N,H,A), N plans for each of B problems, and answers (B,N): higher is better, NaN counts
as worst. What is random is drawn once for all B problems, so that a batch gives what its problems give one by one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from agents.optimiser import Adam

Score = Callable[[Float[Tensor, "B N H A"]], Float[Tensor, "B N"]]

_WORST = -1e30


class Plan(NamedTuple):
    """What a search has found."""

    action: Float[Tensor, "B H A"]
    """In [-1, 1]."""
    std: Float[Tensor, "B H A"]
    """How widely good plans lie around it: the noise to explore with."""


class Planner(ABC):
    """Searches the action box [-1, 1] for H actions; never answers a plan that scores below ``mean``, its start."""

    @abstractmethod
    def search(
        self,
        score: Score,
        mean: Float[Tensor, "B H A"],
        std: Float[Tensor, "B H A"],
        *,
        proposals: Float[Tensor, "B P H A"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Plan:
        """The best plan found, starting from a normal of ``mean`` and ``std``, and from ``proposals`` besides."""

    def plan(
        self,
        score: Score,
        mean: Float[Tensor, "B H A"],
        std: Float[Tensor, "B H A"],
        *,
        proposals: Float[Tensor, "B P H A"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B H A"]:
        """The actions of :meth:`search`."""
        return self.search(score, mean, std, proposals=proposals, generator=generator).action


def shift(plan: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
    """A warm start for the next decision: the first action is over, and nothing is known of the last."""
    return torch.cat([plan[:, 1:], torch.zeros_like(plan[:, :1])], 1)


# -- planners that sample ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingConfig:
    """What all sampling planners have in common, and the same budget for each."""

    samples: int = 64
    """Candidates of an iteration."""
    iterations: int = 2
    """Times that the normal is refitted."""
    elites: int = 8
    """Best candidates it is refitted to."""
    min_std: float = 0.05
    """Smallest standard deviation."""


@dataclass(frozen=True)
class CEMConfig(SamplingConfig):
    """The cross-entropy method: a normal refitted to its best samples, iteration after iteration."""


@dataclass(frozen=True)
class ICEMConfig(SamplingConfig):
    """iCEM (arXiv 2008.06389): CEM with noise that is correlated in time, elites that stay, and fewer samples later."""

    colour: float = 2.0
    """Exponent β of the noise's power spectrum 1/fᵝ over the horizon. 0: white."""
    keep: float = 0.3
    """Share of the elites that compete again in the next iteration."""
    decay: float = 1.25
    """What the number of samples is divided by after each iteration, down to twice the elites."""


@dataclass(frozen=True)
class MPPIConfig(SamplingConfig):
    """Model predictive path integral control, as in TD-MPC2 (arXiv 2310.16828): elites, all of which stay in the race,
    are weighted by their scores."""

    temperature: float = 0.5
    """Difference in score, in standard deviations of the elites' scores, that makes a weight e times larger."""


class _Sampler(Planner):
    """The iteration that CEM, iCEM and MPPI share: sample, score, refit a normal to the elites."""

    answers_mean = True
    """Whether the answer is the normal's mean, or the best candidate of all."""

    def __init__(self, config: SamplingConfig, *, keep: int = 0, decay: float = 1.0) -> None:
        samples, iterations, elites = config.samples, config.iterations, config.elites
        if iterations < 1 or not 1 <= elites <= samples:
            raise ValueError(
                "a planner needs at least 1 iteration and 1 elite, and as many samples as elites; got "
                f"{iterations} iterations, {elites} elites and {samples} samples"
            )
        self.counts = [max(int(samples / decay**i), min(samples, 2 * elites)) for i in range(iterations)]
        self.elites = elites
        self.min_std = config.min_std
        self.keep = keep

    def noise(self, shape: tuple[int, int, int], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Standard normal (N,H,A)."""
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

    def weigh(self, scores: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Weights of the elites, given best first; a row sums to 1."""
        return torch.full_like(scores, 1 / scores.shape[1])

    def search(
        self,
        score: Score,
        mean: Float[Tensor, "B H A"],
        std: Float[Tensor, "B H A"],
        *,
        proposals: Float[Tensor, "B P H A"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Plan:
        mean = mean.clamp(-1, 1)
        given = [mean[:, None]] if proposals is None else [mean[:, None], proposals.clamp(-1, 1)]
        candidates, scores = mean.new_zeros(len(mean), 0, *mean.shape[1:]), mean.new_zeros(len(mean), 0)
        best, best_score = mean, torch.full_like(mean[:, 0, 0], -torch.inf, dtype=torch.float32)
        start_score = best_score
        for i, samples in enumerate(self.counts):
            noise = self.noise((samples, *mean.shape[1:]), mean, generator)
            fresh = torch.cat([*given, (mean[:, None] + std[:, None] * noise).clamp(-1, 1)], 1)
            fresh_scores = _rankable(score(fresh))
            candidates, scores = torch.cat([candidates, fresh], 1), torch.cat([scores, fresh_scores], 1)
            top, index = scores.topk(self.elites, 1)
            elites = _take(candidates, index)
            if i == 0:
                start_score = fresh_scores[:, 0]
            best, best_score = _better(best, best_score, elites[:, 0], top[:, 0])
            weight = self.weigh(top)[..., None, None]
            mean = (weight * elites).sum(1).clamp(-1, 1)  # weights may sum to a little more than 1
            std = (weight * (elites - mean[:, None]).square()).sum(1).sqrt().clamp(min=self.min_std)
            candidates, scores, given = elites[:, : self.keep], top[:, : self.keep], []
        if not self.answers_mean:
            return Plan(best, std)
        # The mean of plans that pass an obstacle on either side runs into it.
        fine = _rankable(score(mean[:, None]))[:, 0] >= start_score
        return Plan(torch.where(fine[:, None, None], mean, best), std)


def _rankable(scores: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """NaN, which topk takes for the largest, and infinities as numbers that can be ranked and weighted."""
    return scores.float().nan_to_num(nan=_WORST, neginf=_WORST, posinf=-_WORST)


def _take(candidates: Float[Tensor, "B N H A"], index: Int[Tensor, "B K"]) -> Float[Tensor, "B K H A"]:
    return candidates.gather(1, index[..., None, None].expand(-1, -1, *candidates.shape[2:]))


def _better(
    best: Float[Tensor, "B H A"],
    best_score: Float[Tensor, " B"],
    plan: Float[Tensor, "B H A"],
    score: Float[Tensor, " B"],
) -> tuple[Float[Tensor, "B H A"], Float[Tensor, " B"]]:
    """The better of two plans for each problem, with its score."""
    better = score > best_score
    return torch.where(better[:, None, None], plan, best), torch.where(better, score, best_score)


class CEM(_Sampler):
    """See :class:`CEMConfig`."""

    def __init__(self, config: CEMConfig) -> None:
        super().__init__(config)


class ICEM(_Sampler):
    """See :class:`ICEMConfig`."""

    answers_mean = False

    def __init__(self, config: ICEMConfig) -> None:
        if not 0 <= config.keep <= 1 or not config.decay >= 1:
            raise ValueError(f"keep must lie in 0 to 1 and decay be at least 1; got {config.keep} and {config.decay}")
        super().__init__(config, keep=round(config.keep * config.elites), decay=config.decay)
        self.colour = config.colour

    def noise(self, shape: tuple[int, int, int], like: Tensor, generator: torch.Generator | None) -> Tensor:
        return coloured_noise(super().noise(shape, like, generator), self.colour)


class MPPI(_Sampler):
    """See :class:`MPPIConfig`."""

    def __init__(self, config: MPPIConfig) -> None:
        if not config.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {config.temperature}")
        super().__init__(config, keep=config.elites)
        self.temperature = config.temperature

    def weigh(self, scores: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        spread = scores.std(1, keepdim=True, correction=0).clamp(min=1e-6)
        return ((scores - scores[:, :1]) / (self.temperature * spread)).softmax(1)


def coloured_noise(white: Float[Tensor, "N H A"], exponent: float) -> Float[Tensor, "N H A"]:
    """White noise with its spectrum over H reshaped to 1/f^``exponent``, and unit variance again.

    As Timmer and König (1995) make it, but by filtering, so that exponent 0 gives back the noise itself. The mean over
    H is scaled like the lowest frequency.
    """
    horizon = white.shape[1]
    if horizon < 2:
        return white
    index = torch.arange(horizon // 2 + 1, device=white.device)
    gain = (index.clamp(min=1) / horizon) ** (-exponent / 2)
    # Every frequency but the mean and the highest stands for two.
    twice = 1 + ((index > 0) & (2 * index < horizon)).to(gain.dtype)
    gain = gain / ((twice * gain.square()).sum() / horizon).sqrt()
    return torch.fft.irfft(torch.fft.rfft(white, dim=1) * gain[:, None], n=horizon, dim=1)


# -- gradients ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientConfig:
    """Gradient ascent on the score with Adam from several starts, projected onto the action box after each step."""

    starts: int = 16
    """Plans that are improved side by side, besides the proposals; the first is the mean itself."""
    iterations: int = 10
    """Gradient steps."""
    lr: float = 0.1
    """Adam's learning rate, in units of action."""
    min_std: float = 0.05
    """Standard deviation that the answer is given."""


class GradientPlanner(Planner):
    """See :class:`GradientConfig`. The score has to be differentiable; the best plan met on the way is the answer."""

    def __init__(self, config: GradientConfig) -> None:
        if config.starts < 1 or config.iterations < 1:
            raise ValueError(
                f"a planner needs at least 1 start and 1 iteration; got {config.starts} and {config.iterations}"
            )
        self.config = config

    @torch.enable_grad()
    def search(
        self,
        score: Score,
        mean: Float[Tensor, "B H A"],
        std: Float[Tensor, "B H A"],
        *,
        proposals: Float[Tensor, "B P H A"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Plan:
        cfg = self.config
        shape = (cfg.starts - 1, *mean.shape[1:])
        noise = torch.randn(shape, generator=generator, dtype=mean.dtype, device=mean.device)
        starts = [mean[:, None], mean[:, None] + std[:, None] * noise, *([] if proposals is None else [proposals])]
        plans = torch.cat(starts, 1).clamp(-1, 1).detach().requires_grad_()
        optimiser = Adam([plans], lr=cfg.lr, capturable=plans.is_cuda)
        best, best_score = plans.detach()[:, 0], torch.full_like(mean[:, 0, 0], -torch.inf, dtype=torch.float32)
        for step in range(cfg.iterations + 1):
            scores = score(plans)
            top, index = _rankable(scores.detach()).max(1)
            best, best_score = _better(best, best_score, _take(plans.detach(), index[:, None])[:, 0], top)
            if step < cfg.iterations:
                (plans.grad,) = torch.autograd.grad(-scores.sum(), plans)
                plans.grad.nan_to_num_()
                optimiser.step()
                with torch.no_grad():
                    plans.clamp_(-1, 1)
        return Plan(best, torch.full_like(best, cfg.min_std))

"""Planning that was learned beforehand: one network answers at once what a search would look for.

It learns by hindsight from recorded episodes, with the world model frozen: whatever state came later in an episode was
reached by the actions before it, so it is taken for a goal, and the first of those actions is the answer to imitate.
That this serves on LeWorldModel's latents is from arXiv 2605.08732; relabelling is hindsight experience replay's (arXiv
1707.01495), imitating what is relabelled goal-conditioned supervised learning's (arXiv 1912.06088).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from agents.optimiser import Adam
from worldmodels.heads import mlp
from worldmodels.interface import State, WorldModel


@dataclass(frozen=True)
class AmortisedConfig:
    """The network, and how it learns."""

    units: int = 256
    """Units of each hidden layer."""
    layers: int = 2
    """Hidden layers."""
    updates: int = 2_000
    """Gradient steps."""
    batch: int = 256
    """Relabelled rows in an update."""
    lr: float = 1e-3
    """Adam's learning rate, which falls to zero as a cosine."""
    rows: int = 20_000
    """Rows of recorded episodes to learn from, at most; encoding them is what takes long."""


class HindsightRows(NamedTuple):
    """R rows of whole episodes, one episode after another."""

    z: Float[Tensor, "R D"]
    action: Float[Tensor, "R A"]
    ahead: Int[Tensor, " R"]
    """Rows that follow in the same episode."""


class Relabelled(NamedTuple):
    """B rows with goals that their own episodes reached."""

    z: Float[Tensor, "B D"]
    goal: Float[Tensor, "B D"]
    left: Float[Tensor, " B"]
    """Decisions until the goal was reached, at least 1."""
    action: Float[Tensor, "B A"]


def relabel(rows: HindsightRows, batch: int, longest: int, generator: torch.Generator) -> Relabelled:
    """Random rows, each with a goal 1 to ``longest`` rows later in its episode.

    Raises:
        ValueError: no row has another one after it.
    """
    begin = rows.ahead.clamp(max=1).nonzero()[:, 0]
    if not len(begin):
        raise ValueError("no episode has two rows, so none shows where an action led")
    start = begin[_below(torch.full((batch,), len(begin)), generator).to(begin.device)]
    gap = 1 + _below(rows.ahead[start].clamp(max=longest).cpu(), generator).to(start.device)
    return Relabelled(rows.z[start], rows.z[start + gap], gap.float(), rows.action[start])


def _below(limit: Int[Tensor, " B"], generator: torch.Generator) -> Int[Tensor, " B"]:
    """Uniform in 0 … limit − 1, on the CPU, where the generator is."""
    draw = torch.rand(len(limit), generator=generator, dtype=torch.float64)
    return (draw * limit).long().minimum(limit - 1)


class AmortisedPolicy(nn.Module):
    """(z, goal, decisions left) → action.

    It reads the newest latent alone. How things moved before would help to plan, but it also tells what the recorded
    actor was doing, which goes on more often than not: on reacher, networks that read it imitated better and reached
    less.

    Args:
        longest: decisions left beyond which all count the same.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, latent_dim: int, action_dim: int, longest: int, config: AmortisedConfig) -> None:
        super().__init__()
        self.longest = longest
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("std", torch.ones(latent_dim))
        self.net = mlp([2 * latent_dim + 2, *[config.units] * config.layers, action_dim], last_scale=0.01)

    def fit_normaliser(self, z: Float[Tensor, "R D"]) -> None:
        """Fit what standardises the latents; once, before the first gradient step."""
        self.mean.copy_(z.mean(0))
        self.std.copy_(z.std(0, correction=0).clamp(min=1e-4))

    def forward(
        self, z: Float[Tensor, "B D"], goal: Float[Tensor, "B D"], left: Float[Tensor, " B"]
    ) -> Float[Tensor, "B A"]:
        left = left.clamp(1, self.longest)
        time = torch.stack([left / self.longest, 1 / left], -1)
        latents = [(x.float() - self.mean) / self.std for x in (z, goal)]
        return torch.tanh(self.net(torch.cat([*latents, time], -1)))


def learn(
    policy: AmortisedPolicy, rows: HindsightRows, config: AmortisedConfig, generator: torch.Generator
) -> Iterator[Float[Tensor, ""]]:
    """Train ``policy``; yields the mean squared error of each update's actions.

    Raises:
        ValueError: see :func:`relabel`.
    """
    policy.fit_normaliser(rows.z)
    optimiser = Adam(policy.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.updates)
    for _ in range(config.updates):
        batch = relabel(rows, config.batch, policy.longest, generator)
        loss = F.mse_loss(policy(batch.z, batch.goal, batch.left), batch.action)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        yield loss.detach()


class Amortised:
    """Acts by the network alone. Implements :class:`agents.goals.GoalSeeker`."""

    def __init__(self, model: WorldModel, policy: AmortisedPolicy) -> None:
        self.model = model
        self.policy = policy

    def begin(self) -> None:
        pass

    @torch.no_grad()
    def act(self, state: State, goal: Float[Tensor, "B D"], left: int) -> Float[Tensor, "B A"]:
        return self.policy(self.model.latent(state), goal, torch.full_like(goal[:, 0], left))

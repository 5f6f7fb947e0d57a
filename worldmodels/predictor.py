"""The fast predictor: one MLP over a short window of latents, their differences and the actions between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from worldmodels.heads import mlp_trunk
from worldmodels.windows import differences, joined, unfold_windows


@dataclass(frozen=True)
class WindowConfig:
    """The windowed predictor."""

    history: int = 3
    """Frames in the window, K."""
    hidden: tuple[int, ...] = (256, 192)
    """Units of the layers; the last one is what the heads, the policy and the critic read beside z."""


class WindowPredictor(nn.Module):
    """ẑ = z + Linear(h), h = MLP([z, z − z₋₁, z₋₁ − z₋₂, …, a, a₋₁, …]).

    Differences and actions that would reach before the episode's start are zeros.
    """

    cheap = True

    def __init__(self, dim: int, action_dim: int, config: WindowConfig) -> None:
        super().__init__()
        if config.history < 1:
            raise ValueError(f"the predictor's history must be at least 1 frame, got {config.history}")
        self.history = config.history
        self.hidden_dim = config.hidden[-1]
        # The actions inside the window: the one being taken and the K − 2 before it; older ones are in the differences.
        self.actions = max(1, config.history - 1)
        inputs = config.history * dim + self.actions * action_dim
        self.trunk = mlp_trunk([inputs, *config.hidden])
        self.out = nn.Linear(self.hidden_dim, dim)
        with torch.no_grad():
            # Starting near "nothing changes", the right guess at high frame rates.
            self.out.weight.mul_(0.3)
            self.out.bias.zero_()

    def forward(
        self, z: Float[Tensor, "B K D"], action: Float[Tensor, "B K A"], valid: Bool[Tensor, "B K"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B F"]]:
        newest, past = z[:, -1], self.recall(z, action[:, :-1], valid)
        change, hidden, _ = self.step(past, newest, differences(z, valid), action[:, -1])
        return newest + change, hidden

    def recall(
        self, z: Float[Tensor, "B K D"], action: Float[Tensor, "B K1 A"], valid: Bool[Tensor, "B K"]
    ) -> Float[Tensor, "B P"]:
        """The actions before the newest that the predictor reads, oldest first; zeros before the episode's start."""
        first = action.shape[1] + 1 - self.actions
        return action[:, first:].masked_fill(~valid[:, first:-1, None], 0.0).flatten(1)

    def step(
        self,
        cache: Float[Tensor, "B P"],
        z: Float[Tensor, "B D"],
        moved: Float[Tensor, "B M"],
        action: Float[Tensor, "B A"],
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B F"], Float[Tensor, "B P"]]:
        """See :class:`~worldmodels.interface.CachingPredictor`."""
        actions = torch.cat([cache, action], -1)
        hidden = self.trunk(joined([z, moved, actions], moved.dtype))
        return self.out(hidden), hidden, actions[:, action.shape[1] :]

    def sequence(
        self, z: Float[Tensor, "B T D"], action: Float[Tensor, "B T A"], is_first: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T F"]]:
        """The same for the window ending at each row."""
        predicted, hidden = self(*unfold_windows(z, action, is_first, self.history))
        return predicted.view_as(z), hidden.view(*z.shape[:2], -1)

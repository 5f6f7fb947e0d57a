"""World models whose truth is known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from worldmodels.interface import Batch, Predicted, WorldModel


class PointState(NamedTuple):
    x: Tensor


class Point(WorldModel):
    """An exact model of x' = x + 0.3·a, reward −x², that never ends. Its latent is x, and it has nothing to learn."""

    feat_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.begun: list[Tensor] = []

    def initial(self, batch: int) -> PointState:
        return PointState(torch.zeros(batch, 1))

    def observe(self, state: PointState, prev_action: Tensor, obs: Tensor, is_first: Tensor) -> PointState:
        return PointState(obs)

    def imagine(self, state: PointState, action: Tensor) -> PointState:
        self.begun.append(state.x)
        return PointState(state.x + 0.3 * action)

    def feat(self, state: PointState) -> Tensor:
        return state.x

    def latent(self, state: PointState) -> Tensor:
        return state.x

    def reward(self, feat: Tensor) -> Tensor:
        return -feat[..., 0].square()

    def cont(self, feat: Tensor) -> Tensor:
        return torch.ones_like(feat[..., 0])

    def settled(self, state: PointState) -> Tensor:
        return state.x[:, 0] > 0

    def embed(self, batch: Batch, *, cut: bool = False) -> tuple[PointState, None]:
        return PointState(batch.obs.flatten(0, 1)), None

    def backward_encoder(self, embedded: tuple[PointState, None]) -> None:
        pass

    def losses(self, batch: Batch, embedded: tuple[PointState, None]) -> tuple[Tensor, dict[str, Tensor], Predicted]:
        """Its predictions are exact: what each row is, from the one before it."""
        began, feat = batch.is_first.flatten(), self.feat(embedded[0])
        predicted = Predicted(torch.cat([feat, feat]), torch.arange(len(began)), (~began).float())
        return 0 * self.unused.sum(), {}, predicted

"""Encoders from one observation to one latent, and the fixed input normaliser in front of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from worldmodels.heads import mlp
from worldmodels.projector import BatchNormProjector


@dataclass(frozen=True)
class ConvConfig:
    """The convolutional encoder: a strided stem and strided 4×4 stages."""

    channels: tuple[int, ...] = (24, 48, 48)
    """Output channels of each stage. The first is an 8×8 convolution of stride 4, the others 4×4 of stride 2."""
    hidden: int = 256
    """Units of the layer between the convolutions and the latent."""
    projector: bool = False
    """Normalise that layer by BatchNorm over rows (LeWorldModel's projector) and not LayerNorm over units."""


class Normaliser(nn.Module):
    """(obs − mean) / scale with a mean for each pixel and one scale, fitted once on the first episodes.

    Subtracting the mean image leaves what moves; on cartpole it raised the linear R² of the pole's angle more than any
    other change. The fit is part of the weights: it is saved and restored with them.
    """

    mean: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(self, obs_shape: tuple[int, ...], *, per_feature: bool) -> None:
        super().__init__()
        self.per_feature = per_feature
        self.register_buffer("mean", torch.zeros(obs_shape))
        self.register_buffer("scale", torch.ones(obs_shape if per_feature else (1,) * len(obs_shape)))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(self, obs: Shaped[Tensor, "N *obs"], *, std: float = 0.5, smallest: float = 1e-3) -> None:
        """Fit to ``obs``: afterwards the residual's standard deviation is ``std`` (over everything, or per feature)."""
        obs = obs.float()
        self.mean.copy_(obs.mean(0))
        residual = obs - self.mean
        spread = residual.std(0) if self.per_feature else residual.std()
        # A feature that never moved in the first episodes keeps its own units rather than being blown up.
        spread = torch.where(spread > smallest, spread, torch.full_like(spread, std))
        self.scale.copy_(spread / std)
        self.fitted.fill_(True)

    def forward(self, obs: Shaped[Tensor, "N *obs"]) -> Float[Tensor, "N *obs"]:
        return torch.sub(obs, self.mean).mul_(1 / self.scale)


class ConvEncoder(nn.Module):
    """Pixels (N,C,H,W) float → latent (N,D). Works in channels_last, which is worth 1.5–2.5× on CPU."""

    def __init__(self, obs_shape: tuple[int, int, int], dim: int, config: ConvConfig) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = obs_shape[0]
        for i, out in enumerate(config.channels):
            kernel, stride = (8, 4) if i == 0 else (4, 2)
            stages += [nn.Conv2d(channels, out, kernel, stride, padding=(kernel - stride) // 2), nn.ReLU()]
            channels = out
        self.convolutions = nn.Sequential(*stages)
        # The weights stay contiguous: fused Adam would pair channels_last ones wrongly with moments from a checkpoint.
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, *obs_shape)).numel()
        self.out = BatchNormProjector(flat, config.hidden, dim) if config.projector else mlp([flat, config.hidden, dim])

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D"]:
        y = self.convolutions(x.contiguous(memory_format=torch.channels_last))
        return self.out(y.permute(0, 2, 3, 1).flatten(1))


class StateEncoder(nn.Module):
    """State vectors (N,S) float → latent (N,D)."""

    def __init__(self, size: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = mlp([size, hidden, hidden, dim])

    def forward(self, x: Float[Tensor, "N S"]) -> Float[Tensor, "N D"]:
        return self.net(x)


def random_shift(x: Float[Tensor, "N C H W"], pixels: int) -> Float[Tensor, "N C H W"]:
    """DrQ's random shift (arXiv 2004.13649): each image moved by up to ``pixels`` whole pixels, edges replicated."""
    n, _, h, w = x.shape
    padded = torch.nn.functional.pad(x, (pixels,) * 4, mode="replicate")
    dy = torch.randint(0, 2 * pixels + 1, (n,), device=x.device)
    dx = torch.randint(0, 2 * pixels + 1, (n,), device=x.device)
    rows = dy[:, None] + torch.arange(h, device=x.device)
    cols = dx[:, None] + torch.arange(w, device=x.device)
    index = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)

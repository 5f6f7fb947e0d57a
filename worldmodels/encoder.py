"""Encoders from one observation to one latent, and the fixed input normaliser in front of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from worldmodels.heads import mlp
from worldmodels.projector import BatchNormProjector
from worldmodels.windows import product_dtype


@dataclass(frozen=True)
class ConvConfig:
    """The convolutional encoder: a strided stem and strided 4×4 stages."""

    channels: tuple[int, ...] = (24, 48, 48)
    """Output channels of each stage. The first is an 8×8 convolution of stride 4, the others 4×4 of stride 2."""
    hidden: int = 256
    """Units of the layer between the convolutions and the latent; also those of the encoder of states."""
    projector: bool = False
    """Normalise that layer by BatchNorm over rows (LeWorldModel's projector) and not LayerNorm over units."""


@dataclass(frozen=True)
class KeypointConfig:
    """The keypoint encoder: two convolutions and the mean position of what each map responds to."""

    stem: int = 24
    """Output channels of the first convolution, 8×8 with stride 4."""
    keypoints: int = 32
    """Maps, each summed up by one position."""
    kernel: int = 3
    """Side of the second convolution, which makes the maps; odd. 1 sees no cell's neighbours, in two thirds of the
    encoder's time."""
    sharpness: float = 10.0
    """What the maps are multiplied by at the start, before the softmax; learned for each map."""
    hidden: int = 256
    """Units of the layer between the positions and the latent."""


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
        return obs.to(self.mean.dtype, copy=True).sub_(self.mean).mul_(1 / self.scale)


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


class KeypointEncoder(nn.Module):
    """Images (N,C,H,W), normalised → latent (N,D), through spatial softmaxes (Finn et al. 2016, arXiv 1509.06113).

    Each map gives the expected position of its softmax: a coordinate of sub-pixel resolution that moves smoothly with
    what it follows. Small things that matter, as a pole's angle, are thus in the latent from the start, where flattened
    maps have to find them by a gradient that hardly notices them.
    """

    grid: Tensor

    def __init__(self, obs_shape: tuple[int, int, int], dim: int, config: KeypointConfig) -> None:
        super().__init__()
        # The weights stay contiguous: fused Adam would pair channels_last ones wrongly with moments from a checkpoint.
        self.stem = nn.Conv2d(obs_shape[0], config.stem, 8, 4)
        # A softmax over positions does not see what is added to all of them.
        self.maps = nn.Conv2d(config.stem, config.keypoints, config.kernel, padding="same", bias=False)
        self.log_sharpness = nn.Parameter(torch.full((config.keypoints,), math.log(config.sharpness)))
        with torch.no_grad():
            height, width = self.stem(torch.zeros(1, *obs_shape)).shape[-2:]
        down, across = torch.meshgrid(torch.linspace(-3, 3, height), torch.linspace(-3, 3, width), indexing="ij")
        one = torch.ones(height * width)
        self.register_buffer("grid", torch.stack([one, across.flatten(), down.flatten()]), persistent=False)
        self.out = mlp([2 * config.keypoints, config.hidden, dim])
        self.linear = nn.Linear(2 * config.keypoints, dim)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D"]:
        positions = self.positions(x).flatten(1)
        return self.linear(positions) + self.out(positions)

    def positions(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N 2 P"]:
        """Across and down, in [-3, 3], of each keypoint."""
        # The maps come out of their convolution sharpened, which spares three passes over them.
        weight = self.maps.weight * self.log_sharpness.exp().view(-1, 1, 1, 1)
        maps = F.conv2d(F.relu(strided_convolution(x, self.stem)), weight, padding="same")
        return expected_positions(maps, self.grid)


def strided_convolution(x: Float[Tensor, "N C H W"], conv: nn.Conv2d) -> Float[Tensor, "N O h w"]:
    """``conv(x)``, of a kernel twice as high as its stride, on a processor in half the time.

    The rows of each stride become channels of one row, so that the convolution has enough channels for channels_last
    to be worth its while: of three it is slow, and its backward pass takes three times as long.
    """
    stride, width = conv.stride[0], x.shape[3]
    x = x.to(product_dtype(x))  # before it is copied about
    high = 2 + (x.shape[2] - 2 * stride) // stride
    rows = x[:, :, : high * stride].unflatten(2, (high, stride)).transpose(2, 3).reshape(len(x), -1, high, width)
    weight = conv.weight.unflatten(2, (2, stride)).transpose(2, 3).reshape(conv.out_channels, -1, 2, 2 * stride)
    return F.conv2d(rows.contiguous(memory_format=torch.channels_last), weight, conv.bias, stride=(1, stride))


def expected_positions(maps: Float[Tensor, "N P h w"], grid: Float[Tensor, "G h*w"]) -> Float[Tensor, "N G-1 P"]:
    """The means under each map's softmax of ``grid``'s rows, the first of which is ones and left out.

    In float32, since bfloat16 would round positions to a fraction of a pixel.
    """
    return _ExpectedPositions.apply(maps, grid)


class _ExpectedPositions(torch.autograd.Function):
    """One product for the softmax's sum and its means, and one for their gradient."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, grid: Tensor) -> Tensor:
        weight = maps.permute(0, 2, 3, 1).flatten(1, 2).to(torch.promote_types(maps.dtype, torch.float32), copy=True)
        # Weights of 1e-17 count for nothing; denormal numbers, here or times a gradient, would take ten times as long.
        weight.sub_(weight.amax(1, keepdim=True)).clamp_(min=-40).exp_()
        with torch.autocast(maps.device.type, enabled=False):
            sums = grid.to(weight.dtype) @ weight
        total = sums[:, :1]
        positions = sums[:, 1:] / total
        ctx.save_for_backward(weight, total, positions, grid)
        ctx.maps = maps.dtype, maps.shape[2:]
        return positions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, total, positions, grid = ctx.saved_tensors
        dtype, shape = ctx.maps
        grad = grad / total
        of_sums = torch.cat([-(grad * positions).sum(1, keepdim=True), grad], 1)
        of_maps = (grid.t().to(weight.dtype) @ of_sums).mul_(weight).to(dtype)
        return of_maps.unflatten(1, shape).permute(0, 3, 1, 2), None


class StateEncoder(nn.Module):
    """State vectors (N,S) float → latent (N,D)."""

    def __init__(self, size: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = mlp([size, hidden, hidden, dim])

    def forward(self, x: Float[Tensor, "N S"]) -> Float[Tensor, "N D"]:
        return self.net(x)


def random_shift(x: Float[Tensor, "N C H W"], pixels: int) -> Float[Tensor, "N C H W"]:
    """Each image moved at random by up to ``pixels`` whole pixels either way."""
    down, across = (torch.randint(0, 2 * pixels + 1, (len(x),), device=x.device) - pixels for _ in range(2))
    return shift_images(x, down, across)


def shift_images(
    images: Shaped[Tensor, "N C H W"], down: Int[Tensor, " N"], across: Int[Tensor, " N"]
) -> Shaped[Tensor, "N C H W"]:
    """What each image shows, so many whole pixels further down and across, its edges repeated: DrQ's shift (arXiv
    2004.13649, section 3.1)."""
    height, width = images.shape[2:]
    rows = (down[:, None] + torch.arange(height, device=images.device)).clamp(0, height - 1)
    columns = (across[:, None] + torch.arange(width, device=images.device)).clamp(0, width - 1)
    moved = images.gather(2, rows[:, None, :, None].expand(images.shape))
    return moved.gather(3, columns[:, None, None, :].expand(images.shape))

"""A decoder from latents to pictures, for people to look at. Nothing that learns to act depends on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_LARGEST_GRID = 8
_CHANNELS = 32


class Decoder(nn.Module):
    """Latents (N,D) → pictures (N,C,H,W) in [0, 1], as logits around one learned background picture.

    An MLP draws a small grid, which transposed convolutions double up to a quarter of the picture; a sub-pixel
    convolution enlarges it fourfold (on CPU 1.5× as fast as a transposed one). Any size does: what is drawn beyond the
    picture is cut off. At 64×64 pixels, forward and backward of 32 pictures take about 8 ms on one CPU core.
    """

    started: Tensor

    def __init__(self, dim: int, obs_shape: tuple[int, int, int], *, hidden: int = 256) -> None:
        super().__init__()
        channels, height, width = obs_shape
        grid, doublings = (-(-height // 8), -(-width // 8)), 1
        while min(grid) > _LARGEST_GRID:
            grid, doublings = (-(-grid[0] // 2), -(-grid[1] // 2)), doublings + 1
        self.trunk = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, _CHANNELS * grid[0] * grid[1]),
            nn.Unflatten(1, (*grid, _CHANNELS)),
        )
        stages: list[nn.Module] = [nn.ReLU()]
        for i in range(doublings):
            out = _CHANNELS if i < doublings - 1 else _CHANNELS // 2
            stages += [nn.ConvTranspose2d(_CHANNELS, out, 4, 2, padding=1), nn.ReLU()]
        last = nn.Conv2d(_CHANNELS // 2, 16 * channels, 3, padding=1)
        with torch.no_grad():
            # Starting near the background, so that learning is about what differs from it.
            last.weight.mul_(0.1)
        self.convolutions = nn.Sequential(*stages, last, nn.PixelShuffle(4))
        self.background = nn.Parameter(torch.zeros(obs_shape))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def start(self, pictures: Float[Tensor, "N C H W"]) -> None:
        """Make the mean of ``pictures`` the background; once, before the first gradient step."""
        self.background.copy_(torch.logit(pictures.mean(0), eps=0.01))
        self.started.fill_(True)

    def forward(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N C H W"]:
        return self._logits(z).sigmoid()

    def loss(self, z: Float[Tensor, "N D"], pictures: Float[Tensor, "N C H W"]) -> Float[Tensor, ""]:
        """Binary cross entropy a pixel: least at the mean picture, as squared error is, but never flat in between."""
        return F.binary_cross_entropy_with_logits(self._logits(z), pictures)

    def _logits(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N C H W"]:
        height, width = self.background.shape[1:]
        # The grid is drawn as (N,H,W,C): the convolutions are faster in channels_last, everything after them is slower.
        drawn = self.convolutions(self.trunk(z).permute(0, 3, 1, 2)).contiguous()
        return drawn[:, :, :height, :width] + self.background

"""A Vision Transformer encoder (arXiv 2010.11929), ViT-tiny with 14×14 patches by default as in LeWorldModel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from worldmodels.projector import BatchNormProjector


@dataclass(frozen=True)
class ViTConfig:
    """The Vision Transformer encoder. The defaults are LeWorldModel's ViT-tiny (5.5M parameters, projector 0.8M)."""

    patch: int = 14
    """Side of a square patch in pixels; the image's height and width are multiples of it."""
    width: int = 192
    """Size of a token."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 3
    """Attention heads; the width is a multiple of it."""
    mlp: int = 768
    """Hidden units of each block's MLP."""
    projector: int = 2048
    """Hidden units of the BatchNorm projector from the [CLS] token to the latent."""


class ViTEncoder(nn.Module):
    """Pixels (N,C,H,W) float, normalised → latent (N,D): the [CLS] token through a :class:`BatchNormProjector`.

    ``obs_shape`` is (C, H, W). Raises ValueError where the image is not made of whole patches, or the width of whole
    heads, or where there is no block.
    """

    def __init__(self, obs_shape: tuple[int, int, int], dim: int, config: ViTConfig) -> None:
        super().__init__()
        channels, height, width = obs_shape
        if height % config.patch or width % config.patch:
            raise ValueError(
                f"images of {height}×{width} cannot be cut into {config.patch}×{config.patch} patches; "
                "choose a size that is a multiple of the patch, or another patch"
            )
        if config.width % config.heads:
            raise ValueError(f"the ViT's width {config.width} is not a multiple of its {config.heads} heads")
        if config.depth < 1:
            raise ValueError(f"the ViT needs a depth of at least 1 block, got {config.depth}")
        self.patch = config.patch
        patches = (height // config.patch) * (width // config.patch)
        self.embed = nn.Linear(channels * config.patch**2, config.width)
        self.cls = nn.Parameter(torch.zeros(config.width))
        self.position = nn.Parameter(torch.zeros(patches + 1, config.width))
        self.blocks = nn.Sequential(*[_Block(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)
        self.project = BatchNormProjector(config.width, config.projector, dim)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D"]:
        # One patch is one row of a matrix: (N,C,h,p,w,p) → (N,h·w,C·p·p). The same as a p×p convolution of stride p.
        n, c, h, w = x.shape
        p = self.patch
        patches = x.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * p * p)
        tokens = torch.cat([self.cls.expand(n, 1, -1), self.embed(patches)], 1) + self.position
        tokens = self.blocks[:-1](tokens)
        # Of the last block only [CLS] is read: most of its work for the others would be thrown away.
        return self.project(self.norm(self.blocks[-1](tokens, wanted=1)[:, 0]))


class _Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(nn.Linear(config.width, config.mlp), nn.GELU(), nn.Linear(config.mlp, config.width))

    def forward(self, x: Float[Tensor, "N L W"], wanted: int | None = None) -> Float[Tensor, "N M W"]:
        """The first ``wanted`` tokens of what leaves the block, or all."""
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q[:, :, :wanted], k, v)
        x = x[:, :wanted] + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

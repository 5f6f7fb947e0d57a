"""LeWorldModel's predictor (arXiv 2603.19312): a causal transformer over K latents, each conditioned on its action."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from worldmodels.projector import BatchNormProjector
from worldmodels.windows import rows_since_start, unfold_windows


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer predictor. The defaults are LeWorldModel's published ones; its tokens have the latent's size."""

    history: int = 3
    """Frames in the window, K."""
    depth: int = 6
    """Transformer blocks."""
    heads: int = 16
    """Attention heads."""
    head_dim: int = 64
    """Size of one head; heads × head_dim need not be the latent's size."""
    mlp: int = 2048
    """Hidden units of each block's MLP."""
    dropout: float = 0.1
    """Dropped share of attention weights and of the outputs of attention and MLP, in train mode."""
    projector: int = 2048
    """Hidden units of the BatchNorm projector from the last token to the predicted latent."""


class TransformerPredictor(nn.Module):
    """(z_{t−K+1..t}, a_{t−K+1..t}) → ẑ_{t+1} and the last token's features (F = D) that it is projected from.

    Actions act through AdaLN-zero (arXiv 2212.09748): each token's action shifts, scales and gates its residual
    branches, and all gates start at 0, so that the blocks start as the identity whatever the action. A token's position
    counts from the memory's start, so a context of c < K latents uses positions 0 … c − 1 wherever it is met.

    Dropout and the projector's BatchNorm make train and eval mode differ: see :class:`BatchNormProjector`.
    Raises ValueError where history, depth, heads or head_dim is below 1.
    """

    def __init__(self, dim: int, action_dim: int, config: TransformerConfig) -> None:
        super().__init__()
        for name in ("history", "depth", "heads", "head_dim"):
            if getattr(config, name) < 1:
                raise ValueError(f"the predictor's {name} must be at least 1, got {getattr(config, name)}")
        self.history = config.history
        self.hidden_dim = dim
        self.embed_action = nn.Sequential(nn.Linear(action_dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.position = nn.Parameter(0.02 * torch.randn(config.history, dim))
        self.blocks = nn.ModuleList([_AdaLNBlock(dim, config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(dim)
        self.project = BatchNormProjector(dim, config.projector, dim)

    def forward(
        self, z: Float[Tensor, "B K D"], action: Float[Tensor, "B K A"], valid: Bool[Tensor, "B K"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """The next latent after a window, as the Predictor protocol says; ``hidden`` has the latent's size."""
        # Zeroed besides being masked: a masked NaN would still reach the output through 0 · NaN.
        z = torch.where(valid[..., None], z, 0.0)
        action = torch.where(valid[..., None], action, 0.0)
        position = (valid.cumsum(1) - 1).clamp(min=0)
        causal = torch.ones(self.history, self.history, dtype=torch.bool, device=z.device).tril()
        # An invalid slot looks at itself, because a softmax over nothing is NaN; nobody looks at it.
        itself = torch.eye(self.history, dtype=torch.bool, device=z.device)
        hidden = self._tokens(z, action, position, (causal & valid[:, None]) | itself)[:, -1]
        return self.project(hidden), hidden

    def sequence(
        self, z: Float[Tensor, "B T D"], action: Float[Tensor, "B T A"], is_first: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
        """What :meth:`forward` answers for the window ending at each row, none reaching across ``is_first`` or row 0.

        Up to T = K rows this is one causal pass, the training form of LeWorldModel; beyond, one window for each row.
        """
        b, t, _ = z.shape
        if t > self.history:
            predicted, hidden = self(*unfold_windows(z, action, is_first, self.history))
            return predicted.view(b, t, -1), hidden.view(b, t, -1)
        position = rows_since_start(is_first)
        row = torch.arange(t, device=z.device)
        age = row[:, None] - row
        hidden = self._tokens(z, action, position, (age >= 0) & (age <= position[..., None]))
        return self.project(hidden.flatten(0, 1)).view(b, t, -1), hidden

    def _tokens(
        self,
        z: Float[Tensor, "B L D"],
        action: Float[Tensor, "B L A"],
        position: Int[Tensor, "B L"],
        visible: Bool[Tensor, "B L L"],
    ) -> Float[Tensor, "B L D"]:
        """The features of every token; ``visible[b, i, j]``: token i looks at token j."""
        condition = F.silu(self.embed_action(action))
        x = z + self.position[position]
        for block in self.blocks:
            x = block(x, condition, visible.unsqueeze(1))
        return self.norm(x)


class _AdaLNBlock(nn.Module):
    """x + gate·attention(modulated norm(x)), then x + gate·MLP(modulated norm(x)); the condition gives all the gates,
    scales and shifts."""

    def __init__(self, dim: int, config: TransformerConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.dropout = config.dropout
        # No affine parameters: the modulation takes their place.
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(config.dropout))
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.mlp),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.mlp, dim),
            nn.Dropout(config.dropout),
        )

    def forward(
        self, x: Float[Tensor, "B L D"], condition: Float[Tensor, "B L D"], visible: Bool[Tensor, "B 1 L L"]
    ) -> Float[Tensor, "B L D"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        x = x + gate1 * self._attention(self.norm(x) * (1 + scale1) + shift1, visible)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)

    def _attention(self, x: Tensor, visible: Tensor) -> Tensor:
        b, length, _ = x.shape
        q, k, v = self.qkv(x).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
        return self.out(attended.transpose(1, 2).reshape(b, length, -1))

"""LeWorldModel's predictor (arXiv 2603.19312): a causal transformer over K latents, each conditioned on its action."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from worldmodels.projector import BatchNormProjector
from worldmodels.windows import product_dtype, rows_since_start, unfold_windows


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


class _Keys(NamedTuple):
    """What one block lets later tokens see of L tokens. N is 1 where all futures of a stream share them."""

    k: Float[Tensor, "B N L heads d"]
    v: Float[Tensor, "B N L heads d"]


class _Projections(NamedTuple):
    """A block's weights of attention, in the precision that they are used in: cast once for all futures."""

    query: Float[Tensor, "I D"]
    key_value: Float[Tensor, "2*I D"]
    alone: Float[Tensor, "D D"]
    """Output times value: what attention makes of a token that sees itself alone, but for the bias."""


class _Shared(NamedTuple):
    """The observed tokens of a window: what all futures of a stream see before their own tokens."""

    visible: Bool[Tensor, "B C"]
    position: Int[Tensor, " B"]
    """Of the first token after them."""
    keys: list[_Keys] | None
    """Each block's. None: there are no tokens."""


class _Step(NamedTuple):
    """A future's own token, before any block; kept, because it gets another position when the window slides."""

    z: Float[Tensor, "B N 1 D"]
    modulation: list[Float[Tensor, "B N 1 6*D"]]
    """Each block's: they follow from the action alone."""


class TransformerCache(NamedTuple):
    """N futures of each of B streams, some steps on. See :meth:`TransformerPredictor.recall`."""

    shared: list[_Shared]
    """Entry s: what is left of the observed tokens once the window has slid by s; the last is empty."""
    projections: list[_Projections]
    """Each block's."""
    imagined: int
    """Steps so far."""
    steps: tuple[_Step, ...]
    """Those that the window may still hold, at most K."""
    keys: list[_Keys] | None
    """Each block's, of all own tokens in the window. None before the first step, and once the window slides."""


class TransformerPredictor(nn.Module):
    """(z_{t−K+1..t}, a_{t−K+1..t}) → ẑ_{t+1} and the last token's features (F = D) that it is projected from.

    Actions act through AdaLN-zero (arXiv 2212.09748): each token's action shifts, scales and gates its residual
    branches, and all gates start at 0, so that the blocks start as the identity whatever the action. A token's position
    counts from the memory's start, so a context of c < K latents uses positions 0 … c − 1 wherever it is met.

    Dropout and the projector's BatchNorm make train and eval mode differ: see :class:`BatchNormProjector`.
    Raises ValueError where history, depth, heads or head_dim is below 1.
    """

    cheap = False

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
        z = z.masked_fill(~valid[..., None], 0.0)
        action = action.masked_fill(~valid[..., None], 0.0)
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

    # -- many futures of one memory ------------------------------------------------------------------------------------

    def recall(
        self, z: Float[Tensor, "B K D"], action: Float[Tensor, "B K1 A"], valid: Bool[Tensor, "B K"]
    ) -> TransformerCache:
        """The cache that :meth:`step` begins with: keys and values of what has been observed, once for all futures.

        ``action`` is what left between the K latents; the newest latent's own is the first that a future takes. Every
        stream must have observed something. Waits for the device, to learn how long the longest memory is.
        """
        rows = int(valid.sum(1).max()) - 1
        first = self.history - 1 - rows
        z, action, valid = z[:, first:-1], action[:, first:], valid[:, first:-1]
        projections = [block.projections() for block in self._layers()]
        shared = [self._observed(z[:, s:], action[:, s:], valid[:, s:], projections) for s in range(rows)]
        nothing = _Shared(valid[:, :0], torch.zeros(len(z), dtype=torch.long, device=z.device), None)
        return TransformerCache([*shared, nothing], projections, 0, (), None)

    def step(
        self,
        cache: TransformerCache,
        z: Float[Tensor, "R D"],
        moved: Float[Tensor, "R M"],
        action: Float[Tensor, "R A"],
    ) -> tuple[Float[Tensor, "R D"], Float[Tensor, "R D"], TransformerCache]:
        """What :meth:`forward` answers for futures whose newest latent is ``z``, less ``z``, and the cache of the next
        step.

        Row-major over streams, then futures; always as many. In eval mode only, since dropout is left out. While the
        window fills, the new token alone is computed, and sees the others' keys. Once it slides, each token has another
        position and one fewer before it, so that no key is what it was, and all of the future's own tokens in the
        window are computed again; their modulations, and what was observed, are not.
        """
        observed = len(cache.shared) - 1
        slid = observed + 1 + cache.imagined - self.history
        shared = cache.shared[min(max(slid, 0), observed)]
        b = len(shared.visible)
        condition = F.silu(self.embed_action(action)).view(b, -1, 1, z.shape[-1])
        new = _Step(z.view_as(condition), [block.modulation(condition) for block in self._layers()])
        steps = (*cache.steps, new)[-self.history :]
        fed, past, known = (steps, None, 0) if slid > 0 else ((new,), cache.keys, cache.imagined)
        own = torch.arange(known + len(fed), device=z.device)
        position = self.position[shared.position[:, None] + own[known:]]
        visible = torch.cat(
            [
                shared.visible[:, None].expand(-1, len(fed), -1),
                (own <= own[known:, None]).expand(b, -1, -1),
            ],
            -1,
        )
        alone = known == 0 and shared.keys is None
        x = _join([step.z for step in fed]) + position[:, None]
        modulation = [_join(blocks) for blocks in zip(*(step.modulation for step in fed), strict=True)]
        hidden, keys = self._extend(x, modulation, visible, cache.projections, past, shared.keys, alone=alone)
        hidden = self.norm(hidden[:, :, 0]).flatten(0, 1)
        kept = keys if slid < 0 else None
        return self.project(hidden) - z, hidden, cache._replace(imagined=cache.imagined + 1, steps=steps, keys=kept)

    def _layers(self) -> list[_AdaLNBlock]:
        return cast(list[_AdaLNBlock], list(self.blocks))

    def _observed(
        self,
        z: Float[Tensor, "B C D"],
        action: Float[Tensor, "B C A"],
        valid: Bool[Tensor, "B C"],
        projections: list[_Projections],
    ) -> _Shared:
        z = z.masked_fill(~valid[..., None], 0.0)
        condition = F.silu(self.embed_action(action.masked_fill(~valid[..., None], 0.0)))[:, None]
        row = torch.arange(z.shape[1], device=z.device)
        visible = ((row <= row[:, None]) & valid[:, None]) | (row == row[:, None])
        x = (z + self.position[(valid.cumsum(1) - 1).clamp(min=0)])[:, None]
        modulation = [block.modulation(condition) for block in self._layers()]
        _, keys = self._extend(x, modulation, visible, projections, None, None, alone=False)
        return _Shared(valid, valid.sum(1), keys)

    def _extend(
        self,
        x: Float[Tensor, "B N M D"],
        modulation: list[Float[Tensor, "B N M 6*D"]],
        visible: Bool[Tensor, "B M L"],
        projections: list[_Projections],
        past: list[_Keys] | None,
        shared: list[_Keys] | None,
        *,
        alone: bool,
    ) -> tuple[Float[Tensor, "B N 1 D"], list[_Keys]]:
        """Through all blocks: the newest token's features, and each block's keys of the past and these tokens."""
        keys = []
        for i, block in enumerate(self._layers()):
            # Of the last block only the newest token's output counts.
            wanted = 1 if i == len(self.blocks) - 1 else x.shape[2]
            x, known = block.extend(
                x,
                modulation[i],
                visible,
                projections[i],
                past[i] if past else None,
                shared[i] if shared else None,
                wanted=wanted,
                alone=alone,
            )
            keys.append(known)
        return x, keys

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

    def extend(
        self,
        x: Float[Tensor, "B N M D"],
        modulation: Float[Tensor, "B N M 6*D"],
        visible: Bool[Tensor, "B M L"],
        projections: _Projections,
        past: _Keys | None,
        shared: _Keys | None,
        *,
        wanted: int,
        alone: bool,
    ) -> tuple[Float[Tensor, "B N W D"], _Keys]:
        """The last ``wanted`` tokens' outputs, and the keys of ``past`` and these tokens. L counts those of ``shared``
        first, then past, then these. With ``alone`` the first token sees itself alone: no query is needed to tell what
        it attends to. Without dropout."""
        shift, scale = modulation.chunk(6, -1)[:2]
        inner = torch.addcmul(shift, self.norm(x), 1 + scale)
        k, v = F.linear(inner, projections.key_value).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        keys = _Keys(k, v) if past is None else _Keys(torch.cat([past.k, k], 2), torch.cat([past.v, v], 2))
        x, inner = x[:, :, -wanted:], inner[:, :, -wanted:]
        attended = []
        if alone and wanted == visible.shape[1]:
            attended.append(F.linear(inner[:, :, :1], projections.alone, cast(nn.Linear, self.out[0]).bias))
            inner = inner[:, :, 1:]
        if inner.shape[2]:
            q = F.linear(inner, projections.query).unflatten(-1, (self.heads, -1))
            attended.append(self.out(_attend(q, keys, shared, visible[:, -q.shape[2] :])))
        gate, shift2, scale2, gate2 = modulation[:, :, -wanted:].chunk(6, -1)[2:]
        x = torch.addcmul(x, gate, _join(attended))
        inner = torch.addcmul(shift2, self.norm(x), 1 + scale2)
        return torch.addcmul(x, gate2, self.mlp(inner)), keys

    def projections(self) -> _Projections:
        """For all the futures of a memory."""
        weight, out = self.qkv.weight, cast(nn.Linear, self.out[0]).weight
        dtype, inner = product_dtype(weight), len(weight) // 3
        with torch.autocast(weight.device.type, enabled=False):
            alone = out @ weight[2 * inner :]
        return _Projections(*(x.to(dtype) for x in (weight[:inner], weight[inner:], alone)))

    def _attention(self, x: Tensor, visible: Tensor) -> Tensor:
        b, length, _ = x.shape
        q, k, v = self.qkv(x).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
        return self.out(attended.transpose(1, 2).reshape(b, length, -1))


def _join(tokens: Sequence[Float[Tensor, "B N _ X"]]) -> Float[Tensor, "B N M X"]:
    return tokens[0] if len(tokens) == 1 else torch.cat(list(tokens), 2)


def _attend(
    q: Float[Tensor, "B N M heads d"], own: _Keys, shared: _Keys | None, visible: Bool[Tensor, "B M L"]
) -> Float[Tensor, "B N M inner"]:
    """Attention over few tokens: products and sums, because a matrix product for each future and head is too small to
    be worth its call. What is shared is never copied for each future."""
    logits = torch.stack([(q * k[:, :, None]).sum(-1) for k in own.k.unbind(2)], 3)
    if shared is not None:
        logits = torch.cat([torch.einsum("bnmhd,blhd->bnmlh", q, shared.k[:, 0]), logits], 3)
    logits = logits.float() * q.shape[-1] ** -0.5
    weight = logits.masked_fill(~visible[:, None, :, :, None], -torch.inf).softmax(3).to(q.dtype)
    before = weight.shape[3] - own.k.shape[2]
    first, *others = zip(weight[:, :, :, before:, :, None].unbind(3), own.v[:, :, :, None].unbind(2), strict=True)
    attended = first[0] * first[1]
    for w, v in others:
        attended = torch.addcmul(attended, w, v)
    if shared is not None:
        attended = attended + torch.einsum("bnmlh,blhd->bnmhd", weight[:, :, :, :before], shared.v[:, 0])
    return attended.flatten(-2)

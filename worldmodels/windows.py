"""Windows over replayed sequences: what a predictor with a history of K sees at each row of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def rows_since_start(is_first: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """How many rows before it a row remembers: 0 at ``is_first`` and at row 0, where a sequence's memory begins."""
    row = torch.arange(is_first.shape[1], device=is_first.device)
    return row - row.expand(is_first.shape).masked_fill(~is_first, 0).cummax(1).values


def unfold_windows(
    z: Float[Tensor, "B T D"], action: Float[Tensor, "B T A"], is_first: Bool[Tensor, "B T"], history: int
) -> tuple[Float[Tensor, "B*T K D"], Float[Tensor, "B*T K A"], Bool[Tensor, "B*T K"]]:
    """For each row t the window of ``history`` = K rows that ends at t, in the form :class:`Predictor` takes.

    Slot K−1 holds (z_t, a_t), slot K−2 holds (z_{t−1}, a_{t−1}), and so on. ``valid`` is False where a slot would lie
    before the episode's start or before row 0; such a slot holds whatever row is there, or zeros. Windows are row-major
    over B, then T. Raises ValueError where ``history`` is below 1.
    """
    if history < 1:
        raise ValueError(f"a window needs a history of at least 1 row, got {history}")
    age = torch.arange(history - 1, -1, -1, device=is_first.device)
    valid = rows_since_start(is_first).unsqueeze(-1) >= age
    return _unfold(z, history), _unfold(action, history), valid.flatten(0, 1)


def differences(z: Float[Tensor, "B K D"], valid: Bool[Tensor, "B K"]) -> Float[Tensor, "B M"]:
    """How a window's latents moved, oldest first; 0 where it would reach before the episode's start."""
    return (z[:, 1:] - z[:, :-1]).masked_fill(~valid[:, :-1, None], 0.0).flatten(1)


def product_dtype(x: Tensor) -> torch.dtype:
    """The precision that products with ``x`` are computed in: autocast's, where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def joined(parts: Sequence[Float[Tensor, "B _"]], dtype: torch.dtype) -> Float[Tensor, "B F"]:
    """The parts side by side, in one precision."""
    return torch.cat([part.to(dtype) for part in parts], -1)


def _unfold(x: Float[Tensor, "B T X"], history: int) -> Float[Tensor, "B*T K X"]:
    """For each row t the ``history`` rows up to t, zeros before row 0."""
    rows = x.shape[1]
    padded = torch.nn.functional.pad(x, (0, 0, history - 1, 0))
    return torch.stack([padded[:, k : k + rows] for k in range(history)], 2).flatten(0, 1)

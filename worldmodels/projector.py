"""LeWorldModel's projector: the last layer of the encoder, and again of the predictor."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class BatchNormProjector(nn.Sequential):
    """Linear → BatchNorm1d → GELU → Linear, as LeWorldModel's published configuration has it (hidden 2048).

    The transformers before it end in a LayerNorm, which fixes the norm of what it returns; SIGReg needs latents free to
    take the scale of N(0, I), so nothing normalises the last Linear's output.

    In train mode the hidden layer is normalised by the batch it is called with, in eval mode by running averages: the
    two give different latents for the same input. Imagining, acting and planning therefore belong in eval mode; train
    mode is for the loss, where one batch holds all rows.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.GELU(), nn.Linear(hidden, outputs))

    def forward(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        return super().forward(x)

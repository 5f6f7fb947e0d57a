"""Shows people what the world model imagines: real frames against frames imagined open loop, in one picture.

The latents are decoded by a decoder that learns on the side, from latents without gradient. Training is the same to the
last bit with and without a viewer: it draws from random generators of its own and leaves the model as it found it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from agents.optimiser import Adam
from runners.replay import Replay
from worldmodels.decoder import Decoder
from worldmodels.interface import Batch
from worldmodels.lewm import LeWorldModel

EXAMPLES = 3
"""Sequences in a strip."""
CONTEXT = 5
"""Frames of a sequence that the model observes before it imagines."""
LINE = 4
"""Width in pixels of the marker and of the gaps between examples."""
SEAM = 2
"""Width in pixels of the black seam right of and below each frame."""
MARKER_COLOUR, GAP_COLOUR = (255, 140, 0), (255, 255, 255)
_BLANK = 0.5
_SMALLEST_FRAME = 128  # smaller ones are hard to make out on a screen
_BACKGROUND_FRAMES = 256  # enough that what moves averages out


class Viewer:
    """A decoder, its optimiser, and the strips drawn with them. Pixels (3,H,W) uint8 only.

    Args:
        dim: size D of the latents.
        device: where the model is.
        seed: of the generator that chooses frames.

    Raises:
        ValueError: observations that are not RGB pictures.
    """

    def __init__(self, dim: int, obs_shape: tuple[int, ...], device: torch.device, *, seed: int) -> None:
        if len(obs_shape) != 3 or obs_shape[0] != 3:
            raise ValueError(f"a viewer shows RGB pictures (3,H,W), not observations of shape {obs_shape}")
        # Initial weights are drawn on the CPU, from a copy of its random stream.
        with torch.random.fork_rng(devices=[]):
            self.decoder = Decoder(dim, obs_shape).to(device)  # type: ignore[arg-type]
        self.optimiser = Adam(self.decoder.parameters(), lr=2e-3, fused=True)
        self.generator = np.random.default_rng(seed)

    def fit(self, model: LeWorldModel, replay: Replay, steps: int, batch: int = 32) -> float:
        """Gradient steps of the decoder alone, each on ``batch`` single frames of the replay.

        Returns the mean squared error on the last step's frames, pixels in [0, 1].
        """
        if steps < 1:
            raise ValueError(f"fitting the decoder takes at least 1 step, got {steps}")
        if not self.decoder.started:
            self.decoder.start(_unit(replay.sample(_BACKGROUND_FRAMES, 1, self.generator).obs[:, 0]))
        for _ in range(steps):
            obs = replay.sample(batch, 1, self.generator).obs[:, 0]
            with undisturbed(model):
                z = model.encode(obs)
            pictures = _unit(obs)
            loss = self.decoder.loss(z, pictures)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
        with torch.no_grad():
            return float((self.decoder(z) - pictures).square().mean())

    def strip(
        self, model: LeWorldModel, batch: Batch, context: int = CONTEXT, horizon: int = 15
    ) -> UInt8[np.ndarray, "height width 3"]:
        """A picture of up to three sequences of ``batch``, one below the other, time from left to right.

        Each has three rows: the real frames, what is decoded from the latents, and their absolute difference. Left of
        the marker the model has observed the frames, so decoding is all that can go wrong; right of it the model has
        only been told the actions. The sequences that stay longest in one episode are chosen, and what lies beyond the
        episode's end is blank. ``horizon`` is cut to the rows that there are.

        Raises:
            ValueError: no context, or a batch with no row beyond it.
        """
        length = batch.obs.shape[1]
        if context < 1 or horizon < 1 or length <= context:
            raise ValueError(
                f"a strip needs at least 1 row of context and 1 to imagine, got context {context}, horizon {horizon}, "
                f"sequences of {length}"
            )
        shown = Batch(*(x[:, : context + horizon] for x in batch))
        chosen, alive = _longest_episodes(shown.is_first)
        shown = Batch(*(x[chosen] for x in shown))
        with undisturbed(model):
            z = open_loop(model, shown, context)
            decoded = self.decoder(z.flatten(0, 1)).view(shown.obs.shape)
        real = _unit(shown.obs)
        bands = torch.stack([real, decoded, (real - decoded).abs()], 1)
        bands = torch.where(alive[:, None, :, None, None, None], bands, _BLANK)
        return _compose((bands * 255).round().to(torch.uint8).cpu().numpy(), context)

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`fit` and :meth:`strip` depend on."""
        return {
            "decoder": self.decoder.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decoder.load_state_dict(state["decoder"])
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self.generator.bit_generator.state = state["generator"]


@contextmanager
def undisturbed(model: LeWorldModel) -> Iterator[None]:
    """No gradients, and no running statistics that would take note of what is looked at."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _unit(obs: UInt8[Tensor, "*N C H W"]) -> Float[Tensor, "*N C H W"]:
    """Pixels in [0, 1]."""
    return obs.float() / 255


def _longest_episodes(is_first: Bool[Tensor, "B T"]) -> tuple[Int64[Tensor, " N"], Bool[Tensor, "N T"]]:
    """The sequences whose first episode goes on longest, and which of their rows belong to it."""
    begun = is_first.clone()
    begun[:, 0] = False
    alive = begun.cumsum(1) == 0
    chosen = alive.sum(1).argsort(descending=True, stable=True)[:EXAMPLES]
    return chosen, alive[chosen]


def open_loop(model: LeWorldModel, batch: Batch, context: int) -> Float[Tensor, "B T D"]:
    """Latents of all rows: observed up to ``context``, then imagined from the recorded actions alone."""
    state = model.initial(len(batch.obs))
    action = torch.zeros_like(batch.action[:, 0])
    latents = []
    for t in range(batch.obs.shape[1]):
        if t < context:
            state = model.observe(state, action, batch.obs[:, t], batch.is_first[:, t])
        else:
            state = model.imagine(state, action)
        latents.append(model.latent(state))
        action = batch.action[:, t]
    return torch.stack(latents, 1)


def _compose(bands: UInt8[np.ndarray, "N R T C H W"], context: int) -> UInt8[np.ndarray, "height width 3"]:
    """Frames enlarged by a whole factor to at least 128 pixels, with seams, gaps, and a marker after the context."""
    scale = -(-_SMALLEST_FRAME // min(bands.shape[-2:]))
    frames = bands.repeat(scale, axis=-2).repeat(scale, axis=-1)
    frames = np.pad(frames, [(0, 0)] * 4 + [(0, SEAM)] * 2)
    n, rows, columns, channels, height, width = frames.shape
    image = frames.transpose(0, 1, 4, 2, 5, 3).reshape(n, rows * height, columns * width, channels)
    left, right = np.split(image, [context * width], axis=2)
    marker = np.full((n, image.shape[1], LINE, 3), MARKER_COLOUR, np.uint8)
    examples = np.concatenate([left, marker, right], axis=2)
    gap = np.full((n, LINE, examples.shape[2], 3), GAP_COLOUR, np.uint8)
    return np.concatenate([examples, gap], axis=1).reshape(-1, examples.shape[2], 3)[:-LINE]

"""The size at which updates are compared, between ways of running them and with other packages, and rows to learn."""

from __future__ import annotations

from dataclasses import replace

import torch

from agents.actor_critic import PolicyConfig
from runners.config import Config, presets
from worldmodels.encoder import KeypointConfig
from worldmodels.interface import Batch
from worldmodels.predictor import WindowConfig


def reference(config: Config | None = None) -> Config:
    """About 12M parameters learning from 16 × 64 frames of 64×64 pixels, with 15 steps imagined from 1,024 of them:
    the CUDA preset with wider layers. Eight steps of rollout loss, as there.

    What is no size (task, seed, device, how an update is run, which rows teach a critic) is ``config``'s.
    """
    cuda, units = presets()["cuda"], 768
    config = config or replace(cuda, task="dmc/walker-walk")
    return replace(
        config,
        model=replace(
            cuda.model,
            latent_dim=256,
            keypoint=KeypointConfig(stem=32, keypoints=64, hidden=units),
            window=WindowConfig(hidden=(1536, 1280)),
            head_units=units,
        ),
        dreamer=replace(
            cuda.dreamer,
            horizon=15,
            starts=1024,
            policy=PolicyConfig(units=units),
            critic=replace(cuda.dreamer.critic, units=units, rows=config.dreamer.critic.rows),
            precision=config.dreamer.precision,
        ),
        loop=replace(cuda.loop, train_ratio=config.loop.train_ratio),
    )


def random_batch(batch: int, length: int, size: int, actions: int, device: torch.device) -> Batch:
    """Random rows (B,T) from within episodes."""
    never = torch.zeros(batch, length, dtype=torch.bool, device=device)
    return Batch(
        obs=torch.randint(0, 256, (batch, length, 3, size, size), dtype=torch.uint8, device=device),
        action=2 * torch.rand(batch, length, actions, device=device) - 1,
        reward=torch.rand(batch, length, device=device),
        is_first=never,
        is_last=never.clone(),
        is_terminal=never.clone(),
    )

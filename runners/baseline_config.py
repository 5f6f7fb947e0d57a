"""Settings of the baselines, the algorithms of Stable-Baselines3 and sb3-contrib that ours are compared with.

Sources, named at the fields: SB3, its default (docs, version 2.9); zoo, RL Baselines3 Zoo's settings for MuJoCo
(hyperparams/*.yml); DrQ (Kostrikov et al. 2020) and DrQ-v2 (Yarats et al. 2021), for pixels of dm_control. Fields of
``loop`` that count for them too: prefill (not for ppo), log_every, eval_every, eval_episodes, checkpoint_every.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

BaselineName = Literal["sac", "td3", "ppo", "tqc"]
BASELINES: tuple[str, ...] = get_args(BaselineName)

MIN_PIXELS = 36
"""The smallest picture that the convolutions of Stable-Baselines3's CnnPolicy leave something of."""


@dataclass(frozen=True)
class OffPolicyConfig:
    """What sac, td3 and tqc share. Exploration begins with ``loop.prefill`` random env_steps."""

    learning_rate: float = 3e-4
    """Of Adam, for all networks (SB3, zoo)."""
    batch: int = 256
    """Transitions in an update, from states (SB3, zoo)."""
    pixel_batch: int = 64
    """The same from pixels: what a CPU can do; the cuda preset has 256 (DrQ-v2)."""
    updates: int = 1
    """Updates per agent step; with E environments, E times as many per step of all (SB3, zoo)."""
    discount: float = 0.99
    """Per agent step (SB3, zoo)."""
    tau: float = 0.005
    """Part of the critic that its slow copy takes over at each update (SB3, zoo)."""
    units: tuple[int, ...] = (256, 256)
    """Hidden layers of policy and critics, after the convolutions if there are any (SB3, zoo)."""
    capacity: int = 1_000_000
    """Transitions that the replay holds, or the whole budget if that is less (SB3, zoo)."""
    frames: int = 3
    """From pixels: pictures stacked into an observation (DrQ)."""
    shift: int = 4
    """From pixels: sampled pictures are shifted at random by up to this many pixels of 84, scaled to their size (DrQ);
    without it these algorithms hardly learn from pixels. 0: none."""


@dataclass(frozen=True)
class SACConfig(OffPolicyConfig):
    """Soft actor-critic (Haarnoja et al. 2018), entropy coefficient learned, target entropy -A."""


@dataclass(frozen=True)
class TD3Config(OffPolicyConfig):
    """Twin delayed DDPG (Fujimoto et al. 2018)."""

    learning_rate: float = 1e-3
    """Of Adam, for all networks (SB3, zoo)."""
    noise: float = 0.1
    """Standard deviation of the Gaussian noise on actions in [-1, 1] (zoo)."""


@dataclass(frozen=True)
class TQCConfig(OffPolicyConfig):
    """Truncated quantile critics (Kuznetsov et al. 2020), from sb3-contrib."""

    quantiles: int = 25
    """Of each of the two critics (sb3-contrib, zoo)."""
    dropped: int = 2
    """Highest quantiles of each critic that targets leave out (sb3-contrib, zoo)."""


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation (Schulman et al. 2017). Rewards are scaled by the running deviation of returns, and
    states are normalised by running statistics (VecNormalize, as zoo does on MuJoCo)."""

    rollout: int = 512
    """Agent steps, over all environments, between updates (zoo; SB3 has 2048, too long for short budgets)."""
    epochs: int = 10
    """Passes over a rollout (SB3)."""
    batch: int = 64
    """Agent steps in a gradient step (SB3)."""
    learning_rate: float = 3e-4
    """Of Adam (SB3)."""
    discount: float = 0.99
    """Per agent step (SB3)."""
    lam: float = 0.95
    """λ of the generalised advantage estimate (SB3)."""
    clip: float = 0.2
    """How far the probability ratio may move (SB3)."""
    entropy: float = 0.0
    """Weight of the entropy bonus (SB3)."""
    value_weight: float = 0.5
    """Of the value loss (SB3)."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm (SB3)."""
    units: tuple[int, ...] = (64, 64)
    """Hidden layers of policy and value, with tanh (SB3)."""
    frames: int = 3
    """From pixels: pictures stacked into an observation."""


Settings = SACConfig | TD3Config | TQCConfig | PPOConfig

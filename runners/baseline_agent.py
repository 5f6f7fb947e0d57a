"""A model of Stable-Baselines3 from a configuration, and its policy as an :class:`agents.interface.Agent`.

The model is built without an environment, so that the same lines make the one that learns, in ``runners.baselines``,
and the one that ``runners.evaluate`` brings back from a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from sb3_contrib import TQC
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations
from torch import Tensor

from agents.interface import Carry
from runners.baseline_config import OffPolicyConfig, PPOConfig, TD3Config, TQCConfig
from worldmodels.interface import Batch

if TYPE_CHECKING:  # which builds these agents itself
    from runners.config import Config

CLIP_OBS, EPSILON = 10.0, 1e-8
"""Of normalised states; VecNormalize's own."""


class BaselineAgent:
    """A model of Stable-Baselines3 that acts. Implements :class:`agents.interface.Agent`, but for learning, which is
    the model's own: ``runners.baselines`` drives it.

    Its memory is the stack of pictures (E, frames · C, H, W), zeros before an episode's first, as of VecFrameStack.

    Attributes:
        model: its policy, networks and optimisers.
        frames: pictures stacked into an observation; None: states, which are not stacked.
        obs_statistics: running mean and variance of states, if they are normalised.
    """

    def __init__(self, model: BaseAlgorithm, frames: int | None, obs_statistics: RunningMeanStd | None) -> None:
        self.model, self.frames, self.obs_statistics = model, frames, obs_statistics

    def initial(self, envs: int) -> Carry:
        if self.frames is None:
            return ()
        assert self.model.observation_space.shape is not None
        return torch.zeros((envs, *self.model.observation_space.shape), dtype=torch.uint8)

    def act(
        self, obs: Shaped[np.ndarray, "E *obs"], is_first: Bool[np.ndarray, " E"], carry: Carry, *, explore: bool
    ) -> tuple[Float[np.ndarray, "E A"], Carry]:
        if self.frames is not None:
            older = carry[:, obs.shape[1] :] * torch.from_numpy(~is_first)[:, None, None, None]
            carry = torch.cat([older, torch.from_numpy(obs)], 1)
            obs = carry.numpy()
        if self.obs_statistics is not None:
            scaled = (obs - self.obs_statistics.mean) / np.sqrt(self.obs_statistics.var + EPSILON)
            obs = np.clip(scaled, -CLIP_OBS, CLIP_OBS).astype(np.float32)
        action, _ = self.model.policy.predict(obs, deterministic=not explore)
        return action.astype(np.float32), carry

    def start(self, obs: Shaped[Tensor, "N *obs"]) -> None:
        pass

    def anneal(self, progress: float) -> None:
        pass

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Raises NotImplementedError."""
        raise NotImplementedError("a baseline learns by its own loop, in runners.baselines")

    def monitors(self, batch: Batch) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimisers under Stable-Baselines3's names, and what normalises states."""
        statistics = self.obs_statistics
        return {
            "parameters": self.model.get_parameters(),
            "variables": {name: getattr(self.model, name).detach() for name in self._variables()},
            "updates": self.model._n_updates,
            "obs_statistics": None if statistics is None else statistics_state(statistics),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.set_parameters(state["parameters"], exact_match=True, device=self.model.device)
        for name in self._variables():
            getattr(self.model, name).data.copy_(state["variables"][name])
        self.model._n_updates = state["updates"]
        if self.obs_statistics is not None:
            load_statistics(self.obs_statistics, state["obs_statistics"])

    def _variables(self) -> list[str]:
        """Tensors beside the networks: the entropy coefficient."""
        return self.model._get_torch_save_params()[1]


def statistics_state(statistics: RunningMeanStd) -> dict[str, Any]:
    """Running mean and variance, for a checkpoint."""
    return {
        "mean": torch.tensor(statistics.mean),
        "var": torch.tensor(statistics.var),
        "count": float(statistics.count),
    }


def load_statistics(statistics: RunningMeanStd, state: dict[str, Any]) -> None:
    """The inverse. Raises ValueError on a state of another size."""
    mean, var = state["mean"].numpy(), state["var"].numpy()
    if mean.shape != statistics.mean.shape:
        raise ValueError(f"statistics of shape {mean.shape}, not {statistics.mean.shape}")
    statistics.mean, statistics.var, statistics.count = mean.copy(), var.copy(), state["count"]


def build_baseline(
    config: Config, observations: gym.Space, actions: gym.Space, device: torch.device, num_envs: int
) -> BaselineAgent:
    """The model that ``config.agent`` names, seeded, for single environments with these spaces, both flat boxes or
    pictures.

    Args:
        num_envs: environments that it learns in; of no account where it only acts.
    """
    assert isinstance(observations, gym.spaces.Box)
    assert isinstance(actions, gym.spaces.Box)
    settings = config.baseline
    pixels = len(observations.shape) == 3
    frames = settings.frames if pixels else None
    if frames is not None:
        stacked = StackedObservations(1, frames, observations, "first").stacked_observation_space
        assert isinstance(stacked, gym.spaces.Box)
        observations = stacked
    policy = "CnnPolicy" if pixels else "MlpPolicy"
    common = {"env": None, "seed": config.seed, "device": device, "_init_setup_model": False}
    statistics = None
    if isinstance(settings, PPOConfig):
        model: BaseAlgorithm = _ppo(policy, settings, num_envs, common)
        statistics = None if pixels else RunningMeanStd(shape=observations.shape)
    else:
        model = _off_policy(policy, settings, actions.shape[0], num_envs, common)
        model.batch_size = settings.pixel_batch if pixels else settings.batch
    model.observation_space, model.action_space, model.n_envs = observations, actions, num_envs
    model._setup_model()
    if pixels and isinstance(model, OffPolicyAlgorithm):
        _share_convolutions(model, settings.learning_rate)
    return BaselineAgent(model, frames, statistics)


def _off_policy(
    policy: str, settings: OffPolicyConfig, action_dim: int, num_envs: int, common: dict[str, Any]
) -> OffPolicyAlgorithm:
    shared = common | {
        "buffer_size": 1,  # RowBuffer takes its place
        "learning_rate": settings.learning_rate,
        "gradient_steps": settings.updates * num_envs,
        "gamma": settings.discount,
        "tau": settings.tau,
    }
    networks: dict[str, Any] = {"net_arch": list(settings.units)}
    if isinstance(settings, TD3Config):
        noise = NormalActionNoise(np.zeros(action_dim), np.full(action_dim, settings.noise))
        return TD3(policy, policy_kwargs=networks, action_noise=noise, **shared)
    # Said here because the model would ask an environment for it.
    shared["target_entropy"] = -float(action_dim)
    if isinstance(settings, TQCConfig):
        networks["n_quantiles"] = settings.quantiles
        return TQC(policy, policy_kwargs=networks, top_quantiles_to_drop_per_net=settings.dropped, **shared)
    return SAC(policy, policy_kwargs=networks, **shared)


class Borrowed(BaseFeaturesExtractor):
    """Another network's features, without a gradient into them."""

    def __init__(self, owner: BaseFeaturesExtractor) -> None:
        super().__init__(owner._observation_space, owner.features_dim)
        self._owner = (owner,)  # not a part of this module, so that its weights are saved and learned where they belong

    def forward(self, obs: Float[Tensor, "B *obs"]) -> Float[Tensor, "B F"]:
        with torch.no_grad():
            return self._owner[0](obs)


def _share_convolutions(model: OffPolicyAlgorithm, learning_rate: float) -> None:
    """The critic's convolutions serve the policy too, and learn from the critic's loss alone: from the policy's they
    learn worse (SAC-AE, Yarats et al. 2019, section 4.3; DrQ). Stable-Baselines3 gives each its own."""
    policy: Any = model.policy
    policy.actor.features_extractor = Borrowed(policy.critic.features_extractor)
    policy.actor.optimizer = policy.optimizer_class(policy.actor.parameters(), lr=learning_rate)
    if isinstance(model, TD3):
        policy.actor_target.features_extractor = Borrowed(policy.critic_target.features_extractor)
        return

    def stop_policy_gradient(critic: Any, inputs: tuple[Tensor, Tensor]) -> None:
        # It would be thrown away, at the price of a third of the update. This flag of the critic's stops it.
        critic.share_features_extractor = inputs[1].requires_grad

    policy.critic.register_forward_pre_hook(stop_policy_gradient)


def _ppo(policy: str, settings: PPOConfig, num_envs: int, common: dict[str, Any]) -> BaseAlgorithm:
    return PPO(
        policy,
        n_steps=-(-settings.rollout // num_envs),
        n_epochs=settings.epochs,
        batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        gamma=settings.discount,
        gae_lambda=settings.lam,
        clip_range=settings.clip,
        ent_coef=settings.entropy,
        vf_coef=settings.value_weight,
        max_grad_norm=settings.max_grad_norm,
        policy_kwargs={"net_arch": list(settings.units)},
        **common,
    )

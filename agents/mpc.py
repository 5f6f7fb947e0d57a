"""An agent that plans at every step inside the world model, and learns as the imagination agent does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from agents.actor_critic import Estimator
from agents.captured import Captured
from agents.dreamer import Compilation, DreamerAgent, DreamerConfig
from agents.planner import (
    CEM,
    ICEM,
    MPPI,
    CEMConfig,
    GradientConfig,
    GradientPlanner,
    ICEMConfig,
    MPPIConfig,
    Planner,
    shift,
)
from worldmodels.interface import State, WorldModel


@dataclass(frozen=True)
class MPCConfig:
    """How the planning agent acts; what it learns, and how, is the imagination agent's."""

    planner: Literal["mppi", "cem", "icem", "gradient"] = "mppi"
    """Which search; the settings of each are below."""
    horizon: int = 3
    """Planned decisions, H, as in TD-MPC2 (arXiv 2310.16828); keep it within the world model's rollout."""
    collecting_horizon: int | None = None
    """The most decisions to plan while collecting, which makes many more of them than evaluating. None: ``horizon``."""
    proposals: int = 8
    """Candidates that the policy imagines, the first without noise. 0: none."""
    terminal_value: bool = True
    """Whether the critic's value of the last state counts, beside the imagined rewards. False, with 0 proposals, is
    PlaNet's planning by rewards alone (arXiv 1811.04551)."""
    std: float = 1.0
    """Standard deviation that each search starts from."""
    noise: float = 0.3
    """While collecting, the largest standard deviation of the noise on the planned action; it is the plan's own std up
    to there."""
    mppi: MPPIConfig = field(default_factory=MPPIConfig)
    cem: CEMConfig = field(default_factory=CEMConfig)
    icem: ICEMConfig = field(default_factory=ICEMConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)


def build_planner(config: MPCConfig) -> Planner:
    """The search that a configuration names.

    Raises:
        ValueError: its numbers are impossible.
    """
    if config.planner == "mppi":
        return MPPI(config.mppi)
    if config.planner == "cem":
        return CEM(config.cem)
    if config.planner == "icem":
        return ICEM(config.icem)
    return GradientPlanner(config.gradient)


class ImaginedReturn:
    """Scores candidates by the discounted rewards they are imagined to bring, plus the value of where they lead.

    What has been observed is encoded once, in ``state``: candidates share it, and are imagined in one batch a step.
    """

    def __init__(
        self, model: WorldModel, state: State, discount: float, value: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.model = model
        self.futures = model.futures(state)
        self.discount = discount
        self.value = value

    def __call__(self, candidates: Float[Tensor, "B N H A"]) -> Float[Tensor, "B N"]:
        b, n, horizon, _ = candidates.shape
        state = self.futures(n)
        actions = candidates.flatten(0, 1)
        feats = []
        for k in range(horizon):
            state = self.model.imagine(state, actions[:, k])
            feats.append(self.model.feat(state))
        reward, cont = (x.view(horizon, b * n) for x in self.model.outcome(torch.cat(feats)))
        kept = self.discount * cont
        total = self.value(feats[-1]) if self.value is not None else torch.zeros_like(reward[0])
        for k in reversed(range(horizon)):
            total = reward[k] + kept[k] * total
        return total.view(b, n)


class MPCCarry(NamedTuple):
    """A model state, the action that left it, and the plan to start the next search from."""

    state: State
    action: Float[Tensor, "E A"]
    plan: Float[Tensor, "E H A"]


class MPCAgent(DreamerAgent):
    """Acts by planning; everything else is :class:`DreamerAgent`'s, weights and checkpoints included, so that either
    way of acting can be tried on what the other has learned."""

    def __init__(
        self,
        model: WorldModel,
        action_dim: int,
        estimator: Estimator,
        config: DreamerConfig,
        mpc: MPCConfig,
        planner: Planner,
        compilation: Compilation = "auto",
    ) -> None:
        super().__init__(model, action_dim, estimator, config, compilation)
        self.mpc = mpc
        self.planner = planner
        self._still = torch.Generator(self.device)
        # What begins with a wait for the device cannot be recorded.
        recorded = self._act_on_device.enabled and not model.futures_wait
        self._act_on_device = Captured(self._act, enabled=recorded, generators=[self._still])

    def initial(self, envs: int) -> MPCCarry:  # type: ignore[override]
        action = torch.zeros(envs, self.action_dim, device=self.device)
        return MPCCarry(self.model.initial(envs), action, action.new_zeros(envs, self.mpc.horizon, self.action_dim))

    def act(  # type: ignore[override]
        self, obs: Shaped[np.ndarray, "E *obs"], is_first: Bool[np.ndarray, " E"], carry: MPCCarry, *, explore: bool
    ) -> tuple[Float[np.ndarray, "E A"], MPCCarry]:
        if not explore:
            # The same draws at every decision: what is done follows from what was seen alone.
            self._still.manual_seed(0)
        return self._decide(obs, is_first, carry, explore)

    @torch.no_grad()
    def _act(  # type: ignore[override]
        self, obs: Shaped[Tensor, "E *obs"], is_first: Bool[Tensor, " E"], carry: MPCCarry, explore: bool
    ) -> MPCCarry:
        self.model.eval()
        generator = None if explore else self._still
        with self._autocast():
            state = self.model.observe(carry.state, carry.action, obs, is_first)
            value = self.critic.value if self.mpc.terminal_value else None
            score = ImaginedReturn(self.model, state, self.config.discount, value)
            mean = shift(carry.plan).masked_fill(is_first[:, None, None], 0.0)[:, : self._ahead(explore)]
            found = self.planner.search(
                score,
                mean,
                torch.full_like(mean, self.mpc.std),
                proposals=self._propose(state, mean.shape[:2], generator),
                generator=generator,
            )
        action = found.action[:, 0]
        if explore:
            noise = found.std[:, 0].clamp(max=self.mpc.noise) * torch.randn_like(action)
            action = (action + noise).clamp(-1, 1)
        return MPCCarry(state, action, F.pad(found.action, (0, 0, 0, self.mpc.horizon - mean.shape[1])))

    def _ahead(self, explore: bool) -> int:
        """Planned decisions."""
        most = self.mpc.collecting_horizon if explore else None
        return self.mpc.horizon if most is None else min(most, self.mpc.horizon)

    def _propose(
        self, state: State, shape: torch.Size, generator: torch.Generator | None
    ) -> Float[Tensor, "E P H A"] | None:
        """Plans as the policy imagines them: the first by its most likely actions, the others sampled."""
        count = self.mpc.proposals
        if not count:
            return None
        envs, horizon = shape
        state = self.model.futures(state)(count)
        first = torch.arange(envs * count, device=self.device)[:, None] % count == 0
        actions = []
        for _ in range(horizon):
            mean, std = self.policy(self.model.feat(state))
            noise = torch.empty_like(std).normal_(generator=generator).masked_fill(first, 0.0)
            actions.append(self.policy.action(mean, std, noise))
            state = self.model.imagine(state, actions[-1])
        return torch.stack(actions, 1).view(envs, count, horizon, -1)

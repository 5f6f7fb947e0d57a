"""Reaching goals that are given as observations: plans are scored by how near imagined latents come to the goal's.

The cost is that of LeWorldModel (arXiv 2603.19312) and DINO-WM (arXiv 2411.04983), the squared distance of the last
imagined latent, or the absolute one of V-JEPA 2-AC (arXiv 2506.09985).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from agents.planner import Planner, shift
from worldmodels.interface import State, WorldModel


@runtime_checkable
class GoalSeeker(Protocol):
    """Decides, for B problems at once, what brings each nearer to its goal."""

    def begin(self) -> None:
        """Forget what was planned: other problems follow."""
        ...

    def act(self, state: State, goal: Float[Tensor, "B D"], left: int) -> Float[Tensor, "B A"]:
        """Actions in [-1, 1].

        Args:
            state: the model's memory after the newest observation.
            goal: the latent to reach.
            left: decisions until the end, this one included; at least 1.
        """
        ...


@dataclass(frozen=True)
class GoalSearchConfig:
    """Model predictive control towards a goal."""

    distance: Literal["l2", "l1"] = "l2"
    """Between latents, a mean over their numbers: l2 the squared difference (LeWorldModel), l1 the absolute one
    (V-JEPA 2-AC)."""
    path_weight: float = 0.0
    """Weight of the mean distance of all imagined latents, beside that of the last one. 0: the last alone counts, as
    published."""
    horizon: int = 6
    """Planned decisions, H, and fewer when fewer are left; keep it within the world model's rollout."""
    replan_every: int = 1
    """Decisions that are carried out of each plan, at most the whole of it."""
    std: float = 1.0
    """Standard deviation that each search starts from."""


def latent_distance(
    z: Float[Tensor, "*N D"], goal: Float[Tensor, "*N D"], kind: Literal["l2", "l1"]
) -> Float[Tensor, "*N"]:
    """See ``GoalSearchConfig.distance``."""
    difference = (z - goal).float()
    return difference.square().mean(-1) if kind == "l2" else difference.abs().mean(-1)


class NearnessToGoal:
    """Scores candidates by minus the distance to the goal: of the last imagined latent, and of all on the way to it.

    What has been observed is encoded once, in ``state``: candidates share it, and are imagined in one batch a step.
    """

    def __init__(self, model: WorldModel, state: State, goal: Float[Tensor, "B D"], config: GoalSearchConfig) -> None:
        self.model = model
        self.futures = model.futures(state)
        self.goal = goal
        self.config = config

    def __call__(self, candidates: Float[Tensor, "B N H A"]) -> Float[Tensor, "B N"]:
        b, n, horizon, _ = candidates.shape
        state, goal = self.futures(n), self.goal.repeat_interleave(n, 0)
        actions = candidates.flatten(0, 1)
        far = []
        for k in range(horizon):
            state = self.model.imagine(state, actions[:, k])
            if self.config.path_weight or k == horizon - 1:
                far.append(latent_distance(self.model.latent(state), goal, self.config.distance))
        cost = far[-1] + self.config.path_weight * torch.stack(far).mean(0)
        return -cost.view(b, n)


class GoalSearch:
    """A planner towards goals. Each search starts from what is left of the last plan.

    The same random numbers are drawn after each :meth:`begin`, so that what is done follows from what was seen alone.
    """

    def __init__(self, model: WorldModel, planner: Planner, action_dim: int, config: GoalSearchConfig) -> None:
        self.model = model
        self.planner = planner
        self.action_dim = action_dim
        self.config = config
        self.begin()

    def begin(self) -> None:
        self._plan: Float[Tensor, "B H A"] | None = None
        self._taken = 0
        self._generator: torch.Generator | None = None

    @torch.no_grad()
    def act(self, state: State, goal: Float[Tensor, "B D"], left: int) -> Float[Tensor, "B A"]:
        plan = self._plan
        if plan is None or self._taken == min(self.config.replan_every, plan.shape[1]):
            plan = self._plan = self._search(state, goal, min(self.config.horizon, left))
            self._taken = 0
        self._taken += 1
        return plan[:, self._taken - 1]

    def _search(self, state: State, goal: Float[Tensor, "B D"], horizon: int) -> Float[Tensor, "B H A"]:
        start = goal.new_zeros(len(goal), self.config.horizon, self.action_dim)
        if self._plan is not None:
            start[:, : self._plan.shape[1]] = self._plan
            for _ in range(self._taken):
                start = shift(start)
        start = start[:, :horizon]
        if self._generator is None:
            self._generator = torch.Generator(goal.device).manual_seed(0)
        score = NearnessToGoal(self.model, state, goal, self.config)
        return self.planner.plan(score, start, torch.full_like(start, self.config.std), generator=self._generator)

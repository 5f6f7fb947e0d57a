"""The agent that knows nothing: it fills the replay before learning starts, and it is the floor of every comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from agents.interface import Carry
from worldmodels.interface import Batch


class RandomAgent:
    """Uniform actions in [-1, 1], from a generator of its own. Implements :class:`agents.interface.Agent`.

    Of ``total`` environments side by side it acts in those from ``first`` on, as one agent for all of them would there.
    None: it acts in all.
    """

    def __init__(self, action_dim: int, seed: int, *, first: int = 0, total: int | None = None) -> None:
        self.action_dim = action_dim
        self.first = first
        self.total = total
        self.generator = np.random.default_rng(seed)

    def initial(self, envs: int) -> Carry:
        return ()

    def act(
        self, obs: Shaped[np.ndarray, "E *obs"], is_first: Bool[np.ndarray, " E"], carry: Carry, *, explore: bool
    ) -> tuple[Float[np.ndarray, "E A"], Carry]:
        envs = len(is_first)
        actions = self.generator.uniform(-1, 1, (self.total or envs, self.action_dim))
        return actions[self.first : self.first + envs].astype(np.float32), carry

    def start(self, obs: Shaped[Tensor, "N *obs"]) -> None:
        pass

    def anneal(self, progress: float) -> None:
        pass

    def update(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def monitors(self, batch: Batch) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.bit_generator.state = state["generator"]

"""What acts and learns."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from worldmodels.interface import Batch

Carry = Any
"""An agent's memory between acts, for E environments: a NamedTuple of (E, …) tensors. Opaque to the loop."""


class NonFiniteLoss(RuntimeError):
    """A loss or a gradient norm is NaN or inf; the message says which. The weights have not been touched by it."""


@runtime_checkable
class Agent(Protocol):
    """E environments act in one batch. ``carry`` comes from ``initial`` and is handed back at every act."""

    def initial(self, envs: int) -> Carry:
        """An empty memory for E environments."""
        ...

    def act(
        self, obs: Shaped[np.ndarray, "E *obs"], is_first: Bool[np.ndarray, " E"], carry: Carry, *, explore: bool
    ) -> tuple[Float[np.ndarray, "E A"], Carry]:
        """Actions in [-1, 1]. ``explore`` samples the policy; otherwise its most likely action is taken."""
        ...

    def start(self, obs: Shaped[Tensor, "N *obs"]) -> None:
        """Called once with the prefilled observations, before the first update."""
        ...

    def anneal(self, progress: float) -> None:
        """Called before updates with the part of the run's budget that is used, in [0, 1], for schedules."""
        ...

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step on everything that learns; metrics as scalar tensors on the device.

        Raises:
            NonFiniteLoss: before any weight was changed.
        """
        ...

    def monitors(self, batch: Batch) -> dict[str, float]:
        """Slower measurements on a batch, for the logs."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that ``update`` and ``act`` depend on: weights, optimisers, scales."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

"""The programs that train, evaluate, record, plan and ask; and the loop and the files that they share.

from runners import MPC, Dreamer      # the agents, behind Stable-Baselines3's API
"""

import os
from typing import TYPE_CHECKING, Any

# Before torch is imported anywhere: how long OpenMP's threads spin for their next operator before they sleep. libgomp's
# own 300,000 rounds take a core from the other half of an update, the environments and other programs; threads that
# sleep at once are late for every operator of a planned decision.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

if TYPE_CHECKING:
    from runners.sb3 import MPC, Dreamer

__all__ = ["MPC", "Dreamer"]


def __getattr__(name: str) -> Any:
    """Imports the agents, and torch with them, at first use."""
    if name in __all__:
        from runners import sb3

        return getattr(sb3, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

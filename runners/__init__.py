"""The programs that train, evaluate, record, plan and ask; and the loop and the files that they share.

from runners import MPC, Dreamer      # the agents, behind Stable-Baselines3's API
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runners.sb3 import MPC, Dreamer

__all__ = ["MPC", "Dreamer"]


def __getattr__(name: str) -> Any:
    """Imports the agents, and torch with them, at first use."""
    if name in __all__:
        from runners import sb3

        return getattr(sb3, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

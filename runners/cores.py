"""How much of the machine is this process's."""

from __future__ import annotations

import os

from loky import cpu_count


def cores() -> int:
    """Processor cores that this process may use, at least one: those that it is bound to (by Slurm or ``taskset``),
    within its container's quota, hyperthreads of one core counted once."""
    return int(cpu_count(only_physical_cores=True))


def others_at_work() -> str | None:
    """For a training that is to use all cores: what to do instead if others keep them busy, or nothing where they have
    not been. An installation that has just ended counts, too.

    Two trainings that use all cores each wait for each other: one fell to a tenth of its speed.
    """
    load, ours = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, cores()
    if load < 0.75 * ours:
        return None
    return (
        f"this machine was busy in the last minute (a load of {load:.1f} for {ours} cores): "
        "if other programs go on beside this one, --threads 1 learns faster"
    )

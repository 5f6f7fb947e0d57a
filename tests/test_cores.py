"""How much of the machine a process takes to be its own."""

import os
import subprocess
import sys

import pytest

from runners.cores import cores, others_at_work
from tests.loop_helpers import ROOT

BOUND = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from runners.session import configure_torch
for threads in (0, 3):
    configure_torch(threads)
    print(torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_a_bound_process_learns_on_the_cores_that_it_is_bound_to() -> None:
    run = subprocess.run([sys.executable, "-c", BOUND], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "3"]


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="this system tells no load")
def test_a_busy_machine_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5 * cores(), 9.0, 9.0))
    assert others_at_work() is None
    monkeypatch.setattr(os, "getloadavg", lambda: (float(cores()), 0.0, 0.0))
    assert "--threads 1" in (others_at_work() or "")

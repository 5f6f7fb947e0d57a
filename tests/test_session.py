"""What a program tells the system of its memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from runners.session import HEAP
from tests.loop_helpers import ROOT

ASKED = """
from runners.session import configure_torch
configure_torch(1)
print(open("/proc/self/smaps").read())
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux with large pages")
def test_the_heap_may_lie_in_large_pages() -> None:
    """In a process of its own, whose heap has not grown before."""
    run = subprocess.run([sys.executable, "-c", ASKED], cwd=ROOT, capture_output=True, text=True, check=True)
    sizes, size = [], 0
    for line in run.stdout.splitlines():
        name, *values = line.split() or [""]
        if name == "Size:":
            size = 1024 * int(values[0])
        elif name == "VmFlags:" and "hg" in values:
            sizes.append(size)
    assert sum(sizes) == pytest.approx(HEAP, rel=0.1)

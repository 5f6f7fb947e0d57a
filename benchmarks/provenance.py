"""Where a figure comes from: the command, the date and the machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from runners.cores import cores


def command_line(module: str, args: Sequence[str]) -> str:
    """The line that a person would type to run ``module`` with ``args``."""
    return shlex.join(["python", "-m", module, *args])


def now() -> str:
    """The time in UTC, to the minute."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def machine_line() -> str:
    """The processor, its cores that this process may use, and the GPUs; no host name."""
    count, gpus = cores(), _gpus()
    return f"{_cpu_model()}, {count} {'core' if count == 1 else 'cores'}" + (f"; {', '.join(gpus)}" if gpus else "")


def machine() -> dict[str, Any]:
    """What a timing depends on, as JSON. ``load_average`` (1 minute) tells whether others used the machine."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "opengl": os.environ.get("MUJOCO_GL", ""),
        **software(),
    }


def software() -> dict[str, str]:
    """Versions of what computes, renders and simulates."""
    return {"torch": torch.__version__, **{name: version(name) for name in ("mujoco", "dm-control", "gymnasium")}}


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _cpu_model() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            return asked.stdout.strip()
    return platform.processor() or platform.machine()

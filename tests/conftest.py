"""What every test runs under: tensor shapes checked at run time, one thread, fixed seeds, a renderer chosen."""

import random

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

# Only modules imported after this line are checked, so it stands before any import of the project.
install_import_hook(["worldmodels", "agents"], "beartype.beartype")

import envs  # noqa: E402, F401  importing it chooses MUJOCO_GL, which must come before MuJoCo is imported

# Sums are grouped by thread, so a fixed number of threads keeps results equal on every machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)  # a program that the last test ran may have taken more
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  third-party code draws from the global generator
    torch.manual_seed(0)

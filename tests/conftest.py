"""What every test runs under: tensor shapes checked at run time, one thread, fixed seeds, a renderer chosen."""

import copy
import random
from collections.abc import Iterator
from unittest import mock

import jaxtyping
import numpy as np
import pytest
import torch

# Only modules imported after this line are checked, so it stands before any import of the project.
jaxtyping.install_import_hook(["worldmodels", "agents"], "beartype.beartype")

import mujoco  # noqa: E402

import envs  # noqa: E402, F401  importing it chooses MUJOCO_GL, which must come before MuJoCo is imported

LONGEST = ("resume", "grid", "bad_input", "baselines", "train", "vector", "learning", "diagnose", "ranks", "evaluate")
"""The files that take longest, longest first. Begun first, they leave short ones to even out what two workers have."""

# Sums are grouped by thread, so a fixed number of threads keeps results equal on every machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)  # a program that the last test ran may have taken more
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  third-party code draws from the global generator
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def unchecked() -> Iterator[None]:
    """Shapes are not checked, as for a user, which takes a third off a small training. For files whose trainings must
    end like another one bit for bit, or are like those of test_train, where shapes are checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
    """dm_control's models are compiled once and then copied: the dog, of which the suite has five tasks, takes seconds.
    For files that make every task many times."""
    compile_model, compiled = mujoco.MjModel.from_xml_string, {}

    def copied(xml: str, assets: dict[str, bytes] | None = None) -> mujoco.MjModel:
        key = (xml, *sorted((assets or {}).items()))
        if key not in compiled:
            compiled[key] = compile_model(xml, assets or {})
        return copy.copy(compiled[key])

    with mock.patch.object(mujoco.MjModel, "from_xml_string", copied):
        yield

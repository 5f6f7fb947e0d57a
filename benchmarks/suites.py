"""Suites: lists of tasks that belong together."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

SuiteName = Literal["dmc6", "dmc20", "mujoco5"]

DMC6 = (
    "dmc/cartpole-swingup",
    "dmc/reacher-easy",
    "dmc/cheetah-run",
    "dmc/walker-walk",
    "dmc/finger-spin",
    "dmc/ball_in_cup-catch",
)
"""The six of PlaNet (Hafner et al. 2019), known since CURL as the benchmark of sample efficiency from pixels."""

DMC20 = (
    "dmc/acrobot-swingup",
    "dmc/ball_in_cup-catch",
    "dmc/cartpole-balance",
    "dmc/cartpole-balance_sparse",
    "dmc/cartpole-swingup",
    "dmc/cartpole-swingup_sparse",
    "dmc/cheetah-run",
    "dmc/finger-spin",
    "dmc/finger-turn_easy",
    "dmc/finger-turn_hard",
    "dmc/hopper-hop",
    "dmc/hopper-stand",
    "dmc/pendulum-swingup",
    "dmc/quadruped-run",
    "dmc/quadruped-walk",
    "dmc/reacher-easy",
    "dmc/reacher-hard",
    "dmc/walker-run",
    "dmc/walker-stand",
    "dmc/walker-walk",
)
"""The tasks on which DreamerV3 (Hafner et al. 2023) published its curves from pixels."""

MUJOCO5 = (
    "mujoco/HalfCheetah-v5",
    "mujoco/Hopper-v5",
    "mujoco/Walker2d-v5",
    "mujoco/Ant-v5",
    "mujoco/Humanoid-v5",
)
"""Gymnasium's locomotion tasks on which SAC and TD3 are compared."""

SUITES: Mapping[SuiteName, tuple[str, ...]] = MappingProxyType({"dmc6": DMC6, "dmc20": DMC20, "mujoco5": MUJOCO5})

"""Edits of a running simulation that break what was so far: gravity, colours. And what kind of number is an angle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gymnasium as gym
import mujoco
import numpy as np

from envs.physics import simulation

_STRANGE = (0.1, 0.9, 0.2)
"""Red, green and blue of a colour that no task's body has."""


def angles(env: gym.Env) -> list[bool]:
    """For each number of the physical state, whether it is a hinge's angle, the same again after a full turn."""
    model, _ = simulation(env)
    hinges = model.jnt_qposadr[model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE]
    return np.isin(np.arange(model.nq + model.nv + model.na), hinges).tolist()


@contextmanager
def switched_gravity(env: gym.Env) -> Iterator[None]:
    """While entered, everything falls the other way."""
    model, _ = simulation(env)
    gravity = model.opt.gravity
    before = gravity.copy()
    gravity[:] = -before
    try:
        yield
    finally:
        gravity[:] = before


@contextmanager
def recoloured(env: gym.Env) -> Iterator[None]:
    """While entered, every body that can move is green."""
    model, _ = simulation(env)
    moving = model.body_weldid[model.geom_bodyid] != 0
    colours, materials = model.geom_rgba.copy(), model.geom_matid.copy()
    model.geom_matid[moving] = -1  # a material's colour and texture would hide the geom's own
    model.geom_rgba[moving, :3] = _STRANGE
    try:
        yield
    finally:
        model.geom_rgba[:], model.geom_matid[:] = colours, materials

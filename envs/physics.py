"""The physical state behind a picture: read it, put it back, name its parts.

It is what dm_control's ``physics.get_state`` gives: generalised positions, velocities and, where there are any,
actuator activations. A task may also draw its target anew for each episode (dm_control's reacher moves a geom of the
model); that belongs to the episode and not to the state, so :func:`put_back` takes both.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from jaxtyping import Float64

from envs.dmc import DMCEnv
from envs.wrappers import UnsupportedSetting

_WIDTHS = {
    mujoco.mjtJoint.mjJNT_FREE: (7, 6),
    mujoco.mjtJoint.mjJNT_BALL: (4, 3),
    mujoco.mjtJoint.mjJNT_SLIDE: (1, 1),
    mujoco.mjtJoint.mjJNT_HINGE: (1, 1),
}
"""Positions and velocities of each kind of joint."""

_UNITS = {
    mujoco.mjtJoint.mjJNT_FREE: (["m"] * 3 + [""] * 4, ["m/s"] * 3 + ["rad/s"] * 3),
    mujoco.mjtJoint.mjJNT_BALL: ([""] * 4, ["rad/s"] * 3),
    mujoco.mjtJoint.mjJNT_SLIDE: (["m"], ["m/s"]),
    mujoco.mjtJoint.mjJNT_HINGE: (["rad"], ["rad/s"]),
}
"""Their units; the parts of a quaternion have none."""


class NoPhysics(UnsupportedSetting):
    """The task is not simulated by MuJoCo, so it has no physical state that could be read or set."""


def simulation(env: gym.Env) -> tuple[mujoco.MjModel, mujoco.MjData]:
    """The MuJoCo model and data inside ``env``, under whatever wrappers.

    Raises:
        NoPhysics: there are none.
    """
    base = env.unwrapped
    if isinstance(base, DMCEnv):
        return base.simulation
    if isinstance(getattr(base, "model", None), mujoco.MjModel):  # Gymnasium's own tasks, OGBench's
        return base.model, base.data  # type: ignore[attr-defined]
    raise NoPhysics(
        f"{type(base).__name__} has no MuJoCo simulation; physical states exist on dmc/, mujoco/ and OGBench's tasks"
    )


def physical_state(env: gym.Env) -> Float64[np.ndarray, " S"]:
    """Positions, velocities and activations as they are now, a new array. Its parts: :func:`physical_names`.

    Raises:
        NoPhysics: the task is not simulated by MuJoCo.
    """
    _, data = simulation(env)
    return np.concatenate([data.qpos, data.qvel, data.act])


def set_physical_state(env: gym.Env, state: Float64[np.ndarray, " S"]) -> None:
    """Put the simulation into ``state`` and compute what follows from it, so that ``env.render()`` shows it.

    Time limits and what the episode drew at its start (a target's place) stay as they are. Gymnasium's own tasks draw
    while they are stepped what was one simulator step earlier, so there the picture is that much newer than theirs.

    Raises:
        NoPhysics: the task is not simulated by MuJoCo.
        ValueError: a state of another size, or not finite.
    """
    model, data = simulation(env)
    state = np.asarray(state, np.float64)
    if state.shape != (model.nq + model.nv + model.na,):
        raise ValueError(
            f"a physical state of this task has {model.nq + model.nv + model.na} numbers, got the shape {state.shape}"
        )
    if not np.isfinite(state).all():
        raise ValueError("the physical state has NaN or inf in it")
    data.qpos[:], data.qvel[:], data.act[:] = np.split(state, [model.nq, model.nq + model.nv])
    mujoco.mj_forward(model, data)


def put_back(env: gym.Env, seed: int, episode: int, state: Float64[np.ndarray, " S"]) -> None:
    """Reset ``env`` to an episode of that seed (``envs.wrappers.Episodes``), with all that it drew, and put its
    simulation into ``state``. Raises what :func:`set_physical_state` raises."""
    env.reset(seed=seed, options={"episode": episode})
    set_physical_state(env, state)


def physical_names(env: gym.Env) -> list[str]:
    """What each number of :func:`physical_state` is: ``qpos/<joint>``, ``qvel/<joint>``, ``act/<number>``; joints with
    several numbers count them, as ``qpos/root[0]``.

    Raises:
        NoPhysics: the task is not simulated by MuJoCo.
    """
    model, _ = simulation(env)
    names = []
    for part, kind in enumerate(("qpos", "qvel")):
        for joint in range(model.njnt):
            name = mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_JOINT, joint) or f"joint{joint}"
            width = _WIDTHS[mujoco.mjtJoint(model.jnt_type[joint])][part]
            names += [f"{kind}/{name}"] if width == 1 else [f"{kind}/{name}[{i}]" for i in range(width)]
    return names + [f"act/{i}" for i in range(model.na)]


def physical_units(env: gym.Env) -> list[str]:
    """The unit of each number of :func:`physical_state`: m, rad, m/s, rad/s, or "" for quaternions and activations. A
    number in rad is a hinge's angle, the same again after a full turn.

    Raises:
        NoPhysics: the task is not simulated by MuJoCo.
    """
    model, _ = simulation(env)
    kinds = [_UNITS[mujoco.mjtJoint(kind)] for kind in model.jnt_type]
    positions, velocities = ([unit for kind in kinds for unit in kind[part]] for part in (0, 1))
    return [*positions, *velocities, *[""] * model.na]


def geom_places(env: gym.Env) -> dict[str, float]:
    """Where the model has its named geoms, in m from their bodies: ``geom/<name>[0]`` to ``[2]``. It is the model's and
    not the state's, and yet a task may draw it for each episode (dm_control's reacher and fish place their targets so).

    Raises:
        NoPhysics: the task is not simulated by MuJoCo.
    """
    model, _ = simulation(env)
    named = ((mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_GEOM, geom), geom) for geom in range(model.ngeom))
    return {f"geom/{name}[{i}]": float(model.geom_pos[geom, i]) for name, geom in named if name for i in range(3)}


class WithPhysics(gym.Wrapper):
    """Adds to each observation the ``physics`` behind it, float64: a dict of both, the first named ``observation``
    unless it is a dict already.

    Raises:
        NoPhysics: the task is not simulated by MuJoCo.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        space = env.observation_space
        parts = space.spaces if isinstance(space, gym.spaces.Dict) else {"observation": space}
        physics = gym.spaces.Box(-np.inf, np.inf, (len(physical_names(env)),), np.float64)
        self.observation_space = gym.spaces.Dict({**parts, "physics": physics})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._with_physics(obs), info

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._with_physics(obs), reward, terminated, truncated, info

    def _with_physics(self, obs: Any) -> dict[str, np.ndarray]:
        return {**(obs if isinstance(obs, dict) else {"observation": obs}), "physics": physical_state(self.env)}

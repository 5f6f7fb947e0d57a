"""A world model that another run has learned, as the start of a new one."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from envs import action_repeat_of
from runners.checkpoint import CheckpointError, Checkpoints
from runners.config import Config, ConfigError, read_config
from worldmodels.lewm import LeWorldModel

UNKNOWN_TASK = "none"
"""The task of a run on imported data that are of no task of ours."""

_HEADS = ("head_trunk.", "reward_head.", "cont_head.")


def take_world_model(model: LeWorldModel, config: Config, source: Path) -> None:
    """Give ``model`` the encoder, the normaliser and the predictor of the latest checkpoint of the run in ``source``,
    and its heads where they have the same size.

    Raises:
        ConfigError: no run there; one that sees its task in another way; one of another size.
        CheckpointError: it has no usable checkpoint.
    """
    learned = read_config(source)
    changed = other_sight(learned, config)
    if changed:
        lines = "\n  ".join(changed)
        raise ConfigError(f"--init-from {source} has learned from other observations than these:\n  {lines}")
    found = Checkpoints(source / "checkpoints").latest()
    if found is None:
        raise CheckpointError(f"--init-from {source} has no checkpoint yet; let it reach its first one")
    weights: dict[str, Tensor] | None = found[0]["agent"].get("model")
    if weights is None:
        raise ConfigError(f"--init-from {source} is a run of the {learned.agent} agent, which has no world model")
    own = model.state_dict()
    body = [name for name in own.keys() | weights.keys() if not name.startswith(_HEADS)]
    different = sorted(name for name in body if _size(own, name) != _size(weights, name))
    if different:
        name = different[0]
        raise ConfigError(
            f"--init-from {source} has a world model of another size or kind: {name} is {_size(weights, name)} there "
            f"and {_size(own, name)} here, {len(different)} parts differ; repeat its --model flags and its task's "
            "observations and actions"
        )
    heads = [name for name in own if name.startswith(_HEADS)]
    if all(_size(own, name) == _size(weights, name) for name in heads):
        body += heads
    model.load_state_dict({**own, **{name: weights[name] for name in body}})


def other_sight(learned: Config, config: Config) -> list[str]:
    """What of the settings that shape observations and actions differs, as ``name: theirs → ours``."""
    if learned.task == UNKNOWN_TASK:
        return []
    names = ["obs", "size", "camera", "render"] if learned.env.obs == "pixels" else ["obs"]
    pairs = {f"env.{name}": (getattr(learned.env, name), getattr(config.env, name)) for name in names}
    pairs["action repeat"] = (action_repeat_of(learned.task, learned.env), action_repeat_of(config.task, config.env))
    return [f"{name}: {theirs} there, {ours} here" for name, (theirs, ours) in pairs.items() if theirs != ours]


def _size(weights: dict[str, Tensor], name: str) -> str:
    return str(tuple(weights[name].shape)) if name in weights else "missing"

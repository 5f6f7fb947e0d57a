"""Impossible numbers, refused before anything is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from envs import action_repeat_of, resolve_task
from runners.baseline_config import BASELINES, MIN_PIXELS, TQCConfig
from runners.config import WORLD_MODEL_AGENTS, Config, ConfigError


def refuse_below(at_least: Iterable[tuple[str, float, float]]) -> None:
    """Raises ConfigError on the first (flag, value, least) whose value is below its least."""
    for flag, value, least in at_least:
        if value < least:
            raise ConfigError(f"{flag} is {value}, but must be at least {least:g}")


def check(config: Config) -> None:
    """Refuse impossible numbers before anything is built.

    Raises:
        ConfigError: the first one found; says the field, its value and what would do.
        envs.UnknownTask: no such task.
    """
    resolve_task(config.task)
    check_numbers(config)
    loop = config.loop
    if config.agent in BASELINES:
        _check_baseline(config)
    repeat = action_repeat_of(config.task, config.env)
    rows = loop.prefill // (repeat * config.num_envs)
    if config.agent in WORLD_MODEL_AGENTS and rows < loop.length:
        raise ConfigError(
            f"--loop.prefill {loop.prefill} env_steps gives {rows} rows in each of {config.num_envs} environments at "
            f"action repeat {repeat}, fewer than a sequence of --loop.length {loop.length}; change one of them"
        )
    if loop.prefill > config.env_steps and config.agent not in ("random", "ppo"):
        raise ConfigError(f"--loop.prefill {loop.prefill} is beyond the whole budget, --env-steps {config.env_steps}")


def check_numbers(config: Config) -> None:
    """The part of :func:`check` that holds for any task and any budget. Raises ConfigError."""
    loop = config.loop
    at_least: list[tuple[str, float, float]] = [
        ("--env-steps", config.env_steps, 1),
        ("--seed", config.seed, 0),
        ("--num-envs", config.num_envs, 1),
        ("--threads", config.threads, 0),
        ("--profile", config.profile, 0),
        ("--loop.batch", loop.batch, 1),
        ("--loop.length", loop.length, 2),
        ("--loop.pretrain", loop.pretrain, 0),
        ("--loop.train-ratio", loop.train_ratio, 0),
        ("--loop.capacity", loop.capacity, config.num_envs * loop.length),
        ("--loop.log-every", loop.log_every, 1),
        ("--loop.eval-every", loop.eval_every, 1),
        ("--loop.eval-episodes", loop.eval_episodes, 1),
        ("--loop.checkpoint-every", loop.checkpoint_every, 1),
        ("--loop.view-steps", loop.view_steps, 0),
        ("--model.latent-dim", config.model.latent_dim, 1),
        ("--model.rollout", config.model.rollout, 1),
        ("--model.rollout-every", config.model.rollout_every, 1),
        ("--dreamer.horizon", config.dreamer.horizon, 1),
        ("--dreamer.starts", config.dreamer.starts, 1),
        ("--dreamer.behaviour-every", config.dreamer.behaviour_every, 1),
        ("--dreamer.critic.members", config.dreamer.critic.members, 1),
        ("--mpc.horizon", config.mpc.horizon, 1),
        ("--mpc.collecting-horizon", 1 if config.mpc.collecting_horizon is None else config.mpc.collecting_horizon, 1),
        ("--mpc.proposals", config.mpc.proposals, 0),
        ("--mpc.std", config.mpc.std, 0),
        ("--mpc.noise", config.mpc.noise, 0),
    ]
    refuse_below(at_least)
    _check_model_and_agent(config)


def _check_baseline(config: Config) -> None:
    """Raises ConfigError on what Stable-Baselines3's algorithms cannot learn from, or on impossible numbers."""
    agent, settings = config.agent, config.baseline
    if config.env.obs == "both":
        raise ConfigError(f"--agent {agent} learns from --env.obs pixels or state, not from both at once")
    if config.env.obs == "pixels" and config.env.size < MIN_PIXELS:
        raise ConfigError(
            f"--env.size {config.env.size} is too small for the convolutions of --agent {agent}: at least {MIN_PIXELS}"
        )
    if config.init_from is not None:
        raise ConfigError(f"--init-from gives a world model, which the {agent} agent does not have")
    if config.profile:
        raise ConfigError(f"--profile traces the updates of {' and '.join(WORLD_MODEL_AGENTS)}, not of {agent}")
    least: dict[str, float] = dict.fromkeys(("batch", "updates", "capacity", "frames", "rollout", "epochs"), 1)
    least |= {"batch": 2, "pixel_batch": 2, "quantiles": 1} | dict.fromkeys(("dropped", "shift", "noise", "clip"), 0)
    least |= dict.fromkeys(("learning_rate", "entropy", "value_weight", "max_grad_norm"), 0)
    values = dataclasses.asdict(settings)
    dashed = {name: f"--{agent}.{name.replace('_', '-')}" for name in values}
    refuse_below((dashed[name], values[name], low) for name, low in least.items() if name in values)
    refuse_below((f"{dashed['units']}[{i}]", units, 1) for i, units in enumerate(settings.units))
    for name in {"discount", "tau", "lam"} & values.keys():
        if not 0 <= values[name] <= 1:
            raise ConfigError(f"{dashed[name]} is {values[name]}, but must lie in 0 to 1")
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{dashed[name]} is {value}, but must be finite")
    if isinstance(settings, TQCConfig) and settings.dropped >= settings.quantiles:
        raise ConfigError(f"--tqc.dropped {settings.dropped} leaves none of --tqc.quantiles {settings.quantiles}")


def check_parts(config: Config, processes: int) -> None:
    """Refuse what ``processes`` that learn side by side cannot divide among them. Raises ConfigError."""
    if processes == 1:
        return
    if config.agent not in WORLD_MODEL_AGENTS:
        raise ConfigError(f"--agent {config.agent} learns in one process, not in {processes} that share the work")
    whole = {
        "--num-envs": config.num_envs,
        "--loop.batch": config.loop.batch,
        "--dreamer.starts": config.dreamer.starts,
    }
    for flag, value in whole.items():
        if value % processes:
            raise ConfigError(
                f"{flag} is {value}, of which {processes} processes cannot have equal parts; it counts what they have "
                f"together, so make it a multiple of {processes}"
            )


def _check_model_and_agent(config: Config) -> None:
    """Raises ConfigError on a number that no model or agent can have."""
    model, agent = config.model, config.dreamer
    sizes = {
        "--model.head-units": model.head_units,
        "--model.sigreg-directions": model.sigreg_directions,
        "--model.window.history": model.window.history,
        "--model.conv.hidden": model.conv.hidden,
        "--model.keypoint.stem": model.keypoint.stem,
        "--model.keypoint.keypoints": model.keypoint.keypoints,
        "--model.keypoint.kernel": model.keypoint.kernel,
        "--model.keypoint.hidden": model.keypoint.hidden,
        "--dreamer.policy.units": agent.policy.units,
        "--dreamer.critic.units": agent.critic.units,
        **{f"--model.conv.channels[{i}]": size for i, size in enumerate(model.conv.channels)},
        **{f"--model.window.hidden[{i}]": size for i, size in enumerate(model.window.hidden)},
    }
    for flag, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{flag} is {size}, but must be at least 1")
    unit = {
        "--dreamer.discount": agent.discount,
        "--dreamer.lam": agent.lam,
        "--dreamer.replay-lam": agent.replay_lam,
        "--dreamer.policy-average": agent.policy_average,
        "--dreamer.random-actions": agent.random_actions,
        "--dreamer.final-lr": agent.final_lr,
        "--dreamer.critic.slow-rate": agent.critic.slow_rate,
    }
    for flag, value in unit.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{flag} is {value}, but must lie in 0 to 1")
    if model.keypoint.kernel % 2 == 0:
        raise ConfigError(f"--model.keypoint.kernel is {model.keypoint.kernel}, but must be odd to have a middle")
    if not (model.keypoint.sharpness > 0 and math.isfinite(model.keypoint.sharpness)):
        raise ConfigError(f"--model.keypoint.sharpness is {model.keypoint.sharpness}, but must be finite and above 0")
    weights = {
        "--loop.train-ratio": config.loop.train_ratio,
        "--model.sigreg-weight": model.sigreg_weight,
        "--model.rollout-weight": model.rollout_weight,
        "--model.reward-weight": model.reward_weight,
        "--model.cont-weight": model.cont_weight,
        "--dreamer.entropy": agent.entropy,
        "--dreamer.replay-value-weight": agent.replay_value_weight,
        "--dreamer.rollout-value-weight": agent.rollout_value_weight,
        "--dreamer.model-lr": agent.model_lr,
        "--dreamer.behaviour-lr": agent.behaviour_lr,
        "--dreamer.clip": agent.clip,
    }
    for flag, value in weights.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"{flag} is {value}, but must be finite and at least 0")

"""Whether every way of running an update (--compile) is the same update, to rounding, as operator by operator, and acts
the same.

    python -m benchmarks.same_updates

On a processor that is torch.compile; on a GPU a CUDA graph, too. It ends with 1 where figures, weights or actions
differ.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from agents import dreamer
from agents.actor_critic import PolicyConfig
from agents.dreamer import Compilation, DreamerAgent
from benchmarks.reference_size import random_batch
from runners.config import Config, build_agent, presets, resolve_device
from worldmodels.encoder import KeypointConfig
from worldmodels.predictor import WindowConfig

UPDATES = 12
"""Those of the world model alone and those of the behaviour too, in turn: a GPU replays the last of each."""
STEPS = 8
"""Decisions of two environments: a GPU replays the last of them."""


@dataclass(frozen=True)
class SameConfig:
    """Run the same updates in every way that --compile knows, and compare figures, weights and actions."""

    device: str = "auto"
    """auto, cpu or cuda."""
    compiler: str = "inductor"
    """torch.compile's backend. aot_eager traces and splits forward from backward, but compiles nothing, which takes a
    processor seconds and not minutes."""
    tolerance: float = 2e-3
    """How far an action may be off, and a figure or a weight after the last update beside a hundredth of itself."""


def small() -> Config:
    """The CPU preset, as small as it can be: every layer and every imagined step more takes the compiler seconds."""
    cpu = presets()["cpu"]
    eyes, window = KeypointConfig(stem=8, keypoints=8, hidden=16), WindowConfig(hidden=(16, 16))
    model = replace(cpu.model, latent_dim=8, keypoint=eyes, window=window, rollout=2, head_units=16)
    policy, critic = PolicyConfig(units=16, layers=1), replace(cpu.dreamer.critic, units=16, layers=1)
    agent = replace(
        cpu.dreamer, policy=policy, critic=critic, horizon=1, starts=16, behaviour_every=2, precision="float32"
    )
    return replace(cpu, model=model, dreamer=agent, loop=replace(cpu.loop, batch=4, length=8))


def seeded_agent(config: Config, device: torch.device) -> DreamerAgent:
    """For 32×32 pixels and two actions; PyTorch's random numbers go on from the same seed."""
    frames, actions = gym.spaces.Box(0, 255, (3, 32, 32), np.uint8), gym.spaces.Box(-1, 1, (2,))
    torch.manual_seed(0)
    agent = build_agent(config, frames, actions, device)
    assert isinstance(agent, DreamerAgent)
    return agent


def learned(config: Config, device: torch.device) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The figures of every update, and the weights after the last."""
    agent = seeded_agent(config, device)
    batch = random_batch(config.loop.batch, config.loop.length, 32, 2, device)
    agent.start(batch.obs.flatten(0, 1))
    figures = []
    for k in range(UPDATES):
        agent.anneal(k / 100)
        figures.append({name: float(value) for name, value in agent.update(batch).items()})
    return figures, weights_of(agent.state_dict())


def acted(config: Config, device: torch.device) -> Float[np.ndarray, "steps E A"]:
    """What an agent that has learned nothing, but whose policy, critics and heads differ from zero, does without
    exploring."""
    agent = seeded_agent(config, device)
    with torch.no_grad():
        for module in (agent.model, agent.average_policy, agent.policy, agent.critic):
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    seen = random_batch(STEPS, 2, 32, 2, torch.device("cpu")).obs
    agent.start(seen.flatten(0, 1).to(device))
    carry, chosen = agent.initial(2), []
    for step, obs in enumerate(seen.numpy()):
        action, carry = agent.act(obs, np.array([step == 0, step in (0, 5)]), carry, explore=False)
        chosen.append(action)
    return np.stack(chosen)


def weights_of(tree: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of a state_dict by name."""
    if isinstance(tree, Tensor):
        return {name: tree.detach().float().cpu()}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {k: v for key, value in items for k, v in weights_of(value, f"{name}.{key}").items()}


def differences(way: Compilation, device: torch.device, tolerance: float) -> list[str]:
    """What is not as operator by operator, one line for each figure, weight and way of acting."""
    wanted, weights = learned(replace(small(), compile="false"), device)
    found, state = learned(replace(small(), compile=way), device)
    lines = [
        f"{way}: {name} of update {k + 1} is {figures[name]:g} instead of {value:g}"
        for k, (figures, of_eager) in enumerate(zip(found, wanted, strict=True))
        for name, value in of_eager.items()
        if not abs(figures[name] - value) <= tolerance + 0.01 * abs(value)
    ]
    for kind in ("dreamer", "mpc"):
        config = replace(small(), agent=kind)
        apart = np.abs(acted(replace(config, compile=way), device) - acted(replace(config, compile="false"), device))
        if apart.max() > tolerance:
            lines.append(f"{way}: the {kind} agent's actions differ by {apart.max():g}")
    far = {name: (state[name] - value).abs() - 0.01 * value.abs() for name, value in weights.items()}
    return lines + [f"{way}: {name} differs by {float(x.max()):g}" for name, x in far.items() if x.max() > tolerance]


def main() -> int:
    options = tyro.cli(SameConfig, prog="python -m benchmarks.same_updates")
    device = resolve_device(options.device)
    torch.backends.cudnn.allow_tf32 = False  # kernels that fuse other convolutions would round otherwise
    dreamer.COMPILER = options.compiler
    ways: tuple[Compilation, ...] = ("true",) if device.type == "cpu" else ("graph", "true")
    failed = False
    for way in ways:
        lines = differences(way, device, options.tolerance)
        failed |= bool(lines)
        print(
            "\n".join(lines)
            or f"{way}: {UPDATES} updates and {STEPS} decisions as operator by operator, to {options.tolerance:g}"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

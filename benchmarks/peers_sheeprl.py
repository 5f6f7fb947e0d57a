"""One training step of sheeprl's two DreamerV3s (arXiv 2301.04104), by their own functions: that of 2023 in its size
XS, and that of the Nature paper in its size 12M."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import Peer, unavailable

SHEEPRL = "sheeprl"
Size = Literal["dreamer_v3_XS", "dreamer_v3_5_12M"]
"""As its configurations are called. They learn 8.3M and 10.5M parameters; its next one, dreamer_v3_S, 17.9M."""


def sheeprl_update(
    size: Size, *, batch: int, length: int, horizon: int, actions: int, bf16: bool, device: torch.device
) -> Peer:
    """World model, actor, critic and slow critic learn once from ``batch`` × ``length`` frames of 64×64 pixels, with
    ``horizon`` steps imagined from each of them. Random frames, its own settings for walker-walk, nothing compiled.

    Raises:
        PeerUnavailable: it is not installed, cannot be imported, or has no such size.
    """
    algorithm = size.rpartition("_")[0]
    try:
        from lightning.fabric import Fabric
        from torch.distributions import Distribution

        cfg = _settings(algorithm, size)
        code = importlib.import_module(f"sheeprl.algos.{algorithm}.{algorithm}")
        name = f"{SHEEPRL} {version(SHEEPRL)} {size}"
    except (ImportError, OSError, RuntimeError, PackageNotFoundError) as error:
        raise unavailable(SHEEPRL, error) from error
    cfg.algo.horizon = horizon
    torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
    Distribution.set_default_validate_args(cfg.distribution.validate_args)
    fabric = Fabric(accelerator=device.type, devices=1, precision="bf16-mixed" if bf16 else "32-true")
    frames = gym.spaces.Dict({"rgb": gym.spaces.Box(0, 255, (3, 64, 64), np.uint8)})
    modules = code.build_agent(fabric, (actions,), True, cfg, frames)[:4]
    prepare = _nature if algorithm == "dreamer_v3_5" else _first
    learn = prepare(code, fabric, cfg, modules, _rows(batch, length, actions, device))
    return Peer(name, learn, sum(p.numel() for module in modules[:3] for p in module.parameters()))


def _settings(algorithm: str, size: str) -> Any:
    """What ``sheeprl exp=<algorithm>_dmc_walker_walk algo=<size>`` reads. Raises RuntimeError: no such size."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from sheeprl.utils.utils import dotdict

    try:
        with initialize_config_module("sheeprl.configs", version_base="1.3"):
            cfg = compose("config", overrides=[f"exp={algorithm}_dmc_walker_walk", f"algo={size}"])
    except HydraException as error:
        raise RuntimeError(f"this version has no {size}: {error}") from error
    return dotdict(OmegaConf.to_container(cfg, resolve=True))


def _rows(batch: int, length: int, actions: int, device: torch.device) -> dict[str, Tensor]:
    """Random rows as its replay gives them, time first."""
    flag = torch.zeros(length, batch, 1, device=device)
    return {
        "rgb": torch.randint(0, 256, (length, batch, 3, 64, 64), dtype=torch.uint8, device=device),
        "actions": 2 * torch.rand(length, batch, actions, device=device) - 1,
        "rewards": torch.rand_like(flag),
        "terminated": flag,
        "truncated": flag.clone(),
        "is_first": flag.clone(),
    }


def _first(code: Any, fabric: Any, cfg: Any, modules: tuple[Any, ...], rows: dict[str, Tensor]) -> Callable[[], None]:
    """A gradient step as the loop of sheeprl's dreamer_v3 takes it."""
    from hydra.utils import instantiate

    world_model, actor, critic, slow_critic = modules
    parts = ((world_model, cfg.algo.world_model), (actor, cfg.algo.actor), (critic, cfg.algo.critic))
    optimisers = fabric.setup_optimizers(
        *(instantiate(of.optimizer, params=module.parameters(), _convert_="all") for module, of in parts)
    )
    moments, aggregator = _moments(code, cfg), instantiate(cfg.metric.aggregator, _convert_="all")
    tau = cfg.algo.critic.tau
    rows = {name: row.float() for name, row in rows.items()}

    def learn() -> None:
        for fast, slow in zip(critic.module.parameters(), slow_critic.parameters(), strict=True):
            slow.data.copy_(tau * fast.data + (1 - tau) * slow.data)
        shape = (rows["actions"].shape[-1],)
        code.train(fabric, *modules, *optimisers, rows, aggregator, cfg, True, shape, moments)

    return learn


def _nature(code: Any, fabric: Any, cfg: Any, modules: tuple[Any, ...], rows: dict[str, Tensor]) -> Callable[[], None]:
    """A gradient step as the loop of sheeprl's dreamer_v3_5 takes it, without the row of context that its replay keeps
    before each sequence."""
    from hydra.utils import instantiate

    cfg.algo.replay_context = 0
    learned = [p for module in modules[:3] for p in module.parameters()]
    optimiser = fabric.setup_optimizers(instantiate(cfg.algo.optimizer, params=learned, _convert_="all"))
    moments, aggregator = _moments(code, cfg), instantiate(cfg.metric.aggregator, _convert_="all")

    def learn() -> None:
        shape = (rows["actions"].shape[-1],)
        code.train(fabric, cfg, *modules, optimiser, moments, rows, aggregator, shape)
        code.update_target_critic(*modules[2:], cfg.algo.critic.tau)

    return learn


def _moments(code: Any, cfg: Any) -> Any:
    of = cfg.algo.actor.moments
    return code.Moments(of.decay, of.max, of.percentile.low, of.percentile.high)

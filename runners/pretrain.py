"""Train the world model alone on recorded episodes, without rewards: LeWorldModel as published (arXiv 2603.19312).

    python -m runners.pretrain --data data/reacher --run-dir runs/reacher-lewm --updates 5000

The same command on an existing folder goes on from its last checkpoint. What it leaves is a run like any other, with an
agent whose model has learned and whose policy has not: ``runners.train --init-from runs/reacher-lewm`` starts with it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from agents.dreamer import DreamerAgent
from agents.interface import NonFiniteLoss
from runners.checkpoint import Checkpoints
from runners.config import Config, ConfigError, build_agent, resolve_device
from runners.dataset import Dataset, Windows
from runners.disk import clear_disk_full, replace_file
from runners.logger import Logger
from runners.pretrain_config import SETTINGS, PretrainConfig, next_command, parse_args, run_config, to_json
from runners.progress import Display
from runners.run import load_agent
from runners.session import (
    claim_run,
    configure_torch,
    holds_run,
    lock_run,
    refuse_changes,
    set_torch_random,
    torch_random,
)
from runners.train import USER_ERRORS, Meter, StopOnSignal
from runners.transfer import UNKNOWN_TASK
from runners.viewer import open_loop, undisturbed
from worldmodels.interface import Batch
from worldmodels.lewm import LeWorldModel

HORIZONS = (1, 2, 4, 8, 15)
"""Steps ahead at which the open-loop error is measured."""
_FIT_ROWS = 1024
_MEASURED_BATCHES = 4


class Pretraining:
    """Everything of one pretraining. Entering it creates or resumes the folder; leaving it closes what is open.

    Raises:
        ConfigError: impossible settings; a folder that is not this run's.
        ReplayError, CheckpointError: what is read is missing or damaged.
    """

    def __init__(self, config: PretrainConfig, *, quiet: bool = False) -> None:
        self.config, self.path, self.updates = config, Path(config.run_dir), 0
        self.device = resolve_device(config.device)
        self.data = Dataset(config.data)
        self.data.replay.place(self.device)
        train, held_out = self.data.split(config.validation, config.seed)
        self.train = Windows(self.data, train, config.length)
        self.frames = Windows(self.data, train, 1)
        self.held_out = Windows(self.data, held_out, config.length)
        self.run = run_config(config, self.data)
        resumed = _holds_pretraining(self.path, config, self.run)
        configure_torch(config.threads)
        torch.manual_seed(config.seed)
        self.generator = np.random.default_rng(config.seed)
        self.agent, self.model = _build(self.run, self.data, self.device)
        self.ahead = Windows(self.data, held_out, self._measured_length(held_out))
        # What no term of the loss reaches (the heads) has no gradient, and AdamW leaves it alone.
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        with ExitStack() as opened:
            self._open(opened, resumed=resumed, quiet=quiet)
            self._opened = opened.pop_all()

    def _open(self, opened: ExitStack, *, resumed: bool, quiet: bool) -> None:
        if not resumed:
            claim_run(self.path, self.run)
            replace_file(self.path / SETTINGS, to_json(self.config).encode())
        opened.callback(os.close, lock_run(self.path))
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        saved = self.checkpoints.latest() if resumed else None
        if saved is not None:
            self._load(saved[0])
        else:
            self.agent.start(self.frames.sample(_FIT_ROWS, self.generator).obs.flatten(0, 1))
        self.logger = Logger(
            self.path,
            resume_env_steps=None if saved is None else self.updates,
            total_env_steps=self.config.updates,
            resume_wall_s=0.0 if saved is None else saved[1]["wall_s"],
            counter="updates",
            quiet=True,
        )
        opened.callback(self.logger.close)
        self.display = None if quiet else Display(self.config.updates, "updates", "updates")
        if self.display is not None:
            opened.callback(self.display.close)
        if saved is not None:
            self.message(f"resuming {self.path} at {self.updates:,} updates")

    def _measured_length(self, held_out: np.ndarray) -> int:
        """Rows of the sequences that are predicted open loop: what is remembered, and as far ahead as episodes go."""
        longest, history = int(self.data.spans[held_out, 2].max()), self.model.history
        if longest <= history:
            raise ConfigError(
                f"the longest held-out episode of {self.data.path} has {longest} rows, but to predict one the model "
                f"has to see {history} before it; lower --model.window.history or record longer episodes"
            )
        return min(history + HORIZONS[-1], longest)

    def message(self, text: str) -> None:
        if self.display is not None:
            self.display.message(text)

    def update(self) -> dict[str, Tensor]:
        """One gradient step; the loss's terms.

        Raises:
            NonFiniteLoss: before any weight was changed.
        """
        config, batch = self.config, self.train.sample(self.config.batch, self.generator)
        for group in self.optimiser.param_groups:
            group["lr"] = config.lr * schedule(self.updates, config.updates, config.final_lr)
        metrics = gradient_step(self.model, self.optimiser, batch, clip=config.clip, bf16=self.agent.bf16)
        self.updates += 1
        return metrics

    def measure(self) -> dict[str, float]:
        """Losses, collapse monitors and open-loop errors on the same held-out rows each time, in eval mode."""
        generator, sums = np.random.default_rng(self.config.seed), Meter()
        forked = torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])
        with undisturbed(self.model), forked, self._autocast():
            torch.manual_seed(self.config.seed)
            for _ in range(_MEASURED_BATCHES):
                batch = self.held_out.sample(self.config.batch, generator)
                sums.add(self.model.loss(batch)[2])
            monitors = self.model.monitors(batch)
            ahead = self.ahead.sample(max(64, self.config.batch), generator)
            errors, copied = open_loop_errors(self.model, ahead, self.model.history)
        values = {name.replace("train/", "validation/"): value for name, value in sums.means().items()}
        values |= {f"monitor/{name}": value for name, value in monitors.items()}
        for k in [k for k in HORIZONS if k <= len(errors)]:
            values |= {f"open_loop/error_{k}": float(errors[k - 1]), f"open_loop/copy_last_{k}": float(copied[k - 1])}
        return values

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.agent.bf16)

    def save(self) -> None:
        """A checkpoint of everything."""
        state = {
            "agent": self.agent.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "updates": self.updates,
            "generator": self.generator.bit_generator.state,
            **torch_random(self.device),
        }
        # The policy has seen no environment: 0 env_steps. The folder's name counts updates.
        meta = {"env_steps": 0, "updates": self.updates, "wall_s": self.logger.wall_s, "task": self.run.task}
        self.checkpoints.save(self.updates, state, meta)

    def _load(self, state: dict[str, Any]) -> None:
        load_agent(self.agent, state["agent"], self.path)
        self.optimiser.load_state_dict(state["optimiser"])
        self.updates = state["updates"]
        self.generator.bit_generator.state = state["generator"]
        set_torch_random(state, self.device)

    def __enter__(self) -> Pretraining:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()


def pretrain(config: PretrainConfig, *, quiet: bool = False) -> dict[str, float] | None:
    """Run or resume a pretraining to its end; the last measurements. None if a signal stopped it before.

    Raises one of ``USER_ERRORS``; what was saved before stays as it was.
    """
    with clear_disk_full(Path(config.run_dir)), Pretraining(config, quiet=quiet) as run, StopOnSignal() as stop:
        meter = Meter()
        measured = run.measure()
        if run.updates == 0:
            run.logger.metrics(measured, env_steps=0)
        while run.updates < config.updates and not stop.asked:
            meter.add(run.update())
            if run.updates % config.log_every == 0 or run.updates == config.updates:
                measured = run.measure()
                run.logger.metrics(meter.means() | measured, env_steps=run.updates)
            if run.display is not None:
                run.display.progress(run.updates, run.updates, summary(measured))
            if run.updates % config.checkpoint_every == 0 and run.updates < config.updates:
                run.save()
        run.save()
        if run.updates < config.updates:
            run.message(f"stopped at {run.updates:,} updates and saved; the same command goes on from here")
            return None
        run.message(f"{run.path}: {summary(measured)}, of {config.model.latent_dim}")
        return measured


def summary(measured: dict[str, float]) -> str:
    """What to look at: prediction errors relative to the latents' variance, beside guessing that nothing changes."""
    furthest = max(k for k in HORIZONS if f"open_loop/error_{k}" in measured)
    parts = [
        f"{k}-step error {measured[f'open_loop/error_{k}']:.3f} (copy-last {measured[f'open_loop/copy_last_{k}']:.3f})"
        for k in sorted({1, furthest})
    ]
    return ", ".join([*parts, f"effective rank {measured['monitor/effective_rank']:.1f}"])


def gradient_step(
    model: LeWorldModel, optimiser: torch.optim.Optimizer, batch: Batch, *, clip: float, bf16: bool
) -> dict[str, Tensor]:
    """One step on the model's loss, its gradient's norm at most ``clip``; the loss's terms. ``bf16`` runs the networks
    in bfloat16 autocast.

    Raises:
        NonFiniteLoss: before any weight was changed.
    """
    model.train()
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=bf16):
        loss, _, metrics = model.loss(batch)
    loss.backward()
    metrics |= {"loss": loss.detach(), "grad_norm": nn.utils.clip_grad_norm_(model.parameters(), clip)}
    if not torch.isfinite(metrics["loss"] + metrics["grad_norm"]):
        raise NonFiniteLoss(
            "the loss became NaN or inf, before the weights were changed; the last checkpoint is good. Lower --lr"
        )
    optimiser.step()
    return metrics


def schedule(update: int, updates: int, final: float) -> float:
    """The learning rate's factor: a linear warm-up over the first hundredth, then a cosine down to ``final``."""
    warm_up = max(1, updates // 100)
    if update < warm_up:
        return (update + 1) / warm_up
    progress = (update - warm_up) / max(1, updates - warm_up)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def open_loop_errors(
    model: LeWorldModel, batch: Batch, context: int
) -> tuple[Float[Tensor, " H"], Float[Tensor, " H"]]:
    """For 1 to H = T − ``context`` steps ahead, the mean squared error of the latents imagined from the recorded
    actions, and that of the last observed latent, both relative to the latents' variance. Rows are of one episode."""
    real = model.encode(batch.obs.flatten(0, 1)).float().view(*batch.reward.shape, -1)
    imagined = open_loop(model, batch, context)[:, context:]
    ahead = real[:, context:]
    scale = real.flatten(0, 1).var(0).mean().clamp(min=1e-8)
    copied = real[:, context - 1 : context]
    return (imagined - ahead).square().mean((0, 2)) / scale, (copied - ahead).square().mean((0, 2)) / scale


def _build(run: Config, data: Dataset, device: torch.device) -> tuple[DreamerAgent, LeWorldModel]:
    """Raises ConfigError where the encoder cannot read the data's pictures."""
    try:
        agent = build_agent(run, *data.spaces(), device)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"this model cannot be built for {data.path}: {error}") from error
    assert isinstance(agent, DreamerAgent)
    assert isinstance(agent.model, LeWorldModel)
    return agent, agent.model


def _holds_pretraining(path: Path, config: PretrainConfig, run: Config) -> bool:
    """Whether the folder already holds this very pretraining, to be resumed. Changes nothing."""
    file = path / SETTINGS
    if not file.exists():
        if (path / "config.json").exists():
            raise ConfigError(f"{path} holds a run of runners.train; choose another --run-dir")
        return holds_run(path, run)
    try:
        before = json.loads(file.read_bytes())
        now = json.loads(to_json(config))
        changed = [
            f"{n}: {before.get(n)} → {now[n]}" for n in now if n not in ("run_dir", "model") and before.get(n) != now[n]
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be used: {error}") from error
    refuse_changes(f"{path} holds a pretraining with other settings", changed)
    return holds_run(path, run)


def main(args: Sequence[str] | None = None) -> int:
    """0: all updates are done; 1: an error; 130: stopped by a signal, saved."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        config = parse_args(sys.argv[1:] if args is None else args)
        if pretrain(config) is None:
            return 130
        run = run_config(config, Dataset(config.data))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if run.task != UNKNOWN_TASK:
        print(f"next: {next_command(config, run)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

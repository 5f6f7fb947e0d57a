"""The settings of a pretraining: its command line, its presets, and the run that it makes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import tyro

from agents.dreamer import DreamerConfig
from envs import EnvConfig, closest
from runners.checks import refuse_below
from runners.config import Config, ConfigError, LoopConfig
from runners.config import presets as online_presets
from runners.dataset import Dataset
from runners.transfer import UNKNOWN_TASK
from worldmodels.lewm import PAPER, LeWMConfig

SETTINGS = "pretrain.json"
"""The file in a run's folder that holds them."""


@dataclass(frozen=True)
class PretrainConfig:
    """Train the world model alone on recorded episodes. The same command goes on where it stopped."""

    data: str
    """Dataset that runners.collect wrote, or the replay folder of a training run."""
    run_dir: str
    """Folder of the run: config, metrics, TensorBoard events and checkpoints."""
    preset: str = "cpu"
    """Defaults of everything below: cpu, small and for 64×64 pixels, or paper, LeWorldModel as published, for 224."""
    updates: int = 5_000
    """Gradient steps in all."""
    batch: int = 16
    """Sequences in an update, B."""
    length: int = 16
    """Rows of a sequence, T, all within one episode."""
    lr: float = 1e-3
    """AdamW's learning rate, after a warm-up over the first hundredth of the updates, before it falls as a cosine."""
    final_lr: float = 0.1
    """The learning rate falls to this fraction of itself. 1: it stays."""
    weight_decay: float = 1e-3
    """AdamW's weight decay."""
    clip: float = 10.0
    """Largest gradient norm."""
    validation: float = 0.1
    """Share of the episodes that is only measured on, at least one."""
    log_every: int = 100
    """Updates between rows of metrics.jsonl, each with all measurements on the validation episodes."""
    checkpoint_every: int = 1_000
    """Updates between checkpoints."""
    seed: int = 1
    """Fixes the weights, the split of the episodes and the sampling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    threads: int = 0
    """CPU threads that PyTorch uses. 0: all cores."""
    # The sizes of runners.train, which starts from such a run with --init-from.
    model: LeWMConfig = field(
        default_factory=lambda: replace(online_presets()["cpu"].model, reward_weight=0.0, cont_weight=0.0)
    )


def presets() -> dict[str, PretrainConfig]:
    """Defaults by name; data and run_dir are for the command line to say."""
    cpu = PretrainConfig(data=tyro.MISSING, run_dir=tyro.MISSING)
    paper = replace(
        cpu,
        preset="paper",
        updates=100_000,
        batch=128,
        length=4,
        lr=5e-5,
        final_lr=0.0,
        clip=1.0,
        log_every=500,
        checkpoint_every=2_500,
        model=replace(PAPER, reward_weight=0.0, cont_weight=0.0),
    )
    return {"cpu": cpu, "paper": paper}


def parse_args(args: Sequence[str]) -> PretrainConfig:
    """The command line: the preset's defaults, then what the flags say.

    Raises:
        ConfigError: an unknown preset, impossible numbers.
    """
    name, table = tyro.cli(_Choice, args=args, return_unknown_args=True, add_help=False)[0].preset, presets()
    if name not in table:
        raise ConfigError(f"there is no preset {name!r}.{closest(name, table)} The presets: {', '.join(table)}.")
    config = tyro.cli(PretrainConfig, default=table[name], args=args, prog="python -m runners.pretrain")
    refuse_below(
        [
            ("--updates", config.updates, 1),
            ("--batch", config.batch, 2),
            ("--length", config.length, 2),
            ("--log-every", config.log_every, 1),
            ("--checkpoint-every", config.checkpoint_every, 1),
            ("--lr", config.lr, 0),
            ("--final-lr", config.final_lr, 0),
            ("--weight-decay", config.weight_decay, 0),
            ("--clip", config.clip, 0),
            ("--validation", config.validation, 0),
            ("--seed", config.seed, 0),
            ("--threads", config.threads, 0),
            ("--model.rollout", config.model.rollout, 1),
            ("--model.rollout-every", config.model.rollout_every, 1),
            ("--model.latent-dim", config.model.latent_dim, 1),
        ]
    )
    return config


@dataclass(frozen=True)
class _Choice:
    """The flag that decides the defaults of all others."""

    preset: str = "cpu"


def run_config(config: PretrainConfig, data: Dataset) -> Config:
    """The configuration of an agent on the data's task, with the model that is trained here."""
    about, (observations, _) = data.about, data.spaces()
    env = (about.env if about is not None else None) or EnvConfig()
    pixels = len(observations.shape) == 3
    env = replace(env, obs="pixels", size=observations.shape[-1]) if pixels else replace(env, obs="state")
    return Config(
        task=about.task if about is not None and about.task is not None else UNKNOWN_TASK,
        run_dir=config.run_dir,
        seed=config.seed,
        device=config.device,
        threads=config.threads,
        preset="cpu",
        env=env,
        model=config.model,
        dreamer=DreamerConfig(model_lr=config.lr, clip=config.clip),
        loop=LoopConfig(batch=config.batch, length=config.length),
    )


def next_command(config: PretrainConfig, run: Config) -> str:
    """How to train an agent that starts with the model of this run."""
    env = [
        f"--env.{f.name.replace('_', '-')} {value}"
        for f in dataclasses.fields(run.env)
        if (value := getattr(run.env, f.name)) != f.default
    ]
    flags = ["--preset cpu", f"--task {run.task}", *env, f"--init-from {config.run_dir}"]
    command = f"python -m runners.train {' '.join(flags)} --run-dir {config.run_dir}-agent"
    same = config.model == presets()["cpu"].model
    return command if same else f"{command}, with the sizes that {config.run_dir}/config.json has under model"


def to_json(config: PretrainConfig) -> str:
    """All settings, for pretrain.json."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"

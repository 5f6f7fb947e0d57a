"""The configuration tree, its presets, and the one place where a configuration becomes objects."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import gymnasium as gym
import torch
import tyro

from agents.actor_critic import CriticConfig, Estimator, Pathwise, PolicyConfig, Reinforce
from agents.dreamer import Compilation, DreamerAgent, DreamerConfig, computes_bf16
from agents.interface import Agent
from agents.mpc import MPCAgent, MPCConfig, build_planner
from agents.planner import MPPIConfig
from agents.random import RandomAgent
from envs import EnvConfig, closest
from runners.baseline_config import (
    BASELINES,
    PPOConfig,
    SACConfig,
    Settings,
    TD3Config,
    TQCConfig,
)
from worldmodels.encoder import KeypointConfig
from worldmodels.lewm import LeWMConfig, build_world_model

AgentName = Literal["dreamer", "mpc", "random", "sac", "td3", "ppo", "tqc"]
WORLD_MODEL_AGENTS = ("dreamer", "mpc")
"""Those that learn a world model, which can be looked into, planned with and handed on."""


@dataclass(frozen=True)
class LoopConfig:
    """When things happen. Steps are env_steps: simulator steps, action repeat included, over all environments."""

    prefill: int = 5_000
    """Env_steps of random actions before learning starts."""
    pretrain: int = 100
    """Updates on the prefilled rows before the policy acts."""
    train_ratio: float = 38.4
    """Replayed rows for each agent step; updates per agent step are train_ratio / (batch × length)."""
    batch: int = 16
    """Sequences in an update, B."""
    length: int = 16
    """Rows of a sequence, T."""
    capacity: int = 100_000
    """Rows that the replay holds, over all environments; 12.3 kB each at 64×64 pixels."""
    log_every: int = 2_000
    """Env_steps between rows of metrics.jsonl."""
    eval_every: int = 20_000
    """Env_steps between evaluations."""
    eval_episodes: int = 10
    """Episodes of an evaluation, with the deterministic policy."""
    checkpoint_every: int = 10_000
    """Env_steps between checkpoints."""
    view_steps: int = 40
    """Gradient steps at each evaluation for the decoder that draws what the model imagines; it never touches the
    model. 0: no pictures."""


@dataclass(frozen=True)
class Config:
    """Train an agent on a task. The same command on the same --run-dir goes on where it stopped."""

    task: str = "dmc/cartpole-swingup"
    """dmc/<domain>-<task>, mujoco/<Id> (as mujoco/HalfCheetah-v5), or gym/<Id> with continuous actions."""
    agent: AgentName = "dreamer"
    """dreamer learns in imagination and acts by its policy; mpc learns the same and acts by planning; random is the
    floor of every comparison. sac, td3, ppo and tqc are Stable-Baselines3's, each set up by the flags of its name."""
    run_dir: str = "runs/default"
    """Folder of the run: config, metrics, evaluations, TensorBoard events, checkpoints and replay."""
    env_steps: int = 320_000
    """Budget, in env_steps (simulator steps, action repeat included, over all environments)."""
    seed: int = 1
    """Fixes the weights, the environments, the exploration and the sampling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    num_envs: int = 4
    """Environments collecting side by side; more than one run in processes of their own, and step while the agent
    learns."""
    replay_device: Literal["auto", "host", "cuda"] = "auto"
    """Where sampled images live. auto: on the GPU that learns, if they fill at most half of its free memory."""
    threads: int = 0
    """CPU threads that PyTorch uses, in each process that learns. 0: all cores that Slurm, a container or taskset
    leaves to the run, shared by those."""
    preset: str = "auto"
    """Defaults of everything else: cpu, cuda or state; auto is cuda where there is one, else state where states are
    observed, else cpu."""
    gradient: Literal["pathwise", "reinforce"] = "pathwise"
    """How imagined returns become a policy gradient."""
    compile: Compilation = "auto"
    """How an update is run. true: fused by torch.compile, and on CUDA replayed as one graph, without launches between
    its kernels. graph: the latter alone. false: operator by operator. auto: graph on CUDA, else false. All compute the
    same, to rounding."""
    overlap: bool = True
    """Learn while the environments take their step, where they run in processes of their own. Either way the newest
    weights choose an action, batches are drawn from all rows up to it, and a run can be repeated bit by bit; but with
    overlap env_steps are counted a step later."""
    profile: int = 0
    """Updates to trace with PyTorch's profiler, after ten that are not, into profile/ in the run's folder; 0: none. A
    run may be resumed with another number."""
    init_from: str | None = None
    """Folder of a run, as of runners.pretrain, whose encoder, normaliser and predictor this one starts with."""
    env: EnvConfig = field(default_factory=EnvConfig)
    model: LeWMConfig = field(default_factory=LeWMConfig)
    dreamer: DreamerConfig = field(default_factory=DreamerConfig)
    mpc: MPCConfig = field(default_factory=MPCConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    sac: SACConfig = field(default_factory=SACConfig)
    td3: TD3Config = field(default_factory=TD3Config)
    tqc: TQCConfig = field(default_factory=TQCConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)

    @property
    def baseline(self) -> Settings:
        """The settings of the agent, which is one of ``BASELINES``."""
        settings: dict[str, Settings] = {"sac": self.sac, "td3": self.td3, "tqc": self.tqc, "ppo": self.ppo}
        return settings[self.agent]


class ConfigError(ValueError):
    """What was asked for cannot be run. The message says why and what to do."""


def presets() -> dict[str, Config]:
    """Defaults by name: ``cpu`` fits two cores, ``cuda`` one GPU under the published protocol. ``state`` learns from
    states, where an update is cheap: it makes the more of them for each step, at each task's own action repeat.

    The processor sets the budget of ``cpu``, so that it takes less than 20 minutes of two cores: those that compute in
    bfloat16 have been more than twice as fast. All else is the same on both.
    """
    # Some are not the field's own default, which is what run folders without the field were made with.
    cpu = Config(
        env_steps=480_000 if computes_bf16(torch.device("cpu")) else 320_000,
        model=LeWMConfig(keypoint=KeypointConfig(kernel=1)),
        dreamer=DreamerConfig(critic=CriticConfig(rows="split")),
        # As good as the fields' own defaults, cheaper and smoother: one search, and more elites. Five ahead score
        # better and cost half as much again, which is too dear while collecting.
        mpc=MPCConfig(horizon=5, collecting_horizon=3, mppi=MPPIConfig(iterations=1, elites=16, temperature=1.0)),
    )
    cuda = Config(
        env_steps=100_000,
        env=EnvConfig(render="canonical", action_repeat=2),
        # SIGReg grows with the rows of a batch, of which there are four times as many.
        model=LeWMConfig(latent_dim=128, rollout=8, head_units=256, sigreg_weight=0.0125),
        dreamer=DreamerConfig(
            policy=PolicyConfig(units=256),
            critic=CriticConfig(units=256, rows="split"),
            horizon=8,
            starts=960,  # of 1,024 rows: a sequence's first ones lack the memory that acting has
            discount=0.99,
            model_lr=3e-4,
            behaviour_lr=1e-4,
        ),
        loop=LoopConfig(train_ratio=512, length=64),
        sac=SACConfig(pixel_batch=256),
        td3=TD3Config(pixel_batch=256),
        tqc=TQCConfig(pixel_batch=256),
    )
    state = dataclasses.replace(
        cpu,
        env_steps=100_000,
        env=EnvConfig(obs="state"),
        dreamer=dataclasses.replace(cpu.dreamer, discount=0.99),
        loop=LoopConfig(train_ratio=128, eval_every=10_000),
    )
    return {"cpu": cpu, "cuda": cuda, "state": state}


def parse_args(args: Sequence[str]) -> Config:
    """The command line as a Config: the preset's defaults, then what the flags say. ``--overlap false`` is
    ``--no-overlap``, as ``--compile false`` is written.

    Exits with 2, naming the closest matches, on an unknown flag or value.

    Raises:
        ConfigError: an unknown preset.
    """
    choice, _ = tyro.cli(_Choice, args=args, return_unknown_args=True, add_help=False)
    default = defaults(choice.preset, choice.device, choice.env.obs)
    args = _switches(args, [name for name, value in _flat(dataclasses.asdict(default)).items() if type(value) is bool])
    config = tyro.cli(Config, default=default, args=args, prog="python -m runners.train")
    return dataclasses.replace(config, preset=default.preset)


def defaults(preset: str, device: str, obs: str) -> Config:
    """The preset of this name; ``auto`` is that of the device and, on a processor, of what is observed.

    Raises:
        ConfigError: an unknown preset; says the closest.
    """
    if preset == "auto":
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        preset = "cuda" if cuda else "state" if obs == "state" else "cpu"
    table = presets()
    if preset not in table:
        hint = closest(preset, table)
        raise ConfigError(f"there is no preset {preset!r}.{hint} The presets: auto, {', '.join(table)}.")
    return dataclasses.replace(table[preset], preset=preset)


def advice(config: Config) -> str | None:
    """Of another preset that learns more from the same steps, if there is one."""
    learning, wanted = config.agent in ("dreamer", "mpc"), presets()["state"].loop.train_ratio
    if not learning or config.env.obs != "state" or config.loop.train_ratio >= wanted:
        return None
    return (
        f"this run replays {config.loop.train_ratio:g} rows for each step, a number for pixels; from states, "
        f"--preset state replays {wanted:g} and learns more from each step"
    )


def adjust(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with some fields changed, each named by its place in the tree: ``{"dreamer.horizon": 8}``.

    Raises:
        ConfigError: no such field, with the closest; a value of another type, or an impossible one.
    """
    known = _flat(dataclasses.asdict(config))
    tree = dataclasses.asdict(config)
    for name, value in settings.items():
        field_name = name.replace("-", "_")
        if field_name not in known:
            raise ConfigError(f"there is no setting {name!r}.{closest(field_name, known)}")
        *parents, leaf = field_name.split(".")
        branch = tree
        for parent in parents:
            branch = branch[parent]
        branch[leaf] = value
    try:
        return _from_dict(Config, tree)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@dataclass(frozen=True)
class _ChoiceOfEnv:
    obs: str = "pixels"


@dataclass(frozen=True)
class _Choice:
    """The flags that decide the defaults of all others."""

    preset: str = "auto"
    device: str = "auto"
    env: _ChoiceOfEnv = field(default_factory=_ChoiceOfEnv)


def resolve_device(name: str) -> torch.device:
    """auto, cpu or cuda as a device.

    Raises:
        ConfigError: cuda was asked for and PyTorch sees none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        build = "this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch finds no usable GPU or driver"
        raise ConfigError(f"--device cuda was asked for, but {build}; use --device auto or cpu")
    return torch.device(name)


def build_agent(config: Config, observations: gym.Space, actions: gym.Space, device: torch.device) -> Agent:
    """The objects that a configuration describes, for one environment's spaces. Variants are composed here alone.

    Raises:
        ConfigError: observations that no world model here reads; a planner that cannot plan.
    """
    if not isinstance(observations, gym.spaces.Box):
        raise ConfigError(f"the world model reads --env.obs pixels or state, not {observations}")
    assert actions.shape is not None  # every task's actions are a flat Box
    action_dim = actions.shape[0]
    if config.agent == "random":
        return RandomAgent(action_dim, config.seed)
    if config.agent in BASELINES:
        from runners.baseline_agent import build_baseline  # takes seconds to import, which only these agents need

        return build_baseline(config, observations, actions, device, num_envs=1)
    model = build_world_model(observations.shape, action_dim, config.model).to(device)
    estimator: Estimator = Pathwise() if config.gradient == "pathwise" else Reinforce()
    if config.agent == "dreamer":
        return DreamerAgent(model, action_dim, estimator, config.dreamer, config.compile)
    if config.model.reward_weight == 0:
        raise ConfigError(
            "the mpc agent plans for imagined rewards, but --model.reward-weight is 0, so that no reward was learned"
        )
    try:
        planner = build_planner(config.mpc)
    except ValueError as error:
        raise ConfigError(f"--mpc.{config.mpc.planner}: {error}") from error
    return MPCAgent(model, action_dim, estimator, config.dreamer, config.mpc, planner, config.compile)


def to_json(config: Config) -> str:
    """The whole tree, for config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The inverse of :func:`to_json`.

    Raises:
        ConfigError: not JSON, or not the fields of this version's Config.
    """
    try:
        return _from_dict(Config, json.loads(text))
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise ConfigError(f"this is not a LeDream config of this version: {error}") from error


def _from_dict(kind: Any, values: Any) -> Any:
    """A dataclass from nested plain values; tuples come back from lists."""
    if not isinstance(values, dict):
        raise ValueError(f"expected the fields of {kind.__name__}, got {values!r}")
    hints = get_type_hints(kind)
    unknown = values.keys() - {f.name for f in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    out: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            out[name] = _from_dict(hints[name], value)
            continue
        out[name] = tuple(value) if isinstance(value, list) else value
        if not _fits(out[name], hints[name]):
            raise ValueError(f"{name} is {value!r}, which is not of type {hints[name]}")
    return kind(**out)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of the annotated type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if arguments:  # a union
        return any(_fits(value, each) for each in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def read_config(path: Path) -> Config:
    """The config.json of the run in the folder ``path``.

    Raises:
        ConfigError: there is none, or it cannot be read; names the folder.
    """
    file = path / "config.json"
    if not file.exists():
        raise ConfigError(f"{path} is not a run: it has no config.json; give the folder that runners.train wrote")
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be used: {error}") from error


_NOT_THE_RUN = ("run_dir", "profile", "compile")
"""Fields that change nothing of what is learned."""


def differences(old: Config, new: Config) -> list[str]:
    """``field: old → new`` for every field that differs, leaving out where the run lies and what is only watched."""
    before, after = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    changed = [name for name in before if name not in _NOT_THE_RUN and before[name] != after[name]]
    return [f"{name}: {before[name]} → {after[name]}" for name in changed]


def _switches(args: Sequence[str], names: Sequence[str]) -> list[str]:
    """With ``--name true`` and ``--name false`` as ``--name`` and ``--no-name``, those of a group as
    ``--group.no-name``."""
    out: list[str] = []
    for arg in args:
        flag = out[-1].removeprefix("--") if out and out[-1].startswith("--") else ""
        if flag.replace("-", "_") not in names or arg.lower() not in ("true", "false"):
            out.append(arg)
        elif arg.lower() == "false":
            group, dot, leaf = flag.rpartition(".")
            out[-1] = f"--{group}{dot}no-{leaf}"
    return out


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out

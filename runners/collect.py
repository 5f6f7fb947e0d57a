"""Record complete episodes as a dataset, or import a dataset of others, to train a world model on it.

    python -m runners.collect --task dmc/reacher-easy --policy mixture --episodes 200 --out data/reacher
    python -m runners.collect --from-hdf5 pusht.h5 --out data/pusht

``runners.dataset_folder`` says what the folder holds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro

from agents.interface import Agent
from agents.random import RandomAgent
from envs import EnvConfig, NoPhysics, closest, make_env, resolve_task
from envs.physics import physical_names
from envs.vector import VectorEnv
from runners.behaviour import MixtureAgent
from runners.checks import refuse_below
from runners.config import Config, ConfigError, build_agent, read_config, resolve_device
from runners.dataset_folder import About, DatasetError, Episode, write_dataset
from runners.importers import from_hdf5, from_minari
from runners.progress import Display
from runners.run import find_checkpoint, load_agent
from runners.session import configure_torch
from runners.train import USER_ERRORS, StopOnSignal

NAMED_POLICIES = ("random", "mixture", "scripted")
"""Who can act without having learned; any other policy is a run's."""


@dataclass(frozen=True)
class CollectConfig:
    """Record complete episodes as a dataset, or import a dataset of others."""

    out: str
    """Folder to write; it must not exist."""
    task: str | None = None
    """dmc/<domain>-<task>, mujoco/<Id>, or gym/<Id>. None: that of the run that acts. With an import, the task that the
    data are of, if it is one of these."""
    policy: str = "mixture"
    """Who acts. random: uniform actions, a new one each step. mixture: each episode draws uniform noise, held actions,
    coloured noise or sinusoids, persisting for 2 to 32 steps. scripted: OGBench's own script, which grasps and
    moves things in its manipulation tasks. Anything else is a run's folder: its policy explores."""
    random_actions: float | None = None
    """With a run's policy: each episode takes a uniformly random action with a probability drawn between 0 and this.
    None: as the run itself did."""
    episodes: int = 100
    """Complete episodes to record."""
    seed: int = 1
    """Fixes the episodes and the random actions."""
    num_envs: int = 1
    """Environments side by side; more than one run in processes of their own."""
    from_hdf5: str | None = None
    """Import this HDF5 file of stable-worldmodel instead of playing; needs the extra hdf5."""
    from_minari: str | None = None
    """Import the Minari dataset of this id instead, downloading it if need be; needs the extra minari."""
    column: str = "pixels"
    """With --from-hdf5: the column to observe, pixels (H, W, 3) uint8 or numbers (S,)."""
    resize: int | None = None
    """With an import: make square pictures of this many pixels, each the mean of what it covers."""
    env: EnvConfig = field(default_factory=EnvConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    """CPU threads that PyTorch uses. 0: all cores."""


def parse_args(args: Sequence[str]) -> CollectConfig:
    """The command line; a run that acts says which task and environment are meant, unless flags do.

    Raises:
        ConfigError: no run there.
    """
    who, _ = tyro.cli(_Who, args=args, return_unknown_args=True, add_help=False)
    default = CollectConfig(out=tyro.MISSING)
    if who.policy not in NAMED_POLICIES:
        if not Path(who.policy).exists():
            choices = f"{', '.join(NAMED_POLICIES)} or a run's folder"
            raise ConfigError(f"--policy: {who.policy!r} is not {choices}.{closest(who.policy, NAMED_POLICIES)}")
        run = read_config(Path(who.policy))
        default = replace(default, task=run.task, env=run.env, policy=who.policy)
    return tyro.cli(CollectConfig, default=default, args=args, prog="python -m runners.collect")


@dataclass(frozen=True)
class _Who:
    """The flag that decides the defaults of others."""

    policy: str = "mixture"


def collect(config: CollectConfig, *, quiet: bool = False) -> About:
    """Write the dataset; what it says about itself. A signal ends it after the last complete episode.

    Raises one of ``USER_ERRORS``; then nothing is left behind.
    """
    refuse_below(
        [
            ("--episodes", config.episodes, 1),
            ("--seed", config.seed, 0),
            ("--num-envs", config.num_envs, 1),
            ("--threads", config.threads, 0),
            ("--resize", 8 if config.resize is None else config.resize, 8),
        ]
    )
    out = Path(config.out)
    if out.exists():
        raise DatasetError(f"{out} exists; choose another --out, or remove it")
    if config.task is not None:
        resolve_task(config.task)
    if config.from_hdf5 is not None and config.from_minari is not None:
        raise ConfigError("--from-hdf5 and --from-minari were both given; import one at a time")
    with StopOnSignal() as stop:
        # The policy says whether there is a script; the data are of the task as it is without one.
        known = None if config.task is None else replace(config.env, scripted=False)
        about = About(policy=config.policy, task=config.task, env=known, seed=config.seed)
        if config.from_hdf5 is not None:
            total, episodes = from_hdf5(Path(config.from_hdf5), about, column=config.column, resize=config.resize)
        elif config.from_minari is not None:
            total, episodes = from_minari(config.from_minari, about, resize=config.resize)
        else:
            total, episodes = config.episodes, _play(config, about, stop)
        write_dataset(out, _shown(episodes, total, stop, quiet=quiet), about)
    return about


def _shown(episodes: Iterable[Episode], total: int, stop: StopOnSignal, *, quiet: bool) -> Iterator[Episode]:
    """The same episodes, with their progress on the screen, until a signal asks to stop."""
    display = None if quiet else Display(total, "episodes", "rows")
    rows, returns = 0, 0.0
    try:
        for done, episode in enumerate(episodes, 1):
            yield episode
            rows, returns = rows + len(episode.obs), returns + float(episode.reward.sum())
            if display is not None:
                display.progress(done, rows, f"mean return {returns / done:.1f}")
            if stop.asked:
                break
    finally:
        if display is not None:
            display.close()


def _play(config: CollectConfig, about: About, stop: StopOnSignal) -> Iterator[Episode]:
    """Episodes of the task, as they end; ``about`` learns what a physical state consists of."""
    if config.task is None:
        raise ConfigError("--task is missing: which task is to be played? As in --task dmc/reacher-easy")
    if config.env.obs == "both":
        raise ConfigError("--env.obs both cannot be recorded; use pixels or state (physical states are kept anyway)")
    env = replace(config.env, physics=False, scripted=config.policy == "scripted")
    with closing(make_env(config.task, env)) as probe:
        try:
            about.physics = physical_names(probe)
        except NoPhysics:
            pass  # a task of another simulator is recorded without physical states
    recorded = replace(env, physics=about.physics is not None)
    num_envs = min(config.num_envs, config.episodes)
    with closing(VectorEnv(config.task, recorded, num_envs, config.seed)) as envs:
        yield from play(envs, _build_actor(config, envs), config.episodes, stop)


def _build_actor(config: CollectConfig, envs: VectorEnv) -> Agent:
    """Who acts.

    Raises:
        ConfigError, CheckpointError: a run that cannot act here.
    """
    observations, actions = envs.single_observation_space, envs.single_action_space
    if isinstance(observations, gym.spaces.Dict):  # what else is in it is recorded, and the agent does not see it
        observations = observations["observation"]
    if config.policy in ("random", "scripted"):  # the script does not ask
        return RandomAgent(actions.shape[0], config.seed)
    if config.policy == "mixture":
        return MixtureAgent(actions.shape[0], config.seed)
    path = Path(config.policy)
    run: Config = read_config(path)
    if config.random_actions is not None:
        if not 0 <= config.random_actions <= 1:
            raise ConfigError(f"--random-actions is {config.random_actions}, but must lie in 0 to 1")
        run = replace(run, dreamer=replace(run.dreamer, random_actions=config.random_actions))
    configure_torch(config.threads)
    torch.manual_seed(config.seed)
    state, _, _ = find_checkpoint(path, run)
    agent = build_agent(run, observations, actions, resolve_device(config.device))
    load_agent(agent, state["agent"], path)
    return agent


def play(envs: VectorEnv, agent: Agent, episodes: int, stop: StopOnSignal) -> Iterator[Episode]:
    """Complete episodes in the order in which they end. Environment i plays so many that short ones do not prevail.

    An episode that a fault of the simulation cut off is left out, and another one played. Observations may come with
    the physical states behind them (``EnvConfig.physics``) and with the actions that a script took in place of the
    agent's (``EnvConfig.scripted``).
    """
    n = envs.num_envs
    missing = [len(range(i, episodes, n)) for i in range(n)]
    tracks: list[_Track] = [_Track((0, 0))] * n
    answer, _ = envs.reset()
    reward, terminated, faults = np.zeros(n), np.zeros(n, bool), [None] * n
    is_first, is_last = np.ones(n, bool), np.zeros(n, bool)
    carry = agent.initial(n)
    while not stop.asked:
        parts = answer if isinstance(answer, dict) else {"observation": answer}
        obs, physics, taken = parts["observation"], parts.get("physics"), parts.get("action")
        if is_first.any():
            places = envs.get_state()["envs"]
        for i in range(n):
            if is_first[i]:
                tracks[i] = _Track((places[i]["seed"], places[i]["episode"]))
            if taken is not None and tracks[i].action:
                tracks[i].action[-1] = taken[i].copy()
            tracks[i].arrive(obs[i], reward[i], None if physics is None else physics[i])
            if is_last[i] and faults[i] is None and missing[i]:
                missing[i] -= 1
                yield tracks[i].episode(bool(terminated[i]))
        if not any(missing):
            return
        action, carry = agent.act(obs, is_first, carry, explore=True)
        for i in range(n):
            if not is_last[i]:
                tracks[i].action.append(action[i])
        answer, reward, terminated, truncated, info = envs.step(np.where(is_last[:, None], 0.0, action))
        faults = info.get("fault", [None] * n)
        is_first, is_last = is_last, terminated | truncated


class _Track:
    """An episode while it is played."""

    def __init__(self, start: tuple[int, int]) -> None:
        self.start = start
        self.obs: list[np.ndarray] = []
        self.action: list[np.ndarray] = []
        self.reward: list[float] = []
        self.physics: list[np.ndarray] = []

    def arrive(self, obs: np.ndarray, reward: float, physics: np.ndarray | None) -> None:
        if self.obs:
            self.reward.append(float(reward))
        self.obs.append(obs.copy())
        if physics is not None:
            self.physics.append(physics.copy())

    def episode(self, terminated: bool) -> Episode:
        physics: Any = np.stack(self.physics) if self.physics else None
        action, reward = np.stack(self.action), np.array(self.reward, np.float32)
        return Episode(np.stack(self.obs), action, reward, terminated, physics, self.start)


def main(args: Sequence[str] | None = None) -> int:
    """0, or 1 after an error."""
    try:
        config = parse_args(sys.argv[1:] if args is None else args)
        about = collect(config)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    name = Path(config.out).name
    print(
        f"{config.out} holds {about.episodes} episodes, {about.rows:,} rows; mean return {np.mean(about.returns):.1f}"
    )
    print(f"next: python -m runners.pretrain --data {config.out} --run-dir runs/{name}-lewm")
    return 0


if __name__ == "__main__":
    sys.exit(main())

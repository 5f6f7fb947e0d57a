"""The agents behind Stable-Baselines3's API, so that its tools work on them.

    model = Dreamer("dmc/walker-walk", seed=1)
    model.learn(100_000, callback=EvalCallback(...), progress_bar=True)
    action, state = model.predict(obs, state, episode_start, deterministic=True)
    model.save("walker")
    model = Dreamer.load("walker", env="dmc/walker-walk")

It is a face, not a trainer: ``learn`` drives ``runners.train.advance`` on the same agent, replay and update.
Evaluations and checkpoints, which ``runners.train`` makes by itself, are callbacks here.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import maybe_transpose
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import is_vectorized_observation, safe_mean
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from agents.random import RandomAgent
from runners.checkpoint import CheckpointError, load_checkpoint, save_checkpoint_file
from runners.checks import check_numbers
from runners.config import (
    AgentName,
    Config,
    ConfigError,
    adjust,
    build_agent,
    defaults,
    from_json,
    resolve_device,
    to_json,
)
from runners.replay import Replay
from runners.rollout import flatten, unflatten
from runners.run import PREFILL_SEED, load_agent
from runners.session import FLUSH_EVERY, configure_torch
from runners.spaces import (
    TaskOrEnv,
    as_vec_env,
    bounds,
    box_of,
    boxes,
    observes,
    readable,
    refuse_other_spaces,
    task_name,
    to_space,
)
from runners.train import Meter, advance, figures
from runners.vecenv import VecEnvCollector

KIND = "ledream-agent"


class Algorithm(BaseAlgorithm):
    """What :class:`Dreamer` and :class:`MPC` share. Also what ``runners.train`` drives: a ``Learner``.

    ``num_timesteps`` and ``total_timesteps`` are Stable-Baselines3's: steps of the agent, summed over environments.
    ``env_steps``, in which the configuration counts, are simulator steps, action repeat included; the log has both.

    Args:
        env: a task's name, as ``dmc/walker-walk`` or ``dmc/walker-walk-v0``, seen as ``config.env`` says; or a
            Gymnasium environment; or a VecEnv, for several environments or processes.
        config: every setting; by default those of ``preset`` (cpu, cuda, state, or auto, which follows the device and
            the observations), with one environment. Its ``task``, ``agent``, ``run_dir`` and ``env_steps`` do not count
            here.
        run_dir: where ``replay/`` is kept; None: in a temporary folder, which goes with the model.
        settings: fields of the configuration, as ``seed=2``, ``num_envs=4``, ``**{"dreamer.horizon": 8}``.

    Raises:
        ConfigError: a setting that does not exist, with the closest; impossible numbers; unreadable observations.
        UnknownTask, UnsupportedActionSpace: a task that does not exist; actions that are not a bounded box.
    """

    agent_name: AgentName
    observation_space: gym.spaces.Box
    action_space: gym.spaces.Box
    _run_dir: Path | None

    def __init__(
        self,
        env: TaskOrEnv,
        *,
        config: Config | None = None,
        preset: str = "auto",
        run_dir: str | Path | None = None,
        verbose: int = 0,
        tensorboard_log: str | None = None,
        **settings: Any,
    ) -> None:
        if config is None:
            obs = settings.get("env.obs", "pixels") if isinstance(env, str) else observes(env)
            config = replace(defaults(preset, settings.get("device", "auto"), obs), num_envs=1)
        config = replace(adjust(config, settings), task=task_name(env), agent=self.agent_name)
        check_numbers(config)
        if config.init_from is not None:
            raise ConfigError("init_from is for python -m runners.train only; here, go on with a saved model by load")
        if config.profile:
            raise ConfigError("profile is for python -m runners.train only; here, put torch.profiler around learn")
        vec_env = as_vec_env(env, config, verbose=verbose)
        spaces = boxes(vec_env.observation_space, vec_env.action_space)
        self._set_up(config, vec_env, *spaces, verbose, tensorboard_log)
        self._run_dir = None if run_dir is None else Path(run_dir)

    def _set_up(
        self,
        config: Config,
        env: VecEnv | None,
        observations: gym.spaces.Box,
        actions: gym.spaces.Box,
        verbose: int = 0,
        tensorboard_log: str | None = None,
    ) -> None:
        device = resolve_device(config.device)
        super().__init__(
            BasePolicy,  # asked for, and not used
            env,
            config.dreamer.model_lr,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=config.seed,
        )
        self.observation_space, self.action_space = observations, actions
        self.n_envs = config.num_envs if env is None else env.num_envs
        self.config = replace(config, num_envs=self.n_envs)
        configure_torch(config.threads)
        torch.manual_seed(config.seed)
        self.agent = build_agent(config, observations, actions, device)
        self.prefiller = RandomAgent(actions.shape[0], config.seed + PREFILL_SEED)
        self.generator = np.random.default_rng(config.seed)
        self.updates, self.credit, self.learning = 0, 0.0, False
        self._run_dir = None
        self._replay: Replay | None = None
        self._collector: VecEnvCollector | None = None
        self._counted = (0, 0)  # env_steps and agent_steps before this object
        self._refill_until = 0
        self._meter, self._logged = Meter(), 0

    def _setup_model(self) -> None:
        """Nothing: the constructor has done it."""

    # -- learning ------------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """The part of ``learn``'s budget that is used."""
        return self.num_timesteps / self._total_timesteps

    @property
    def replay(self) -> Replay:
        """Every row so far; made at first use."""
        if self._replay is None:
            folder = Path(tempfile.mkdtemp(prefix="ledream-")) if self._run_dir is None else self._run_dir
            loop, observations, actions = self.config.loop, self.observation_space, self.action_space
            self._replay = Replay.create(
                folder / "replay",
                capacity=loop.capacity,
                num_envs=self.n_envs,
                obs_shape=observations.shape,
                obs_dtype=np.uint8 if len(observations.shape) == 3 else np.float32,
                action_dim=actions.shape[0],
                flush_every=FLUSH_EVERY,
            )
            self._keep(self._replay, None if self._run_dir is not None else folder)
        return self._replay

    def _keep(self, replay: Replay, temporary: Path | None) -> None:
        mirror = {"auto": None, "host": False, "cuda": True}[self.config.replay_device]
        replay.place(self.device, mirror=mirror)
        weakref.finalize(self, _let_go, replay, temporary)

    @property
    def replay_buffer(self) -> Replay:
        """The name that ``CheckpointCallback`` looks for."""
        return self.replay

    @property
    def collector(self) -> VecEnvCollector:
        """What steps the training environments."""
        if self._collector is None:
            if self.env is None:
                raise ConfigError("the model has no environment to learn in: call set_env, or give load an env")
            self._collector = VecEnvCollector(self.env, self.replay)
            self._collector.env_steps, self._collector.agent_steps = self._counted
        return self._collector

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str = "run",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Collect and learn for ``total_timesteps`` agent steps over all environments, or until a callback says stop.

        Until ``loop.prefill`` env_steps are collected the actions are random and nothing is learned.

        Args:
            log_interval: episodes between rows of the log.
            reset_num_timesteps: count from 0 and begin new episodes; what was learned and collected stays. Otherwise
                the budget is added to what is counted, and episodes go on.

        Raises:
            ValueError: a budget below 1.
            ConfigError: no environment. NonFiniteLoss: the learning diverged.
        """
        if not total_timesteps >= 1:
            raise ValueError(f"total_timesteps must be at least 1, not {total_timesteps}")
        collector, env, last_obs = self.collector, self.env, self._last_obs
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        if self._last_obs is not last_obs:
            collector.begin(np.asarray(self._last_obs))
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total_timesteps:
            callback.on_rollout_start()
            self._advance()
            heard = collector.wait()
            if heard is None:
                continue
            new_obs, rewards, dones, infos = heard
            self.num_timesteps += self.n_envs
            callback.update_locals(locals())
            if not callback.on_step():
                break
            callback.on_rollout_end()
            self._count_episodes(infos, dones, log_interval)
        if collector.ended:
            self._advance()  # writes the last rows
            collector.wait()
        callback.on_training_end()
        if not self.learning:
            warnings.warn(
                f"nothing was learned yet: {collector.env_steps} of loop.prefill={self.config.loop.prefill} env_steps "
                "are collected",
                stacklevel=2,
            )
        return self

    def _advance(self) -> None:
        """The loop's step. A loaded model without its replay first collects as much as a new one, but acts itself."""
        short = self.learning and self.replay.rows_per_stream < self.config.loop.length
        if short or self.collector.env_steps < self._refill_until:
            self.collector.step(self.agent)
        elif advance(self, self._meter):
            self._record()

    def _record(self) -> None:
        """Every ``loop.log_every`` env_steps the losses, counters and monitors go into the log, as they go into
        metrics.jsonl. At the same moments, because the monitors draw random numbers."""
        now = self.collector.env_steps // self.config.loop.log_every
        if now != self._logged:
            self._logged = now
            for name, value in figures(self, self._meter).items():
                self.logger.record(name if "/" in name else f"train/{name}", value)

    def _count_episodes(self, infos: list[dict[str, Any]], dones: np.ndarray, log_interval: int | None) -> None:
        self._update_info_buffer(infos, dones)
        for _ in range(int(np.sum(dones))):
            self._episode_num += 1
            if log_interval is not None and self._episode_num % log_interval == 0:
                self.dump_logs()

    def dump_logs(self) -> None:
        """One row of the log: episodes and pace under Stable-Baselines3's names, and what was recorded since."""
        seconds = max((time.time_ns() - self.start_time) / 1e9, sys.float_info.epsilon)
        self.logger.record("time/episodes", self._episode_num, exclude="tensorboard")
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / seconds))
        self.logger.record("time/time_elapsed", int(seconds), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.record("time/env_steps", self.collector.env_steps)
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", safe_mean([info["r"] for info in self.ep_info_buffer]))
            self.logger.record("rollout/ep_len_mean", safe_mean([info["l"] for info in self.ep_info_buffer]))
        self.logger.dump(step=self.num_timesteps)

    # -- acting --------------------------------------------------------------------------------------------------------

    def predict(
        self,
        observation: Shaped[np.ndarray, "*obs"] | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: Bool[np.ndarray, " E"] | None = None,
        deterministic: bool = False,
    ) -> tuple[Float[np.ndarray, "*E A"], tuple[np.ndarray, ...]]:
        """An action for one observation or for E, images channel-first or last, and the memory for the next call.

        The world model remembers: hand ``state`` back with the next observation of the same episodes.

        Args:
            state: None where episodes begin.
            episode_start: (E,) where one begins although there is a ``state``: its memory is dropped.

        Raises:
            ValueError: an observation of another shape or kind, or a state of another number of environments.
        """
        obs, single = self._as_batch(observation)
        carry, n = self.agent.initial(len(obs)), len(obs)
        is_first = np.ones(n, bool)
        if state is not None:
            wanted = [tuple(tensor.shape) for tensor in flatten(carry)]
            if [np.shape(part) for part in state] != wanted:
                raise ValueError(f"the state is not what predict returned for {n} environment(s) of this model")
            carry = unflatten(carry, (torch.as_tensor(part) for part in state))
            is_first = np.zeros(n, bool) if episode_start is None else np.array(episode_start, bool).reshape(-1)
        if is_first.shape != (n,):
            raise ValueError(f"episode_start has the shape {is_first.shape}, but there are {n} observation(s)")
        action, carry = self.agent.act(obs, is_first, carry, explore=not deterministic)
        action = to_space(action, self.action_space)
        return (action[0] if single else action), tuple(_to_numpy(tensor) for tensor in flatten(carry))

    def _as_batch(self, observation: Any) -> tuple[Shaped[np.ndarray, "E *obs"], bool]:
        """What the agent reads, and whether it was one observation alone."""
        space = self.observation_space
        if isinstance(observation, dict):
            raise ValueError(f"the observation is a dict, but this model reads an array of shape {space.shape}")
        obs = maybe_transpose(np.asarray(observation), space)
        if len(space.shape) == 3 and obs.dtype != np.uint8:
            raise ValueError(f"images must be uint8 from 0 to 255, not {obs.dtype}")
        single = not is_vectorized_observation(obs, space)
        return readable(obs[None] if single else obs), single

    # -- environments --------------------------------------------------------------------------------------------------

    def set_env(self, env: TaskOrEnv, force_reset: bool = True) -> None:
        """Learn in another environment from now on.

        Raises:
            ValueError: it has other observations or actions, or another number of environments.
        """
        vec_env = as_vec_env(env, self.config, verbose=self.verbose)
        refuse_other_spaces(vec_env, task_name(env), self.observation_space, self.action_space, self.config.task)
        if vec_env.num_envs != self.n_envs:
            raise ValueError(
                f"the model learns in {self.n_envs} environment(s), not in {vec_env.num_envs}; for another number, "
                f"save it and give {type(self).__name__}.load the env"
            )
        super().set_env(vec_env, force_reset=True)  # even where not asked for: the episodes are others
        if self._collector is not None:
            self._collector.envs = vec_env

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:  # type: ignore[override]
        """Configuration, weights, optimisers and counters as one file, which gets the suffix .zip if it has none. The
        replay is saved apart, by :meth:`save_replay_buffer`.

        Raises:
            DiskFull: what was there before is untouched.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        counters = (self.num_timesteps, self._episode_num, *self._counters())
        state = {
            "agent": self.agent.state_dict(),
            "spaces": {"observation": bounds(self.observation_space), "action": bounds(self.action_space)},
            "prefiller": self.prefiller.state_dict(),
            "generator": self.generator.bit_generator.state,
            "learned": (self.updates, self.credit, self.learning),
            "counters": counters,
        }
        about = {"kind": KIND, "task": self.config.task, "config": to_json(self.config)}
        save_checkpoint_file(path if path.suffix else path.with_suffix(".zip"), state, about)

    def _counters(self) -> tuple[int, int]:
        return self._counted if self._collector is None else (self._collector.env_steps, self._collector.agent_steps)

    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: str | Path,
        env: TaskOrEnv | None = None,
        device: str = "auto",
        *,
        run_dir: str | Path | None = None,
        verbose: int = 0,
        tensorboard_log: str | None = None,
        **settings: Any,
    ) -> Self:
        """A saved model. Reading it runs no code that may be hidden in the file. MPC loads what Dreamer has learned,
        and the other way round: they differ in how they act.

        Learning goes on with ``learn(..., reset_num_timesteps=False)``; unless ``load_replay_buffer`` brings its rows
        back, the model first collects ``loop.prefill`` env_steps with its own policy.

        Args:
            env: to learn in, as in the constructor; None for a model that only predicts.
            settings: fields of the configuration to change; sizes of networks must stay.

        Raises:
            CheckpointError: no such file, a damaged one, or one of another program or size.
            ConfigError: a setting that does not exist. ValueError: ``env`` has other observations or actions.
        """
        file = _find(Path(path))
        state, about = load_checkpoint(file)
        if not isinstance(about, dict) or about.get("kind") != KIND:
            raise CheckpointError(f"{file} is not a model that {cls.__name__}.save wrote")
        config = replace(adjust(from_json(about["config"]), {"device": device, **settings}), agent=cls.agent_name)
        check_numbers(config)
        observations, actions = (box_of(state["spaces"][name]) for name in ("observation", "action"))
        vec_env = None if env is None else as_vec_env(env, config, verbose=verbose)
        if env is not None and vec_env is not None:
            refuse_other_spaces(vec_env, task_name(env), observations, actions, config.task)
        model = cls.__new__(cls)
        model._set_up(config, vec_env, observations, actions, verbose, tensorboard_log)
        model._run_dir = None if run_dir is None else Path(run_dir)
        load_agent(model.agent, state["agent"], file)
        model.prefiller.load_state_dict(state["prefiller"])
        model.generator.bit_generator.state = state["generator"]
        model.updates, model.credit, model.learning = state["learned"]
        model.num_timesteps, model._episode_num, *counted = state["counters"]
        model._counted = (counted[0], counted[1])
        model._refill_until = counted[0] + config.loop.prefill
        return model

    def get_parameters(self) -> dict[str, Any]:
        """The agent's ``state_dict``: weights, optimisers, scales."""
        return self.agent.state_dict()

    def set_parameters(  # type: ignore[override]
        self, load_path_or_dict: str | Path | dict[str, Any], exact_match: bool = True, device: str = "auto"
    ) -> None:
        """What :meth:`get_parameters` returned, or that of a saved model. Raises CheckpointError."""
        file, parameters = Path("the given parameters"), load_path_or_dict
        if not isinstance(parameters, dict):
            file = _find(Path(parameters))
            parameters = load_checkpoint(file)[0]["agent"]
        load_agent(self.agent, parameters, file)

    def save_replay_buffer(self, path: str | Path) -> None:
        """A copy of the replay: a folder, which ``Replay.open`` reads. Raises FileExistsError."""
        self.replay.flush()
        shutil.copytree(self.replay.path, path, ignore=shutil.ignore_patterns("*.lock"))

    def load_replay_buffer(self, path: str | Path) -> None:
        """Go on with the rows of a saved replay, copied, instead of this model's.

        Raises:
            ReplayError: not a replay. ValueError: one of another number of environments or of other sizes.
        """
        with Replay.open(path) as found:
            rows = found.sample(1, 1, np.random.default_rng(0)) if len(found) else None
            sizes = None if rows is None else (found.streams, tuple(rows.obs.shape[2:]), rows.action.shape[2])
        wanted = (self.n_envs, self.observation_space.shape, self.action_space.shape[0])
        if sizes != wanted:
            names = "environments, observation and action sizes"
            raise ValueError(f"the replay {path} has {names} {sizes}, but this model has {wanted}")
        folder = self.replay.path
        self.replay.close()
        shutil.rmtree(folder)
        shutil.copytree(path, folder, ignore=shutil.ignore_patterns("*.lock"))
        self._replay = Replay.open(folder, "r+")
        self._keep(self._replay, None if self._run_dir is not None else folder.parent)
        if self._collector is not None:
            self._collector.replay = self._replay
        self._refill_until, self._last_obs = 0, None


class Dreamer(Algorithm):
    """The agent that learns its policy in imagination and acts by it, as a Stable-Baselines3 model."""

    agent_name = "dreamer"


class MPC(Algorithm):
    """The same learner, which acts by planning inside the world model at every step."""

    agent_name = "mpc"


def _let_go(replay: Replay, temporary: Path | None) -> None:
    replay.close()
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)


def _find(path: Path) -> Path:
    """The file, with or without its .zip."""
    for file in (path, path.with_name(path.name + ".zip")):
        if file.is_file():
            return file
    raise CheckpointError(f"there is no model {path}; give the file that save wrote")


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """NumPy knows no bfloat16; as float32 every number of it is the same."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()

"""Training a baseline: Stable-Baselines3's own loop, on a run's environments, evaluations, records and checkpoints.

    python -m runners.train --task dmc/walker-walk --agent sac --env.obs state --run-dir runs/sac

The model's ``learn`` collects and learns; a callback does the rest. A checkpoint is of a moment between rollouts, where
nothing is under way: before any step of an off-policy model, before a rollout of PPO. PPO that is stopped within a
rollout collects it again, with the same random numbers.
"""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

from agents.interface import NonFiniteLoss
from envs import action_repeat_of
from runners.baseline_agent import CLIP_OBS, EPSILON, BaselineAgent, build_baseline, load_statistics, statistics_state
from runners.baseline_buffer import RowBuffer
from runners.baseline_config import OffPolicyConfig, PPOConfig
from runners.checkpoint import CheckpointError
from runners.config import Config, resolve_device
from runners.disk import clear_disk_full
from runners.rollout import Evaluation
from runners.run import load_agent
from runners.session import Session, claim_run, lock_run, set_torch_random, torch_random
from runners.train import Meter, StopOnSignal, assess, finish
from runners.vecenv import TaskVecEnv
from worldmodels import ranks

PICTURE = 84
"""Height of the pictures in which DrQ counts its shifts."""


def train_baseline(config: Config, *, quiet: bool = False) -> Evaluation | None:
    """Run or resume the training of a baseline to the end of its budget. None if a signal stopped it before.

    Raises one of ``runners.train.USER_ERRORS``; what was saved before stays as it was.
    """
    newest = None
    with (
        clear_disk_full(Path(config.run_dir)),
        ranks.together(resolve_device(config.device)),  # which the run refuses
        BaselineRun(config, quiet=quiet) as run,
        StopOnSignal() as stop,
    ):
        if run.env_steps < config.env_steps:
            callback = _Between(run, stop)
            run.learn(callback)
            if run.env_steps < config.env_steps:
                run.save()
                assert run.start is not None  # or the callback had gone on
                at = run.start["env_steps"]
                run.logger.message(f"stopped at {at:,} env_steps and saved; the same command goes on from here")
                return None
            newest = callback.after_step()
        return finish(run, newest)


class BaselineRun(Session):
    """Everything of one run of a baseline. Entering it creates or resumes the folder; leaving it closes what is open.

    Attributes:
        model: of Stable-Baselines3, with its environment.
        buffer: what an off-policy model samples from, in the run's ``replay/``; None: on-policy.
        start: the place that a checkpoint written now goes back to; None: where the run stands.
    """

    def _open(self, opened: ExitStack, *, resumed: bool, quiet: bool) -> None:
        config, settings = self.config, self.config.baseline
        self.start: dict[str, Any] | None = None
        self._open_envs(opened)
        observations, actions = self.envs.single_observation_space, self.envs.single_action_space
        agent = build_baseline(config, observations, actions, self.device, config.num_envs)
        self.agent: BaselineAgent = agent
        self.model: Any = agent.model  # on-policy or off-policy
        self.meter = Meter()
        self.model.set_logger(_Losses(self.meter))
        if not resumed:
            claim_run(self.path, config)
        opened.callback(os.close, lock_run(self.path))
        saved = self.checkpoints.latest() if resumed else None
        self.buffer = self._open_buffer(opened, settings, agent.frames, fresh=saved is None)
        self.tasks = TaskVecEnv(self.envs)
        self._stack: VecFrameStack | None = None
        self._normalise: VecNormalize | None = None
        self.model.set_env(self._wrapped(self.tasks, agent.frames, settings))
        if isinstance(self.model, OffPolicyAlgorithm):
            repeat, shortest = action_repeat_of(config.task, config.env), (agent.frames or 1) + 2
            self.model.learning_starts = max(config.loop.prefill // repeat, shortest * config.num_envs)
            self.model.replay_buffer = self.buffer  # type: ignore[assignment]
        if saved is not None:
            self._load(saved[0])
        self._open_logger(opened, saved, quiet=quiet)

    def _open_buffer(self, opened: ExitStack, settings: Any, frames: int | None, *, fresh: bool) -> RowBuffer | None:
        if not isinstance(settings, OffPolicyConfig):
            return None
        config = self.config
        # A row for each agent step of the budget, and one for the end of each episode, rarely of fewer than 8 steps.
        steps = -(-config.env_steps // action_repeat_of(config.task, config.env))
        replay = self._open_replay(min(settings.capacity, steps * 9 // 8 + config.num_envs), fresh=fresh)
        opened.callback(replay.close)
        replay.place(self.device, mirror={"auto": None, "host": False, "cuda": True}[config.replay_device])
        return RowBuffer(
            replay,
            self.model.observation_space,
            self.model.action_space,
            frames=frames,
            shift=round(settings.shift * config.env.size / PICTURE),
            seed=config.seed,
            device=self.device,
        )

    def _wrapped(self, env: VecEnv, frames: int | None, settings: Any) -> VecEnv:
        if frames is not None:
            env = self._stack = VecFrameStack(env, frames, channels_order="first")
        if isinstance(settings, PPOConfig):
            env = self._normalise = VecNormalize(
                env, norm_obs=frames is None, gamma=settings.discount, clip_obs=CLIP_OBS, epsilon=EPSILON
            )
            if frames is None:
                self._normalise.obs_rms = self.agent.obs_statistics  # type: ignore[assignment]
        return env

    def learn(self, callback: BaseCallback) -> None:
        """The model's own loop, until the callback ends it: agent steps are never more than env_steps.

        Raises:
            NonFiniteLoss: the learning diverged.
        """
        try:
            self.model.learn(self.config.env_steps, callback, log_interval=None, reset_num_timesteps=False)
        except ValueError as error:  # as PyTorch's distributions answer to a mean that is NaN
            if all(torch.isfinite(weight).all() for weight in self.model.policy.parameters()):
                raise
            raise NonFiniteLoss(f"the weights of --agent {self.config.agent} are no longer finite: {error}") from error

    @property
    def env_steps(self) -> int:
        return self.tasks.env_steps

    @property
    def updates(self) -> int:
        return self.model._n_updates

    # -- where it stands -----------------------------------------------------------------------------------------------

    def place(self) -> dict[str, Any]:
        """All that the next rollout depends on, beside what was learned."""
        model, normalise = self.model, self._normalise
        if self.buffer is not None:
            self.buffer.replay.flush()
        key = np.random.get_state(legacy=False)  # noqa: NPY002  Stable-Baselines3 draws from it
        return {
            "envs": self.envs.get_state(),
            "last_obs": torch.tensor(model._last_obs),
            "episode_starts": torch.tensor(model._last_episode_starts),
            "running_return": torch.tensor(self.tasks.running_return),
            "env_steps": self.env_steps,
            "agent_steps": model.num_timesteps,
            "last": dict(self.last),
            "buffer": None if self.buffer is None else self.buffer.state_dict(),
            "replay": None if self.buffer is None else self.buffer.replay.position(),
            "normalise": None if normalise is None else _normalise_state(normalise),
            **torch_random(self.device),
            "numpy_random": key | {"state": key["state"] | {"key": torch.tensor(key["state"]["key"].astype(np.int64))}},
            "action_random": model.action_space.np_random.bit_generator.state,
        }

    def save(self, score: float | None = None) -> None:
        start = self.start or self.place()
        state = {"agent": self.agent.state_dict(), "start": start}
        meta = {"env_steps": start["env_steps"], "wall_s": self.logger.wall_s, "task": self.config.task}
        self.checkpoints.save(start["env_steps"], state, meta, score)

    def _load(self, state: dict[str, Any]) -> None:
        load_agent(self.agent, state["agent"], self.path)
        start, model = state["start"], self.model
        try:
            if self.buffer is not None:
                self.buffer.replay.truncate_to(start["replay"])
                self.buffer.load_state_dict(start["buffer"])
            self.envs.set_state(start["envs"])
            model._last_obs = start["last_obs"].numpy()
            model._last_episode_starts = start["episode_starts"].numpy()
            if self._stack is not None:
                self._stack.stacked_obs.stacked_obs = model._last_obs.copy()
            if self._normalise is not None:
                _load_normalise(self._normalise, start["normalise"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the checkpoint in {self.path} is of another agent, task or size: {error}"
            ) from error
        self.tasks.running_return, self.tasks.env_steps = start["running_return"].numpy().copy(), start["env_steps"]
        model.num_timesteps, self.last = start["agent_steps"], dict(start["last"])
        model.action_space.np_random.bit_generator.state = start["action_random"]
        key = start["numpy_random"]
        words = key["state"]["key"].numpy().astype(np.uint32)
        np.random.set_state(key | {"state": key["state"] | {"key": words}})  # noqa: NPY002
        set_torch_random(start, self.device)


class _Between(BaseCallback):
    """What happens between the model's steps: records, evaluations, checkpoints, and the end."""

    def __init__(self, run: BaselineRun, stop: StopOnSignal) -> None:
        super().__init__()
        self.run, self.stop = run, stop
        self.on_policy = run.buffer is None

    def _on_rollout_start(self) -> None:
        """A place to go back to: what came before is stored and learned."""
        self.run.start = None
        if not self.on_policy:
            self.after_step()
        if self.on_policy or self.stop.asked:
            self.run.start = self.run.place()

    def _on_step(self) -> bool:
        run = self.run
        if run.tasks.returns:
            run.last_return = float(np.mean(run.tasks.returns))
        run.logger.progress(
            env_steps=run.env_steps, updates=run.updates, return_=run.last_return, eval_return=run.last_evaluation
        )
        if run.env_steps >= run.config.env_steps:
            run.start = None  # there is no going back from the end
            return False
        if self.on_policy:  # whose policy stays the same until the rollout is over
            self.after_step()
        return run.start is None or not self.stop.asked

    def after_step(self) -> Evaluation | None:
        """What is due, at env_steps at which the policy is what it will be when they are written down."""
        run, loop = self.run, self.run.config.loop
        if run.due("log", loop.log_every):
            self.record()
        evaluation = assess(run) if run.due("eval", loop.eval_every) else None
        if run.due("checkpoint", loop.checkpoint_every):
            run.save()
        return evaluation

    def record(self) -> None:
        """One row of metrics: the losses' means and the episodes since the last, and the counters."""
        run, values = self.run, self.run.meter.means()
        if run.tasks.returns:
            values["train/return"] = float(np.mean(run.tasks.returns))
            run.tasks.returns.clear()
        values |= {"updates": run.updates, "agent_steps": run.model.num_timesteps}
        if run.buffer is not None:
            values["replay_rows"] = run.buffer.size()
        run.logger.metrics(values, env_steps=run.env_steps)


class _Losses(Logger):
    """Gathers what a model records about its learning, for the run's own records."""

    def __init__(self, meter: Meter) -> None:
        super().__init__(folder=None, output_formats=[])
        self.meter = meter

    def record(self, key: str, value: Any, exclude: Any = None) -> None:
        """Raises NonFiniteLoss."""
        name = key.removeprefix("train/")
        if name.endswith("loss") and not math.isfinite(value):
            raise NonFiniteLoss(f"the {name} of the baseline is {value}")
        if name not in (key, "n_updates", "learning_rate"):
            self.meter.add({name: torch.tensor(float(value))})


def _normalise_state(normalise: Any) -> dict[str, Any]:
    return {
        "obs": statistics_state(normalise.obs_rms) if normalise.norm_obs else None,
        "returns": statistics_state(normalise.ret_rms),
        "running": torch.tensor(normalise.returns),
    }


def _load_normalise(normalise: Any, state: dict[str, Any]) -> None:
    if normalise.norm_obs:
        load_statistics(normalise.obs_rms, state["obs"])
    load_statistics(normalise.ret_rms, state["returns"])
    normalise.returns = state["running"].numpy().copy()

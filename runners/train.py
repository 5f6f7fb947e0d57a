"""Train an agent: collecting and learning alternate, with evaluations and checkpoints on the way.

    python -m runners.train --task dmc/cartpole-swingup --agent dreamer --env-steps 100000 --seed 1 --run-dir runs/a

The same command on an existing folder goes on from its last checkpoint. Several GPUs share the work of one run,

    torchrun --nproc-per-node 4 -m runners.train --task dmc/cartpole-swingup --num-envs 16 --run-dir runs/a

one process each, with the same settings: ``worldmodels.ranks`` says how. All processes walk through the same code at
the same pace; the first one alone evaluates and writes the record.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol

import numpy as np
import torch
from gymnasium.error import DependencyNotInstalled
from torch import Tensor

from agents.captured import NotRecordable
from agents.interface import Agent, NonFiniteLoss
from agents.random import RandomAgent
from envs import EnvironmentFault, NoOpenGL, UnknownTask, UnsupportedActionSpace, UnsupportedSetting
from envs.vector import WorkerFailure
from runners.baseline_config import BASELINES
from runners.checkpoint import CheckpointError, DiskFull
from runners.config import Config, ConfigError, parse_args, resolve_device
from runners.disk import clear_disk_full
from runners.logger import NoVideo, read_rows, write_video
from runners.profiling import Trace
from runners.replay import Replay, ReplayError
from runners.rollout import Evaluation, evaluate
from runners.run import Run
from runners.session import EVALUATION_SEED, Session
from worldmodels import ranks

USER_ERRORS = (
    ConfigError,
    UnknownTask,
    UnsupportedActionSpace,
    UnsupportedSetting,
    NoOpenGL,
    EnvironmentFault,
    WorkerFailure,
    DependencyNotInstalled,  # a task of Gymnasium's; it says what to install
    NonFiniteLoss,
    CheckpointError,
    ReplayError,
    DiskFull,
    NotRecordable,
    NoVideo,
    ranks.RanksError,
)
"""What ends a program with one clear message instead of a traceback."""


def train(config: Config, *, quiet: bool = False) -> Evaluation | None:
    """Run or resume a training to the end of its budget. None if a signal stopped it before.

    Raises one of ``USER_ERRORS``; what was saved before stays as it was.
    """
    if config.agent in BASELINES:
        from runners.baselines import train_baseline  # which takes seconds to import, and shares what is below

        return train_baseline(config, quiet=quiet)
    loop = config.loop
    with (
        clear_disk_full(Path(config.run_dir)),
        ranks.together(resolve_device(config.device)),
        Run(config, quiet=quiet) as run,
        StopOnSignal() as stop,
        Trace(run.path, config.profile if ranks.is_first() else 0, run.device, run.logger.message) as trace,
    ):
        collector, log = run.collector, run.logger
        meter = Meter()
        newest: Evaluation | None = None
        stopped = False
        # A signal to one rank stops all, after the same step.
        while collector.env_steps < config.env_steps and not (stopped := ranks.total(stop.asked) > 0):
            if not advance(run, meter):
                continue
            trace.follow(run.updates)
            if collector.returns:
                run.last_return = float(np.mean(collector.returns))
            log.progress(
                env_steps=collector.env_steps,
                updates=run.updates,
                return_=run.last_return,
                eval_return=run.last_evaluation,
            )
            if run.due("log", loop.log_every):
                record(run, meter)
            newest = assess(run) if run.due("eval", loop.eval_every) else None
            if run.due("checkpoint", loop.checkpoint_every):
                run.save()
        if stopped:
            run.save()
            log.message(f"stopped at {collector.env_steps:,} env_steps and saved; the same command goes on from here")
            return None
        return finish(run, newest)


class Steps(Protocol):
    """What collects rows: ``rollout.Collector``, or ``vecenv.VecEnvCollector``."""

    env_steps: int
    agent_steps: int
    returns: list[float]

    def step(self, agent: Agent) -> None: ...

    def forget(self) -> None: ...


class Learner(Protocol):
    """What the loop drives: a :class:`Run`, or a model behind Stable-Baselines3's API. Run says what each part is."""

    config: Config
    agent: Agent
    prefiller: RandomAgent
    generator: np.random.Generator
    updates: int
    credit: float
    learning: bool

    @property
    def replay(self) -> Replay: ...

    @property
    def collector(self) -> Steps: ...

    @property
    def progress(self) -> float: ...


def advance(run: Learner, meter: Meter) -> bool:
    """One agent step in every environment, and the updates that it pays for; their metrics go into ``meter``. Whether
    there was learning: not in the prefill."""
    collector, agent, loop = run.collector, run.agent, run.config.loop
    before = collector.agent_steps
    collector.step(agent if run.learning else run.prefiller)
    if not run.learning:
        if collector.env_steps >= loop.prefill and run.replay.rows_per_stream >= loop.length:
            start_learning(run)
        return False
    run.credit += (collector.agent_steps - before) * loop.train_ratio / (loop.batch * loop.length)
    agent.anneal(run.progress)
    meter.begin_step()
    while run.credit >= 1:
        meter.add(agent.update(run.replay.sample(ranks.part(loop.batch), loop.length, run.generator)))
        run.credit -= 1
        run.updates += 1
    return True


def start_learning(run: Learner) -> None:
    """The prefill is over: fit what is fitted once, unless it came with the world model, and learn from the rows before
    the policy acts."""
    loop = run.config.loop
    if run.config.init_from is None:
        rows = run.replay.sample(min(ranks.part(1024), len(run.replay)), 1, run.generator)
        run.agent.start(rows.obs.flatten(0, 1))
    run.learning = True
    run.credit += loop.pretrain
    run.collector.forget()


def record(run: Run, meter: Meter) -> None:
    """One row of metrics."""
    run.logger.metrics(figures(run, meter), env_steps=run.collector.env_steps)


def figures(run: Learner, meter: Meter) -> dict[str, float]:
    """The losses' means and the episodes since the last call, counters, and the collapse monitors."""
    loop, returns = run.config.loop, run.collector.returns
    values = meter.means()
    if returns:
        values["train/return"] = float(np.mean(returns))
        returns.clear()
    batch = run.replay.sample(ranks.part(loop.batch), loop.length, np.random.default_rng(run.updates))
    values |= {f"monitor/{name}": value for name, value in run.agent.monitors(batch).items()}
    rows = ranks.total(len(run.replay))
    return values | {"updates": run.updates, "agent_steps": run.collector.agent_steps, "replay_rows": rows}


def assess(run: Session) -> Evaluation:
    """Evaluate, write it down, and keep a checkpoint with the score."""
    run.wait()
    wall_s = run.logger.wall_s
    env_steps, loop = run.env_steps, run.config.loop
    seed = run.config.seed + EVALUATION_SEED + env_steps
    result = ranks.done_by_first(lambda: evaluate(run.agent, run.eval_envs, loop.eval_episodes, seed=seed))
    run.last_evaluation = result.mean
    if result.frames is not None and loop.view_steps > 0:
        frames = result.frames.transpose(0, 2, 3, 1)
        run.logger.video("eval/episode", frames, run.frame_rate, env_steps=env_steps)
        run.draw()
    run.logger.evaluation(env_steps=env_steps, returns=result.returns, lengths=result.lengths, wall_s=wall_s)
    run.save(score=result.mean)
    run.due("checkpoint", loop.checkpoint_every)
    return result


def finish(run: Session, evaluation: Evaluation | None) -> Evaluation:
    """The last evaluation, its video, and where everything lies. A finished run is not evaluated again."""
    result = evaluation or ranks.done_by_first(lambda: recorded(run)) or assess(run)
    log = run.logger
    text = f"evaluation: {result.mean:.1f} ± {np.std(result.returns):.1f} over {len(result.returns)} episodes"
    log.message(f"{run.path} reached {run.env_steps:,} env_steps; {text}")
    if result.frames is not None and ranks.is_first():
        video = run.path / "videos" / "final.mp4"
        try:
            write_video(video, result.frames.transpose(0, 2, 3, 1), fps=run.frame_rate)
            log.message(f"video: {video}")
        except NoVideo as error:
            log.message(f"no video: {error}")
    if run.config.env.obs == "state":
        log.message(f"video, on demand: python -m runners.evaluate --run-dir {run.path} --video film.mp4")
    log.message(f"curves: tensorboard --logdir {run.path}")
    return result


def recorded(run: Session) -> Evaluation | None:
    """The evaluation that evals.jsonl already holds for this very moment of the run."""
    rows = read_rows(run.path / "evals.jsonl")
    if not rows or rows[-1]["env_steps"] != run.env_steps:
        return None
    return Evaluation(rows[-1]["returns"], rows[-1]["lengths"], None)


class Meter:
    """Means of metrics between two rows of the log; the values stay on their device until they are read.

    ``policy_lag`` is among them: the updates made since the weights chose an action, when its outcome arrives. It is
    below 1 + num_envs · train_ratio / (batch · length), what one step of all environments pays for.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        self._steps = self._updates = 0

    def begin_step(self) -> None:
        """The updates that follow are made while the environments take a step."""
        self._steps += 1

    def add(self, metrics: dict[str, Tensor]) -> None:
        self._updates += 1
        if not metrics:  # of an agent that does not learn
            return
        values = torch.stack(list(metrics.values()))
        total, count = self._sums.get(tuple(metrics), (0.0, 0))
        self._sums[tuple(metrics)] = (total + values, count + 1)

    def means(self) -> dict[str, float]:
        """The means, each under ``train/``; the next row starts from nothing."""
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        for names, (total, count) in self._sums.items():
            for name, value in zip(names, total.tolist(), strict=True):
                sums[name] += value
                counts[name] += count
        out = {f"train/{name}": sums[name] / counts[name] for name in sums}
        if self._steps:
            out["train/policy_lag"] = self._updates / self._steps
        self._forget()
        return out


class StopOnSignal:
    """While entered, Ctrl-C and SIGTERM ask for an orderly stop; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopOnSignal:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def main(args: Sequence[str] | None = None) -> int:
    """0: the budget is used up; 1: an error; 130: stopped by a signal, saved."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        return 130 if train(parse_args(sys.argv[1:] if args is None else args)) is None else 0
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""Train a grid of runs, tasks × agents × seeds, each in a process of its own.

    python -m benchmarks.run --suite dmc6 --agents dreamer mpc sac:state --seeds 5 --env-steps 100000 --out runs/dmc6
    python -m benchmarks.run --tasks dmc/walker-walk --agents dreamer --out runs/a -- --env.action-repeat 4

What stands after ``--`` goes to every runners.train. The same command on the same folder goes on where it was, and may
name more tasks, agents and seeds. Finished runs are left alone.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.executors import Executor, LocalProcesses, RayCluster, Slurm
from benchmarks.grid import Cell, Grid, GridError, GridFolder, agent_label, check_flags
from benchmarks.outlook import Board, Outlook, Plan
from benchmarks.provenance import command_line
from benchmarks.suites import SUITES, SuiteName
from benchmarks.training import POLL_S, Job
from envs import UnknownTask
from runners.checks import check, refuse_below
from runners.config import ConfigError, parse_args
from runners.cores import cores
from runners.disk import DiskFull, clear_disk_full
from runners.train import StopOnSignal

ATTEMPTS = 2
"""Of a run, before it is marked as failed and left."""


@dataclass(frozen=True)
class RunConfig:
    """Train a grid of runs, tasks × agents × seeds. The same command goes on where it was. What stands after -- goes to
    every runners.train."""

    out: Path
    """Folder of the grid: grid.json, runs, logs, and what failed. On a cluster every machine must see it, and this
    checkout and its Python, under the same path."""
    suite: SuiteName | None = None
    """dmc6, dmc20 (the tasks of the published curves from pixels) or mujoco5."""
    tasks: tuple[str, ...] = ()
    """Tasks in place of a suite, as runners.train names them."""
    agents: tuple[str, ...] = ("dreamer",)
    """Agents of runners.train. They learn from pixels; sac:state is SAC from the simulator's state."""
    seeds: int = 5
    """Runs of each task and agent, with the seeds 1, 2, …"""
    env_steps: int = 100_000
    """Budget of a run, in env_steps (simulator steps, action repeat included)."""
    jobs: int = 1
    """Runs at once on this machine. A cluster decides that itself."""
    cpus_per_run: int = 0
    """CPU cores, and threads of PyTorch, for each run that is new. 0: here the cores divided by --jobs, on a cluster
    2."""
    gpus_per_run: float = 0.0
    """GPUs for each run on a cluster; Ray takes parts, such as 0.25. Here all runs share the machine's."""
    ray: tuple[str, ...] | None = None
    """Train on a Ray cluster: host:port of the one that this machine belongs to, or ray://host:port. Without an
    address: RAY_ADDRESS, or the one that runs here, or a new one of this machine alone."""
    slurm: bool = False
    """Train as jobs of Slurm, through submitit. This program stays and watches them."""
    slurm_partition: str | None = None
    """Partition of the jobs. None: the cluster's default."""
    slurm_hours: float = 12.0
    """Time limit of a job. A run that needs longer saves, and its job queues again."""
    retry_failed: bool = False
    """Try runs again that were marked as failed."""
    dry_run: bool = False
    """Say what would be trained and about how long it takes; change nothing."""


def parse(args: Sequence[str]) -> tuple[RunConfig, Grid]:
    """The command line. Exits with 2 on an unknown flag, of this program or of runners.train.

    Raises:
        GridError, ConfigError, UnknownTask: what is asked for is impossible, in any of its runs.
    """
    at = args.index("--") if "--" in args else len(args)
    own, flags = list(args[:at]), args[at + 1 :]
    program = tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(RunConfig)
    options = tyro.cli(program, args=own, prog="python -m benchmarks.run", description=RunConfig.__doc__)
    grid = asked_for(options, flags)
    for agent in grid.agents:
        config = parse_args(grid.arguments(Cell(grid.tasks[0], agent, grid.seeds[0])))
        for task in grid.tasks:
            check(dataclasses.replace(config, task=task))
    return options, grid


def asked_for(options: RunConfig, flags: Sequence[str]) -> Grid:
    """The grid that the options name. Raises GridError or ConfigError."""
    if bool(options.tasks) == (options.suite is not None):
        raise GridError(f"name either --tasks or a --suite: {', '.join(SUITES)}")
    refuse_below(
        [
            ("--seeds", options.seeds, 1),
            ("--env-steps", options.env_steps, 1),
            ("--jobs", options.jobs, 1),
            ("--cpus-per-run", options.cpus_per_run, 0),
            ("--gpus-per-run", options.gpus_per_run, 0),
            ("--slurm-hours", options.slurm_hours, 0.5),
        ]
    )
    if options.ray is not None and (options.slurm or len(options.ray) > 1):
        raise GridError("choose --ray or --slurm" if options.slurm else "--ray takes one address")
    if options.slurm and options.gpus_per_run != int(options.gpus_per_run):
        raise GridError(f"--gpus-per-run {options.gpus_per_run:g}: Slurm gives whole GPUs; only Ray gives parts")
    tasks = options.tasks or SUITES[options.suite or "dmc6"]
    agents = tuple(agent_label(entry) for entry in options.agents)
    for name, entries in (("task", tasks), ("agent", agents)):
        twice = [entry for entry, count in Counter(entries).items() if count > 1]
        if twice or not entries:
            raise GridError(f"the {name} {twice[0]} is named twice" if twice else f"no {name} is named")
    return Grid(tasks, agents, tuple(range(1, options.seeds + 1)), options.env_steps, check_flags(flags))


def make_executor(options: RunConfig, folder: GridFolder) -> Executor:
    """Where the runs go: the one place that tells. Raises GridError if it cannot be reached."""
    if options.ray is not None:
        return RayCluster(next(iter(options.ray), None), cpus_per_run(options), options.gpus_per_run)
    if options.slurm:
        return Slurm(
            folder.path / "slurm",
            cpus=cpus_per_run(options),
            gpus=int(options.gpus_per_run),
            hours=options.slurm_hours,
            partition=options.slurm_partition,
        )
    return LocalProcesses(options.jobs)


def cpus_per_run(options: RunConfig) -> int:
    """For a new run."""
    on_cluster = options.ray is not None or options.slurm
    return options.cpus_per_run or (2 if on_cluster else max(1, cores() // options.jobs))


def make_job(folder: GridFolder, grid: Grid, cell: Cell, threads: int) -> Job:
    """The job that trains a cell, or goes on with it."""
    run_dir = folder.run_dir(cell)
    begun_with = folder.threads(cell)
    place = {"run-dir": str(run_dir), "threads": str(threads if begun_with is None else begun_with)}
    words = [word for flag, value in place.items() for word in (f"--{flag}", value)]
    arguments = (*grid.arguments(cell), *words)
    return Job(str(cell), arguments, str(run_dir), str(folder.log(cell)), str(folder.file), os.getcwd())


def plan(folder: GridFolder, grid: Grid, *, retry_failed: bool) -> Plan:
    """What there is and what is missing, in the order in which it will be trained."""
    done, failed, todo = [], [], []
    for cell in grid.cells():
        if folder.finished(cell, grid.env_steps):
            done.append(cell)
        elif folder.failure(cell).exists() and not retry_failed:
            failed.append(cell)
        else:
            todo.append(cell)
    return Plan(done, failed, todo)


class Driver:
    """Hands the runs that are missing to an executor, tries each again that fails, and marks those that fail twice."""

    def __init__(self, folder: GridFolder, grid: Grid, executor: Executor, board: Board, threads: int) -> None:
        self._folder, self._grid, self._executor, self._board = folder, grid, executor, board
        self._threads = threads
        self._attempts: Counter[Cell] = Counter()
        self._running: dict[str, Cell] = {}

    def run(self, todo: Iterable[Cell], stop: StopOnSignal) -> bool:
        """Until nothing is missing. False if a signal stopped it before: all runs have saved then."""
        waiting = deque(todo)
        try:
            while (waiting or self._running) and not stop.asked:
                while waiting and self._executor.has_room():
                    self._start(waiting.popleft())
                for job, error in self._executor.ended():
                    again = self._settle(self._running.pop(job.name), error)
                    waiting.extendleft(again)
                self._board.draw(list(self._running.values()), list(waiting))
                time.sleep(POLL_S)
        finally:
            if self._running:
                self._board.message(f"waiting for {len(self._running)} runs to save; Ctrl-C again ends them at once")
                self._executor.stop()
        return not stop.asked

    def _start(self, cell: Cell) -> None:
        self._attempts[cell] += 1
        job = make_job(self._folder, self._grid, cell, self._threads)
        self._executor.start(job)
        self._running[job.name] = cell
        self._board.message(f"started   {cell}")

    def _settle(self, cell: Cell, error: str | None) -> list[Cell]:
        """Write down how a run ended; it, if it is to be tried again."""
        self._board.ended(cell)
        if self._folder.finished(cell, self._grid.env_steps):
            self._folder.failure(cell).unlink(missing_ok=True)
            self._board.message(f"finished  {cell}")
            return []
        error = error or f"it ended without an evaluation at {self._grid.env_steps} env_steps"
        if self._attempts[cell] < ATTEMPTS:
            self._board.message(f"failed    {cell}, and is tried again: {error.splitlines()[-1]}")
            return [cell]
        self._folder.mark_failed(cell, self._attempts[cell], error)
        self._board.message(f"gave up   {cell}: {error.splitlines()[-1]}\n          see {self._folder.log(cell)}")
        return []


def run(options: RunConfig, asked: Grid, command: str) -> int:
    """Train what is missing. 0: nothing is missing; 1: runs are marked as failed; 130: stopped by a signal.

    Raises:
        GridError: the folder, or where the runs shall go, cannot be used. Nothing was changed then.
    """
    folder = GridFolder(options.out)
    grid = folder.grow_to(asked)
    slots = options.jobs if options.ray is None and not options.slurm else None
    if options.dry_run:
        todo = plan(folder, grid, retry_failed=options.retry_failed)
        print("\n".join(Outlook(folder, grid, slots).lines(todo)))
        return 0
    with clear_disk_full(folder.path), ExitStack() as opened:
        executor = make_executor(options, folder)
        grid, held = folder.claim(asked)
        opened.callback(os.close, held)
        found = plan(folder, grid, retry_failed=options.retry_failed)
        board = opened.enter_context(Board(Outlook(folder, grid, slots), found))
        stop = opened.enter_context(StopOnSignal())  # not before Ray has set its own handlers
        try:
            complete = Driver(folder, grid, executor, board, cpus_per_run(options)).run(found.todo, stop)
        except KeyboardInterrupt:
            complete = False
        left = plan(folder, grid, retry_failed=False)
        board.message(f"{folder.path}: {left}")
        if not complete:
            board.message(f"stopped; to go on: {command}")
            return 130
        if left.failed:
            board.message(f"failed: {', '.join(map(str, left.failed))}\nto try them again: add --retry-failed")
        return 1 if left.failed else 0


def main(args: Sequence[str] | None = None) -> int:
    """0: every run is finished; 1: an error, or runs are marked as failed; 130: stopped by a signal."""
    given = sys.argv[1:] if args is None else list(args)
    try:
        options, grid = parse(given)
        return run(options, grid, command_line("benchmarks.run", given))
    except (GridError, ConfigError, UnknownTask, DiskFull) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""A grid of runs: what is trained and in which order, what happens to runs that fail or are interrupted, and where."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.executors import Executor, LocalProcesses, Slurm
from benchmarks.grid import Cell, Grid, GridError, GridFolder, agent_label, read_grid
from benchmarks.outlook import Board, Outlook, Plan
from benchmarks.run import RunConfig, main, make_job, plan, run
from benchmarks.suites import SUITES
from benchmarks.training import Job, execute
from envs import resolve_task
from runners.train import train
from tests.loop_helpers import COUNTING, ROOT, config, contents, differing, flags, newest_state, rows, without_wall_time

COUNT, CRASH = "gym/tests.envs_helpers:Counting-v0", "gym/tests.envs_helpers:Crash-v0"
SET_BY_GRID = ("task", "seed", "env-steps", "env.obs", "threads")
SETTINGS = {name: value for name, value in COUNTING.items() if name not in SET_BY_GRID}
FLAGS = tuple(flags(Path("nowhere"), SETTINGS)[2:])
"""Of runs on the counting environment that take a second."""
LONGER = 200
"""Env_steps of a run that takes some seconds: long enough to be found and stopped in the middle."""


def grid_of(*tasks: str, agents: tuple[str, ...] = ("dreamer:state",), seeds: int = 1, env_steps: int = 120) -> Grid:
    return Grid(tasks, agents, tuple(range(1, seeds + 1)), env_steps, FLAGS)


def words(grid: Grid, out: Path, *more: str) -> list[str]:
    """The command that asks for this grid."""
    asked = ["--tasks", *grid.tasks, "--agents", *grid.agents, "--seeds", str(len(grid.seeds)), "--out", str(out)]
    return [*asked, "--env-steps", str(grid.env_steps), "--cpus-per-run", "1", *more, "--", *grid.flags]


def train_here(grid: Grid, run_dir: Path, cell: Cell) -> None:
    """The run of a cell, as its own process would train it, but in this one."""
    settings = SETTINGS | {"task": cell.task, "env.obs": "state", "agent": cell.kind[0], "threads": 1}
    assert train(config(run_dir, settings, seed=cell.seed, env_steps=grid.env_steps), quiet=True) is not None


def assert_same_run(one: Path, other: Path) -> None:
    assert differing(newest_state(one), newest_state(other)) == []
    assert without_wall_time(rows(one / "evals.jsonl")) == without_wall_time(rows(other / "evals.jsonl"))


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Give another process time. Far longer than it needs on a busy machine."""
    end = time.monotonic() + 240
    while not true():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.02)


def begun(run_dir: Path) -> bool:
    """Whether the run has a checkpoint of its own making and is on its way."""
    return bool(list((run_dir / "checkpoints").glob("[!.]*"))) and (run_dir / "metrics.jsonl").stat().st_size > 0


class NoExecutor(Executor):
    """Nothing may be started."""

    def start(self, job: Job) -> None:
        raise AssertionError(f"{job.name} was started")


# -- what is asked for -------------------------------------------------------------------------------------------------


def test_suites_are_tasks_that_exist() -> None:
    assert {name: len(tasks) for name, tasks in SUITES.items()} == {"dmc6": 6, "dmc20": 20, "mujoco5": 5}
    for tasks in SUITES.values():
        assert len(set(tasks)) == len(tasks)
        assert [str(resolve_task(task)) for task in tasks] == list(tasks)
    assert set(SUITES["dmc6"]) < set(SUITES["dmc20"])


def test_every_task_and_agent_has_its_first_seed_before_any_has_its_second() -> None:
    cells = grid_of("dmc/walker-walk", "mujoco/Ant-v5", agents=("mpc", "dreamer:state"), seeds=2).cells()
    assert [str(cell) for cell in cells] == [
        "walker-walk/mpc/seed-1",
        "walker-walk/dreamer-state/seed-1",
        "Ant-v5/mpc/seed-1",
        "Ant-v5/dreamer-state/seed-1",
        "walker-walk/mpc/seed-2",
        "walker-walk/dreamer-state/seed-2",
        "Ant-v5/mpc/seed-2",
        "Ant-v5/dreamer-state/seed-2",
    ]


def test_an_agent_says_what_it_observes() -> None:
    assert [agent_label(entry) for entry in ("mpc", "mpc:pixels", "mpc:state")] == ["mpc", "mpc", "mpc:state"]
    arguments = grid_of(COUNT).arguments(Cell(COUNT, "mpc:state", 2))
    asked = {"--task": COUNT, "--agent": "mpc", "--seed": "2", "--env-steps": "120", "--env.obs": "state"}
    assert dict(zip(arguments[:10:2], arguments[1:10:2], strict=True)) == asked
    assert Cell(COUNT, "mpc", 1).kind == ("mpc", "pixels")


def test_a_grid_is_read_back(tmp_path: Path) -> None:
    grid = grid_of(COUNT, "dmc/walker-walk", agents=("mpc", "random:state"), seeds=3)
    (tmp_path / "grid.json").write_text(grid.to_json())
    assert read_grid(tmp_path / "grid.json") == grid


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--agents", "dreemer"], "no agent 'dreemer'; the agents are dreamer, mpc"),
        (["--agents", "mpc:touch"], "pixels or state"),
        (["--agents", "mpc", "mpc:pixels"], "mpc is named twice"),
        (["--agents"], "no agent is named"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--suite", "dmc6"], "either --tasks or a --suite"),
        (["--tasks"], "either --tasks or a --suite"),
        (["--tasks", "dmc/cartpole-swingdown"], "dmc/cartpole-swingup"),
        (["--tasks", COUNT, COUNT], "named twice"),
        (["--tasks", "mujoco/Hopper-v5", "gym/Hopper-v5"], "would share a folder"),
        (["--env-steps", "20"], "--loop.prefill 40 is beyond the whole budget"),
        (["--ray", "--slurm"], "choose --ray or --slurm"),
        (["--slurm", "--gpus-per-run", "0.5"], "only Ray gives parts"),
        (["--ray", "nowhere"], "--ray nowhere is not an address"),
        (["--", "--seed", "3"], "--seed after --"),
        (["--", "--env.obs=state"], "--env.obs after --"),
    ],
)
def test_impossible_grids(changes: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, extra = (changes, ()) if changes[0] != "--" else ([], changes[1:])
    assert main(words(grid_of(COUNT), tmp_path / "grid", *own) + list(extra)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert "Traceback" not in error
    assert not (tmp_path / "grid").exists()


def test_slurm_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(words(grid_of(COUNT), tmp_path / "grid", "--slurm")) == 1
    assert "are you indeed on a slurm cluster" in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_an_unknown_flag_for_the_runs_is_refused_before_any_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*words(grid_of(COUNT), tmp_path / "grid"), "--loop.evaluate-every", "5"])
    assert "eval-every" in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize("file", ["config.json", "notes/todo.txt"])
def test_a_folder_of_other_things_is_refused_and_untouched(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    before = contents(tmp_path)
    assert main(words(grid_of(COUNT), tmp_path)) == 1
    assert "holds other things and no grid.json; choose another --out" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 2}', '{"format": 1, "tasks": "dmc/walker-walk"}'])
def test_a_broken_grid_file_is_refused_and_untouched(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid.json").write_text(text)
    assert main(words(grid_of(COUNT), tmp_path)) == 1
    assert "grid.json cannot be used as a grid" in capsys.readouterr().err
    assert (tmp_path / "grid.json").read_text() == text


def test_other_settings_are_refused_with_all_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = grid_of(COUNT, "dmc/walker-walk", agents=("mpc", "random"), seeds=3)
    (tmp_path / "grid.json").write_text(held.to_json())
    before = contents(tmp_path)
    asked = grid_of(COUNT, agents=("mpc", "dreamer"), seeds=2, env_steps=160)
    assert main([*words(asked, tmp_path), "--loop.batch", "8"]) == 1
    listed = [line.strip() for line in capsys.readouterr().err.splitlines() if line.startswith("  ")]
    assert listed[:4] == [
        "tasks: dmc/walker-walk left out",
        "agents: random left out",
        "seeds: 3 left out",
        "env_steps: 120 → 160",
    ]
    assert listed[4].startswith("flags for runners.train: ")
    assert contents(tmp_path) == before


def test_a_grid_that_is_being_run_is_left_alone(tmp_path: Path) -> None:
    folder = GridFolder(tmp_path / "grid")
    _, held = folder.claim(grid_of(COUNT))
    with pytest.raises(GridError, match="being run by another process"):
        folder.claim(grid_of(COUNT, seeds=2))
    assert read_grid(folder.file) == grid_of(COUNT)
    os.close(held)


# -- what is missing ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the grid's first cell, trained by runners.train and finished. Not to be changed."""
    path = tmp_path_factory.mktemp("finished") / "run"
    train_here(grid_of(COUNT), path, grid_of(COUNT).cells()[0])
    return path


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> GridFolder:
    """A grid's folder with that run in its place."""
    out = GridFolder(tmp_path / "grid")
    os.close(out.claim(grid_of(COUNT))[1])
    cell = grid_of(COUNT).cells()[0]
    out.run_dir(cell).parent.mkdir(parents=True)
    out.run_dir(cell).symlink_to(finished)
    return out


def test_a_grid_grows_and_finished_runs_stay(folder: GridFolder) -> None:
    larger = grid_of("dmc/walker-walk", COUNT, agents=("random:state", "dreamer:state"), seeds=2)
    grid, held = folder.claim(larger)
    os.close(held)
    assert read_grid(folder.file) == grid
    assert grid.tasks == (COUNT, "dmc/walker-walk")  # what was there keeps its place
    assert grid.agents == ("dreamer:state", "random:state")
    found = plan(folder, grid, retry_failed=False)
    assert found.done == grid_of(COUNT).cells()
    assert found.todo == grid.cells()[1:]


def test_nothing_is_started_where_nothing_is_missing(folder: GridFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalProcesses, "start", NoExecutor.start)
    before = contents(folder.path)
    assert run(RunConfig(folder.path), grid_of(COUNT), "the command") == 0
    assert contents(folder.path) == before | {"grid.lock": before["grid.lock"]}


def test_a_longer_budget_or_another_run_in_its_place_is_not_finished(folder: GridFolder) -> None:
    (cell,) = grid_of(COUNT).cells()
    assert folder.finished(cell, 120)
    assert not folder.finished(cell, 121)
    folder.run_dir(cell).rename(folder.run_dir(cell._replace(seed=2)))
    assert not folder.finished(cell, 120)
    assert not folder.finished(cell._replace(seed=2), 120)  # a run of seed 1 lies there


def test_failed_ones_are_left_until_asked_for(folder: GridFolder) -> None:
    grid = grid_of(COUNT, seeds=2)
    lost = grid.cells()[1]
    folder.mark_failed(lost, 2, "it was the disk")
    assert plan(folder, grid, retry_failed=False).failed == [lost]
    assert plan(folder, grid, retry_failed=False).todo == []
    assert plan(folder, grid, retry_failed=True).todo == [lost]


def test_dry_run_says_what_is_missing_and_how_long_it_takes(
    folder: GridFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that took 60 s for its 120 env_steps tells what others of its agent take; of others nothing is known."""
    (cell,) = grid_of(COUNT).cells()
    real = folder.run_dir(cell).resolve()
    folder.run_dir(cell).unlink()
    folder.run_dir(cell).mkdir()
    (folder.run_dir(cell) / "config.json").write_bytes((real / "config.json").read_bytes())
    last = rows(real / "evals.jsonl")[-1] | {"wall_s": 60.0}
    (folder.run_dir(cell) / "evals.jsonl").write_text(json.dumps(last) + "\n")
    half = folder.run_dir(cell._replace(seed=2))
    half.mkdir()
    (half / "metrics.jsonl").write_text('{"env_steps": 60, "wall_s": 30.0}\n{"env_ste')
    before = contents(folder.path)
    larger = grid_of(COUNT, "dmc/walker-walk", agents=("dreamer:state", "random:state"), seeds=2)
    assert main(words(larger, folder.path, "--dry-run", "--jobs", "2")) == 0
    place = "tests.envs_helpers-Counting-v0"
    assert capsys.readouterr().out.splitlines() == [
        f"     missing  {place}/random-state/seed-1  unknown",
        "     missing  walker-walk/dreamer-state/seed-1  ~1:00 (by other tasks)",
        "     missing  walker-walk/random-state/seed-1  unknown",
        f"       at 60  {place}/dreamer-state/seed-2  ~0:30",
        f"     missing  {place}/random-state/seed-2  unknown",
        "     missing  walker-walk/dreamer-state/seed-2  ~1:00 (by other tasks)",
        "     missing  walker-walk/random-state/seed-2  unknown",
        "1 runs finished, 7 to be trained",
        "to be trained, 2 at once: about 1:15, and 4 runs of which nothing is known",  # (60 + 30 + 60) s / 2
    ]
    assert contents(folder.path) == before


@pytest.mark.parametrize("terminal", [False, True])
def test_the_screen_says_how_far_each_run_is(terminal: bool, folder: GridFolder) -> None:
    grid = grid_of(COUNT, seeds=3)
    first, second, third = grid.cells()
    folder.run_dir(second).mkdir()
    (folder.run_dir(second) / "metrics.jsonl").write_text('{"env_steps": 60, "wall_s": 30.0}\n')
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    seconds = iter([0.0, 1.0, 61.0])
    with Board(Outlook(folder, grid, 1), Plan([first], [], [second, third]), console, lambda: next(seconds)) as board:
        board.draw([second], [third])  # too early to look again
        board.draw([second], [third])
        board.message("a line between")
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert shown.startswith("1 runs finished, 2 to be trained\n")
    assert "60/120" in shown
    assert "1/3 runs" in shown
    assert "left: about " in shown
    assert ("━" in shown) == terminal
    assert "a line between" in shown


def test_a_machine_without_the_folder_says_so(folder: GridFolder) -> None:
    job = make_job(folder, grid_of(COUNT), grid_of(COUNT).cells()[0], 1)
    elsewhere = dataclasses.replace(job, grid="/not/mounted/grid.json")
    assert "every machine must see the grid's folder" in str(execute(elsewhere))
    assert not folder.log(grid_of(COUNT).cells()[0]).exists()


def test_dry_run_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "dmc6", "--seeds", "3", "--out", str(tmp_path / "new"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "0 runs finished, 18 to be trained" in out
    assert "unknown: no run of these agents" in out
    assert not (tmp_path / "new").exists()


def test_a_run_goes_on_with_the_threads_it_began_with(folder: GridFolder) -> None:
    grid = grid_of(COUNT, seeds=2)
    threads = [make_job(folder, grid, cell, 7).arguments[-1] for cell in grid.cells()]
    assert threads == ["1", "7"]


# -- in processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first run of a grid of LONGER ones, in one piece."""
    grid = grid_of(COUNT, env_steps=LONGER)
    path = tmp_path_factory.mktemp("longer") / "run"
    train_here(grid, path, grid.cells()[0])
    return path


def test_a_failing_run_is_tried_again_then_marked_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The failing one comes first. The other one is bit for bit what runners.train makes of the same settings."""
    grid = grid_of(CRASH, COUNT, agents=("random:state",))
    folder = GridFolder(tmp_path / "grid")
    assert main(words(grid, folder.path)) == 1
    crash, count = grid.cells()
    train_here(grid, tmp_path / "whole", count)
    assert_same_run(folder.run_dir(count), tmp_path / "whole")
    failure = json.loads(folder.failure(crash).read_text())
    assert failure["attempts"] == 2
    assert failure["error"].splitlines()[0] == "(exit code 1)"
    assert failure["error"].splitlines()[-1].endswith("step three is out of order")
    assert not folder.failure(count).exists()
    assert folder.log(crash).read_text().count("# ") == 2  # what each process printed, under its title
    out = capsys.readouterr().out
    events = [line.split()[0] for line in out.splitlines() if str(crash) in line and line[0] not in " 0123456789"]
    assert events[:4] == ["started", "failed", "started", "gave"]
    assert "to try them again: add --retry-failed" in out


def test_stopped_in_the_middle_it_saves_and_goes_on(
    longer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing tells afterwards that SIGTERM came in between."""
    grid = grid_of(COUNT, env_steps=LONGER)
    (cell,) = grid.cells()
    folder = GridFolder(tmp_path / "grid")

    def stop_it() -> None:
        wait_until(lambda: begun(folder.run_dir(cell)), "the run is on its way")
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_it)
    watcher.start()
    assert main(words(grid, folder.path)) == 130
    watcher.join()
    out = capsys.readouterr().out
    assert "stopped; to go on: python -m benchmarks.run --tasks" in out
    at = newest_state(folder.run_dir(cell))["collector"]["env_steps"]
    assert 0 < at < LONGER
    assert f"stopped at {at:,} env_steps and saved" in folder.log(cell).read_text()
    assert not folder.failure(cell).exists()
    assert main(words(grid, folder.path)) == 0
    assert f"at {at:,} env_steps" in folder.log(cell).read_text()
    assert_same_run(folder.run_dir(cell), longer)


def test_a_killed_driver_leaves_no_process_behind_and_the_next_waits_for_the_last(longer: Path, tmp_path: Path) -> None:
    grid = grid_of(COUNT, env_steps=LONGER)
    (cell,) = grid.cells()
    folder = GridFolder(tmp_path / "grid")
    os.close(folder.claim(grid)[1])
    job = make_job(folder, grid, cell, 1)
    code = f"from benchmarks.training import Job, Training\nTraining({job!r}).wait()"
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_until(lambda: begun(folder.run_dir(cell)), "the run is on its way")
    driver.kill()
    driver.wait()
    executor = LocalProcesses(1)
    executor.start(job)  # at once, while the first process is still saving
    assert not executor.has_room()
    assert until_ended(executor) == [(job, None)]
    said = folder.log(cell).read_text()
    assert said.index("and saved; the same command goes on") < said.index("resuming ")
    assert_same_run(folder.run_dir(cell), longer)


def until_ended(executor: Executor) -> list[tuple[Job, str | None]]:
    over: list[tuple[Job, str | None]] = []

    def one_more() -> bool:
        over.extend(executor.ended())
        return bool(over)

    wait_until(one_more, "a job ended")
    return over


# -- on clusters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listens", [False, True], ids=["nobody", "not Ray"])
def test_a_ray_address_that_does_not_answer(
    listens: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said within seconds, and the grid that was there is as it was."""
    monkeypatch.setattr("benchmarks.executors.CONNECT_S", 1.0)
    folder = GridFolder(tmp_path / "grid")
    os.close(folder.claim(grid_of(COUNT))[1])
    before = contents(folder.path)
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        if listens:
            door.listen()
        address = f"127.0.0.1:{door.getsockname()[1]}"
        assert main(words(grid_of(COUNT, seeds=2), folder.path, "--ray", address)) == 1
    assert f"error: no Ray cluster answers at {address}" in capsys.readouterr().err
    assert contents(folder.path) == before


def first_process(folder: GridFolder, cell: Cell) -> int:
    """The process that a run was first trained in, as its log says."""
    return int(folder.log(cell).read_text().partition("process ")[2].split()[0])


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()[1])


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two workers on this machine; the address."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray puts a token into the home folder
    import ray

    for left in (2, 1, 0):
        try:
            ray.init(num_cpus=2, log_to_driver=False, object_store_memory=80_000_000)
            break
        except Exception:  # it gives its processes 30 seconds to start, which a busy machine may not keep
            ray.shutdown()
            if not left:
                raise
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.mark.timeout(600)  # it starts two dozen processes, most of them Ray's
def test_a_ray_cluster_whose_worker_is_killed_finishes_the_grid(ray_cluster: str, longer: Path, tmp_path: Path) -> None:
    """Two runs at once; the worker of one is killed with -9. Its run ends with it, is started again and goes on."""
    grid = grid_of(COUNT, seeds=2, env_steps=LONGER)
    folder = GridFolder(tmp_path / "grid")
    first, second = grid.cells()
    driver = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.run", *words(grid, folder.path, "--ray", ray_cluster)], cwd=ROOT
    )
    wait_until(lambda: begun(folder.run_dir(first)), "the first run is on its way")
    training = first_process(folder, first)
    os.kill(parent(training), signal.SIGKILL)
    assert driver.wait(timeout=500) == 0
    assert not Path(f"/proc/{training}").exists()
    assert folder.log(first).read_text().count("# 20") == 2
    assert "resuming " in folder.log(first).read_text()
    assert plan(folder, grid, retry_failed=False).done == [first, second]
    assert_same_run(folder.run_dir(first), longer)


def test_a_preempted_job_of_slurm_saves_and_goes_on(longer: Path, tmp_path: Path) -> None:
    """Through submitit's local executor: the same job and signal in the same wrapping, without the queue."""
    grid = grid_of(COUNT, env_steps=LONGER)
    (cell,) = grid.cells()
    folder = GridFolder(tmp_path / "grid")
    os.close(folder.claim(grid)[1])
    executor = Slurm(folder.path / "slurm", cpus=1, gpus=0, hours=1, cluster="local")
    executor.start(make_job(folder, grid, cell, 1))
    wait_until(lambda: begun(folder.run_dir(cell)), "the run is on its way")
    for pid in (parent(first_process(folder, cell)), first_process(folder, cell)):
        os.kill(pid, signal.SIGUSR2)  # to every process of the job, as Slurm does
    until_ended(executor)
    said = folder.log(cell).read_text()
    assert said.count("# 20") == 2
    assert said.index("and saved; the same command goes on") < said.index("resuming ")
    assert folder.finished(cell, grid.env_steps)
    assert_same_run(folder.run_dir(cell), longer)

"""A run that is stopped or killed goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from runners.checkpoint import Checkpoints
from runners.run import Run
from runners.train import main, train
from tests.loop_helpers import (
    COUNTING,
    TINY,
    Finished,
    config,
    contents,
    differing,
    finished_run,
    flags,
    newest_state,
    program,
    replay_rows,
    rows,
    signal_at_row,
    without_wall_time,
)

LONGER = TINY | {"env-steps": 760, "loop.train-ratio": 128, "loop.eval-every": 640}
"""95 agent steps of pixels, and four updates for each after the prefill."""

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished_run(tmp_path_factory)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the counting environment, for comparison."""
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train(config(path, COUNTING), quiet=True) is not None
    return path


def stop(path: Path, settings: dict[str, Any], row: int, number: int = signal.SIGTERM) -> dict[str, Any]:
    """Start or resume, be asked to stop after that many rows of this session; what the checkpoint holds."""
    with signal_at_row(number, row):
        assert train(config(path, settings), quiet=True) is None
    return newest_state(path)


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimisers, random states, environments, counters and replay are equal, and so is the record."""
    assert differing(newest_state(one), newest_state(other)) == []
    assert differing(replay_rows(one), replay_rows(other)) == []
    assert without_wall_time(rows(one / "evals.jsonl")) == without_wall_time(rows(other / "evals.jsonl"))
    counters = ("env_steps", "updates", "agent_steps", "replay_rows")
    metrics = [[[row[name] for name in counters] for row in rows(path / "metrics.jsonl")] for path in (one, other)]
    assert metrics[0] == metrics[1]


# -- stopped and resumed -----------------------------------------------------------------------------------------------


def test_next_200_updates_are_bit_identical(tmp_path: Path) -> None:
    """Pixels of a real task, one environment, on the CPU."""
    assert train(config(tmp_path / "whole", LONGER), quiet=True) is not None
    stopped = stop(tmp_path / "parts", LONGER, row=46)
    assert 0 < stopped["updates"] < 80
    assert train(config(tmp_path / "parts", LONGER), quiet=True) is not None
    assert newest_state(tmp_path / "parts")["updates"] - stopped["updates"] >= 200
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("row", [20, 66, 67, 70], ids=["prefill", "last row", "first row", "within an episode"])
def test_stopping_anywhere_changes_nothing(row: int, uninterrupted: Path, tmp_path: Path) -> None:
    state = stop(tmp_path, COUNTING, row)
    assert state["replay"]["written"] == row
    assert state["learning"] == (row > 60)
    assert train(config(tmp_path, COUNTING), quiet=True) is not None
    assert_same_run(uninterrupted, tmp_path)


def test_stopping_again_and_again_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    written = [stop(tmp_path, COUNTING, row)["replay"]["written"] for row in (15, 50, 1, 30)]
    assert written == [15, 65, 66, 96]
    assert train(config(tmp_path, COUNTING), quiet=True) is not None
    assert_same_run(uninterrupted, tmp_path)


def test_metrics_after_a_stop_are_those_of_an_uninterrupted_run(uninterrupted: Path, tmp_path: Path) -> None:
    """The row in whose interval the stop fell averages what came after it; all later ones are the same."""
    stopped_at = stop(tmp_path, COUNTING, 66)["collector"]["env_steps"]
    assert train(config(tmp_path, COUNTING), quiet=True) is not None
    pairs = zip(rows(uninterrupted / "metrics.jsonl"), rows(tmp_path / "metrics.jsonl"), strict=True)
    later = [pair for pair in pairs if pair[0]["env_steps"] > stopped_at + COUNTING["loop.log-every"]]
    assert len(later) >= 4
    for whole, resumed in later:
        assert without_wall_time([whole]) == without_wall_time([resumed])


def test_two_environments_go_on_where_they_were(tmp_path: Path) -> None:
    """Each in a process of its own; both in the middle of an episode."""
    two = COUNTING | {"num-envs": 2, "env-steps": 160, "loop.eval-episodes": 1}  # each of them takes a process
    assert train(config(tmp_path / "whole", two), quiet=True) is not None
    stop(tmp_path / "parts", two, row=40)
    assert train(config(tmp_path / "parts", two), quiet=True) is not None
    assert differing(newest_state(tmp_path / "whole"), newest_state(tmp_path / "parts")) == []


def test_wall_time_goes_on(tmp_path: Path) -> None:
    stop(tmp_path, COUNTING, 70)
    before = rows(tmp_path / "metrics.jsonl")[-1]["wall_s"]
    assert train(config(tmp_path, COUNTING), quiet=True) is not None
    times = [row["wall_s"] for row in rows(tmp_path / "metrics.jsonl")]
    assert times == sorted(times)
    assert times[-1] > before


def test_a_run_that_was_moved_goes_on(uninterrupted: Path, tmp_path: Path) -> None:
    stop(tmp_path / "here", COUNTING, 70)
    (tmp_path / "here").rename(tmp_path / "there")
    assert train(config(tmp_path / "there", COUNTING), quiet=True) is not None
    assert_same_run(uninterrupted, tmp_path / "there")


# -- signals -----------------------------------------------------------------------------------------------------------


def signalled_at_row(number: int, row: int, path: Path, settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, which gets a signal after so many rows."""
    before = f"held = loop_helpers.signal_at_row({int(number)}, {row}); held.__enter__()"
    return program("runners.train", *flags(path, settings), before=before)


def test_sigterm_saves_and_says_how_to_go_on(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = signalled_at_row(signal.SIGTERM, 70, path, COUNTING)
    assert process.returncode == 130
    state = newest_state(path)
    assert state["replay"]["written"] == 70
    said = f"stopped at {state['collector']['env_steps']} env_steps and saved; the same command goes on from here"
    assert process.stdout.splitlines()[-1] == said
    assert "Traceback" not in process.stderr
    assert train(config(path, COUNTING), quiet=True) is not None
    assert_same_run(uninterrupted, path)


def test_ctrl_c_saves_too_and_gives_the_signals_back(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert stop(tmp_path, COUNTING, 70, signal.SIGINT)["replay"]["written"] == 70
    assert {number: signal.getsignal(number) for number in before} == before


def test_second_ctrl_c_ends_at_once_and_loses_nothing_saved(uninterrupted: Path, tmp_path: Path) -> None:
    stop(tmp_path, COUNTING, 64)
    saved = newest_state(tmp_path)
    with pytest.raises(KeyboardInterrupt), signal_at_row(signal.SIGINT, 3), signal_at_row(signal.SIGINT, 3):
        train(config(tmp_path, COUNTING), quiet=True)
    assert differing(newest_state(tmp_path), saved) == []
    assert train(config(tmp_path, COUNTING), quiet=True) is not None
    assert_same_run(uninterrupted, tmp_path)


# -- killed ------------------------------------------------------------------------------------------------------------


def test_killed_run_goes_back_to_its_last_checkpoint(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the pixels of a real task."""
    path = tmp_path / "run"
    process = signalled_at_row(signal.SIGKILL, 110, path, TINY)
    assert process.returncode == -signal.SIGKILL, process.stderr
    found = Checkpoints(path / "checkpoints").latest()
    assert found is not None
    back = found[1]["env_steps"]
    assert max(row["env_steps"] for row in rows(path / "metrics.jsonl")) > back  # rows to be written again
    assert main(flags(path, TINY)) == 0
    assert f"resuming {path} at {back} env_steps" in capsys.readouterr().out
    for file in ("metrics.jsonl", "evals.jsonl"):
        steps = [row["env_steps"] for row in rows(path / file)]
        assert steps == sorted(set(steps))
    assert_same_run(finished.path, path)


def test_killed_before_the_first_checkpoint_starts_over(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = signalled_at_row(signal.SIGKILL, 20, path, COUNTING)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert Checkpoints(path / "checkpoints").latest() is None
    assert train(config(path, COUNTING), quiet=True) is not None
    assert_same_run(uninterrupted, path)


# -- the same folder again ---------------------------------------------------------------------------------------------


def test_changed_config_is_refused_and_lists_what_differs(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(finished.path, tmp_path / "run")
    before = contents(path)
    assert main(flags(path, TINY, seed=4, env__size=48, model__window__hidden=(16, 24))) == 1
    error = capsys.readouterr().err
    listed = [line.strip() for line in error.splitlines() if "→" in line]
    assert listed == ["seed: 3 → 4", "env.size: 32 → 48", "model.window.hidden: (16, 16) → (16, 24)"]
    assert "choose another --run-dir" in error
    assert contents(path) == before


def test_finished_run_ends_at_once(finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copytree(finished.path, tmp_path / "run")
    with signal_at_row(signal.SIGKILL, 1):  # not one row more is collected
        assert main(flags(path, TINY)) == 0
    assert "evaluation: " in capsys.readouterr().out
    assert differing(newest_state(path)["agent"], newest_state(finished.path)["agent"]) == []
    assert_same_run(finished.path, path)
    assert rows(path / "metrics.jsonl") == rows(finished.path / "metrics.jsonl")
    assert rows(path / "evals.jsonl") == rows(finished.path / "evals.jsonl")


@pytest.mark.parametrize("budget", [120, 118], ids=["last row", "within an episode"])
def test_finished_run_is_not_evaluated_again(budget: int, tmp_path: Path) -> None:
    """Wherever in an episode the budget ended, with a row still on its way or not."""
    assert train(config(tmp_path, COUNTING, env_steps=budget), quiet=True) is not None
    evaluations, state = rows(tmp_path / "evals.jsonl"), newest_state(tmp_path)
    assert train(config(tmp_path, COUNTING, env_steps=budget), quiet=True) is not None
    assert rows(tmp_path / "evals.jsonl") == evaluations
    assert differing(newest_state(tmp_path), state) == []


def test_a_run_in_progress_is_left_alone(finished: Finished, tmp_path: Path) -> None:
    """The same command in a second terminal."""
    path = shutil.copytree(finished.path, tmp_path / "run")
    with Run(config(path, TINY), quiet=True):
        before = contents(path)
        process = program("runners.train", *flags(path, TINY))
        assert process.returncode == 1
        assert "being trained by another process" in process.stderr
        assert "Traceback" not in process.stderr
        assert contents(path) == before

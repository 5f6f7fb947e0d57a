"""Whatever is wrong ends in one clear message and exit code 1, not in a traceback, and loses nothing that was saved."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.interface import NonFiniteLoss
from runners.checkpoint import Checkpoints, load_checkpoint
from runners.config import from_json, to_json
from runners.disk import ASIDE
from runners.run import Run
from runners.train import main, train
from tests.disk_helpers import disk_full_at, fill_disk, tiny_disk
from tests.envs_helpers import PREFIX, Moody
from tests.loop_helpers import (
    COUNTING,
    config,
    contents,
    differing,
    flags,
    newest_state,
    replay_rows,
    rows,
    signal_at_row,
)

pytestmark = pytest.mark.usefixtures("unchecked")

MOODY = COUNTING | {"task": PREFIX + "Moody-v0"}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped while it learned. Copy it before spoiling it."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    with signal_at_row(signal.SIGTERM, 100):
        assert train(config(path, COUNTING), quiet=True) is None
    assert len(list((path / "checkpoints").iterdir())) >= 2
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without the stop."""
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train(config(path, COUNTING), quiet=True) is not None
    return path


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def refused(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """Train in vain; the error."""
    capsys.readouterr()
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def assert_goes_on_to_the_same_end(path: Path, uninterrupted: Path) -> None:
    assert train(config(path, COUNTING), quiet=True) is not None
    assert differing(newest_state(path), newest_state(uninterrupted)) == []
    assert differing(replay_rows(path), replay_rows(uninterrupted)) == []


# -- what is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "dmc/cartpole-swingdown"}, "dmc/cartpole-swingup"),
        ({"task": "gym/CartPole-v1"}, "discrete actions are not"),
        ({"task": "gym/tests.envs_helpers:Discrete-v0"}, "discrete actions are not"),
        ({"task": "gym/tests.envs_helpers:Unbounded-v0"}, "unbounded actions"),
        ({"task": "gym/tests.envs_helpers:Discrete-v0", "num_envs": 2}, "discrete actions are not"),
        ({"task": "gym/tests.envs_helpers:Painted-v0", "env.obs": "pixels"}, "run `pip install painter`"),
        ({"task": "gym/tests.envs_helpers:Absent-v0"}, "No module named 'absent_package'"),
        ({"env.camera": 9}, "no camera to choose"),
        (
            {"task": "dmc/cartpole-swingup", "env.camera": 9, "num_envs": 2, "env.action_repeat": 1},
            "cameras -1 (free) to 1",
        ),
    ],
)
def test_impossible_tasks(
    changes: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, flags(tmp_path / "run", COUNTING, **changes))
    # The folder is free: the corrected command can have it.
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("words", [["--device", "cuda"], ["--device", "cpu", "--replay-device", "cuda"]])
def test_cuda_without_cuda(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, ["--run-dir", str(tmp_path / "run"), *words])
    assert " ".join(words[-2:]) in error
    assert "auto" in error  # what would do
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(60)  # a number that is let through may keep the loop busy forever
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("env-steps", 0),
        ("env-steps", -5),
        ("num-envs", 0),
        ("num-envs", -1),
        ("seed", -1),
        ("model.keypoint.sharpness", 0),
        ("model.keypoint.kernel", 0),
        ("model.keypoint.kernel", 2),
        ("mpc.horizon", 0),
        ("mpc.proposals", -1),
        ("mpc.noise", -0.5),
        ("threads", -1),
        ("env.size", 4),
        ("env.action-repeat", 0),
        ("env.time-limit", 0),
        ("loop.prefill", 0),
        ("loop.prefill", 200),  # beyond the budget
        ("loop.pretrain", -1),
        ("loop.batch", 0),
        ("loop.length", 0),
        ("loop.length", 1),
        ("loop.length", 41),  # longer than the prefill
        ("loop.capacity", 7),  # shorter than a sequence
        ("loop.train-ratio", -1.0),
        ("loop.train-ratio", "nan"),
        ("loop.train-ratio", "inf"),
        ("loop.log-every", 0),
        ("loop.eval-every", 0),
        ("loop.eval-episodes", 0),
        ("loop.checkpoint-every", 0),
        ("model.latent-dim", 0),
        ("model.rollout", 0),
        ("model.rollout-every", 0),
        ("model.head-units", 0),
        ("model.sigreg-directions", 0),
        ("model.window.history", 0),
        ("model.sigreg-weight", "nan"),
        ("dreamer.horizon", 0),
        ("dreamer.starts", 0),
        ("dreamer.discount", 1.5),
        ("dreamer.discount", "nan"),
        ("dreamer.lam", -0.1),
        ("dreamer.model-lr", -1.0),
        ("dreamer.behaviour-lr", "nan"),
        ("dreamer.critic.members", 0),
        ("dreamer.policy.units", 0),
    ],
)
def test_impossible_numbers(flag: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the flag; the command line's own errors (exit code 2) are as good as the program's."""
    command = flags(tmp_path / "run", COUNTING | {flag: value})
    try:
        code = main(command)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert flag in error or flag.rpartition(".")[2].replace("-", "_") in error
    assert not (tmp_path / "run").exists()


# -- folders -----------------------------------------------------------------------------------------------------------


def test_foreign_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    (tmp_path / "replay").mkdir()
    before = contents(tmp_path)
    assert "is not a run" in refused(capsys, flags(tmp_path, COUNTING))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_run_folder_that_is_a_file_or_below_one(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("hello")
    assert str(tmp_path / "file") in refused(capsys, flags(tmp_path / where, COUNTING))
    assert (tmp_path / "file").read_text() == "hello"


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    assert train(config(tmp_path, COUNTING, agent="random"), quiet=True) is not None
    assert (tmp_path / "config.json").exists()


# -- checkpoints and replay --------------------------------------------------------------------------------------------


def newest(run_dir: Path) -> Path:
    found = Checkpoints(run_dir / "checkpoints").latest()
    assert found is not None
    return found[2]


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "SHA256SUMS", "meta.json"])
def test_truncated_newest_checkpoint_falls_back_and_says_so(
    file: str,
    copied: Path,
    uninterrupted: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The replay goes back with it, so the run still ends as if nothing had happened."""
    spoilt = newest(copied)
    (spoilt / file).write_bytes((spoilt / file).read_bytes()[:-20])
    before = newest(copied)
    assert before != spoilt
    caplog.clear()
    assert main(flags(copied, COUNTING)) == 0
    assert any(str(spoilt) in record.message and str(before) in record.message for record in caplog.records)
    env_steps = before.name.rpartition("-")[2]
    assert f"at {env_steps} env_steps" in capsys.readouterr().out
    assert differing(newest_state(copied), newest_state(uninterrupted)) == []
    assert differing(replay_rows(copied), replay_rows(uninterrupted)) == []


def test_no_whole_checkpoint(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in copied.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"")
    before = contents(copied)
    assert "no checkpoint in" in refused(capsys, flags(copied, COUNTING))
    assert contents(copied) == before


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage index"])
def test_damaged_replay(damage: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replay = copied / "replay"
    if damage == "missing":
        shutil.rmtree(replay)
    elif damage == "truncated":
        (replay / "obs.npy").write_bytes((replay / "obs.npy").read_bytes()[:100])
    else:
        (replay / "index.json").write_bytes(b"\xff")
    before = contents(copied / "checkpoints")
    assert str(replay) in refused(capsys, flags(copied, COUNTING))
    assert contents(copied / "checkpoints") == before


def test_checkpoint_of_another_size(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copied / "config.json"
    other = from_json(file.read_text())
    file.write_text(to_json(dataclasses.replace(other, model=dataclasses.replace(other.model, latent_dim=9))))
    before = contents(copied / "replay"), contents(copied / "checkpoints")
    error = refused(capsys, flags(copied, COUNTING, model__latent_dim=9))
    assert "another agent, task or size" in error
    assert (contents(copied / "replay"), contents(copied / "checkpoints")) == before


@pytest.mark.parametrize("task", ["mujoco/Hopper-v5", "gym/tests.envs_helpers:BadReward-v0"], ids=["others", "same"])
def test_checkpoint_of_another_task(task: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With other sizes, and with the same ones, where nothing but the name tells."""
    file = copied / "config.json"
    file.write_text(to_json(dataclasses.replace(from_json(file.read_text()), task=task)))
    before = contents(copied / "replay"), contents(copied / "checkpoints")
    error = refused(capsys, flags(copied, COUNTING, task=task))
    assert "another agent, task or size" in error
    assert (contents(copied / "replay"), contents(copied / "checkpoints")) == before


# -- numbers that are not finite ---------------------------------------------------------------------------------------


def misbehave(monkeypatch: pytest.MonkeyPatch, steps: Any) -> None:
    """From now on the environment's steps are counted from 1, and those in ``steps`` give NaN."""
    monkeypatch.setattr(Moody, "bad_steps", steps)
    monkeypatch.setattr(Moody, "steps_taken", 0)


def test_one_nan_of_an_environment_closes_its_episode_and_the_run_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    misbehave(monkeypatch, {20, 70})
    assert main(flags(tmp_path / "run", MOODY, loop__train_ratio=32)) == 0
    warnings = [record.message for record in caplog.records if "NaN" in record.message]
    assert len(warnings) == 2
    assert all("Moody-v0" in text and "episode seed" in text for text in warnings)
    held = replay_rows(tmp_path / "run")
    assert all(np.isfinite(held[name]).all() for name in ("obs", "action", "reward"))
    assert (held["is_last"] & ~held["is_terminal"]).sum() == 2  # this task itself only terminates
    assert rows(tmp_path / "run" / "metrics.jsonl")[-1]["updates"] > 50


def test_environment_that_only_gives_nan_ends_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    assert train(config(tmp_path / "whole", MOODY), quiet=True) is not None
    with signal_at_row(signal.SIGTERM, 80):
        assert train(config(path, MOODY), quiet=True) is None
    saved = contents(path / "checkpoints")
    misbehave(monkeypatch, range(10, 10**9))
    error = refused(capsys, flags(path, MOODY))
    assert "Moody-v0" in error
    assert "NaN" in error
    assert contents(path / "checkpoints") == saved
    misbehave(monkeypatch, ())
    assert train(config(path, MOODY), quiet=True) is not None
    assert differing(newest_state(path), newest_state(tmp_path / "whole")) == []


@pytest.mark.parametrize("task", ["BadObs-v0", "BadReward-v0"])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_environment_that_was_never_finite(
    task: str, num_envs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"task": PREFIX + task, "num-envs": num_envs, "loop.prefill": 80, "loop.eval-episodes": 1}
    command = flags(tmp_path, COUNTING | changes)
    error = refused(capsys, command)
    assert task in error
    assert "NaN or inf" in error or "reward is inf" in error


def test_nan_loss_stops_before_the_weights_are_touched(
    copied: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rewards that rotted on the disk make the loss NaN. With the disk healed, the run goes on as it would have."""
    rewards = np.load(copied / "replay" / "reward.npy", mmap_mode="r+", allow_pickle=False)
    good = rewards.copy()
    rewards[:] = np.nan
    rewards.flush()
    saved = contents(copied / "checkpoints")
    error = refused(capsys, flags(copied, COUNTING))
    assert "reward_loss" in error
    assert "became NaN or inf" in error
    assert "pred_loss" not in error  # it does not depend on rewards
    assert contents(copied / "checkpoints") == saved
    rewards[:] = good
    rewards.flush()
    assert_goes_on_to_the_same_end(copied, uninterrupted)


@pytest.mark.parametrize(("field", "term"), [("reward", "reward_loss"), ("obs", "pred_loss")])
def test_nan_batch_leaves_the_agent_as_it_was(field: str, term: str, copied: Path) -> None:
    with Run(config(copied, COUNTING), quiet=True) as run:
        batch = run.replay.sample(4, 8, np.random.default_rng(0))
        bad = batch._replace(**{field: getattr(batch, field) * torch.nan})
        before = copy.deepcopy(run.agent.state_dict())
        with pytest.raises(NonFiniteLoss, match=term):
            run.agent.update(bad)
        # The running scale of returns is no weight, and the run ends here.
        changed = differing(run.agent.state_dict(), before)
        assert [place for place in changed if not place.startswith("state.scale")] == []
        run.agent.load_state_dict(before)
        run.agent.update(batch)
        assert differing(run.agent.state_dict()["model"], before["model"])


def test_learning_rate_that_explodes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, flags(tmp_path / "run", COUNTING, dreamer__model_lr=1e30))
    assert "became NaN or inf" in error
    assert "learning rate" in error


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free_kb", [0, 8, 40, 100])
def test_full_disk_in_the_middle_of_a_run(
    free_kb: int, stopped: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real one, full when the run resumes or some way into it. With space again, the same command goes on."""
    with tiny_disk(tmp_path / "disk", kilobytes=4_000) as disk:
        path = shutil.copytree(stopped, disk / "run")
        saved = contents(path / "checkpoints")
        filler = fill_disk(disk)
        os.truncate(filler, filler.stat().st_size - free_kb * 1024)
        assert "disk is full" in refused(capsys, flags(path, COUNTING))
        assert {name: contents(path / "checkpoints").get(name) for name in saved} == saved
        filler.unlink()
        assert_goes_on_to_the_same_end(path, uninterrupted)


def test_disk_too_small_for_the_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tiny_disk(tmp_path / "disk", kilobytes=400) as disk:
        error = refused(capsys, flags(disk / "run", COUNTING, env__obs="pixels", env__size=32))
        assert "its disk has only" in error


@pytest.mark.parametrize("call", [0, 8, 14])
def test_disk_that_fills_while_saving(
    call: int,
    copied: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wherever it happens, what is called a checkpoint is a whole one, and the run goes on from it."""
    with monkeypatch.context() as patch:
        disk_full_at(patch, "fsync", call)
        assert "disk is full" in refused(capsys, flags(copied, COUNTING))
    found = [path for path in (copied / "checkpoints").iterdir() if path.suffix != ASIDE]
    assert len(found) >= 2
    for path in found:
        load_checkpoint(path)  # raises if a part is missing
    assert_goes_on_to_the_same_end(copied, uninterrupted)

"""runners.evaluate on a finished run, and on folders and checkpoints that are not what they should be."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from runners.checkpoint import Checkpoints
from runners.config import from_json, to_json
from runners.evaluate import main
from runners.train import train
from tests.envs_helpers import PREFIX
from tests.loop_helpers import COUNTING, TINY, Finished, config, contents, finished_run, newest_state, program


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished_run(tmp_path_factory)


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    """A copy to spoil, without the replay, which evaluating does not need."""
    return shutil.copytree(finished.path, tmp_path / "run", ignore=shutil.ignore_patterns("replay"))


def play(capsys: pytest.CaptureFixture[str], run_dir: Path, *args: str) -> dict[str, Any]:
    """Evaluate in this process; the JSON of the last line."""
    assert main(["--run-dir", str(run_dir), "--device", "cpu", "--threads", "1", *args]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


def refused(capsys: pytest.CaptureFixture[str], run_dir: Path, *args: str) -> str:
    """Evaluate in vain; the error."""
    assert main(["--run-dir", str(run_dir), "--device", "cpu", "--threads", "1", *args]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: ") or captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert "mean_return" not in captured.out
    return captured.err


def change_config(run_dir: Path, **changes: Any) -> None:
    file = run_dir / "config.json"
    file.write_text(to_json(dataclasses.replace(from_json(file.read_text()), **changes)))


# -- what it answers ---------------------------------------------------------------------------------------------------


def test_command_ends_with_one_json_line(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, with a video; in this process the same episodes give the same returns."""
    before, film = contents(finished.path), tmp_path / "films" / "out.mp4"
    common = ["--episodes", "4", "--seed", "5", "--threads", "1"]
    process = program(
        "runners.evaluate", "--run-dir", str(finished.path), "--device", "cpu", *common, "--video", str(film)
    )
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout.splitlines()[-1])
    assert answer.keys() == {"mean_return", "std", "returns", "env_steps"}
    assert len(answer["returns"]) == 4
    assert len(set(answer["returns"])) == 4
    assert answer["mean_return"] == pytest.approx(np.mean(answer["returns"]))
    assert answer["std"] == pytest.approx(np.std(answer["returns"]))
    assert answer["env_steps"] == newest_state(finished.path)["collector"]["env_steps"]
    with av.open(str(film)) as video:
        assert sum(1 for _ in video.decode(video=0)) in (20, 21)  # with or without the final observation
    assert contents(finished.path) == before  # evaluating writes nothing into the run

    assert play(capsys, finished.path, *common) == answer
    assert play(capsys, finished.path, "--episodes", "4", "--seed", "6")["returns"] != answer["returns"]


def test_exploring_is_other_and_as_repeatable(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--episodes", "2", "--seed", "5"]
    explored = play(capsys, finished.path, *args, "--explore")
    assert play(capsys, finished.path, *args, "--explore") == explored
    assert play(capsys, finished.path, *args) != explored


def test_a_video_without_what_encodes_it(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    video = tmp_path / "out.mp4"
    assert main(["--run-dir", str(finished.path), "--episodes", "1", "--video", str(video)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {video} cannot be written without PyAV: pip install av")
    assert not video.exists()


def test_best_checkpoint(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its env_steps tell which one was played."""
    checkpoints = Checkpoints(copied / "checkpoints")
    best = checkpoints.best()
    assert best is not None
    checkpoints.save(5_000, newest_state(copied), best[1] | {"env_steps": 5_000}, score=-1.0)
    assert play(capsys, copied, "--episodes", "1")["env_steps"] == 5_000
    assert play(capsys, copied, "--episodes", "1", "--checkpoint", "best")["env_steps"] == best[1]["env_steps"]


def test_random_agent_on_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config(tmp_path, COUNTING, agent="random"), quiet=True) is not None
    answer = play(capsys, tmp_path, "--episodes", "3")
    assert len(answer["returns"]) == 3
    assert play(capsys, tmp_path, "--episodes", "3") == answer


def test_a_run_that_observes_states_is_drawn_for_its_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(tmp_path / "run", TINY, agent="random", env__obs="state", loop__view_steps=0)
    assert train(settings) is not None
    film = tmp_path / "out.mp4"
    assert f"runners.evaluate --run-dir {tmp_path / 'run'} --video" in capsys.readouterr().out
    answer = play(capsys, tmp_path / "run", "--episodes", "2", "--video", str(film))
    with av.open(str(film)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert frames[0].shape == (256, 256, 3)
    assert any(np.abs(frame.astype(int) - frames[0]).max() > 30 for frame in frames)  # the cart moves
    assert play(capsys, tmp_path / "run", "--episodes", "2")["returns"] == answer["returns"]


def test_a_task_that_draws_itself_is_filmed_where_it_observes_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config(tmp_path / "run", COUNTING, agent="random"), quiet=True) is not None
    play(capsys, tmp_path / "run", "--episodes", "1", "--video", str(tmp_path / "out.mp4"))
    with av.open(str(tmp_path / "out.mp4")) as video:
        brightness = [frame.to_ndarray(format="rgb24").mean() for frame in video.decode(video=0)]
    assert np.abs(np.diff(brightness) - 10).max() < 3  # it counts its steps


def test_a_task_that_makes_no_pictures_is_not_filmed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config(tmp_path, COUNTING, agent="random", task=PREFIX + "Moody-v0"), quiet=True) is not None
    film = tmp_path / "out.mp4"
    assert "makes no pictures" in refused(capsys, tmp_path, "--episodes", "1", "--video", str(film))
    assert not film.exists()


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folder_that_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("hello")
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        error = refused(capsys, path)
        assert "is not a run" in error
        assert str(path) in error
    assert not (tmp_path / "nothing").exists()


def test_run_without_a_checkpoint_yet(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "checkpoints")
    assert "no checkpoint yet" in refused(capsys, copied)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"task": 5}', b"[" * 100_000])
def test_damaged_config(content: bytes, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "config.json").write_bytes(content)
    assert "config" in refused(capsys, copied)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def newest(run_dir: Path) -> Path:
    found = Checkpoints(run_dir / "checkpoints").latest()
    assert found is not None
    return found[2]


def test_checkpoint_of_another_size(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_config(
        copied, model=dataclasses.replace(from_json((copied / "config.json").read_text()).model, latent_dim=9)
    )
    error = refused(capsys, copied)
    assert "another agent, task or size" in error
    assert str(copied) in error


@pytest.mark.parametrize("task", ["dmc/walker-walk", "dmc/cartpole-balance"], ids=["other sizes", "same sizes"])
def test_checkpoint_of_another_task(task: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_config(copied, task=task)
    assert "another agent, task or size" in refused(capsys, copied)


def test_checkpoint_of_another_agent(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_config(copied, agent="random")
    assert "another agent, task or size" in refused(capsys, copied)


def test_truncated_newest_checkpoint_falls_back_and_says_so(
    copied: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    spoilt = newest(copied)
    weights = spoilt / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    answer = play(capsys, copied, "--episodes", "1")
    before = newest(copied)
    assert before != spoilt
    assert answer["env_steps"] == json.loads((before / "meta.json").read_text())["env_steps"]
    assert any(str(spoilt) in record.message and str(before) in record.message for record in caplog.records)


def test_no_whole_checkpoint(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in copied.glob("checkpoints/*/state.json"):
        file.write_bytes(b"{")
    assert "no checkpoint in" in refused(capsys, copied)


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_pickle_in_place_of_weights_is_not_run(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With right checksums, in every checkpoint, so that nothing but the reader stands against it."""
    evil = pickle.dumps(Payload(tmp_path / "executed"))
    for folder in (copied / "checkpoints").iterdir():
        (folder / "model.safetensors").write_bytes(evil)
        names = [line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
        sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        (folder / "SHA256SUMS").write_text("".join(sums))
    assert "no checkpoint in" in refused(capsys, copied)
    assert not (tmp_path / "executed").exists()
    pickle.loads(evil)
    assert (tmp_path / "executed").exists()  # it would have worked


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "value"), [("--episodes", 0), ("--num-envs", 0), ("--seed", -1), ("--threads", -1)])
def test_impossible_numbers(flag: str, value: int, finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{flag} is {value}" in refused(capsys, finished.path, flag, str(value))


def test_unknown_flag_answers_with_the_closest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as exit_:
        main(["--run-dir", "x", "--episode", "3"])
    assert exit_.value.code == 2
    assert "--episodes" in capsys.readouterr().err

"""A run's records read back as other programs read them: JSONL, TensorBoard's own reader, Pillow and PyAV."""

import json
import resource
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from runners.logger import Logger, read_rows, write_video


class Clock:
    """Stands where the test puts it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _event_files_sort_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads event files by name: second, host, process, count. Within one second, .10 would precede .9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def new_logger(run_dir: Path, **options: Any) -> Logger:
    return Logger(run_dir, **{"resume_env_steps": None, "total_env_steps": 100, "quiet": True, **options})


def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(run_dir).Scalars(tag)]


def moving_square(frames: int, height: int = 32, width: int = 32) -> np.ndarray:
    """A white square that moves one pixel a frame, so every frame differs and shows which one it is."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    for index in range(frames):
        video[index, 4:12, index : index + 8] = 255
    return video


def test_metrics_are_one_row_and_one_scalar_each(tmp_path: Path) -> None:
    clock = Clock()
    with new_logger(tmp_path, clock=clock) as logger:
        clock.now += 12.5
        logger.metrics({"train/return": np.float32(3.5), "loss": torch.tensor(0.25)}, env_steps=40)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"env_steps": 40, "wall_s": 12.5, "train/return": 3.5, "loss": 0.25}
    assert scalars(tmp_path, "train/return") == [(40, 3.5)]


def test_a_row_is_on_disk_before_the_logger_is_closed(tmp_path: Path) -> None:
    with new_logger(tmp_path) as logger:
        logger.metrics({"loss": 1.0}, env_steps=1)
        assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_values_that_are_not_finite_leave_strict_json(tmp_path: Path) -> None:
    with new_logger(tmp_path) as logger:
        logger.metrics({"a": float("nan"), "b": float("-inf"), "c": 1.0}, env_steps=1)
        logger.evaluation(env_steps=1, returns=[float("inf"), 2.0], lengths=[5, 6], wall_s=1.0)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["a"], row["b"], row["c"]) == (None, None, 1.0)
    assert json.loads((tmp_path / "evals.jsonl").read_text(), parse_constant=refuse)["returns"] == [None, 2.0]


def test_evaluation_row_has_exactly_the_four_fields(tmp_path: Path) -> None:
    with new_logger(tmp_path) as logger:
        logger.evaluation(env_steps=500, returns=[1.0, 3.0], lengths=[10, 20], wall_s=7.0)
    expected = {"env_steps": 500, "returns": [1.0, 3.0], "lengths": [10, 20], "wall_s": 7.0}
    assert read_rows(tmp_path / "evals.jsonl") == [expected]
    assert scalars(tmp_path, "eval/return_mean") == [(500, 2.0)]
    assert scalars(tmp_path, "eval/return_std") == [(500, 1.0)]
    assert scalars(tmp_path, "eval/length_mean") == [(500, 15.0)]


@pytest.mark.parametrize(("returns", "lengths"), [([], []), ([1.0], [1, 2])])
def test_evaluation_refuses_episodes_that_do_not_match(
    tmp_path: Path, returns: list[float], lengths: list[int]
) -> None:
    with new_logger(tmp_path) as logger, pytest.raises(ValueError, match="one length for each return"):
        logger.evaluation(env_steps=1, returns=returns, lengths=lengths, wall_s=0.0)
    assert read_rows(tmp_path / "evals.jsonl") == []


def test_resume_goes_back_to_the_checkpoint(tmp_path: Path) -> None:
    with new_logger(tmp_path) as logger:
        for step in (10, 20, 30, 40):
            logger.metrics({"loss": float(step)}, env_steps=step)
            logger.evaluation(env_steps=step, returns=[step], lengths=[1], wall_s=step)
    with new_logger(tmp_path, resume_env_steps=20) as logger:
        logger.metrics({"loss": -30.0}, env_steps=30)
        logger.evaluation(env_steps=30, returns=[-30.0], lengths=[1], wall_s=30.0)
    metrics = [(row["env_steps"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")]
    assert metrics == [(10, 10.0), (20, 20.0), (30, -30.0)]
    assert [row["returns"] for row in read_rows(tmp_path / "evals.jsonl")] == [[10], [20], [-30.0]]
    assert scalars(tmp_path, "loss") == metrics


def test_a_fresh_start_in_a_used_folder_leaves_no_old_rows(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with new_logger(tmp_path) as logger:
            logger.metrics({"loss": value}, env_steps=0)
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2.0]
    assert scalars(tmp_path, "loss") == [(0, 2.0)]


def test_resume_removes_the_half_row_of_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"env_steps": 1, "loss": 1.0}\n{"env_steps": 2, "lo')
    assert [row["env_steps"] for row in read_rows(path)] == [1]
    with new_logger(tmp_path, resume_env_steps=5) as logger:
        logger.metrics({"loss": 6.0}, env_steps=6)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["env_steps"] for line in lines] == [1, 6]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evals.jsonl", "metrics.jsonl", "tensorboard"]


def test_wall_time_continues_over_sessions(tmp_path: Path) -> None:
    clock = Clock()
    logger = new_logger(tmp_path, resume_env_steps=10, resume_wall_s=100.0, clock=clock)
    clock.now += 5.0
    assert logger.wall_s == 105.0
    logger.close()
    logger.close()  # a second close is harmless


def test_image_reads_back_exactly(tmp_path: Path) -> None:
    picture = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    with new_logger(tmp_path) as logger:
        logger.image("strip", picture, env_steps=3)
    (event,) = events(tmp_path).Images("strip")
    assert (event.step, event.height, event.width) == (3, 8, 6)
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(event.encoded_image_string))), picture)


def test_video_is_an_animated_gif_with_every_frame(tmp_path: Path) -> None:
    video = moving_square(7)
    with new_logger(tmp_path) as logger:
        logger.video("eval/video", video, fps=20, env_steps=9)
    (event,) = events(tmp_path).Images("eval/video")
    gif = Image.open(BytesIO(event.encoded_image_string))
    frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
    np.testing.assert_array_equal(frames, video)  # two colours survive GIF's palette untouched
    assert gif.info["duration"] == 50


@pytest.mark.parametrize("frames", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((8, 8), "u1")])
def test_frames_of_another_kind_are_refused(tmp_path: Path, frames: np.ndarray) -> None:
    with new_logger(tmp_path) as logger, pytest.raises(ValueError, match="uint8 frames"):
        logger.video("eval/video", frames, fps=20, env_steps=0)
    with pytest.raises(ValueError, match="uint8 frames"):
        write_video(tmp_path / "video.mp4", frames, fps=20)


@pytest.mark.parametrize(
    ("height", "width", "shown"), [(64, 64, (256, 256)), (33, 51, (264, 408)), (301, 277, (302, 278))]
)
def test_mp4_has_every_frame_at_an_even_size(tmp_path: Path, height: int, width: int, shown: tuple[int, int]) -> None:
    video = moving_square(12, height, width)
    path = tmp_path / "videos" / "eval.mp4"
    write_video(path, video, fps=25.0)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 25)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == 12
    scale = shown[0] // height
    for index, (frame, source) in enumerate(zip(decoded, video, strict=True)):
        assert frame.shape == (*shown, 3)
        centres = frame[scale // 2 :: scale, scale // 2 :: scale][:height, :width].astype(int)
        assert np.abs(centres - source).mean() < 4, f"frame {index} shows another picture"


def test_plain_lines_come_seldom_when_stdout_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    clock = Clock()
    with new_logger(tmp_path, total_env_steps=100_000, quiet=False, clock=clock) as logger:
        for second in range(61):  # 100 env_steps and 5 updates a second
            logger.progress(env_steps=100 * second, updates=5 * second, return_=123.456, eval_return=200.0)
            clock.now += 1
        logger.message("saved to [runs/a] " + "x" * 100)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0] == "return 123.5 · eval 200.0 · env_steps 0/100,000 · – updates/s · – left"
    assert lines[2] == "return 123.5 · eval 200.0 · env_steps 6,000/100,000 · 5.0 updates/s · 15:40 left"
    assert lines[3] == "saved to [runs/a] " + "x" * 100


def test_rates_follow_the_last_minute_and_a_resumed_run_starts_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    with new_logger(tmp_path, resume_env_steps=5000, total_env_steps=10_000, quiet=False, clock=clock) as logger:
        logger.progress(env_steps=5000, updates=900)
        clock.now += 1000  # a long pause that must leave the window
        for second in range(100):
            logger.progress(env_steps=5000 + 10 * second, updates=900 + second)
            clock.now += 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "return – · env_steps 5,000/10,000 · – updates/s · – left"
    assert lines[-1] == "return – · env_steps 5,900/10,000 · 1.0 updates/s · 6:50 left"


def test_the_last_step_is_always_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with new_logger(tmp_path, total_env_steps=7200, quiet=False, clock=clock) as logger:
        logger.progress(env_steps=0, updates=0, return_=None)
        clock.now += 1
        logger.progress(env_steps=1, updates=0, return_=None)
        logger.progress(env_steps=7200, updates=0, return_=-5.0)
    assert [line.split(" · ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "env_steps 0/7,200",
        "env_steps 7,200/7,200",
    ]


def test_terminal_shows_a_live_line_and_whole_messages(tmp_path: Path) -> None:
    clock, screen = Clock(), StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    with new_logger(tmp_path, total_env_steps=100, quiet=False, console=console, clock=clock) as logger:
        for step in range(0, 101, 25):
            logger.progress(env_steps=step, updates=step, return_=1.0)
            clock.now += 1
        logger.message("a message")
    shown = screen.getvalue()
    assert "env_steps 50/100" in shown
    assert "env_steps 100/100" in shown
    assert "a message\n" in shown
    assert shown.endswith("\x1b[?25h"), "the cursor comes back"


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with new_logger(tmp_path) as logger:
        logger.progress(env_steps=100, updates=1)
        logger.message("hello")
    assert capsys.readouterr().out == ""


def test_a_disk_that_takes_no_more_is_an_error_and_keeps_the_rows_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with new_logger(tmp_path) as logger:
        logger.metrics({"loss": 1.0}, env_steps=1)
        logger._events.flush()  # TensorBoard's thread must not meet the limit
        _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))  # the next row fits only in part
        try:
            with pytest.raises(OSError, match="File too large"):
                logger.metrics({"loss": 2.0}, env_steps=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [row["loss"] for row in read_rows(path)] == [1.0]

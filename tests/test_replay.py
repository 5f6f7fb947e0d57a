"""The replay against rows whose content says which row and stream they are."""

import json
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from runners.disk import DiskFull
from runners.replay import Replay, ReplayError
from tests.disk_helpers import ROOT, crash_at_every_disk_call, disk_full_at, fill_disk, kill_after_lines, tiny_disk
from worldmodels.interface import Batch

STREAMS = 2
LENGTH = 5  # rows of an episode


def create(path: Path, **settings: Any) -> Replay:
    """Ten rows in each of two streams, two more to spare, flushed every two."""
    defaults = {
        "capacity": 20,
        "num_envs": STREAMS,
        "obs_shape": (1, 2, 3),
        "obs_dtype": np.uint8,
        "action_dim": 2,
        "spare": 4,
        "flush_every": 4,
    }
    return Replay.create(path, **(defaults | settings))


def row(t: int, *, streams: int = STREAMS, life: int = 0) -> dict[str, NDArray[Any]]:
    """Row t. Stream e is e rows ahead in its episode; a life that came later can be told from an earlier one."""
    e = np.arange(streams)
    step = (t + e) % LENGTH
    is_last = step == LENGTH - 1
    return {
        "obs": np.broadcast_to(((7 * t + 101 * e + life) % 256)[:, None, None, None], (streams, 1, 2, 3)).astype("u1"),
        "action": np.where(is_last[:, None], 0, np.stack([t / 64 + e, -e - life], 1)).astype(np.float32),
        "reward": (t + 1000 * e + 100_000 * life).astype(np.float32),
        "is_first": (step == 0) | (t == 0),
        "is_last": is_last,
        "is_terminal": is_last & (t % 2 == 0),
    }


def fill(replay: Replay, start: int, stop: int, life: int = 0) -> Replay:
    for t in range(start, stop):
        replay.add(**row(t, life=life))
    return replay


def lives_of(replay: Replay) -> list[tuple[int, int]]:
    """(life, t) of every row held, oldest first, each checked in all fields against what ``row`` says."""
    held = replay.rows_per_stream
    if held == 0:
        return []
    batch = every_start(replay, held)
    out = [divmod(int(reward), 100_000) for reward in batch.reward[0]]
    for i, (life, t) in enumerate(out):
        for name, value in row(t, life=life).items():
            np.testing.assert_array_equal(getattr(batch, name)[:, i].numpy(), value, err_msg=f"{name} of row {t}")
    return out


def times_of(replay: Replay) -> list[int]:
    return [t for _, t in lives_of(replay)]


def every_start(replay: Replay, length: int) -> Batch:
    """Each possible sequence once, ordered by stream, then time, found by sampling until all were seen."""
    starts = replay.streams * (replay.rows_per_stream - length + 1)
    batch = replay.sample(40 * starts, length, np.random.default_rng(0))
    _, index = np.unique(batch.reward[:, 0].numpy(), return_index=True)
    assert len(index) == starts
    order = index[np.argsort(batch.reward[index, 0].numpy() % 100_000, kind="stable")]
    return Batch(*(value[order] for value in batch))


def assert_equal(one: Batch, other: Batch) -> None:
    for name, a, b in zip(Batch._fields, one, other, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_a_sample_is_rows_as_they_were_added(tmp_path: Path) -> None:
    replay = fill(create(tmp_path / "replay"), 0, 10)
    batch = replay.sample(64, 4, np.random.default_rng(0))
    assert batch.obs.shape == (64, 4, 1, 2, 3)
    assert (batch.obs.dtype, batch.action.dtype, batch.reward.dtype) == (torch.uint8, torch.float32, torch.float32)
    assert {batch.is_first.dtype, batch.is_last.dtype, batch.is_terminal.dtype} == {torch.bool}
    for b in range(64):
        stream, t = divmod(int(batch.reward[b, 0]), 1000)
        for i in range(4):
            for name, value in row(t + i).items():
                np.testing.assert_array_equal(getattr(batch, name)[b, i].numpy(), value[stream])


@pytest.mark.parametrize("written", [4, 10, 11, 12, 13, 23, 24, 25, 36, 37])
def test_samples_reach_every_start_and_none_across_the_seam(tmp_path: Path, written: int) -> None:
    replay = fill(create(tmp_path / "replay"), 0, written)
    oldest = max(0, written - 10)
    batch = replay.sample(1000, 4, np.random.default_rng(0))
    assert torch.equal(batch.reward - batch.reward[:, :1], torch.arange(4.0).expand(1000, 4))
    starts = {1000 * e + t for e in range(STREAMS) for t in range(oldest, written - 3)}
    assert set(batch.reward[:, 0].tolist()) == starts


def test_starts_are_uniform(tmp_path: Path) -> None:
    replay = fill(create(tmp_path / "replay"), 0, 17)
    count = Counter(replay.sample(14_000, 4, np.random.default_rng(0)).reward[:, 0].tolist())
    assert len(count) == 14
    # Binomial with mean 1000 and standard deviation 30.
    assert all(abs(n - 1000) < 150 for n in count.values())


def test_the_generator_alone_decides(tmp_path: Path) -> None:
    replay = fill(create(tmp_path / "replay"), 0, 15)
    one, other = np.random.default_rng(3), np.random.default_rng(3)
    first = replay.sample(8, 3, one)
    assert_equal(first, replay.sample(8, 3, other))
    assert not torch.equal(first.reward, replay.sample(8, 3, one).reward)


def test_a_later_sample_leaves_an_earlier_one_alone(tmp_path: Path) -> None:
    replay = fill(create(tmp_path / "replay"), 0, 10)
    generator = np.random.default_rng(0)
    first = replay.sample(8, 3, generator)
    kept = Batch(*(value.clone() for value in first))
    replay.sample(8, 3, generator)
    fill(replay, 10, 30)
    assert_equal(first, kept)


@pytest.mark.parametrize("written", [7, 12, 31])
def test_a_mirror_samples_what_the_disk_does(tmp_path: Path, written: int) -> None:
    on_disk = fill(create(tmp_path / "a"), 0, written)
    mirrored = create(tmp_path / "b")
    mirrored.place("cpu", mirror=True)
    fill(mirrored, 0, written)
    expected = on_disk.sample(50, 5, np.random.default_rng(0))
    assert_equal(mirrored.sample(50, 5, np.random.default_rng(0)), expected)
    mirrored.close()
    for mode in ("r", "r+"):
        with Replay.open(tmp_path / "b", mode) as reopened:
            reopened.place("cpu", mirror=True)
            # The files may change now: whatever is sampled comes from the copy.
            np.load(tmp_path / "b" / "reward.npy", mmap_mode="r+")[:] = -1
            assert_equal(reopened.sample(50, 5, np.random.default_rng(0)), expected)
        shutil.copy(tmp_path / "a" / "reward.npy", tmp_path / "b" / "reward.npy")


def test_a_mirror_takes_part_in_everything(tmp_path: Path) -> None:
    """Closing an episode early, and going back, reach the copy as well."""
    replay = create(tmp_path / "replay", num_envs=1, capacity=10)
    replay.place("cpu", mirror=True)
    for t in range(3):
        replay.add(**row(t, streams=1))
    position = replay.position()
    for t in range(5, 8):
        replay.add(**row(t, streams=1))
    assert every_start(replay, 6).is_last.tolist() == [[False, False, True, False, False, False]]
    replay.truncate_to(position)
    assert len(replay) == 3
    with_mirror = replay.sample(20, 2, np.random.default_rng(0))
    replay.place("cpu", mirror=False)
    assert_equal(with_mirror, replay.sample(20, 2, np.random.default_rng(0)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mirror", [True, False, None])
def test_samples_on_a_gpu_are_those_on_the_host(tmp_path: Path, mirror: bool | None) -> None:
    replay = fill(create(tmp_path / "replay"), 0, 15)
    expected = replay.sample(50, 5, np.random.default_rng(0))
    replay.place("cuda", mirror=mirror)
    batch = replay.sample(50, 5, np.random.default_rng(0))
    assert batch.obs.device.type == "cuda"
    assert_equal(Batch(*(value.cpu() for value in batch)), expected)


def test_sequences_longer_than_the_replay_are_refused(tmp_path: Path) -> None:
    replay = create(tmp_path / "replay")
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="holds 0 rows per stream"):
        replay.sample(1, 1, generator)
    fill(replay, 0, 30)
    assert replay.sample(1, 10, generator).reward.shape == (1, 10)
    with pytest.raises(ValueError, match=r"T=11 is longer than the replay, which holds 10 rows per stream; .*prefill"):
        replay.sample(1, 11, generator)
    for batch, length in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least 1 sequence"):
            replay.sample(batch, length, generator)


# -- what may be added -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"num_envs": 0}, {"capacity": 1}, {"action_dim": 0}, {"flush_every": 0}])
def test_numbers_that_make_no_replay_are_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} {next(iter(changes.values()))}"):
        create(tmp_path / "replay", **changes)
    assert not (tmp_path / "replay").exists()


def test_rows_that_break_the_timeline_are_refused(tmp_path: Path) -> None:
    replay = create(tmp_path / "replay")
    yes, no = np.ones(STREAMS, bool), np.zeros(STREAMS, bool)
    with pytest.raises(ValueError, match="without is_first"):
        replay.add(**row(1) | {"is_first": no})
    fill(replay, 0, 2)
    with pytest.raises(ValueError, match="is_terminal without is_last"):
        replay.add(**row(2) | {"is_terminal": yes})
    with pytest.raises(ValueError, match=r"reward has the shape \(3,\), but this replay takes \(2,\)"):
        replay.add(**row(2) | {"reward": np.zeros(3, np.float32)})
    fill(replay, 2, 4)  # stream 1 has now ended
    with pytest.raises(ValueError, match="has ended"):
        replay.add(**row(4) | {"is_first": no})
    assert times_of(replay) == [0, 1, 2, 3]


def test_an_episode_that_was_left_is_closed(tmp_path: Path) -> None:
    """In stream 0 only: stream 1 goes on with its episode."""
    replay = fill(create(tmp_path / "replay"), 0, 2)
    replay.close()
    replay = Replay.open(tmp_path / "replay", "r+")
    replay.add(**row(2) | {"is_first": np.array([True, False])})
    batch = every_start(replay, 3)
    assert batch.is_first.tolist() == [[True, False, True], [True, False, False]]
    assert batch.is_last.tolist() == [[False, True, False], [False, False, False]]
    assert not batch.is_terminal.any()
    assert batch.action[:, 1].tolist() == [[0, 0], row(1)["action"][1].tolist()]
    first = next(replay.episodes())
    assert first["reward"].tolist() == [0, 1]


def test_floating_observations_are_float32(tmp_path: Path) -> None:
    replay = create(tmp_path / "replay", obs_shape=(3,), obs_dtype=np.float64)
    replay.add(**row(0) | {"obs": np.full((STREAMS, 3), 0.1)})
    obs = replay.sample(1, 1, np.random.default_rng(0)).obs
    assert obs.dtype == torch.float32
    assert obs.tolist() == [[[float(np.float32(0.1))] * 3]]


# -- a dataset ---------------------------------------------------------------------------------------------------------


def test_episodes_are_the_complete_ones(tmp_path: Path) -> None:
    replay = fill(create(tmp_path / "replay"), 0, 23)  # rows 13 … 22
    episodes = list(replay.episodes())
    # Stream 0 begins its episodes at 15 and 20, stream 1 at 14 and 19; the second ones are not over.
    expected = [list(range(15, 20)), [1000 + t for t in range(14, 19)]]
    assert [episode["reward"].tolist() for episode in episodes] == expected
    for episode in episodes:
        assert tuple(episode) == Batch._fields
        assert episode["obs"].shape == (5, 1, 2, 3)
        assert episode["is_first"].tolist() == [True] + [False] * 4
        assert episode["is_last"].tolist() == [False] * 4 + [True]


def test_reading_never_writes(tmp_path: Path) -> None:
    path = tmp_path / "replay"
    fill(create(path), 0, 17).close()
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.iterdir()}
    with Replay.open(path) as replay:
        assert times_of(replay) == list(range(7, 17))
        assert replay.sample(2, 2, np.random.default_rng(0)).reward.shape == (2, 2)
        for change in (lambda: replay.add(**row(17)), replay.flush, lambda: replay.truncate_to({"written": 3})):
            with pytest.raises(ReplayError, match="reading only"):
                change()
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.iterdir()} == before


def test_a_reader_sees_the_last_flush(tmp_path: Path) -> None:
    writer = fill(create(tmp_path / "replay"), 0, 15)
    writer.flush()
    reader = Replay.open(tmp_path / "replay")
    fill(writer, 15, 17)  # as many as are spare
    assert times_of(reader) == list(range(5, 15))
    assert times_of(Replay.open(tmp_path / "replay")) == list(range(5, 15))
    writer.flush()
    assert times_of(Replay.open(tmp_path / "replay")) == list(range(7, 17))


def test_arrays_are_plain_npy_files(tmp_path: Path) -> None:
    fill(create(tmp_path / "replay"), 0, 3).close()
    reward = np.load(tmp_path / "replay" / "reward.npy", allow_pickle=False)
    assert reward.shape == (12, STREAMS)
    assert reward[:3].tolist() == [[0, 1000], [1, 1001], [2, 1002]]


# -- size --------------------------------------------------------------------------------------------------------------


def test_100k_frames_take_at_most_1_3_gb(tmp_path: Path) -> None:
    tenth = create(
        tmp_path / "r", capacity=10_000, num_envs=1, obs_shape=(3, 64, 64), action_dim=6, spare=None, flush_every=100
    )
    assert 10 * tenth.nbytes <= 1.3e9
    files = sum(p.stat().st_size for p in (tmp_path / "r").iterdir())
    assert tenth.nbytes <= files <= tenth.nbytes + 4096
    used = sum(512 * p.stat().st_blocks for p in (tmp_path / "r").iterdir())
    assert used < 1e6  # blocks are taken as rows come


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_frames_are_not_the_processs_own_memory(tmp_path: Path) -> None:
    def own_megabytes() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3

    replay = create(tmp_path / "r", capacity=200, num_envs=1, obs_shape=(1, 1024, 1024))
    frame = {"obs": np.zeros((1, 1, 1024, 1024), np.uint8), "action": np.zeros((1, 2), np.float32)}
    replay.add(**row(0, streams=1) | frame)
    replay.sample(1, 1, np.random.default_rng(0))
    before = own_megabytes()
    for t in range(1, 200):
        frame["obs"][:] = t
        replay.add(**row(t, streams=1) | frame)
    seen = set()
    for seed in range(60):
        seen |= set(replay.sample(10, 1, np.random.default_rng(seed)).obs[:, 0, 0, 0, 0].tolist())
    assert len(seen) > 150  # megabytes that were read
    assert own_megabytes() - before < 50


# -- going back and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [3, 10, 12, 29])
def test_a_reopened_replay_goes_on_as_if_never_closed(tmp_path: Path, written: int) -> None:
    through = fill(create(tmp_path / "a"), 0, 40)
    fill(create(tmp_path / "b"), 0, written).close()
    with Replay.open(tmp_path / "b", "r+") as reopened:
        assert times_of(reopened) == list(range(max(0, written - 10), written))
        fill(reopened, written, 40)
        generators = np.random.default_rng(1), np.random.default_rng(1)
        assert_equal(reopened.sample(30, 4, generators[0]), through.sample(30, 4, generators[1]))


@pytest.mark.parametrize("position", [0, 2, 15])
def test_going_back_within_the_spare_loses_nothing(tmp_path: Path, position: int) -> None:
    replay = fill(create(tmp_path / "replay"), 0, position)
    saved = json.loads(json.dumps(replay.position()))
    fill(replay, position, position + 2)
    replay.truncate_to(saved)
    assert times_of(replay) == list(range(max(0, position - 10), position))
    fill(replay, position, position + 12, life=1)
    assert lives_of(replay) == [(1, t) for t in range(position + 2, position + 12)]


@pytest.mark.parametrize("reopen", [False, True])
def test_going_back_further_drops_what_was_overwritten(tmp_path: Path, reopen: bool) -> None:
    replay = fill(create(tmp_path / "replay"), 0, 40)
    if reopen:
        replay.close()
        replay = Replay.open(tmp_path / "replay", "r+")
    replay.truncate_to({"written": 35})
    # Slots of rows up to 27 hold rows 28 … 39; one that may have died after row 39 has overwritten two more.
    gone = 30 if reopen else 28
    assert times_of(replay) == list(range(gone, 35))
    fill(replay, 35, 37, life=1)
    replay.close()
    again = Replay.open(tmp_path / "replay", "r+")
    again.truncate_to({"written": 36})
    # What was gone stays gone, although the capacity would allow for it.
    assert lives_of(again) == [(0, t) for t in range(gone, 35)] + [(1, 35)]


def test_going_back_beyond_everything_starts_empty(tmp_path: Path) -> None:
    replay = fill(create(tmp_path / "replay"), 0, 40)
    replay.truncate_to({"written": 20})
    assert len(replay) == 0
    fill(replay, 20, 24, life=1)  # stream 1 goes on with an episode whose beginning is gone
    assert lives_of(replay) == [(1, 20), (1, 21), (1, 22), (1, 23)]


def test_a_position_that_is_not_reached_is_refused(tmp_path: Path) -> None:
    replay = fill(create(tmp_path / "replay"), 0, 7)
    for written in (8, -1):
        with pytest.raises(ReplayError, match=rf"up to 7 of each stream, but the checkpoint needs {written};"):
            replay.truncate_to({"written": written})
    assert times_of(replay) == list(range(7))


# -- kill -9 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 17])
def test_a_crash_loses_only_rows_since_the_last_flush(tmp_path: Path, before: int) -> None:
    """At every call to the disk while the ring fills and wraps."""
    fill(create(tmp_path / "run" / "replay"), 0, before).close()

    def collect(folder: Path) -> None:
        with Replay.open(folder / "replay", "r+") as replay:
            for t in range(before, before + 15):
                replay.add(**row(t))
                (folder / "added").write_text(str(t + 1))

    copies = crash_at_every_disk_call(tmp_path / "run", collect)
    assert len(copies) > 15 * 6
    for copy in copies:
        added = int((copy / "added").read_text()) if (copy / "added").exists() else before
        with Replay.open(copy / "replay") as replay:
            written = replay.position()["written"]
            assert added - 2 <= written <= added
            assert times_of(replay) == list(range(max(0, written - 10), written))
    for copy in copies[::10]:
        with Replay.open(copy / "replay", "r+") as replay:
            written = replay.position()["written"]
            fill(replay, written, written + 3, life=1)
            rows = [(0, t) for t in range(written)] + [(1, t) for t in range(written, written + 3)]
            assert lives_of(replay) == rows[-10:]


def test_a_crash_after_going_back_never_mixes_two_lives(tmp_path: Path) -> None:
    fill(create(tmp_path / "run" / "replay"), 0, 23).close()

    def go_back(folder: Path) -> None:
        with Replay.open(folder / "replay", "r+") as replay:
            replay.truncate_to({"written": 21})
            fill(replay, 21, 30, life=1)

    seen = set()
    for copy in crash_at_every_disk_call(tmp_path / "run", go_back):
        with Replay.open(copy / "replay") as replay:
            lives = lives_of(replay)
            written = replay.position()["written"]
        newest = lives[-1][0]
        assert lives == [(int(newest and t >= 21), t) for t in range(written - len(lives), written)]
        seen.add((newest, written))
    assert seen == {(0, 23), (0, 21), (1, 23), (1, 25), (1, 27), (1, 29), (1, 30)}


def test_a_crash_while_it_is_made_leaves_all_or_nothing(tmp_path: Path) -> None:
    fill(create(tmp_path / "run" / "replay"), 0, 6).close()
    held = set()
    for copy in crash_at_every_disk_call(
        tmp_path / "run", lambda folder: create(folder / "replay", replace=True).close()
    ):
        path = copy / "replay"
        held.add(len(Replay.open(path)) if path.exists() else None)
        create(path, replace=True).close()
        assert [p.name for p in copy.iterdir()] == ["replay"]
    assert held == {12, None, 0}


@pytest.mark.parametrize("lines", [9, 40])
def test_sigkill_loses_only_rows_since_the_last_flush(tmp_path: Path, lines: int) -> None:
    """A real one, before and after the ring has wrapped."""
    path, log = tmp_path / "replay", tmp_path / "log"
    code = f"""
import itertools
from tests.test_replay import *
replay = create(Path({str(path)!r}))
for t in itertools.count():
    replay.add(**row(t))
    Path({str(log)!r}).write_text(str(t + 1).rjust(9))
    print(t)
"""
    kill_after_lines(code, lines)
    with Replay.open(path, "r+") as replay:
        written = replay.position()["written"]
        assert written >= lines - 2
        assert written >= int(log.read_text() or 0) - 2
        assert times_of(replay) == list(range(max(0, written - 10), written))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """Of another process; and reading is always possible."""
    replay = fill(create(tmp_path / "replay"), 0, 4)
    code = f"""
from tests.test_replay import *
path = Path({str(tmp_path / "replay")!r})
for attempt in (lambda: Replay.open(path, "r+"), lambda: create(path, replace=True)):
    with pytest.raises(ReplayError, match="written by another process"):
        attempt()
Replay.open(path)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    fill(replay, 4, 9)
    assert times_of(replay) == list(range(9))


# -- full disks --------------------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk", 1024) as disk:
        with pytest.raises(DiskFull, match=r"needs 0\.11 GB, but its disk has only 0\.00 GB left"):
            create(disk / "replay", obs_shape=(64, 64, 64), capacity=400)
        assert list(disk.iterdir()) == []


def test_a_disk_without_room_is_said_by_numbers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 100))
    with pytest.raises(DiskFull, match="lower its capacity"):
        create(tmp_path / "replay")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_the_rows_before(tmp_path: Path) -> None:
    size = (1, 64, 64)

    def add_big(replay: Replay, start: int, stop: int) -> None:
        for t in range(start, stop):
            replay.add(**row(t) | {"obs": np.zeros((STREAMS, *size), np.uint8)})

    with tiny_disk(tmp_path / "disk", 2048) as disk:
        replay = create(disk / "replay", obs_shape=size, capacity=200)
        add_big(replay, 0, 9)
        replay.flush()
        filler = fill_disk(disk)
        with pytest.raises(DiskFull, match="free some space"):
            add_big(replay, 9, 100)
        added = replay.rows_per_stream
        with Replay.open(disk / "replay") as reader:
            assert every_start(reader, 9).reward[0].tolist() == list(range(9))
        filler.unlink()
        add_big(replay, added, 100)
        assert every_start(replay, 100).reward[0].tolist() == list(range(100))
        replay.close()


@pytest.mark.parametrize(
    ("call", "at", "flushed"),
    [("pwrite", 0, 20), ("pwrite", 3, 20), ("pwrite", 14, 22), ("fsync", 0, 20), ("fsync", 6, 20)],
)
def test_an_error_of_a_full_disk_is_clear_and_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int, flushed: int
) -> None:
    replay = fill(create(tmp_path / "replay"), 0, 20)
    replay.flush()
    with monkeypatch.context() as patch:
        disk_full_at(patch, call, at)
        with pytest.raises(DiskFull, match="the disk is full"):
            fill(replay, 20, 30)
        assert times_of(Replay.open(tmp_path / "replay")) == list(range(flushed - 10, flushed))
        kept = replay.position()["written"]
        assert times_of(replay) == list(range(kept - 10, kept))
        with pytest.raises(DiskFull):
            fill(replay, kept, kept + 10)
    kept = replay.position()["written"]
    fill(replay, kept, 40)
    assert times_of(replay) == list(range(30, 40))


# -- folders that are not what they should be --------------------------------------------------------------------------


def test_another_folder_is_never_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("words")
    for path in (tmp_path / "thesis", tmp_path / "thesis" / "chapter1"):
        for replace in (False, True):
            with pytest.raises(ReplayError, match="is not a replay; choose another"):
                create(path, replace=replace)
    assert (tmp_path / "thesis" / "chapter1").read_text() == "words"
    (tmp_path / "empty").mkdir()
    assert len(create(tmp_path / "empty")) == 0


def test_a_replay_is_replaced_only_when_asked(tmp_path: Path) -> None:
    fill(create(tmp_path / "replay"), 0, 6).close()
    with pytest.raises(ReplayError, match="already holds a replay"):
        create(tmp_path / "replay")
    assert times_of(Replay.open(tmp_path / "replay")) == list(range(6))
    assert len(create(tmp_path / "replay", replace=True, capacity=40)) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["replay"]


def _with_index(path: Path, **changes: Any) -> None:
    index = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(index | changes))


def _truncate(file: Path, size: int) -> None:
    with open(file, "r+b") as out:
        out.truncate(size)


DAMAGES = {
    "no index": (lambda path: (path / "index.json").unlink(), "is not a replay: it has no index.json"),
    "half an index": (lambda path: _truncate(path / "index.json", 90), "index.json cannot be read"),
    "no JSON object": (lambda path: (path / "index.json").write_text("[1]"), "index.json cannot be read"),
    "another format": (lambda path: _with_index(path, format="zarr"), "is of something else"),
    "another version": (lambda path: _with_index(path, version=2), "of version 2; this program reads version 1"),
    "a missing number": (lambda path: _with_index(path, slots=None), "index.json cannot be read"),
    "an unknown entry": (lambda path: _with_index(path, colour="red"), "index.json cannot be read"),
    "too few slots": (lambda path: _with_index(path, slots=10), "contradicts itself"),
    "negative rows": (lambda path: _with_index(path, written=-3), "contradicts itself"),
    "other fields": (lambda path: _with_index(path, fields={"obs": ["uint8", [3]]}), "contradicts itself"),
    "other sizes": (lambda path: _with_index(path, slots=13), "obs.npy is not the uint8 array"),
    "a missing array": (lambda path: (path / "reward.npy").unlink(), "reward.npy cannot be read"),
    "an empty array": (lambda path: _truncate(path / "reward.npy", 0), "reward.npy cannot be read"),
    "half a header": (lambda path: _truncate(path / "reward.npy", 60), "reward.npy cannot be read"),
    "half an array": (lambda path: _truncate(path / "obs.npy", 200), "obs.npy cannot be read"),
    "another dtype": (
        lambda path: np.save(path / "reward.npy", np.zeros((12, STREAMS))),
        r"reward.npy is not the float32 array \(12, 2\)",
    ),
}


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_replay_is_refused(tmp_path: Path, damage: Any, message: str, mode: Any) -> None:
    fill(create(tmp_path / "replay"), 0, 6).close()
    damage(tmp_path / "replay")
    with pytest.raises(ReplayError, match=message):
        Replay.open(tmp_path / "replay", mode)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="is not a replay"):
        Replay.open(tmp_path / "nothing")
    with pytest.raises(ValueError, match="mode is 'w'"):
        Replay.open(tmp_path / "nothing", "w")  # type: ignore[arg-type]


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("kind", ["pickle", "object array", "archive"])
def test_a_planted_pickle_is_not_run(tmp_path: Path, kind: str) -> None:
    fill(create(tmp_path / "replay"), 0, 6).close()
    payload, file = Payload(tmp_path / "ran"), tmp_path / "replay" / "obs.npy"
    objects = np.array([[payload] * STREAMS] * 12, dtype=object)
    if kind == "pickle":
        file.write_bytes(pickle.dumps(payload))
    elif kind == "object array":
        np.save(file, objects, allow_pickle=True)
    else:
        np.savez(tmp_path / "archive.npz", obs=objects)
        shutil.move(tmp_path / "archive.npz", file)
    with pytest.raises(ReplayError, match="obs"):
        Replay.open(tmp_path / "replay")
    assert not (tmp_path / "ran").exists()
    if kind == "archive":
        np.load(file, allow_pickle=True)["obs"]
    else:
        np.load(file, allow_pickle=True)
    assert (tmp_path / "ran").exists()  # it does run where it is let

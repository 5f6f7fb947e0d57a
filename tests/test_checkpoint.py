"""Checkpoints: bit-exact, whole or not at all, damage found out, nothing run."""

import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from runners.checkpoint import CheckpointError, Checkpoints, DiskFull, load_checkpoint, save_checkpoint
from tests.disk_helpers import crash_at_every_disk_call, disk_full_at, fill_disk, tiny_disk


def same(one: Any, other: Any) -> bool:
    """Equal in type and bit for bit, NaN and -0.0 included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        bits = [x.reshape(-1).view(torch.uint8) for x in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, dict):
        keys = list(zip(one, other, strict=False))
        return len(one) == len(other) and all(same(a, b) and same(one[a], other[b]) for a, b in keys)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float):
        return one.hex() == other.hex()
    return one == other


def names(folder: Path) -> list[int]:
    """env_steps of the checkpoints kept, oldest first; and nothing else lies there."""
    found = sorted(folder.iterdir())
    return [int(path.name.split("-step-")[1]) for path in found]


def save_steps(checkpoints: Checkpoints, *scores: float | None) -> None:
    """One checkpoint for each score, at 10, 20, … env_steps."""
    for i, score in enumerate(scores, 1):
        checkpoints.save(10 * i, {"value": torch.full((3,), float(i)), "i": i}, {"step": 10 * i}, score)


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    floats = torch.tensor([0.1, -0.0, math.inf, math.nan, 1e-45])
    state = {
        "scalars": [0, 1, True, False, None, "", "ü\n\u2028", -0.0, 0.1, 1e308, math.inf, math.nan, 5e-324],
        "wide": [2**127 + 1, -(2**200), 2**63],
        "keys": {0: "a", 1: {2.5: "b", None: "c", True: "d"}, "1": "e"},
        "dollars": {"$tensor": ["x", "y"], "$dict": [], "$tuple": 1},
        "empty": [{}, [], (), torch.empty(0, 3)],
        "nested": ((1, [2, (3,)]), {"t": (torch.tensor(7), [torch.tensor(True)])}),
        "floats": floats,
        "same tensor": [floats, floats],
        "dtypes": [floats.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)],
        "whole": [torch.arange(6, dtype=dtype).view(2, 3) for dtype in (torch.int64, torch.int32, torch.uint8)],
        "strided": torch.arange(6.0).view(2, 3).T,
        "colliding": {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2), 1: torch.tensor(3), "1": torch.tensor(4)},
    }
    save_checkpoint(tmp_path / "c", state, {"note": [1, "x"]})
    loaded, about = load_checkpoint(tmp_path / "c")
    assert same(loaded, state)
    assert about == {"note": [1, "x"]}


def test_comparing_tells_what_differs() -> None:
    differing = [1, True, 1.0, "1", None, [1], (1,), {"1": 1}, {1: 1}, -0.0, 0.0, torch.tensor(1), torch.tensor(1.0)]
    for i, one in enumerate(differing):
        assert [same(one, other) for other in differing] == [i == j for j in range(len(differing))]


@pytest.mark.parametrize("value", [torch.randn(3), [torch.randn(2)], 5, {}, None])
def test_the_state_need_not_be_a_dict(tmp_path: Path, value: Any) -> None:
    save_checkpoint(tmp_path / "c", value, {})
    assert same(load_checkpoint(tmp_path / "c")[0], value)


def test_saving_keeps_no_reference(tmp_path: Path) -> None:
    value = torch.ones(3)
    save_checkpoint(tmp_path / "c", {"value": value}, {})
    first, _ = load_checkpoint(tmp_path / "c")
    first["value"].add_(1)
    assert load_checkpoint(tmp_path / "c")[0]["value"].tolist() == [1, 1, 1]


def test_training_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    """A model with BatchNorm, Adam with its integer keys, a schedule, PyTorch's and numpy's generators."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimiser, torch.optim.lr_scheduler.LinearLR(optimiser, total_iters=30)

    def learn(parts: tuple[nn.Module, torch.optim.Optimizer, Any], generator: np.random.Generator) -> None:
        model, optimiser, schedule = parts
        for _ in range(5):
            batch = torch.from_numpy(generator.normal(size=(8, 3))).float() + torch.randn(8, 3)
            optimiser.zero_grad()
            model(batch).square().mean().backward()
            optimiser.step()
            schedule.step()

    through, generator = build(), np.random.default_rng(5)
    learn(through, generator)
    saved = {
        "model": through[0].state_dict(),
        "optimiser": through[1].state_dict(),
        "schedule": through[2].state_dict(),
    }
    saved |= {"torch_random": torch.get_rng_state(), "generator": generator.bit_generator.state}
    Checkpoints(tmp_path).save(5, saved, {}, None)
    learn(through, generator)

    again, fresh = build(), np.random.default_rng(0)
    found = Checkpoints(tmp_path).latest()
    assert found is not None
    for part, name in zip(again, ("model", "optimiser", "schedule"), strict=True):
        part.load_state_dict(found[0][name])
    fresh.bit_generator.state = found[0]["generator"]
    torch.set_rng_state(found[0]["torch_random"])
    learn(again, fresh)
    assert same(dict(again[0].state_dict()), dict(through[0].state_dict()))
    assert same(again[1].state_dict(), through[1].state_dict())
    assert fresh.bit_generator.state == generator.bit_generator.state


def test_weights_load_on_their_own(tmp_path: Path) -> None:
    model, policy = nn.Linear(3, 2), nn.Linear(2, 1)
    optimiser = torch.optim.Adam(model.parameters())
    state = {"agent": {"model": model.state_dict(), "policy": policy.state_dict(), "optimiser": optimiser.state_dict()}}
    state["slow"] = {"policy": nn.Linear(4, 4).state_dict()}
    save_checkpoint(tmp_path / "c", state, {})
    files = {path.name for path in (tmp_path / "c").glob("*.safetensors")}
    assert files == {"model.safetensors", "policy.safetensors", "slow.policy.safetensors", "tensors.safetensors"}
    twin = nn.Linear(3, 2)
    twin.load_state_dict(safetensors.torch.load_file(tmp_path / "c" / "model.safetensors"))
    assert torch.equal(twin.weight, model.weight)


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    save_checkpoint(tmp_path / "c", {"model": model.state_dict()}, {})
    loaded, _ = load_checkpoint(tmp_path / "c")
    assert same(loaded["model"], dict(model.state_dict()))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"agent": {"count": np.int64(3)}}, r"agent\.count is a numpy\.int64"),
        ({"rows": [1, np.zeros(2)]}, r"rows\.1 is a numpy\.ndarray"),
        ({"f": (len,)}, r"f\.0 is a builtins\.builtin_function_or_method"),
        ({"d": {(1, 2): 3}}, r"d has the key \(1, 2\)"),
        (Path("x"), "the state is a pathlib"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        save_checkpoint(tmp_path / "c", state, {})
    assert list(tmp_path.iterdir()) == []


# -- which are kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ([None], [10], None),
        ([None, None, None], [20, 30], None),
        ([5.0, 3.0, 4.0, 2.0], [10, 30, 40], 10),
        ([1.0, 2.0, 3.0], [20, 30], 30),
        ([5.0, None, None, None], [10, 30, 40], 10),
        ([4.0, 4.0, 1.0, 1.0], [20, 30, 40], 20),
        ([-5.0, -9.0, -7.0, math.nan], [10, 30, 40], 10),
    ],
)
def test_the_last_two_and_the_best_are_kept(
    tmp_path: Path, scores: list[float | None], kept: list[int], best: int | None
) -> None:
    save_steps(Checkpoints(tmp_path / "checkpoints"), *scores)
    assert names(tmp_path / "checkpoints") == kept
    again = Checkpoints(tmp_path / "checkpoints")
    latest, found = again.latest(), again.best()
    assert latest is not None
    assert latest[0]["i"] == len(scores)
    assert latest[1] == {"step": 10 * len(scores)}
    assert latest[2].name.endswith(f"-step-{10 * len(scores)}")
    assert (None if found is None else found[1]["step"]) == best


def test_the_same_env_steps_may_be_saved_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(100, {"i": 1}, {}, 7.0)
    checkpoints.save(100, {"i": 2}, {})
    checkpoints.save(90, {"i": 3}, {})  # a run that fell back
    checkpoints.save(100, {"i": 4}, {})
    latest, best = checkpoints.latest(), checkpoints.best()
    assert latest is not None
    assert best is not None
    assert (latest[0]["i"], best[0]["i"]) == (4, 1)
    assert names(tmp_path) == [100, 90, 100]


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        assert Checkpoints(folder).latest() is None
        assert Checkpoints(folder).best() is None


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "keep-step-5").mkdir()
    save_steps(Checkpoints(tmp_path), 1.0, 2.0, 3.0)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "keep-step-5").is_dir()


# -- damage ------------------------------------------------------------------------------------------------------------


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def _empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [_cut, _flip, _empty, Path.unlink]
FILES = ["SHA256SUMS", "meta.json", "state.json", "tensors.safetensors", "model.safetensors"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Callable[[Path], None]
) -> None:
    def save(step: int, score: float) -> Path:
        state = {"model": nn.Linear(2, 2).state_dict(), "x": torch.ones(2), "step": step}
        return checkpoints.save(step, state, {}, score)

    checkpoints = Checkpoints(tmp_path)
    good, bad = save(10, 1.0), save(20, 2.0)
    damage(bad / file)
    checkpoints = Checkpoints(tmp_path)
    for find in (checkpoints.latest, checkpoints.best):
        caplog.clear()
        found = find()
        assert found is not None
        assert (found[0]["step"], found[2]) == (10, good)
        if caplog.text:  # a best one whose meta.json is gone has no score to begin with
            assert f"checkpoint {bad} is damaged" in caplog.text
            assert f"using {good} instead" in caplog.text
        else:
            assert find == checkpoints.best
            assert file == "meta.json"
    newest = save(30, 0.0)
    assert sorted(tmp_path.iterdir()) == [good, newest]  # the damaged one counts as none of the last two


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    state = {"model": nn.Linear(2, 2).state_dict(), "x": torch.ones(2), "n": 12345}
    save_checkpoint(tmp_path / "c", state, {"score": 1.5})
    for file in FILES:
        whole = (tmp_path / "c" / file).read_bytes()
        for at in range(0, len(whole), 7):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << at % 8
            (tmp_path / "c" / file).write_bytes(flipped)
            with pytest.raises(CheckpointError, match="is damaged"):
                load_checkpoint(tmp_path / "c")
        (tmp_path / "c" / file).write_bytes(whole)
    assert load_checkpoint(tmp_path / "c")[0]["n"] == 12345


def test_if_all_are_damaged_it_says_so(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save_steps(checkpoints, 1.0, 2.0)
    for path in tmp_path.iterdir():
        _cut(path / "tensors.safetensors")
    for find in (checkpoints.latest, checkpoints.best):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*-step-20 .*-step-10 "):
            find()


def test_another_version_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", {}, {})
    _rewrite(tmp_path / "c", "state.json", json.dumps({"version": 2, "state": {}}).encode())
    with pytest.raises(CheckpointError, match="is of version 2, not 1"):
        load_checkpoint(tmp_path / "c")


def _rewrite(folder: Path, file: str, data: bytes) -> None:
    """Replace a file and make its checksum right again, as someone with bad intentions would."""
    (folder / file).write_bytes(data)
    kept = [line for line in (folder / "SHA256SUMS").read_text().splitlines() if not line.endswith(f"  {file}")]
    kept.append(f"{hashlib.sha256(data).hexdigest()}  {file}")
    (folder / "SHA256SUMS").write_text("\n".join(kept) + "\n")


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "meta.json", "SHA256SUMS"])
def test_a_planted_pickle_is_not_run(tmp_path: Path, file: str) -> None:
    save_checkpoint(tmp_path / "c", {"x": torch.ones(2)}, {})
    data = pickle.dumps(Payload(tmp_path / "ran"))
    if file == "SHA256SUMS":
        (tmp_path / "c" / file).write_bytes(data)
    else:
        _rewrite(tmp_path / "c", file, data)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(tmp_path / "c")
    assert not (tmp_path / "ran").exists()
    pickle.loads(data)
    assert (tmp_path / "ran").exists()  # it does run where it is let


def test_checksums_reach_no_file_outside(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", {"x": torch.ones(2)}, {})
    shutil.move(tmp_path / "c" / "tensors.safetensors", tmp_path / "tensors.safetensors")
    sums = tmp_path / "c" / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("  tensors", "  ../tensors"))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(tmp_path / "c")


# -- crashes and full disks --------------------------------------------------------------------------------------------


def test_a_crash_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    """At every call to the disk of a save that also drops an old one."""
    save_steps(Checkpoints(tmp_path / "c"), 9.0, 1.0, 2.0)
    seen = set()
    for copy in crash_at_every_disk_call(
        tmp_path / "c", lambda folder: Checkpoints(folder).save(40, {"i": 4}, {}, 3.0) and None
    ):
        checkpoints = Checkpoints(copy)
        latest, best = checkpoints.latest(), checkpoints.best()
        assert latest is not None
        assert best is not None
        assert best[0]["i"] == 1
        for path in copy.glob("*-step-*[0-9]"):
            load_checkpoint(path)
        before = sorted(copy.iterdir())
        assert Checkpoints(copy).latest() is not None
        assert sorted(copy.iterdir()) == before  # a reader leaves alone what a writer may be writing
        checkpoints.save(50, {"i": 5}, {})
        assert names(copy) == [10, 10 * latest[0]["i"], 50]
        seen.add(latest[0]["i"])
    assert seen == {3, 4}


@pytest.mark.parametrize("call", range(7))
def test_a_full_disk_leaves_the_previous_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    save_steps(Checkpoints(tmp_path), 1.0, 2.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    state = {"model": nn.Linear(2, 2).state_dict(), "x": torch.ones(3)}
    with monkeypatch.context() as patch:
        disk_full_at(patch, "fsync", call)
        with pytest.raises(DiskFull, match=r"the disk is full: .*-step-30 could not be written"):
            Checkpoints(tmp_path).save(30, state, {}, 3.0)
    if call < 6:  # before the folder has its name; the last sync is of that name
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    found = Checkpoints(tmp_path).latest()
    assert found is not None
    Checkpoints(tmp_path).save(40, state, {}, 3.0)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk", 1024) as disk:
        checkpoints = Checkpoints(disk / "checkpoints")
        save_steps(checkpoints, 1.0, 2.0)
        fill_disk(disk)
        before = {path: path.read_bytes() for path in checkpoints.folder.rglob("*") if path.is_file()}
        with pytest.raises(DiskFull, match="free some space"):
            checkpoints.save(30, {"x": torch.ones(1000)}, {}, 3.0)
        assert {path: path.read_bytes() for path in checkpoints.folder.rglob("*") if path.is_file()} == before
        (disk / "filler").unlink()
        with pytest.raises(DiskFull):
            checkpoints.save(30, {"x": torch.ones(300_000)}, {}, 3.0)
        found = checkpoints.latest()
        assert found is not None
        assert found[0]["i"] == 2
        assert names(checkpoints.folder) == [10, 20]

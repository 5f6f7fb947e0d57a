"""Ours beside other packages: what can be said without them, and, where they are installed, with them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from agents.optimiser import Adam
from benchmarks import speed
from benchmarks.peer_process import PeerProcess, PeerTask
from benchmarks.peer_updates import (
    Contest,
    Ours,
    compare_peers,
    contests,
    in_turn,
    our_lewm_update,
    our_update,
    ratios,
)
from benchmarks.peers import PeerUnavailable
from benchmarks.reference_size import reference
from benchmarks.stopwatch import Cost, Stopwatch, cost_of
from runners.checks import check_numbers
from worldmodels.lewm import PAPER

CPU = torch.device("cpu")
PYTHON = Path(sys.executable)

STAND_IN = """
import sys
import torch
from torch import nn


class {name}(nn.Module):
    def __init__(self, *args, **sizes):
        super().__init__()
        print("a line that is no answer")
        assert set(sys.modules).isdisjoint(["mujoco", "OpenGL"]), "beside these, real peers crash"
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = 0
"""
LEWM = (
    STAND_IN.format(name="LeWM")
    + """
    def encode(self, info):
        self.calls += 1
        if self.calls > {calls}:
            raise RuntimeError("enough of this")
        z = info["pixels"].mean((2, 3, 4))[..., None].expand(-1, -1, 192) * self.weight
        return {{"emb": z, "act_emb": info["action"]}}

    def predict(self, z, action):
        return z
"""
)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Puts a package of stable-worldmodel's shape, whose model has one weight and lasts for some calls, where other
    processes look first."""

    def install(calls: int) -> None:
        files = {
            "transformers/__init__.py": STAND_IN.format(name="ViTConfig") + STAND_IN.format(name="ViTModel"),
            "stable_worldmodel/__init__.py": "",
            "stable_worldmodel/wm/__init__.py": "",
            "stable_worldmodel/wm/loss.py": STAND_IN.format(name="SIGReg")
            + "    def forward(self, z):\n        return z.mean()\n",
            "stable_worldmodel/wm/lewm/__init__.py": LEWM.format(calls=calls),
            "stable_worldmodel/wm/lewm/module.py": "".join(
                STAND_IN.format(name=name) for name in ("MLP", "Embedder", "Predictor")
            ),
            "stable_worldmodel-9.8.7.dist-info/METADATA": "Name: stable-worldmodel\nVersion: 9.8.7\n",
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install


def test_a_peer_in_its_process_works_when_asked_until_it_fails(stand_in: Callable[[int], None]) -> None:
    stand_in(3)
    with PeerProcess(PYTHON, PeerTask("lewm_update", batch=2, length=4, actions=10)) as peer:
        assert peer.name == f"stable-worldmodel 9.8.7, torch {torch.__version__}"
        assert peer.parameters == 1
        took = peer(2)
        assert took.wall_s > 0
        assert took.cpu_s > 0
        peer(1)
        with pytest.raises(PeerUnavailable, match="lewm_update ended with exit status 1: RuntimeError: enough of this"):
            peer(1)
        with pytest.raises(PeerUnavailable, match="enough of this"):
            peer(1)


def test_a_peer_that_is_missing_is_said_in_a_line_and_left_out(
    stand_in: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(100)
    broken = tmp_path / "lightning" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text("raise ImportError('built for another torch\\nand more')")
    weight = nn.Parameter(torch.zeros(()))
    contest = Contest(
        lambda device, bf16: Ours(lambda: torch.rand(100_000).exp() * weight, 1, "exponentials"),
        {
            "sheeprl": PeerTask("dreamer_v3_XS"),
            "stable_worldmodel": PeerTask("lewm_update", batch=2, length=4, actions=10),
        },
    )
    results = compare_peers({"one": contest}, PYTHON, Stopwatch(2, 0.001, CPU))
    said, errors = capsys.readouterr()
    assert said == f"beside stable-worldmodel 9.8.7, torch {torch.__version__}: 0.0M parameters\n"
    why = "ImportError: built for another torch (pip install -e '.[peers]')"
    assert errors == f"sheeprl cannot be used here: {why}\n"
    ours, theirs = "peers/one", "peers/one_stable_worldmodel"
    times = {f"{who}{unit}" for who in (ours, theirs) for unit in ("", "_cpu")}
    assert results.keys() == times | {f"{theirs}_ratio", f"{theirs}_cpu_ratio"}
    assert all(one.low <= one.value <= one.high for one in results.values())  # type: ignore[operator]
    assert results[ours].note == "0.0M parameters; exponentials"
    assert "stable-worldmodel 9.8.7" in results[theirs].note


@pytest.mark.parametrize("python", ["no/such/python", "."])
def test_without_any_peer_there_is_nothing_to_measure(
    python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--suite", "peers", "--preset", "cpu", "--device", "cpu", "--threads", "1", "--peer-python", python]
    assert speed.main([*args, "--json", str(tmp_path / "none.json")]) == 1
    said = capsys.readouterr().err
    assert f"{python} cannot be started: " in said
    assert f"error: {python} can use none of the peers; say --peer-python with an environment" in said
    assert not (tmp_path / "none.json").exists()


def test_what_the_peers_do_not_do_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(["--suite", "peers", "--preset", "cpu", "--device", "cpu", "--env.size", "84"]) == 1
    assert "--suite peers compares --agent dreamer on 64×64 pixels, not dreamer on pixels of size 84" in (
        capsys.readouterr().err
    )


def test_peers_take_turns_and_the_ratio_is_of_the_same_round(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, int]] = []

    def party(name: str, seconds: float, slower: float, turns: int = 99) -> Callable[[int], Cost]:
        """Takes so long a call, of which half is CPU time, and longer each time it is asked."""

        def take(calls: int) -> Cost:
            mine = [who for who, _ in asked].count(name)
            asked.append((name, calls))
            if mine == turns:
                raise PeerUnavailable(f"{name} ended")
            each = seconds + slower * mine
            return Cost(calls * each, calls * each / 2)

        return take

    costs = in_turn(
        {"": party("ours", 0.25, 0.25), "a": party("a", 25, 0), "b": party("b", 1, 0, turns=3)}, rounds=3, seconds=1.0
    )
    # A call to warm up and one to see how many fill a second, of which ours took half; of a's 25 seconds one is enough.
    once = [("ours", 1), ("ours", 1), ("a", 1), ("b", 1), ("b", 1)]
    assert asked == [*once, ("ours", 2), ("a", 1), ("b", 1), ("ours", 2), ("a", 1), ("b", 1), ("ours", 2), ("a", 1)]
    assert capsys.readouterr().err == "b ended\n"
    assert costs.keys() == {"", "a"}
    assert costs[""] == [Cost(0.75, 0.375), Cost(1.0, 0.5), Cost(1.25, 0.625)]
    of_a = ratios("a", costs[""], costs["a"])
    assert {key: (one.low, one.value, one.high) for key, one in of_a.items()} == {
        "a_ratio": (20.0, 25.0, 25 / 0.75),
        "a_cpu_ratio": (20.0, 25.0, 25 / 0.75),
    }


def test_a_cost_is_of_all_calls_together(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, cpu = 7.0, 3.0
    monkeypatch.setattr(time, "perf_counter", lambda: wall)
    monkeypatch.setattr(time, "process_time", lambda: cpu)

    def work() -> None:
        nonlocal wall, cpu
        wall, cpu = wall + 2, cpu + 0.5

    assert cost_of(work, 3, CPU) == Cost(wall_s=6.0, cpu_s=1.5)


def test_the_reference_size_is_that_of_the_published_agents() -> None:
    run = reference()
    check_numbers(run)
    assert (run.loop.batch, run.loop.length, run.dreamer.starts, run.dreamer.horizon) == (16, 64, 1024, 15)
    ours = our_update(run, CPU, False)
    assert ours.parameters == pytest.approx(12e6, rel=0.03)
    tasks = contests(run)
    assert all(
        (task.batch, task.length, task.horizon, task.actions) == (16, 64, 15, 6)
        for task in tasks["update"].peers.values()
    )
    assert tasks["lewm"].peers["swm"].length == PAPER.transformer.history + 1


@pytest.mark.parametrize(
    "build",
    [
        lambda: our_update(
            replace(
                reference(),
                loop=replace(reference().loop, batch=2, length=9),
                dreamer=replace(reference().dreamer, starts=4, horizon=2),
            ),
            CPU,
            False,
        ),
        lambda: our_lewm_update(2, CPU, False),
    ],
)
def test_ours_learns_all_that_is_counted(build: Callable[[], Ours], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the parameters that one call changes."""
    made: dict[int, torch.Tensor] = {}
    for optimiser in (Adam, torch.optim.AdamW):
        stepped = optimiser.step

        def step(self: torch.optim.Optimizer, *args: object, stepped: Callable = stepped) -> None:
            made.update({id(p): p for group in self.param_groups for p in group["params"] if p.grad is not None})
            stepped(self, *args)

        monkeypatch.setattr(optimiser, "step", step)
    ours = build()
    ours.work()
    assert sum(p.numel() for p in made.values()) == ours.parameters


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sheeprl") is None, reason="sheeprl is not installed")
@pytest.mark.parametrize(("size", "millions"), [("dreamer_v3_XS", 8), ("dreamer_v3_5_12M", 12)])
def test_sheeprl_takes_a_step_where_it_is_installed(size: str, millions: float) -> None:
    with PeerProcess(PYTHON, PeerTask(size, batch=2, length=3, horizon=2)) as peer:  # type: ignore[arg-type]
        assert peer.name.startswith("sheeprl ")
        assert peer.parameters == pytest.approx(1e6 * millions, rel=0.3)
        assert peer(2).cpu_s > 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("stable_worldmodel") is None, reason="stable-worldmodel is not installed")
def test_stable_worldmodel_takes_a_step_where_it_is_installed() -> None:
    with PeerProcess(PYTHON, PeerTask("lewm_update", batch=2, length=4, actions=10)) as peer:
        assert peer.parameters == pytest.approx(our_lewm_update(2, CPU, False).parameters, rel=0.05)
        assert peer(1).cpu_s > 0

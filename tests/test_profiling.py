"""The profiler's files, and that watching a run does not change it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runners.config import ConfigError
from runners.sb3 import Dreamer
from runners.train import main, train
from tests.loop_helpers import COUNTING, config, differing, flags, newest_state

SHORT = COUNTING | {"env-steps": 60, "loop.train-ratio": 32}


def test_traced_run_leaves_a_trace_and_learns_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config(tmp_path / "plain", SHORT), quiet=True) is not None
    assert main(flags(tmp_path / "traced", SHORT, profile=3)) == 0
    folder = tmp_path / "traced" / "profile"
    assert f"profile: {folder}" in capsys.readouterr().out
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"aten::linear", "Optimizer.step#Adam.step"} <= names
    # Model, policy and critic each have an optimiser.
    assert sum(event.get("name") == "Optimizer.step#Adam.step" for event in events) == 3 * 3
    assert (folder / "operators.txt").read_text().startswith("3 updates")
    assert differing(newest_state(tmp_path / "plain"), newest_state(tmp_path / "traced")) == []
    assert train(config(tmp_path / "traced", SHORT), quiet=True) is not None  # --profile is no other run


def test_trace_ends_with_the_run(tmp_path: Path) -> None:
    """Fewer updates are left than were asked for."""
    assert train(config(tmp_path, SHORT, env_steps=54, profile=10_000), quiet=True) is not None
    made = int((tmp_path / "profile" / "operators.txt").read_text().split()[0])
    assert 3 < made < 12


def test_impossible_numbers_and_places_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(tmp_path / "run", SHORT, profile=-1)) == 1
    assert "--profile is -1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"profile is for python -m runners\.train"):
        Dreamer("dmc/cartpole-swingup", profile=3, **{"env.obs": "state"})

"""benchmarks.report: its statistics against figures worked out by hand, its page in a real browser, its bad input.

Runs are written by the classes that write real ones, with returns that the test chose; one is a real training.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rliable import metrics

from benchmarks import report, statistics
from benchmarks.curves import Curve, read_run
from benchmarks.grid import Cell
from benchmarks.plot import COLOURS
from benchmarks.report_data import count
from benchmarks.statistics import Block, aggregate, band, budgets, complete_block, mean_interval, score_at, scores_at
from benchmarks.survey import survey
from envs import EnvConfig
from runners.config import Config, presets, to_json
from runners.logger import Logger
from runners.train import train
from tests.loop_helpers import TINY
from tests.loop_helpers import config as tiny_config

CARTPOLE, REACHER, HOPPER = "dmc/cartpole-swingup", "dmc/reacher-easy", "mujoco/Hopper-v5"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def new_config(task: str = CARTPOLE, agent: str = "dreamer", seed: int = 1, **changes: Any) -> Config:
    """``agent`` is a label."""
    name, _, obs = agent.partition(":")
    own = {"task": task, "agent": name, "seed": seed, "env_steps": 100_000, "env": EnvConfig(obs=obs or "pixels")}
    return dataclasses.replace(presets()["cpu"], preset="cpu", **{**own, **changes})


def write_run(path: Path, config: Config, evaluations: Sequence[tuple[int, float]]) -> Path:
    """A run's folder with (env_steps, mean return) of each evaluation; a minute for a thousand env_steps."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(to_json(config))
    with Logger(path, resume_env_steps=None, total_env_steps=config.env_steps, quiet=True) as log:
        for env_steps, mean in evaluations:
            log.evaluation(
                env_steps=env_steps, returns=[mean - 1, mean + 1], lengths=[1000] * 2, wall_s=env_steps * 0.06
            )
    return path


def run_of(grid: Path, task: str, agent: str, seed: int, evaluations: Sequence[tuple[int, float]]) -> Path:
    """The same where benchmarks.run puts it."""
    place = grid / "runs" / task.partition("/")[2] / agent.replace(":", "-") / f"seed-{seed}"
    return write_run(place, new_config(task, agent, seed), evaluations)


def new_grid(path: Path, tasks: Sequence[str], agents: Sequence[str], seeds: Sequence[int]) -> Path:
    path.mkdir()
    asked = {"format": 1, "tasks": tasks, "agents": agents, "seeds": seeds, "env_steps": 100_000, "flags": []}
    (path / "grid.json").write_text(json.dumps(asked))
    return path


def curve(tmp_path: Path, evaluations: Sequence[tuple[int, float]]) -> Curve:
    return read_run(write_run(tmp_path / "run", new_config(), evaluations))


def make_report(*args: Any) -> int:
    return report.main([str(arg) for arg in (*args, "--reps", 100)])


# -- scores and bands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluations", "score"),
    [
        ([(50_000, 1.0), (90_000, 4.0), (100_000, 8.0)], 6.0),  # the last 10 %, both ends in
        ([(80_000, 4.0), (100_512, 8.0)], 8.0),  # four environments overshoot
        ([(80_000, 4.0), (120_000, 8.0)], 6.0),  # further apart: between the one before and the one after
        ([(85_000, 4.0), (115_000, 10.0), (130_000, 0.0)], 7.0),
        ([(89_000, 4.0)], None),  # ended before
        ([(70_000, 4.0), (110_000, 8.0)], None),  # too far away
        ([(110_000, 8.0)], None),
        ([(95_000, math.nan), (100_000, 8.0)], None),
    ],
)
def test_a_score_is_read_as_the_page_says(tmp_path: Path, evaluations: Any, score: float | None) -> None:
    assert score_at(curve(tmp_path, evaluations), 100_000) == score


def test_the_band_of_two_seeds_reaches_from_one_to_the_other_as_far_as_both_go() -> None:
    xs = [np.array([0.0, 10.0, 20.0]), np.array([5.0, 10.0, 40.0])]
    ys = [np.array([0.0, 100.0, 0.0]), np.array([10.0, 20.0, 80.0])]
    found = band(xs, ys, 1000)
    assert found.x.tolist() == [5, 10, 20, 40]
    assert found.mean.tolist() == [(50 + 10) / 2, (100 + 20) / 2, (0 + 40) / 2, 80]
    assert found.whole.tolist() == [True, True, True, False]
    # A quarter of the draws has the first seed twice, and a quarter the second: 2.5 % lie well within.
    assert found.low[:3].tolist() == [10, 20, 0]
    assert found.high[:3].tolist() == [50, 100, 40]
    assert np.isnan(found.low[3])
    assert np.isnan(found.high[3])


def test_one_seed_has_a_curve_and_no_band() -> None:
    found = band([np.array([1.0, 2.0])], [np.array([3.0, 4.0])], 100)
    assert found.mean.tolist() == [3, 4]
    assert np.isnan(found.low).all()
    assert math.isnan(mean_interval([3.0], 100).low)


def test_the_interval_of_many_seeds_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(500, 100, 400)
    found = mean_interval(values.tolist(), 4000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


# -- aggregates --------------------------------------------------------------------------------------------------------


def block(**scores: Any) -> Block:
    arrays = {agent: np.array(table, np.float64) for agent, table in scores.items()}
    tasks = [CARTPOLE, REACHER][: next(iter(arrays.values())).shape[1]]
    return Block(100_000, tasks, {agent: list(range(1, len(table) + 1)) for agent, table in arrays.items()}, arrays, [])


def test_aggregates_are_those_worked_out_by_hand() -> None:
    # Two tasks, four seeds; all scores in order: 0 .1 | .2 .3 .4 .6 | .8 1
    found = aggregate(block(one=[[0.0, 0.4], [0.1, 0.6], [0.2, 0.8], [0.3, 1.0]]), 200)
    values = {name: estimate.value for name, estimate in found.estimates["one"].items()}
    assert values == pytest.approx({"IQM": 0.375, "median": 0.425, "mean": 0.425, "optimality gap": 0.575})
    assert all(one.low < one.value < one.high for one in found.estimates["one"].values())
    profile = found.profiles["one"]
    share = dict(zip(profile.x.round(2).tolist(), profile.mean.tolist(), strict=True))
    assert (share[0.0], share[0.25], share[0.5], share[0.95], share[1.0]) == (7 / 8, 5 / 8, 3 / 8, 1 / 8, 0)
    assert found.improvements == []


def test_seeds_are_drawn_within_their_task() -> None:
    # Every seed scores alike, so no draw can change anything; drawing from all runs together would mix the tasks.
    found = aggregate(block(one=[[0.2, 0.9]] * 3), 200)
    assert all(one.low == one.value == one.high for one in found.estimates["one"].values())


def test_the_better_agent_is_the_one_that_scores_higher() -> None:
    same = [[0.1, 0.5], [0.2, 0.6], [0.3, 0.7]]
    better = [[0.4, 0.8], [0.5, 0.9]]
    found = {
        (one.agent, one.over): one.probability for one in aggregate(block(a=same, b=same, c=better), 200).improvements
    }
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found["a", "b"].value == 0.5
    assert found["a", "b"].low < 0.5 < found["a", "b"].high
    assert found["a", "c"] == (0, 0, 0)


def test_the_probability_of_improvement_is_that_of_rliable() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, y = (rng.integers(0, 6, (seeds, 3)) / 5 for seeds in (4, 7))  # with ties
        (own,) = statistics.probability_of_improvement(x, y)
        assert own == pytest.approx(metrics.probability_of_improvement(x, y))


def test_the_same_runs_give_the_same_report_and_leave_numpys_generator_alone() -> None:
    scores = block(a=[[0.1, 0.5], [0.2, 0.9]], b=[[0.3, 0.4], [0.0, 0.6]])
    first = aggregate(scores, 100)
    np.random.seed(7)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    second = aggregate(scores, 100)
    assert np.random.random() == expected  # noqa: NPY002
    assert (first.estimates, first.improvements) == (second.estimates, second.improvements)


def test_a_single_seed_has_aggregates_without_intervals() -> None:
    found = aggregate(block(a=[[0.2, 0.4]], b=[[0.1, 0.2], [0.3, 0.5]]), 100)
    assert found.estimates["a"]["mean"].value == pytest.approx(0.3)
    assert math.isnan(found.estimates["a"]["mean"].low)
    assert math.isnan(found.improvements[0].probability.high)
    assert found.estimates["b"]["mean"].low < found.estimates["b"]["mean"].high


def test_only_what_is_complete_is_aggregated_and_the_rest_is_named(tmp_path: Path) -> None:
    grid = new_grid(tmp_path / "grid", [CARTPOLE, REACHER, HOPPER], ["dreamer", "mpc", "random"], [1, 2, 3])
    done = [(100_000, 500.0)]
    for task in (CARTPOLE, REACHER, HOPPER):
        for seed in (1, 2, 3):
            run_of(grid, task, "dreamer", seed, done)
            run_of(grid, task, "mpc", seed, done if (task, seed) != (REACHER, 2) else [(40_000, 100.0)])
    run_of(grid, CARTPOLE, "random", 1, done)
    found = complete_block(survey([grid]), 100_000)
    assert found.tasks == [CARTPOLE, REACHER]
    assert found.seeds == {"dreamer": [1, 2, 3], "mpc": [1, 3]}
    assert found.scores["mpc"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert found.left_out == [
        "Hopper-v5: returns outside dm_control have no largest value to normalise by",
        "random: no score on reacher-easy",
        "mpc, seed 2: not every task has a score",
    ]


@pytest.mark.parametrize(("last", "at"), [(18_000, [18_016, 50_000, 100_000]), (50_000, [50_000, 100_000])])
def test_unfinished_runs_have_scores_as_far_as_every_one_has_come(last: int, at: list[int], tmp_path: Path) -> None:
    agents = ["mpc", "random"]
    grid = new_grid(tmp_path / "grid", [CARTPOLE, REACHER], agents, [1, 2])
    for task, agent, seed in itertools.product((CARTPOLE, REACHER), agents, (1, 2)):
        further = [(last + 12_000, 900.0)] if (agent, seed) == ("mpc", 1) else []
        run_of(grid, task, agent, seed, [(10_000, 50.0), (last + 16 * seed, 100.0 * seed), *further])
    found = survey([grid])
    assert budgets(found) == at
    assert complete_block(found, at[0]).seeds == {"mpc": [1, 2], "random": [1, 2]}
    assert scores_at(found, at[0])[CARTPOLE, "mpc"] == {1: 100.0, 2: 200.0}


# -- what is there -----------------------------------------------------------------------------------------------------


def test_what_is_missing_unfinished_failed_or_unequal_is_said(tmp_path: Path) -> None:
    grid = new_grid(tmp_path / "grid", [CARTPOLE, REACHER], ["mpc", "dreamer:state"], [1, 2])
    run_of(grid, CARTPOLE, "mpc", 1, [(50_000, 100.0), (100_000, 200.0)])
    run_of(grid, CARTPOLE, "mpc", 2, [(50_000, 100.0)])
    run_of(grid, CARTPOLE, "dreamer:state", 1, [(100_000, 300.0)])
    run_of(grid, CARTPOLE, "dreamer:state", 2, [(100_000, 300.0)])
    run_of(grid, REACHER, "dreamer:state", 1, [(100_000, 300.0)])
    run_of(grid, REACHER, "mpc", 1, [])
    run_of(grid, REACHER, "dreamer:state", 7, [(100_000, 300.0)])
    failed = grid / "failed" / "reacher-easy" / "mpc" / "seed-2.json"
    failed.parent.mkdir(parents=True)
    failed.write_text(json.dumps({"attempts": 2, "error": "Traceback …\nFloatingPointError: NaN in the loss"}))
    found = survey([grid])
    assert (list(found.tasks), list(found.agents)) == ([CARTPOLE, REACHER], ["mpc", "dreamer:state"])
    assert len(found.runs) == 5
    assert found.finished(Cell(CARTPOLE, "mpc", 1))
    assert not found.finished(Cell(CARTPOLE, "mpc", 2))
    missing, unfinished, failure, left_out, unequal, few, extra = found.notes
    assert missing == (
        "Missing: 3 of 8 runs have no evaluation: dreamer:state on reacher-easy, seed 2; "
        "mpc on reacher-easy, seeds 1, 2."
    )
    assert "1 of 8 runs" in unfinished
    assert unfinished.endswith("At 50,000 of 100,000 env_steps: mpc on cartpole-swingup, seed 2.")
    assert failure == "Failed: reacher-easy/mpc/seed-2 (FloatingPointError: NaN in the loss)."
    assert "seed-1 has no evaluation" in left_out
    assert unequal == (
        "Seeds are unequal: 2 for each agent and task, but mpc on reacher-easy 0; dreamer:state on reacher-easy 1."
    )
    assert few.startswith("Few seeds: 1 to 2")
    assert "the grid does not name them: dreamer:state on reacher-easy, seed 7" in extra


def test_half_written_runs_count_as_far_as_they_are(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "all" / "a", new_config(), [(50_000, 100.0)])
    with (whole / "evals.jsonl").open("a") as file:
        file.write('{"env_steps": 100000, "returns": [4.0, ')
    torn = write_run(tmp_path / "all" / "b", new_config(seed=2), [(50_000, 100.0)])
    (torn / "config.json").write_text(to_json(new_config(seed=2))[:100])
    empty = write_run(tmp_path / "all" / "c", new_config(seed=3), [])
    (empty / "evals.jsonl").unlink()
    found = survey([tmp_path / "all"])
    assert list(found.runs) == [Cell(CARTPOLE, "dreamer", 1)]
    assert [row.env_steps for row in found.runs[Cell(CARTPOLE, "dreamer", 1)].rows] == [50_000]
    assert [note.partition(": ")[0] for note in found.notes] == ["Unfinished", "Left out", "Left out", "Few seeds"]
    assert make_report(tmp_path / "all", "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "config.json: this is not a LeDream config of this version" in page
    assert "has no evaluation in evals.jsonl yet" in page


def test_without_a_grid_runs_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    write_run(tmp_path / "a", new_config(), [(100_000, 100.0)])
    horizon = presets()["cpu"].dreamer.horizon
    longer = dataclasses.replace(presets()["cpu"].dreamer, horizon=horizon + 1)
    write_run(tmp_path / "b" / "deep", new_config(dreamer=longer), [(100_000, 200.0)])
    write_run(tmp_path / "c", new_config(agent="random"), [(100_000, 10.0)])
    write_run(tmp_path / "again", new_config(agent="random"), [(50_000, 10.0)])
    found = survey([tmp_path])
    changed = f"dreamer, cpu preset, dreamer.horizon: {horizon} → {horizon + 1}"
    assert list(found.agents) == ["dreamer, cpu preset", changed, "random"]
    assert "There are two runs of random on cartpole-swingup, seed 1; c counts, again does not." in found.notes


def test_in_a_grid_differing_settings_are_said(tmp_path: Path) -> None:
    grid = new_grid(tmp_path / "grid", [CARTPOLE], ["random"], [1, 2])
    run_of(grid, CARTPOLE, "random", 1, [(100_000, 10.0)])
    other = new_config(CARTPOLE, "random", 2, env=EnvConfig(render="canonical"))
    write_run(grid / "runs" / "x", other, [(100_000, 10.0)])
    (said,) = [note for note in survey([grid]).notes if "more than their seed" in note]
    assert "env.render: fast → canonical" in said


# -- bad input ---------------------------------------------------------------------------------------------------------


def _nothing(path: Path) -> None:
    path.mkdir()


def _a_file(path: Path) -> None:
    path.write_text("{}")


def _absent(path: Path) -> None:
    pass


def _no_evaluations(path: Path) -> None:
    for seed in (1, 2):
        write_run(path / str(seed), new_config(seed=seed), [])


def _broken_grid(path: Path) -> None:
    run_of(path, CARTPOLE, "random", 1, [(100_000, 10.0)])
    (path / "grid.json").write_text('{"tasks": [')


def _another_grid(path: Path) -> None:
    new_grid(path, [REACHER], ["mpc"], [1])
    run_of(path, CARTPOLE, "random", 1, [(100_000, 10.0)])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_nothing, "no run with an evaluation in"),
        (_a_file, "runs is a file; give a folder that benchmarks.run or runners.train wrote"),
        (_absent, "runs does not exist; give a folder"),
        (
            _no_evaluations,
            "has no evaluation in evals.jsonl yet; let it reach its first one or leave it out (and 1 more",
        ),
        (_broken_grid, "grid.json cannot be used as a grid"),
        (_another_grid, "no run of the grid in"),
    ],
)
def test_nothing_to_report_on_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, says: str
) -> None:
    make(tmp_path / "runs")
    assert make_report(tmp_path / "runs", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "a", new_config(), [(100_000, 10.0)])
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert make_report(tmp_path / "runs", "--out", out) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert str(tmp_path / "file") in error
        assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_impossible_wishes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", new_config(), [(100_000, 10.0)])
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out"), "--reps", "3"]) == 1
    assert "--reps is 3, but a bootstrap must draw at least 100 times" in capsys.readouterr().err
    assert make_report("--out", tmp_path / "out") == 1
    assert "no folder was named" in capsys.readouterr().err
    assert make_report(tmp_path, "--out", tmp_path / "out", "--reference", tmp_path / "none.csv") == 1
    assert "none.csv is no table of published figures" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- the whole report --------------------------------------------------------------------------------------------------

AGENTS = ("dreamer", "mpc", "mpc:state", "random")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on a grid of two tasks and four agents, one run of which is not finished and one is missing."""
    path = tmp_path_factory.mktemp("report")
    grid = new_grid(path / "grid", [CARTPOLE, REACHER], AGENTS, [1, 2, 3])
    for i, agent in enumerate(AGENTS):
        for seed in (1, 2, 3):
            steps = range(10_000, 60_001 if (agent, seed) == ("dreamer", 3) else 100_001, 10_000)
            curve = [(step, (4 - i) * step / 1000 + 10 * seed) for step in steps]
            run_of(grid, CARTPOLE, agent, seed, curve)
            if (agent, seed) != ("mpc", 3):
                run_of(grid, REACHER, agent, seed, curve)
    assert make_report(grid, "--out", path / "out") == 0
    return path / "out"


def test_every_file_is_there(made: Path) -> None:
    pictures = {
        f"{name}-{steps}.png" for name in ("aggregates", "profiles", "improvement") for steps in ("50k", "100k")
    }
    pictures |= {"curves-env_steps.png", "curves-wall_time.png"}
    tables = {"index.html", "scores.md", "scores.csv", "aggregates.csv", "aggregates.json"}
    assert {file.name for file in made.iterdir()} == pictures | tables
    for name in pictures:
        with Image.open(made / name) as image:
            colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
        own = [tuple(bytes.fromhex(colour[1:])) for colour in COLOURS[:3]]
        drawn = own[:2] if name.startswith("improvement") else own  # where random is never the first of a pair
        assert set(drawn) <= colours, name


def test_scores_are_those_of_the_runs(made: Path) -> None:
    rows = list(csv.DictReader((made / "scores.csv").read_text().splitlines()))
    own = {(one["task"], one["agent"], int(one["env_steps"])): one for one in rows if one["source"] == "this report"}
    assert len(own) == 2 * 2 * len(AGENTS)
    mpc = own[CARTPOLE, "mpc", 100_000]  # evaluations at 90k and 100k: 270 and 300, and 10 for each seed
    assert mpc["seed_scores"] == "1:295.00 2:305.00 3:315.00"
    assert (mpc["seeds"], mpc["mean_return"]) == ("3", "305.00")
    assert 295 <= float(mpc["low_95"]) < 305 < float(mpc["high_95"]) <= 315
    assert own[CARTPOLE, "dreamer", 100_000]["seeds"] == "2"
    published = {(one["task"], one["agent"], int(one["env_steps"])): one for one in rows if "/" in one["source"]}
    assert published[CARTPOLE, "DreamerV3, published", 100_000]["mean_return"] == "614.51"
    assert published[CARTPOLE, "TD-MPC2 from state, published", 100_000]["mean_return"] == "839.40"
    assert not any(agent.startswith(("SAC", "PPO")) for _, agent, _ in published), "beside our own only"
    table = (made / "scores.md").read_text()
    assert re.search(r"\| cartpole-swingup \| 395 \[390, 400\] \(2\) \| 305 \[\d+, \d+\] \(3\) \|", table)


def test_aggregates_rest_on_complete_runs_and_say_so(made: Path) -> None:
    found = json.loads((made / "aggregates.json").read_text())
    at = {one["env_steps"]: one for one in found["budgets"]}
    assert at[50_000]["seeds"] == {"dreamer": [1, 2, 3], "mpc": [1, 2], "mpc:state": [1, 2, 3], "random": [1, 2, 3]}
    assert at[100_000]["seeds"]["dreamer"] == [1, 2]
    assert at[100_000]["left_out"] == [
        "dreamer, seed 3: not every task has a score",
        "mpc, seed 3: not every task has a score",
    ]
    assert at[100_000]["aggregates"]["random"]["mean"]["value"] == pytest.approx(0.115)
    rows = list(csv.DictReader((made / "aggregates.csv").read_text().splitlines()))
    (pair,) = [one for one in rows if (one["env_steps"], one["figure"]) == ("100000", "P(better than mpc:state)")][1:]
    assert (pair["agent"], pair["value"]) == ("mpc", "1.0000")


def test_the_page_says_on_top_what_is_missing(made: Path) -> None:
    page = (made / "index.html").read_text()
    top = page[page.index("<main>") : page.index('id="scores"')]
    assert "21 of 24 runs reached their budget of 100,000 env_steps." in top
    assert "mpc on reacher-easy, seed 3" in top
    assert "At 60,000 of 100,000 env_steps: dreamer on cartpole-swingup, seed 3" in top
    assert "Few seeds: 2 to 3" in top
    assert "src=" not in re.sub(r"<script.*?</script>", "", page, flags=re.S), "everything is inside"


def test_budgets_are_short_and_exact() -> None:
    assert [count(steps) for steps in (50_000, 1_000_000, 1_500_000, 12_500, 999, 123_456)] == [
        "50k",
        "1M",
        "1.5M",
        "12.5k",
        "999",
        "123,456",
    ]


# -- in a browser ------------------------------------------------------------------------------------------------------


def opened(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The document after a headless browser opened a file, and what was written to its console."""
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={profile}", "--window-size=1300,1000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH; apt-get install chromium")


@needs_browser
def test_the_page_opens_from_disk_and_draws_every_plot(made: Path, tmp_path: Path) -> None:
    page = (made / "index.html").read_text()
    asked = {}
    for script in page[page.index("<main>") :].split("Plotly.newPlot(")[1:]:
        name, rest = script.split(",", 1)
        traces, _ = json.JSONDecoder().raw_decode(rest.lstrip())
        asked[json.loads(name)] = len(traces)
    names = ["curves-0", "curves-1"]
    names += [f"{kind}-{steps}" for steps in (50_000, 100_000) for kind in ("aggregates", "profiles", "improvement")]
    assert list(asked) == names
    assert all(asked.values())
    document, console = opened(made / "index.html", tmp_path)
    assert console == []
    body = document[document.index("<main>") :]
    starts = [body.index(f'<div id="{name}"') for name in names]
    for name, start, end in zip(names, starts, [*starts[1:], len(body)], strict=True):
        drawn = body[start:end]
        assert "js-plotly-plot" in drawn[:200]
        assert 'class="main-svg"' in drawn
        assert len(re.findall(r'<g class="trace scatter', drawn)) == asked[name], name


@needs_browser
def test_an_error_in_a_page_is_found(tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<!doctype html><title>broken</title><body><script>nonsense()</script></body>")
    _, console = opened(page, tmp_path / "profile")
    assert len(console) == 1
    assert "nonsense is not defined" in console[0]


# -- a real run --------------------------------------------------------------------------------------------------------


def test_a_real_training_can_be_reported_on(tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "runs" / "one", TINY, agent="random", env__obs="state"))
    assert make_report(tmp_path / "runs", "--out", tmp_path / "out") == 0
    (row,) = csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines())
    last = json.loads((tmp_path / "runs" / "one" / "evals.jsonl").read_text().splitlines()[-1])
    assert (row["agent"], row["env_steps"], row["seeds"]) == ("random:state", "960", "1")
    assert float(row["mean_return"]) == pytest.approx(np.mean(last["returns"]), abs=0.01)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "1 of 1 runs reached their budget of 960 env_steps." in page
    assert "Shorter or longer episodes" in page

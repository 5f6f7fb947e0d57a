"""Figures held against numbers known beforehand: hand-made runs, a clock that the test moves, made-up profiles.

How fast anything is is never asserted.
"""

import csv
import dataclasses
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from agents.dreamer import DreamerAgent, DreamerConfig
from benchmarks import cuda, curves, speed
from benchmarks.decision import PARTS as DECISION_PARTS
from benchmarks.decision import PartClock, published_peer
from benchmarks.peers import PeerUnavailable
from benchmarks.plot import legend, mean_curve, read_references
from benchmarks.reference_size import random_batch, reference
from benchmarks.run import parse as grid_of
from benchmarks.stopwatch import Stopwatch
from benchmarks.update_cost import count_flop
from benchmarks.update_parts import PARTS, charge, time_parts
from envs import EnvConfig
from runners.config import Config, build_agent, parse_args, presets, to_json

HEADER = "run,task,agent,seed,env_steps,wall_s,mean_return,std,min,max,episodes,render,action_repeat,preset"


def evaluation(env_steps: int, returns: list[float | None], wall_s: float) -> dict[str, Any]:
    return {"env_steps": env_steps, "returns": returns, "lengths": [1000] * len(returns), "wall_s": wall_s}


def new_config(**changes: Any) -> Config:
    return dataclasses.replace(presets()["cpu"], **{"preset": "cpu", **changes})


def longer_horizon() -> tuple[DreamerConfig, str]:
    """The preset's agent with a horizon one longer, and how this difference is said."""
    usual = presets()["cpu"].dreamer
    longer = dataclasses.replace(usual, horizon=usual.horizon + 1)
    return longer, f"dreamer.horizon: {usual.horizon} → {longer.horizon}"


def new_run(path: Path, evaluations: list[dict[str, Any]], config: Config | None = None) -> Path:
    """The folder of a run, as far as curves are read from it."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(to_json(config or new_config()))
    (path / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    return path


def run_curves(*args: Any) -> int:
    return curves.main([str(arg) for arg in args])


# -- curves ------------------------------------------------------------------------------------------------------------


def test_every_evaluation_is_a_row_with_the_statistics_of_its_episodes(tmp_path: Path) -> None:
    walker = new_config(
        task="dmc/walker-walk", agent="random", seed=4, env=EnvConfig(render="canonical", action_repeat=1)
    )
    second = new_run(tmp_path / "b", [evaluation(4000, [7.125], 3600.04)], walker)
    first = new_run(tmp_path / "a", [evaluation(1000, [1, 2, 3, 6], 60), evaluation(2000, [-2.5, 0.5], 120.55)])
    assert run_curves(second, first, "--out", tmp_path / "results" / "small-1.0") == 0
    assert (tmp_path / "results" / "small-1.0.csv").read_text().splitlines() == [
        HEADER,
        "a,dmc/cartpole-swingup,dreamer,1,1000,60.0,3.0,1.87,1.0,6.0,4,fast,8,cpu",
        "a,dmc/cartpole-swingup,dreamer,1,2000,120.5,-1.0,1.5,-2.5,0.5,2,fast,8,cpu",
        "b,dmc/walker-walk,random,4,4000,3600.0,7.12,0.0,7.12,7.12,1,canonical,1,cpu",
    ]


def test_the_json_says_where_the_figures_come_from(tmp_path: Path) -> None:
    dreamer, difference = longer_horizon()
    config = new_config(seed=7, env_steps=9000, dreamer=dreamer)
    run = new_run(tmp_path / "a", [evaluation(k, [float(k)], k) for k in (1000, 2000, 3000, 4000)], config)
    out = tmp_path / "some"
    args = [str(run), "--out", str(out), "--machine", "one core of a pocket watch", "--note", "only a test"]
    assert curves.main(args) == 0
    content = json.loads((tmp_path / "some.json").read_text())
    assert content["command"] == shlex.join(["python", "-m", "benchmarks.curves", *args])
    assert (content["machine"], content["note"]) == ("one core of a pocket watch", "only a test")
    assert content["date"].endswith(" UTC")
    assert content["software"]["torch"] == torch.__version__
    (about,) = content["runs"]
    assert about.pop("command").startswith("python -m runners.train --preset cpu ")
    assert about == {
        "run": "a",
        "differs_from_preset": [f"env_steps: {presets()['cpu'].env_steps} → 9000", difference],
        "env_steps": 4000,
        "budget_env_steps": 9000,
        "evaluations": 4,
        "mean_of_last_three": 3000.0,
    }


def test_runs_of_a_grid_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    places = ("dreamer/seed-1", "dreamer/seed-2", "mpc/seed-1")
    runs = [new_run(tmp_path / "runs" / place, [evaluation(1, [1.0], 1)]) for place in places]
    for chosen, named in ((runs, places), (runs[:2], ("seed-1", "seed-2"))):
        assert run_curves(*chosen, "--out", tmp_path / "some") == 0
        content = json.loads((tmp_path / "some.json").read_text())
        rows = csv.DictReader((tmp_path / "some.csv").read_text().splitlines())
        assert tuple(run["run"] for run in content["runs"]) == tuple(row["run"] for row in rows) == named


def test_the_machine_is_this_one_unless_said(tmp_path: Path) -> None:
    assert run_curves(new_run(tmp_path / "a", [evaluation(1, [1.0], 1)]), "--out", tmp_path / "some") == 0
    assert "core" in json.loads((tmp_path / "some.json").read_text())["machine"]


def test_the_command_of_a_run_makes_its_configuration() -> None:
    plain = parse_args(["--preset", "cuda", "--device", "cpu"])
    changed = dataclasses.replace(
        plain,
        task="dmc/finger-spin",
        seed=12,
        gradient="reinforce",
        env=dataclasses.replace(plain.env, camera=1, action_repeat=None),
        model=dataclasses.replace(
            plain.model,
            head_gradient=False,
            conv=dataclasses.replace(plain.model.conv, channels=(8, 16), projector=True),
        ),
        loop=dataclasses.replace(plain.loop, train_ratio=12.5),
    )
    for config in (plain, changed):
        program = ["python", "-m", "runners.train"]
        words = shlex.split(curves.training_command(config))
        assert words[:3] == program
        assert dataclasses.replace(parse_args(words[3:]), device="cpu") == config


def test_a_row_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = new_run(tmp_path / "a", [evaluation(1000, [1.0], 60)])
    with (run / "evals.jsonl").open("a") as file:
        file.write('{"env_steps": 2000, "returns": [4.0, ')
    assert [row.env_steps for row in curves.read_run(run).rows] == [1000]


def test_a_return_that_is_not_finite_leaves_a_gap_and_strict_json(tmp_path: Path) -> None:
    run = new_run(tmp_path / "a", [evaluation(1000, [1.0, None], 60)])
    assert run_curves(run, "--out", tmp_path / "some") == 0
    (row,) = csv.DictReader((tmp_path / "some.csv").read_text().splitlines())
    assert [row[name] for name in ("mean_return", "std", "min", "max", "episodes")] == ["nan"] * 4 + ["2"]
    assert json.loads((tmp_path / "some.json").read_text())["runs"][0]["mean_of_last_three"] is None


def _missing(path: Path) -> None:
    pass


def _empty(path: Path) -> None:
    path.mkdir()


def _not_evaluated(path: Path) -> None:
    new_run(path, [])


def _another_version(path: Path) -> None:
    new_run(path, [evaluation(1, [1.0], 1)])
    (path / "config.json").write_text('{"horizon": 5}')


def _another_task(path: Path) -> None:
    new_run(path, [evaluation(1, [1.0], 1)], new_config(task="dmc/walker-wlak"))


def _no_returns(path: Path) -> None:
    new_run(path, [evaluation(1, [1.0], 1), {"env_steps": 2, "wall_s": 2}])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_missing, "b is not a run: it has no config.json"),
        (_empty, "b is not a run: it has no config.json"),
        (_not_evaluated, "b has no evaluation in evals.jsonl yet"),
        (_another_version, "config.json: this is not a LeDream config of this version"),
        (_another_task, "The closest: dmc/walker-walk"),
        (_no_returns, "evals.jsonl has a row that is no evaluation: KeyError('returns')"),
    ],
)
def test_a_folder_without_a_curve_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, says: str
) -> None:
    good = new_run(tmp_path / "a", [evaluation(1000, [1.0], 60)])
    make(tmp_path / "b")
    assert run_curves(good, tmp_path / "b", "--out", tmp_path / "some") == 1
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("some*"))


def test_no_run_or_one_named_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = new_run(tmp_path / "a", [evaluation(1000, [1.0], 60)])
    assert run_curves("--out", tmp_path / "some") == 1
    assert "no run was named" in capsys.readouterr().err
    assert run_curves(good, tmp_path / "x" / ".." / "a", "--out", tmp_path / "some") == 1
    assert "named twice" in capsys.readouterr().err


# -- the picture -------------------------------------------------------------------------------------------------------


def test_the_mean_of_seeds_is_taken_where_all_of_them_have_values() -> None:
    x, y = mean_curve(
        [np.array([0.0, 10.0, 20.0]), np.array([5.0, 10.0, 30.0])],
        [np.array([0.0, 100.0, 0.0]), np.array([10.0, 20.0, 60.0])],
    )
    assert x.tolist() == [5.0, 10.0, 20.0]
    assert y.tolist() == [(50 + 10) / 2, (100 + 20) / 2, (0 + 40) / 2]


def test_runs_that_differ_in_seed_length_and_place_only_share_a_series(tmp_path: Path) -> None:
    shorter = new_config(seed=2, env_steps=7, threads=3)
    dreamer, difference = longer_horizon()
    changed = new_config(dreamer=dreamer)
    configs = [new_config(seed=1), shorter, changed, new_config(agent="random"), new_config(task="dmc/walker-walk")]
    made = [
        curves.read_run(new_run(tmp_path / str(i), [evaluation(1000 * i, [1.0 * i], 60.0 * i)], config))
        for i, config in enumerate(configs)
    ]
    cartpole, walker = curves.panels(made)
    assert (cartpole.task, walker.task) == ("dmc/cartpole-swingup", "dmc/walker-walk")
    assert cartpole.subtitle == "2 seeds · fast rendering · action repeat 8"
    assert walker.subtitle == "seed 1 · fast rendering · action repeat 2"
    assert [(one.label, len(one.lines)) for one in cartpole.series] == [
        ("dreamer, cpu preset", 2),
        (f"dreamer, cpu preset, {difference}", 1),
        ("random", 1),
    ]
    assert [one.label for one in walker.series] == ["dreamer, cpu preset"]
    line = cartpole.series[1].lines[0]
    assert (line.env_steps.tolist(), line.minutes.tolist(), line.mean_return.tolist()) == ([2000.0], [2.0], [2.0])


def test_a_picture_is_drawn_with_a_column_for_each_task(tmp_path: Path) -> None:
    runs = [
        new_run(
            tmp_path / f"{task.partition('/')[2]}-{seed}",
            [evaluation(k * 1000, [k * 10.0 * seed], k * 30.0) for k in range(1, 5 - seed)],
            new_config(task=task, seed=seed),
        )
        for task, seed in itertools.product(("dmc/cartpole-swingup", "dmc/walker-walk", "mujoco/Hopper-v5"), (1, 2))
    ]
    picture = tmp_path / "new" / "curves.png"
    assert run_curves(*runs, "--out", tmp_path / "some", "--plot", picture) == 0
    with Image.open(picture) as image:
        assert image.width == pytest.approx(3 * 3.3 * 150, abs=1)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert (0x00, 0x72, 0xB2) in colours, "no thick line of the mean"


@pytest.mark.parametrize(("letters", "columns"), [(5, 4), (45, 2), (200, 1)])
def test_a_legend_has_as_many_columns_as_fit(letters: int, columns: int) -> None:
    figure = Figure(figsize=(9.6, 8), layout="constrained")
    axis = figure.subplots()
    for i in range(8):
        axis.plot([0, 1], [0, i], label=f"{i}" + "n" * letters)
    legend(figure, [axis])
    figure.draw_without_rendering()
    (drawn,) = figure.legends
    places = [text.get_window_extent() for text in drawn.get_texts()]
    assert len(places) == 8
    assert len({round(place.x0) for place in places}) == columns
    assert max(place.x1 for place in places) <= figure.bbox.width


def test_no_known_picture_format_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(tmp_path / "a", [evaluation(1000, [1.0], 60)])
    assert run_curves(run, "--out", tmp_path / "some", "--plot", tmp_path / "curves.doc") == 1
    assert "curves.doc is no picture" in capsys.readouterr().err
    assert not list(tmp_path.glob("some*"))


def test_published_figures_that_are_named_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(tmp_path / "a", [evaluation(1000, [1.0], 60)])
    table = tmp_path / "figures.csv"
    args = [run, "--out", tmp_path / "some", "--plot", tmp_path / "curves.png", "--reference", table]
    assert run_curves(*args) == 1
    table.write_text("task,algorithm,env_steps\nwalker-walk,drqv2,50000\n")
    assert run_curves(*args) == 1
    assert capsys.readouterr().err.count("figures.csv is no table of published figures") == 2
    assert not list(tmp_path.glob("some*"))


def test_published_figures_are_of_runs_that_see_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(curves, "draw", lambda path, panels, references, footer: drawn.append(references))
    for obs in ("pixels", "state"):
        run = new_run(tmp_path / obs, [evaluation(1000, [1.0], 60)], new_config(env=EnvConfig(obs=obs)))
        assert run_curves(run, "--out", tmp_path / "some", "--plot", tmp_path / "curves.png") == 0
    assert [{one.obs for one in references} for references in drawn] == [{"pixels"}, {"state"}]
    assert "TD-MPC2 from state, published" in {one.label for one in drawn[1]}
    assert "TD-MPC2, published" in {one.label for one in drawn[0]}


def test_the_quoted_figures_are_complete() -> None:
    references = read_references(curves.REFERENCE)
    figures = {(one.task, one.obs, one.algorithm, one.env_steps): one for one in references}
    assert len(figures) == len(references)
    assert [len({one.task for one in references if one.obs == obs}) for obs in ("pixels", "state")] == [20, 20]
    six = ("cartpole-swingup", "reacher-easy", "ball_in_cup-catch", "walker-walk", "cheetah-run", "finger-spin")
    pixels = ("DreamerV3", "DrQ-v2", "CURL", "SAC", "PPO")
    steps = (50_000, 100_000, 200_000, 500_000, 1_000_000)
    assert set(itertools.product(six, ["pixels"], pixels, steps)) <= figures.keys()
    assert set(itertools.product(six, ["state"], ("TD-MPC2", "SAC"), steps[1:])) <= figures.keys()
    assert set(itertools.product(six, ["state"], ("DreamerV3", "PPO"), steps[:4])) <= figures.keys()
    assert all(0 <= one.mean_return <= 1000 and one.source and one.obs in ("pixels", "state") for one in references)
    quoted = [
        figures[task, "pixels", name, 100_000].mean_return
        for task in ("walker-walk", "cartpole-swingup")
        for name in pixels[:2]
    ]
    assert [round(value) for value in quoted] == [639, 170, 615, 626]
    assert curves.REFERENCE.stat().st_size < 100_000


# -- speed -------------------------------------------------------------------------------------------------------------


class Clock:
    """Moves only when work is done: each call takes as long as the test says."""

    def __init__(self, durations: list[float]) -> None:
        self.now = 5.0
        self.durations = itertools.cycle(durations)

    def work(self) -> None:
        self.now += next(self.durations)


def test_rates_and_latencies_are_medians_of_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([0.25])
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    watch = Stopwatch(3, 1.0, torch.device("cpu"))
    one = watch.rate(clock.work, "frames/s", per_call=6)
    assert (one.value, one.low, one.high, one.unit) == (24.0, 24.0, 24.0, "frames/s")
    assert clock.now == 5.0 + 0.25 * (1 + 2 + 3 * 4), "a warm-up, half a repeat to count calls, then the repeats"
    # The warm-up, one call to count, and repeats of one call each.
    clock.durations = itertools.cycle([9.0, 1.0, 0.5, 4.0, 2.0])
    latency = watch.latency(clock.work)
    assert (latency.value, latency.low, latency.high, latency.unit) == (2000.0, 500.0, 4000.0, "ms")


def event(name: str, start: int, end: int, parent: FunctionEvent | None = None, sequence_nr: int = -1) -> FunctionEvent:
    """A profiler's record that ran from ``start`` to ``end`` µs, inside ``parent``."""
    event.count += 1  # type: ignore[attr-defined]
    made = FunctionEvent(event.count, name, 1, start, end, sequence_nr=sequence_nr)  # type: ignore[attr-defined]
    if parent is not None:
        parent.append_cpu_child(made)
        made.set_cpu_parent(parent)
    return made


event.count = 0  # type: ignore[attr-defined]


def test_each_operator_is_charged_to_its_part_and_its_backward_step_too() -> None:
    update = event("update:update", 0, 1000)
    loss = event("update:loss", 0, 300, update)
    encoder = event("update:encoder", 0, 100, loss)
    convolution = event("aten::convolution", 10, 60, encoder, sequence_nr=7)
    view = event("aten::view", 70, 80, encoder, sequence_nr=8)  # makes no backward step: 8 is the predictor's
    predictor = event("update:predictor", 100, 150, loss)
    product = event("aten::addmm", 110, 140, predictor, sequence_nr=8)
    head = event("aten::exp", 200, 220, loss, sequence_nr=9)
    engine = "autograd::engine::evaluate_function: "
    step_9 = event(engine + "ExpBackward0", 310, 330, update, sequence_nr=9)
    step_8 = event(engine + "AddmmBackward0", 330, 400, update, sequence_nr=8)
    inner = event("AddmmBackward0", 340, 390, step_8, sequence_nr=8)
    step_7 = event(engine + "ConvolutionBackward0", 400, 500, update, sequence_nr=7)
    added_up = event(engine + "torch::autograd::AccumulateGrad", 500, 505, update)
    imagined = event("update:predictor", 510, 550, update)
    policy = event("aten::tanh", 560, 570, update, sequence_nr=10)
    step = event("update:optimiser", 600, 650, update)
    clip = event("aten::_foreach_norm", 605, 645, step)
    adam = event("Optimizer.step#Adam.step", 660, 690, update)
    fused = event("aten::_fused_adam_", 665, 680, adam)
    events = [
        update,
        loss,
        encoder,
        convolution,
        view,
        predictor,
        product,
        head,
        step_9,
        step_8,
        inner,
        step_7,
        added_up,
    ]
    charged = charge([*events, imagined, policy, step, clip, adam, fused], on_gpu=False)
    assert charged == {
        "encoder": 100 + 100,
        "predictor": 50 + 70,
        "heads": (300 - 100 - 50) + 20,
        "imagination": 40,
        "actor_critic": 10,
        "optimiser": 50 + 30,
        "other": (1000 - 300 - 20 - 70 - 100 - 5 - 40 - 10 - 50 - 30) + 5,
    }
    assert sum(charged.values()) == 1000


def test_a_gpus_kernels_are_charged_once_to_the_operators_that_launched_them() -> None:
    """A kernel is an event of its own, too, whose number may be that of an operator."""

    def operator(number: int, name: str, parent: FunctionEvent | None, *kernels: int) -> FunctionEvent:
        made = FunctionEvent(number, name, 1, 0, 100, use_device="cuda")
        for duration in kernels:
            made.append_kernel("gemm", 0, duration)
        if parent is not None:
            parent.append_cpu_child(made)
            made.set_cpu_parent(parent)
        return made

    update = operator(1, "update:update", None)
    loss = operator(2, "update:loss", update)
    encoder = operator(3, "update:encoder", loss)
    convolution = operator(4, "aten::convolution", encoder, 30, 12)
    policy = operator(5, "aten::addmm", update, 7)
    on_gpu = [
        FunctionEvent(number, name, 1, 0, 42, device_type=DeviceType.CUDA, use_device="cuda")
        for number, name in ((4, "gemm"), (2, "gemm"), (9, "update:loss"))
    ]
    charged = charge([update, loss, encoder, convolution, policy, *on_gpu], on_gpu=True)
    assert {part: time for part, time in charged.items() if time} == {"encoder": 42, "actor_critic": 7}


def test_measuring_the_parts_of_an_update_is_the_update_itself() -> None:
    config = parse_args([*SMALL, "--dreamer.behaviour-every", "3"])
    observations, actions = gym.spaces.Box(0, 255, (3, 16, 16), np.uint8), gym.spaces.Box(-1, 1, (2,), np.float32)
    batch = random_batch(4, 8, 16, 2, torch.device("cpu"))

    def learn(updates: Callable[[DreamerAgent], Any]) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        agent = build_agent(config, observations, actions, torch.device("cpu"))
        assert isinstance(agent, DreamerAgent)
        agent.start(batch.obs.flatten(0, 1))
        updates(agent)
        assert "forward" not in vars(agent.model.encoder), "a mark was left behind"
        return {name: value for part in (agent.model, agent.policy) for name, value in part.state_dict().items()}

    parts: dict[str, float] = {}
    measured = learn(lambda agent: parts.update(time_parts(agent, batch, 100.0, repeats=2)))
    plain = learn(lambda agent: [agent.update(batch) for _ in range(2 + 2 * 3)])
    assert parts.keys() == PARTS.keys()
    assert sum(parts.values()) == pytest.approx(100.0)
    assert all(torch.equal(measured[name], plain[name]) for name in plain)


def test_the_arithmetic_is_that_of_the_rows_and_starts() -> None:
    """Every product and convolution has as many rows as the batch or the imagination: twice the rows, twice as many."""
    config = parse_args([*SMALL, "--dreamer.starts", "4"])
    frames, actions = gym.spaces.Box(0, 255, (3, 16, 16), np.uint8), gym.spaces.Box(-1, 1, (2,), np.float32)

    def count(times: int, threads: int) -> int:
        torch.set_num_threads(threads)
        dreamer = dataclasses.replace(config.dreamer, starts=4 * times)
        agent = build_agent(dataclasses.replace(config, dreamer=dreamer), frames, actions, torch.device("cpu"))
        assert isinstance(agent, DreamerAgent)
        return count_flop(agent, random_batch(2 * times, 8, 16, 2, torch.device("cpu")))

    once, twice, thrice = (count(times, 1) for times in (1, 2, 3))
    assert thrice - twice == twice - once, "what does not grow with the rows is constant: SIGReg's knots"
    stem = 2 * 2 * 8 * (24 * 3 * 3) * (3 * 8 * 8)
    assert 2 * once - twice < 0.01 * once
    assert once > 2 * stem, "more than the stem alone, forward and the gradient of its weights"
    assert count(1, 2) == once, "with the halves of an update in two threads, too"


SMALL = ["--preset", "cpu", "--device", "cpu", "--threads", "1", "--env.size", "16", "--loop.batch", "4"]
SMALL += ["--loop.length", "8", "--loop.prefill", "512", "--dreamer.starts", "8", "--num-envs", "1"]
QUICK = ["--repeats", "1", "--seconds", "0.01", "--replay-rows", "64", "--processes", "2"]


def test_everything_is_measured_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "speed.json"
    assert speed.main([*QUICK, *SMALL, "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    costs = ("arithmetic", "flop_rate", "matrix_rate", "launches")
    keys = ["env/canonical", "env/fast", "env/vector", "update/total"]
    keys += [f"update/{name}" for name in (*costs, *PARTS)]
    keys += [
        "act/1",
        "act/10",
        "plan/agent",
        *(f"plan/agent_{part}" for part in DECISION_PARTS),
        "loop/collect",
        "loop/learn",
        "replay/add",
        "replay/sample",
        "replay/sample_mirror",
    ]
    keys += ["memory/peak_rss", "memory/own_rss"]
    results = content["results"]
    assert list(results) == keys
    assert all(one["value"] > 0 and math.isfinite(one["value"]) and one["unit"] for one in results.values())
    assert all(one["low"] <= one["value"] <= one["high"] for one in results.values() if one["low"] is not None)
    parts = sum(results[f"update/{part}"]["value"] for part in PARTS)
    assert parts == pytest.approx(1000 / results["update/total"]["value"])
    assert content["command"] == shlex.join(["python", "-m", "benchmarks.speed", *QUICK, *SMALL, "--json", str(file)])
    assert content["date"].endswith(" UTC")
    assert {"cpu", "cores", "gpus", "torch", "torch_threads", "load_average"} <= content["machine"].keys()
    assert content["config"]["loop"]["batch"] == 4
    shown = capsys.readouterr().out
    assert all(key in shown for key in keys)


def test_time_is_charged_to_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def work(seconds: float, *then: Callable[[], None]) -> None:
        nonlocal now
        now += seconds
        for one in then:
            one()

    clock = PartClock(torch.device("cpu"))
    rollout = clock.mark(lambda: work(2.0), "rollout")
    clock.mark(lambda: work(1.0, rollout, rollout), "score")()
    work(0.5)
    assert clock.read() == {"search": 0.5, "score": 1.0, "rollout": 4.0}
    assert clock.read() == {"search": 0.0}


def test_works_are_timed_in_turn_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, []
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def work(name: str) -> None:
        nonlocal now
        calls.append(name)
        now += {"a": 1.0, "b": 0.5}[name] * len(calls)

    a, b = Stopwatch(3, 1.0, torch.device("cpu")).in_turn([lambda: work("a"), lambda: work("b")])
    assert calls == ["a", "b"] * 4
    # The third, fifth and seventh call are a's.
    assert (a.low, a.value, a.high) == (3000, 5000, 7000)
    assert (b.low, b.value, b.high) == (2000, 3000, 4000)


def test_a_peer_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_worldmodel", None)
    with pytest.raises(PeerUnavailable, match=r"cannot be used here: ModuleNotFoundError.*\.\[peers\]"):
        published_peer(torch.device("cpu"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--repeats", "0"], "--repeats is 0, but must be at least 1"),
        (["--preset", "cup"], "The closest: cpu"),
        (["--task", "dmc/cartpole-swingpu"], "The closest: dmc/cartpole-swingup"),
        (["--suite", "update", "--agent", "random"], "--agent random does not learn"),
        (["--suite", "update", "--peers"], "--peers is of --suite published"),
        (["--suite", "replay", "--env.obs", "both"], "a replay holds --env.obs pixels or state"),
    ],
)
def test_what_cannot_be_measured_is_refused(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main([*QUICK, *([] if "--preset" in args else SMALL), *args]) == 1
    assert says in capsys.readouterr().err


def test_an_unknown_flag_ends_with_what_is_close(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        speed.main(["--loop.bacth", "4"])
    assert exit_.value.code == 2
    assert "--loop.batch" in capsys.readouterr().err


# -- a GPU -------------------------------------------------------------------------------------------------------------


def test_the_commands_for_a_gpu_are_understood(tmp_path: Path) -> None:
    """They are run when there is one; until then their flags must not rot."""
    stages = {stage: cuda.commands(cuda.CudaConfig(tmp_path), stage) for stage in get_args(cuda.Stage)}
    assert stages["same"] == [["benchmarks.same_updates", "--device", "cuda"]]
    ways = []
    for _, *args in [*stages["update"], *stages["loop"]]:
        options, others = tyro.cli(speed.SpeedConfig, args=args, return_unknown_args=True)
        run = parse_args(others)
        assert (run.task, run.preset, run.loop.train_ratio) == ("dmc/walker-walk", "cuda", 512)
        ways.append((options.suite, options.size, run.compile))
    sizes = [("update", "reference", way) for way in ("false", "graph", "true")]
    assert ways == [*sizes, ("loop", "preset", "auto")]
    ((_, *args),) = stages["walker"]
    assert parse_args(args).env_steps == 100_000
    ((_, *args),) = stages["dmc6"]
    asked, grid = grid_of(args)
    assert (asked.jobs, len(grid.cells()), grid.env_steps) == (6, 6, 100_000)


def test_without_a_gpu_its_benchmark_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.cuda", "--out", "nowhere"])
    assert cuda.main() == 1
    assert "--device cuda was asked for, but" in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_the_reference_size_is_the_same_learner_but_for_its_size() -> None:
    run = reference(parse_args(["--preset", "cpu", "--seed", "4", "--loop.train-ratio", "3"]))
    assert (run.loop.batch, run.loop.length, run.dreamer.starts, run.dreamer.horizon) == (16, 64, 1024, 15)
    assert (run.seed, run.loop.train_ratio, run.task) == (4, 3, "dmc/cartpole-swingup")
    frames, actions = gym.spaces.Box(0, 255, (3, 64, 64), np.uint8), gym.spaces.Box(-1, 1, (6,), np.float32)
    agent = build_agent(run, frames, actions, torch.device("cpu"))
    assert isinstance(agent, DreamerAgent)
    assert 11.5e6 < sum(x.numel() for group in agent.groups.values() for x in group) < 12.5e6

"""runners.diagnose: its measures against known answers, its edits of the simulation, and the page of a tiny run."""

from __future__ import annotations

import json
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from agents.random import RandomAgent
from envs import EnvConfig, make_env
from envs.edits import angles, recoloured, switched_gravity
from envs.physics import physical_names, physical_state, set_physical_state, simulation
from runners.action_effects import agreement, directions, real_rewards
from runners.diagnose import main
from runners.latents import linear_baseline, principal_axes, straightness
from runners.probes import Sets, linear_probe, mlp_probe, quantities, r_squared
from runners.recordings import Recordings, play, split_episodes
from runners.run import Run
from runners.surprise import AFTER, auroc, frozen, simulate, skipped
from tests.loop_helpers import COUNTING, TINY, Finished, config, contents, finished_run
from worldmodels.interface import Batch

COMMON = ["--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished_run(tmp_path_factory)


# -- probes ------------------------------------------------------------------------------------------------------------


def sets(x: Tensor) -> Sets:
    return Sets(x[:240], x[240:320], x[320:])


def test_probes_find_what_is_linear_and_nothing_in_noise() -> None:
    x, noise = torch.randn(400, 6), torch.randn(400, 1)
    wanted = sets(torch.cat([3 + x @ torch.randn(6, 1), noise], 1))
    linear = r_squared(wanted.held_out, linear_probe(sets(x), wanted))
    assert linear[0] > 0.999
    assert linear[1] < 0.1
    curved = r_squared(wanted.held_out, mlp_probe(sets(x), wanted, seed=1))
    assert curved[0] > 0.9
    assert curved[1] < 0.1
    assert torch.equal(curved, r_squared(wanted.held_out, mlp_probe(sets(x), wanted, seed=1)))


def test_only_the_mlp_finds_what_is_not_linear() -> None:
    x = 2 * torch.rand(400, 1) - 1
    wanted = sets(x.square())
    assert r_squared(wanted.held_out, linear_probe(sets(x), wanted)) < 0.1
    assert r_squared(wanted.held_out, mlp_probe(sets(x), wanted, seed=1)) > 0.9


def test_r_squared_of_the_mean_is_0_and_of_a_constant_is_unknown() -> None:
    target = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert r_squared(target, torch.tensor([[2.0, 5.0], [2.0, 5.0]]))[0] == 0
    assert r_squared(target, target)[0] == 1
    assert r_squared(target, target)[1].isnan()


def test_angles_become_sine_and_cosine_and_what_stands_still_goes() -> None:
    values = np.array([[0.0, 1.0, 7.0], [np.pi / 2, 2.0, 7.0]])
    names, columns = quantities(["hinge", "slide", "still"], values, [True, False, False])
    assert names == ["sin hinge", "cos hinge", "slide"]
    np.testing.assert_allclose(columns, [[0, 1, 1], [1, 0, 2]], atol=1e-12)


# -- latents -----------------------------------------------------------------------------------------------------------


def test_straightness() -> None:
    line = torch.arange(8.0)[:, None] * torch.tensor([1.0, -2.0])
    assert straightness(line[:-2], line[1:-1], line[2:]) == pytest.approx(1)
    back_and_forth = torch.tensor([[0.0], [1.0]] * 4)
    assert straightness(back_and_forth[:-2], back_and_forth[1:-1], back_and_forth[2:]) == pytest.approx(-1)
    noise = torch.randn(2000, 256)
    assert straightness(noise[:-2], noise[1:-1], noise[2:]) == pytest.approx(-0.5, abs=0.02)


def test_principal_axes() -> None:
    z = torch.randn(500, 1) * torch.tensor([3.0, 4.0, 0.0]) + 0.01 * torch.randn(500, 3)
    points, share = principal_axes(z)
    assert share[0] > 0.999
    torch.testing.assert_close(
        points[:, 0].abs(), ((z - z.mean(0)) @ torch.tensor([0.6, 0.8, 0.0])).abs(), atol=0.1, rtol=0
    )


def recorded(lengths: list[int], action: np.ndarray) -> Recordings:
    """Episodes whose observations are their row numbers."""
    rows = sum(lengths)
    return Recordings(
        obs=np.arange(rows, dtype=np.float32)[:, None],
        action=action.astype(np.float32),
        reward=np.zeros(rows, np.float32),
        physical=None,
        drawn={},
        is_terminal=np.zeros(rows, bool),
        episode=np.repeat(np.arange(len(lengths)), lengths),
        step=np.concatenate([np.arange(n) for n in lengths]),
        length=np.array(lengths),
        seed=0,
        split=split_episodes(len(lengths), seed=0),
    )


def test_linear_baseline_knows_a_linear_system() -> None:
    lengths, steps = [20] * 8, 5
    recordings = recorded(lengths, np.random.default_rng(0).uniform(-1, 1, (160, 1)))
    turn = torch.tensor([[0.9, -0.3], [0.3, 0.9]])
    rows = [torch.randn(2)]
    for row in range(1, 160):
        new = torch.randn(2) if recordings.step[row] == 0 else rows[-1] @ turn + float(recordings.action[row - 1, 0])
        rows.append(new)
    starts = recordings.rows(before=2, after=steps, among=recordings.split.held_out)
    assert linear_baseline(torch.stack(rows), recordings, starts, steps, 2) < 1e-6
    assert linear_baseline(torch.randn(160, 2), recordings, starts, steps, 2) > 0.5


def test_rows_stay_within_their_episode() -> None:
    recordings = recorded([3, 5], np.zeros((8, 1)))
    assert recordings.rows(before=1, after=2).tolist() == [4, 5]
    assert recordings.rows(before=0, after=2, among=np.array([0])).tolist() == [0]
    batch = recordings.batch(np.array([3]), 5)
    assert isinstance(batch, Batch)
    assert batch.is_first[0].tolist() == [True] + [False] * 4
    assert batch.is_last[0].tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("episodes", [4, 5, 20])
def test_split_is_of_whole_episodes(episodes: int) -> None:
    parts = split_episodes(episodes, seed=3)
    assert all(len(part) for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(episodes))


# -- surprise and effects ----------------------------------------------------------------------------------------------


def test_auroc() -> None:
    assert auroc(np.array([3.0, 2.0]), np.array([0.0, 1.0, -5.0])) == 1
    assert auroc(np.ones(3), np.ones(7)) == 0.5
    assert auroc(np.array([0.0]), np.array([1.0, 2.0])) == 0
    assert auroc(np.array([1.0, 3.0]), np.array([2.0, 0.0])) == 0.75


def test_agreement_of_effects() -> None:
    real = np.array([-1.0, 0.0, 2.0])
    assert agreement(0.25 * real + 1, real) == pytest.approx((1.0, 0.25))
    assert agreement(-real, real) == pytest.approx((-1.0, -1.0))
    assert agreement(real, np.zeros(3)) == (None, None)
    assert agreement(np.ones(3), real) == (None, 0.0)
    assert directions(2, seed=0).tolist() == [[1, 0], [0, 1]]
    assert set(np.abs(directions(20, seed=0)).ravel()) == {1.0}


def test_edits_of_time() -> None:
    recordings = recorded([30], np.arange(30.0)[:, None])
    still = frozen(recordings, np.array([10]))
    assert still.obs[0, :, 0].tolist() == [10, 10, 10, 14, 15, 16, 17, 18]
    assert still.action[0, :, 0].tolist() == [10, 11, 12, 13, 14, 15, 16, 17]
    short = skipped(recordings, np.array([10]))
    assert short.obs[0, :, 0].tolist() == [12, 13, 14, 15, 16, 17, 18, 19]
    assert short.action[0, :, 0].tolist() == [10, 12, 13, 14, 15, 16, 17, 18]


def untouched(env: gym.Env) -> AbstractContextManager[None]:
    """The edit that changes nothing."""
    return nullcontext()


class Constant:
    """Always acts the same."""

    def initial(self, envs: int) -> Any:
        return ()

    def act(self, obs: np.ndarray, is_first: np.ndarray, carry: Any, *, explore: bool) -> tuple[np.ndarray, Any]:
        return np.full((len(is_first), 1), 0.5, np.float32), carry


def test_simulation_goes_on_from_a_recorded_state() -> None:
    """Unedited it is what was recorded, pictures and rewards; each edit shows, and is gone afterwards."""
    env = make_env("dmc/cartpole-swingup", EnvConfig(size=32))
    recordings = play(env, Constant(), 2, 15, seed=7, physical=True)  # type: ignore[arg-type]
    assert recordings.physical is not None
    assert recordings.length.tolist() == [16, 16]
    assert recordings.action[15] == 0
    starts = np.array([3, 21])
    again = simulate(env, recordings, starts, untouched)
    wanted = recordings.obs[starts[:, None] + np.arange(1, AFTER + 1)]
    np.testing.assert_array_equal(again.obs, wanted)
    assert again.alive.all()
    rewards = [real_rewards(env, recordings, row, np.full(1, 0.5, np.float32)) for row in starts]
    np.testing.assert_allclose(rewards, recordings.reward[starts[:, None] + np.arange(1, 7)].cumsum(1), rtol=1e-5)
    for edit in (recoloured, switched_gravity):
        changed = simulate(env, recordings, starts, edit)
        assert (changed.obs != wanted).any(axis=(1, 2, 3, 4)).all()
    green = simulate(env, recordings, starts, recoloured).obs[:, 0].astype(int)
    assert ((green[:, 1] > green[:, 0] + 50) & (green[:, 1] > green[:, 2] + 50)).any()
    np.testing.assert_array_equal(simulate(env, recordings, starts, untouched).obs, wanted)
    env.close()


def test_a_target_drawn_for_each_episode_is_a_quantity() -> None:
    """The reacher's target is a geom of the model, which no physical state tells."""
    env = make_env("dmc/reacher-easy", EnvConfig(obs="state"))
    recordings = play(env, RandomAgent(2, seed=0), 3, 4, seed=7, physical=True)
    model, _ = simulation(env)
    last = model.geom("target").pos[:2]
    names, values = recordings.quantities(physical_names(env), angles(env))
    assert [name for name in names if name.startswith("geom/")] == ["geom/target[0]", "geom/target[1]"]
    places = values[:, [names.index(f"geom/target[{i}]") for i in range(2)]]
    np.testing.assert_array_equal(places[-1], last)
    assert len(np.unique(places, axis=0)) == 3
    for episode in range(3):
        assert len(np.unique(places[recordings.episode == episode], axis=0)) == 1
    assert "sin qpos/shoulder" in names
    env.close()


def test_which_numbers_are_angles() -> None:
    env = make_env("dmc/cartpole-swingup", EnvConfig(obs="state"))
    env.reset(seed=0)
    assert len(physical_names(env)) == len(angles(env)) == len(physical_state(env)) == 4
    assert angles(env) == [False, True, False, False]
    state = np.array([0.1, 2.0, 0.3, -1.0])
    set_physical_state(env, state)
    np.testing.assert_array_equal(physical_state(env), state)
    env.close()


# -- the program -------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], run_dir: Path, *args: str) -> str:
    """Ask in vain; the error."""
    assert main(["--run-dir", str(run_dir), *COMMON, *args]) == 1
    captured = capsys.readouterr()
    assert "error: " in captured.err
    assert "Traceback" not in captured.err
    assert "page" not in captured.out
    return captured.err


def asked(capsys: pytest.CaptureFixture[str], run_dir: Path, *args: str) -> tuple[Path, dict[str, Any], str]:
    """The folder, the figures and the page."""
    assert main(["--run-dir", str(run_dir), *COMMON, *args]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("page: ")
    where = Path(last.removeprefix("page: "))
    figures = json.loads((where.parent / "diagnosis.json").read_text(), parse_constant=pytest.fail)
    return where.parent, figures, where.read_text(encoding="utf-8")


def test_page_of_a_run(finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = contents(finished.path), tmp_path / "found"
    small = ["--episodes", "4", "--clips", "3", "--starts", "4", "--horizon", "6", "--out", str(out)]
    folder, figures, page = asked(capsys, finished.path, *small)
    assert folder == out
    assert contents(finished.path) == before  # asking writes nothing into the run
    assert figures["task"] == "dmc/cartpole-swingup"
    assert figures["env_steps"] == 960
    assert "runners.diagnose --run-dir" in figures["command"]
    assert figures["rows"] == 4 * 21
    assert len(figures["held_out_episodes"]) == 1

    assert figures["probes"]["quantities"][1:3] == ["sin qpos/hinge_1", "cos qpos/hinge_1"]
    for found in figures["probes"]["r2"].values():
        assert all(len(found[kind]) == len(figures["probes"]["quantities"]) for kind in ("linear", "mlp"))
    assert len(figures["effects"]["real"]) == 4
    assert figures["surprise"]["auroc"].keys() == {"teleport", "colour", "gravity", "freeze", "skip"}
    assert all(0 <= value <= 1 for value in figures["surprise"]["auroc"].values())
    assert len(figures["open-loop"]["model"]) == len(figures["open-loop"]["linear"]) == 6
    assert 1 <= figures["geometry"]["effective_rank"] <= 8

    pictures = sorted(path.name for path in out.glob("*.png"))
    assert "open-loop-strips.png" in pictures  # the run has a decoder
    assert page.count("<img") == len(pictures) == 11
    # Nothing is fetched from anywhere: every source is in the page itself.
    assert set(re.findall(r'(?:src|href)="(data:image/png;base64,|#|[^"]*)', page)) == {"data:image/png;base64,", "#"}
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)


def test_task_without_physics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Observing states, untrained: what needs the simulator's state is left out by itself and refused by name."""
    run_dir = tmp_path / "run"
    settings = TINY | {"task": "gym/Pendulum-v1", "env.obs": "state", "env.time-limit": None}
    with Run(config(run_dir, settings), quiet=True) as run:
        run.save()
    error = refused(capsys, run_dir, "--episodes", "4", "--parts", "geometry", "probes")
    assert "--parts probes cannot be asked on gym/Pendulum-v1" in error
    assert "surprise, open-loop, geometry" in error
    small = ["--episodes", "4", "--longest", "30", "--clips", "3", "--policy", "random"]
    folder, figures, page = asked(capsys, run_dir, *small)
    assert folder == run_dir / "diagnosis"
    assert "probes" not in figures
    assert "What the latent knows (probes) is left out: PendulumEnv has no MuJoCo simulation" in page
    assert "(effects) is left out" in page
    assert figures["surprise"]["auroc"].keys() == {"freeze", "skip"}
    assert figures["surprise"]["left_out"].keys() == {"teleport", "colour", "gravity"}


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--episodes", 0), ("--horizon", 0), ("--clips", 0), ("--starts", 0), ("--longest", 0), ("--random-actions", 2)],
)
def test_impossible_numbers(flag: str, value: int, finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{flag} is {value}" in refused(capsys, finished.path, flag, str(value))


def test_horizon_beyond_the_episodes(finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    long = ["--episodes", "4", "--parts", "open-loop", "--horizon", "40", "--out", str(out)]
    error = refused(capsys, finished.path, *long)
    assert "takes episodes of 43 rows, and the longest one here has 21" in error
    assert not out.exists()


def test_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run" in refused(capsys, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_run_without_a_world_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run(config(tmp_path / "run", COUNTING, agent="random"), quiet=True) as run:
        run.save()
    assert "no world model" in refused(capsys, tmp_path / "run")

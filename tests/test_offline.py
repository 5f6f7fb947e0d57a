"""Recorded data: collected, imported, put back into a simulator, and a world model pretrained on them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from envs import EnvConfig, NoPhysics, VectorEnv, make_env
from envs.physics import physical_names, physical_state, set_physical_state
from runners import collect, pretrain
from runners.behaviour import MixtureAgent
from runners.config import ConfigError, read_config
from runners.config import parse_args as train_args
from runners.dataset import Dataset, Windows
from runners.dataset_folder import About, DatasetError, Episode, write_dataset
from runners.evaluate import main as evaluate
from runners.replay import ReplayError
from runners.run import Run
from runners.train import StopOnSignal, start_learning
from runners.transfer import take_world_model
from tests.loop_helpers import COUNTING, SMALL_AGENT, TINY, config, differing, newest_state, rows
from worldmodels.lewm import build_world_model

COUNT = "gym/tests.envs_helpers:Counting-v0"
RECORD = ["--task", "dmc/reacher-easy", "--env.size", "32", "--env.time-limit", "40", "--episodes", "4", "--seed", "5"]
"""Four episodes of eleven rows: a minute's wait in a second."""
MODEL = {name: value for name, value in SMALL_AGENT.items() if name.startswith("model.")}


def flags(settings: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def learn(data: Path, run_dir: Path, *more: str) -> list[str]:
    """The command line of a tiny pretraining."""
    small = MODEL | {"updates": 6, "batch": 4, "length": 6, "log-every": 3, "checkpoint-every": 2, "threads": 1}
    return ["--data", str(data), "--run-dir", str(run_dir), "--device", "cpu", *flags(small), *more]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of reacher, whose target lies elsewhere in each episode. Copy it before spoiling it."""
    out = tmp_path_factory.mktemp("recorded") / "reacher"
    assert collect.main([*RECORD, "--policy", "mixture", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def pretrained(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("pretrained") / "run"
    assert pretrain.main(learn(recorded, run_dir)) == 0
    return run_dir


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    error = capsys.readouterr().err
    assert code == 1
    assert error.splitlines()[-1].startswith("error: ") or error.startswith("error: ")
    assert "Traceback" not in error
    return error


# -- the physical state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["dmc/ball_in_cup-catch", "mujoco/Hopper-v5"])
def test_a_state_that_is_set_is_what_is_read_and_drawn(task: str) -> None:
    env = make_env(task, EnvConfig(size=16, action_repeat=2))
    env.reset(seed=0)
    action = np.full(env.action_space.shape or (), 0.7, np.float32)
    for _ in range(3):
        env.step(action)
    state = physical_state(env)
    assert len(physical_names(env)) == len(state)
    set_physical_state(env, state)
    picture = env.render()
    for _ in range(3):
        env.step(-action)
    assert not np.array_equal(env.render(), picture)
    set_physical_state(env, state)
    assert np.array_equal(physical_state(env), state)
    assert np.array_equal(env.render(), picture)
    with pytest.raises(ValueError, match="numbers, got the shape"):
        set_physical_state(env, state[:-1])
    env.close()


def test_parts_of_the_state_have_names() -> None:
    env = make_env("dmc/reacher-easy", EnvConfig(size=16))
    assert physical_names(env) == ["qpos/shoulder", "qpos/wrist", "qvel/shoulder", "qvel/wrist"]
    env.close()


def test_a_task_without_mujoco_has_no_physical_state() -> None:
    with pytest.raises(NoPhysics, match="dmc/, mujoco/ and OGBench"):
        make_env(COUNT, EnvConfig(physics=True))


# -- collecting --------------------------------------------------------------------------------------------------------


def test_a_recorded_row_can_be_put_back_into_the_simulator(recorded: Path) -> None:
    """The pictures of the rows come back from their physical states, the target that each episode drew included."""
    data = Dataset(recorded)
    assert data.about is not None
    assert data.about.env is not None
    assert data.physics is not None
    assert data.physics.dtype == np.float64
    assert data.about.physics == ["qpos/shoulder", "qpos/wrist", "qvel/shoulder", "qvel/wrist"]
    env = make_env("dmc/reacher-easy", data.about.env)
    obs = np.concatenate([episode["obs"] for episode in data.replay.episodes()])
    assert len(obs) == len(data.physics) == 44
    for row in (0, 10, 11, 27, 43):
        data.restore(env, row)
        assert np.array_equal(env.render().transpose(2, 0, 1), obs[row])
    with pytest.raises(IndexError):
        data.restore(env, 44)
    env.close()


def test_what_is_said_of_the_episodes(recorded: Path) -> None:
    data = Dataset(recorded)
    about = json.loads((recorded / "dataset.json").read_text())
    assert (about["task"], about["policy"], about["seed"]) == ("dmc/reacher-easy", "mixture", 5)
    assert about["episodes"] == 4
    assert about["lengths"] == [11] * 4
    assert about["returns"] == pytest.approx([e["reward"].sum() for e in data.replay.episodes()])
    assert [n for _, n in about["starts"]] == [0, 1, 2, 3]


def test_same_command_same_data_and_never_over_other_data(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*RECORD, "--policy", "mixture", "--out", str(tmp_path / "again")]
    assert collect.main(command) == 0
    assert "next: python -m runners.pretrain" in capsys.readouterr().out.splitlines()[-1]
    for name in ("obs", "action", "reward", "physics"):
        assert (tmp_path / "again" / f"{name}.npy").read_bytes() == (recorded / f"{name}.npy").read_bytes()
    assert "exists; choose another --out" in refused(capsys, collect.main(command))


def test_environments_side_by_side_keep_the_timeline() -> None:
    """The observation is the step number, the reward twice the action; each environment plays its share."""
    envs = VectorEnv(COUNT, EnvConfig(obs="state"), 2, 3, processes=False)
    with StopOnSignal() as stop:
        episodes = list(collect.play(envs, MixtureAgent(1, 0), 5, stop))
    envs.close()
    assert len(episodes) == 5
    assert len({episode.start for episode in episodes}) == 5
    for episode in episodes:
        assert episode.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
        assert episode.reward == pytest.approx(2 * episode.action[:, 0], abs=1e-6)
    assert {episode.terminated for episode in episodes} == {False, True}


def test_mixture_varies_in_persistence() -> None:
    """Actions stay in [-1, 1]; habits differ between episodes from white noise to long waves."""
    agent, first = MixtureAgent(2, 1), np.array([True] * 40)
    carry, actions = agent.initial(40), []
    for t in range(200):
        action, carry = agent.act(np.zeros((40, 1)), first & (t == 0), carry, explore=True)
        actions.append(action)
    track = np.stack(actions)  # (T, E, A)
    assert np.abs(track).max() <= 1
    assert np.abs(track.mean((0, 1))).max() < 0.1
    following = [np.corrcoef(track[:-1, e, 0], track[1:, e, 0])[0, 1] for e in range(40)]
    assert min(following) < 0.2
    assert max(following) > 0.9


def test_a_run_collects_with_its_own_task(pretrained: Path, tmp_path: Path) -> None:
    out = tmp_path / "played"
    assert collect.main(["--policy", str(pretrained), "--episodes", "1", "--out", str(out)]) == 0
    data = Dataset(out)
    assert data.about is not None
    assert data.about.task == "dmc/reacher-easy"
    assert data.about.lengths == [11]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--task is missing"),
        (["--task", "dmc/reacher-easy", "--episodes", "0"], "--episodes is 0"),
        (["--task", "dmc/racher-easy"], "The closest: dmc/reacher-easy"),
        (["--policy", "runs/nowhere"], "or a run's folder"),
        (["--policy", "mixtur"], "The closest: mixture"),
        (["--policy", "tests", "--task", "dmc/reacher-easy"], "not a run"),
        (["--policy", "scripted", "--task", "dmc/reacher-easy"], "OGBench's manipulation tasks only"),
        (["--env.camera", "9", "--task", "dmc/reacher-easy"], "cameras -1 (free) to 1"),
        (["--from-hdf5", "nowhere.h5"], "cannot be read as HDF5"),
        (["--from-hdf5", "a.h5", "--from-minari", "b/c-v0"], "one at a time"),
    ],
)
def test_a_command_that_cannot_be(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "nowhere.h5" in args:
        pytest.importorskip("h5py")
    assert message in refused(capsys, collect.main([*args, "--out", str(tmp_path / "out")]))
    assert not list(tmp_path.iterdir())


# -- reading -----------------------------------------------------------------------------------------------------------


def counted(episodes: int, length: int, start: int = 0) -> list[Episode]:
    """Episodes whose observation is (episode, step)."""
    step = np.arange(length, dtype=np.float32)
    return [
        Episode(
            np.stack([np.full(length, e, np.float32), step], 1),
            np.full((length - 1, 1), 0.5),
            np.ones(length - 1),
            False,
        )
        for e in range(start, start + episodes)
    ]


def test_windows_stay_within_the_chosen_episodes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [*counted(3, 5), *counted(2, 3, start=3), *counted(3, 9, start=5)], About("toy"))
    data = Dataset(tmp_path / "data")
    train, held_out = data.split(0.25, seed=1)
    assert sorted([*train, *held_out]) == list(range(8))
    assert len(held_out) == 2
    windows = Windows(data, np.array([1, 3, 6]), 4)  # of lengths 5, 3 and 9: 2 + 0 + 6 windows
    assert len(windows) == 8
    obs = windows.sample(400, np.random.default_rng(0)).obs.numpy()
    assert (obs[:, :, 0] == obs[:, :1, 0]).all()
    assert (np.diff(obs[:, :, 1]) == 1).all()
    seen, counts = np.unique(obs[:, 0], axis=0, return_counts=True)
    assert seen.tolist() == [[1, 0], [1, 1], *([6, n] for n in range(6))]
    assert counts.min() > 25  # of 50 on average
    with pytest.raises(DatasetError, match="too few"):
        Windows(data, np.array([3]), 4)


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        (counted(1, 4)[0]._replace(action=np.full((4, 1), 0.5)), "4 observations, 4 actions"),
        (counted(1, 4)[0]._replace(action=np.full((3, 1), 1.5)), r"must lie in \[-1, 1\]"),
        (counted(1, 4)[0]._replace(reward=np.full(3, np.nan)), "NaN or inf among its rewards"),
        (counted(1, 4)[0]._replace(obs=np.zeros((4, 3), np.float32)), "but that of the first"),
    ],
)
def test_an_episode_that_breaks_the_timeline_is_refused(episode: Episode, message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        write_dataset(tmp_path / "data", [*counted(1, 4), episode], About("toy"))
    assert not list(tmp_path.iterdir())


def test_empty_and_damaged_datasets_are_refused(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no complete episode"):
        write_dataset(tmp_path / "empty", [], About("toy"))
    with pytest.raises(DatasetError, match="there is no dataset"):
        Dataset(tmp_path / "empty")
    for name, message in [("obs.npy", "obs.npy cannot be read"), ("physics.npy", "physics.npy"), ("dataset.json", "")]:
        spoilt = shutil.copytree(recorded, tmp_path / name)
        os.truncate(spoilt / name, (spoilt / name).stat().st_size // 2)
        with pytest.raises(ReplayError, match=f"damaged.*{message}"):
            Dataset(spoilt)


# -- importing ---------------------------------------------------------------------------------------------------------


def write_hdf5(path: Path, *, cut: int = 0, **more: np.ndarray) -> None:
    """A file as stable-worldmodel's HDF5Writer lays it out: two episodes of 4 and 3 rows, the last action unknown."""
    h5py = pytest.importorskip("h5py")
    action = np.array([[1.0], [2.0], [-4.0], [np.nan], [3.0], [4.0], [np.nan]], np.float32)
    pixels = (np.arange(7 * 16 * 16 * 3) % 251).reshape(7, 16, 16, 3).astype(np.uint8)
    with h5py.File(path, "w", libver="latest") as file:
        columns = {"pixels": pixels[: 7 - cut], "action": action, "ep_len": [4, 3], "ep_offset": [0, 4]} | more
        for name, values in columns.items():
            file.create_dataset(name, data=np.asarray(values))


def test_hdf5_of_stable_worldmodel(tmp_path: Path) -> None:
    file, out = tmp_path / "swm.h5", tmp_path / "data"
    reward = np.array([np.nan, 1, 2, 3, np.nan, 5, 6], np.float32)
    write_hdf5(file, reward=reward, terminated=np.array([0, 0, 0, 1, 0, 0, 0], bool))
    assert collect.main(["--from-hdf5", str(file), "--resize", "8", "--out", str(out)]) == 0
    data = Dataset(out)
    first, second = data.replay.episodes()
    assert first["action"][:, 0].tolist() == [0.25, 0.5, -1, 0]  # divided by 4, the largest
    assert second["action"][:, 0].tolist() == [0.75, 1, 0]
    assert first["reward"].tolist() == [0, 1, 2, 3]
    assert (first["is_terminal"][-1], second["is_terminal"][-1]) == (True, False)
    whole = (np.arange(7 * 16 * 16 * 3) % 251).reshape(7, 16, 16, 3)
    mean = whole[4].reshape(8, 2, 8, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(second["obs"][0] - mean).max() <= 1
    assert data.about is not None
    assert data.about.action_scale == [4.0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"cut": 2}, "truncated"),
        ({"ep_len": [], "ep_offset": []}, "no episode"),
        ({"action": np.full((7, 1), np.nan)}, "NaN or inf among its actions"),
    ],
)
def test_hdf5_that_cannot_be_imported(
    more: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hdf5(tmp_path / "swm.h5", **more)
    command = ["--from-hdf5", str(tmp_path / "swm.h5"), "--out", str(tmp_path / "data")]
    assert message in refused(capsys, collect.main(command))
    command += ["--column", "state"]
    if "cut" in more:
        assert "pixels" in refused(capsys, collect.main(command))  # what there is
    assert not (tmp_path / "data").exists()


def test_minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two episodes of Gymnasium's InvertedPendulum, whose actions lie in [-3, 3], as Minari itself stores them."""
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    obs = np.arange(2 * 4 * 4, dtype=np.float64).reshape(2, 4, 4)
    episodes = [
        minari.data_collector.EpisodeBuffer(
            id=i,
            observations=list(obs[i]),
            actions=[np.array([value], np.float32) for value in (3.0, -3.0, 1.5)],
            rewards=[1.0, 2.0, 3.0],
            terminations=[False, False, i == 1],
            truncations=[False, False, i == 0],
            infos={},
        )
        for i in range(2)
    ]
    minari.create_dataset_from_buffers("toy/pendulum-v0", episodes, env="InvertedPendulum-v5")
    assert collect.main(["--from-minari", "toy/pendulum-v0", "--out", str(tmp_path / "data")]) == 0
    data = Dataset(tmp_path / "data")
    assert data.about is not None
    assert data.about.task == "mujoco/InvertedPendulum-v5"
    first, second = data.replay.episodes()
    assert first["action"][:, 0].tolist() == [1, -1, 0.5, 0]
    assert np.array_equal(first["obs"], obs[0])
    assert np.array_equal(second["obs"], obs[1])
    assert first["reward"].tolist() == [0, 1, 2, 3]
    assert (first["is_terminal"][-1], second["is_terminal"][-1]) == (False, True)


# -- pretraining -------------------------------------------------------------------------------------------------------


def test_a_pretraining_is_a_run(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its configuration, its log and its checkpoint are what the other programs read."""
    assert read_config(pretrained).task == "dmc/reacher-easy"
    log = rows(pretrained / "metrics.jsonl")
    assert [row["updates"] for row in log] == [0, 3, 6]
    for row in log:
        assert {"validation/pred_loss", "validation/sigreg_loss", "monitor/effective_rank"} <= row.keys()
        assert {"open_loop/error_1", "open_loop/copy_last_1", "open_loop/error_8"} <= row.keys()
        assert not {"train/reward_loss", "train/cont_loss"} & row.keys()
    assert {"train/pred_loss", "train/sigreg_loss", "train/loss"} <= log[1].keys()
    assert list((pretrained / "tensorboard").iterdir())
    capsys.readouterr()
    assert evaluate(["--run-dir", str(pretrained), "--episodes", "1", "--device", "cpu", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["env_steps"] == 0


def test_only_the_model_learns(pretrained: Path, recorded: Path, tmp_path: Path) -> None:
    with pretrain.Pretraining(pretrain.parse_args(learn(recorded, tmp_path / "run")), quiet=True) as run:
        before = run.agent.state_dict()
        before = {name: {k: v.clone() for k, v in before[name].items()} for name in ("model", "policy", "critic")}
        assert run.model.normaliser.fitted  # type: ignore[union-attr]
    after = newest_state(pretrained)["agent"]
    assert differing(after["policy"], before["policy"]) == differing(after["critic"], before["critic"]) == []
    old, new = before["model"], after["model"]
    assert {name.split(".")[0] for name in new if not torch.equal(new[name], old[name])} == {"encoder", "predictor"}


def test_a_stopped_pretraining_goes_on(
    recorded: Path,
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM after three updates; the same command then ends with the same weights as without a stop."""
    command, real = learn(recorded, tmp_path / "run"), pretrain.Pretraining.update

    def update(self: pretrain.Pretraining) -> dict[str, torch.Tensor]:
        if self.updates == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "update", update)
        assert pretrain.main(command) == 130
    assert newest_state(tmp_path / "run")["updates"] == 3
    assert "other settings:\n  lr: 0.001 → 0.5" in refused(capsys, pretrain.main([*command, "--lr", "0.5"]))
    assert pretrain.main(command) == 0
    assert "resuming" in capsys.readouterr().out
    assert differing(newest_state(tmp_path / "run"), newest_state(pretrained)) == []
    assert [row["updates"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [0, 3, 6]


def test_prediction_beats_copying(tmp_path: Path) -> None:
    """On states of cartpole: predicted better than at first and than by the last latent, and not collapsed."""
    data = tmp_path / "data"
    state = ["--env.obs", "state", "--env.time-limit", "60", "--env.action-repeat", "2"]
    assert collect.main(["--task", "dmc/cartpole-swingup", *state, "--episodes", "20", "--out", str(data)]) == 0
    small = [
        "--model.latent-dim",
        "8",
        "--model.sigreg-directions",
        "32",
        "--model.conv.hidden",
        "64",
        "--threads",
        "1",
    ]
    settings = [
        "--updates",
        "100",
        "--batch",
        "16",
        "--length",
        "6",
        "--model.rollout",
        "2",
        "--lr",
        "3e-3",
        "--device",
        "cpu",
    ]
    command = ["--data", str(data), "--run-dir", str(tmp_path / "run"), *small, *settings]
    measured = pretrain.pretrain(pretrain.parse_args(command), quiet=True)
    assert measured is not None
    at_first = rows(tmp_path / "run" / "metrics.jsonl")[0]
    assert measured["open_loop/error_1"] < 0.3 * at_first["open_loop/error_1"]
    assert measured["open_loop/error_1"] < 0.5 * measured["open_loop/copy_last_1"]
    assert measured["open_loop/error_8"] < 0.5 * measured["open_loop/copy_last_8"]
    assert measured["monitor/effective_rank"] > 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "papr"], "The closest: paper"),
        (["--length", "12"], "lower --length"),
        (["--updates", "0"], "--updates is 0"),
        (["--model.encoder", "vit"], "cannot be cut into"),
        (["--data", "nowhere"], "there is no dataset in nowhere"),
    ],
)
def test_a_pretraining_that_cannot_be(
    more: list[str], message: str, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, pretrain.main(learn(recorded, tmp_path / "run", *more)))
    assert not (tmp_path / "run").exists()


# -- starting with a pretrained model ----------------------------------------------------------------------------------


def test_a_pretraining_has_the_sizes_of_a_training_on_a_processor() -> None:
    """So that --init-from needs no --model flag, as in the README."""
    alone = pretrain.parse_args(["--data", "data", "--run-dir", "runs/alone"]).model
    online = train_args(["--preset", "cpu"]).model
    assert dataclasses.replace(alone, reward_weight=online.reward_weight, cont_weight=online.cont_weight) == online


def test_training_starts_with_the_pretrained_model(pretrained: Path, tmp_path: Path) -> None:
    """Its weights, and its normaliser even after the prefill, from which one would be fitted otherwise."""
    changes = {"task": "dmc/reacher-easy", "env__time_limit": 40, "loop__eval_episodes": 1, "seed": 9}
    learned = dict(newest_state(pretrained)["agent"]["model"])
    with Run(config(tmp_path / "run", TINY, init_from=pretrained, **changes), quiet=True) as run:
        for _ in range(12):
            run.collector.step(run.prefiller)
        start_learning(run)
        assert run.learning
        assert differing(dict(run.agent.state_dict()["model"]), learned) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__latent_dim": 12}, "of another size or kind"),
        ({"env__render": "canonical"}, "env.render: fast there, canonical here"),
        ({"env__size": 64}, "env.size: 32 there, 64 here"),
        ({"env__action_repeat": 2}, "action repeat: 4 there, 2 here"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, pretrained: Path) -> None:
    wanted = config(Path("unused"), TINY, task="dmc/reacher-easy", **changes)
    model = build_world_model((3, wanted.env.size, wanted.env.size), 2, wanted.model)
    with pytest.raises(ConfigError, match=message):
        take_world_model(model, wanted, pretrained)


def test_heads_of_another_size_stay_fresh(pretrained: Path) -> None:
    wanted = config(Path("unused"), TINY, task="dmc/reacher-easy", model__head_units=24)
    model = build_world_model((3, 32, 32), 2, wanted.model)
    take_world_model(model, wanted, pretrained)
    learned = newest_state(pretrained)["agent"]["model"]
    assert torch.equal(model.state_dict()["encoder.stem.weight"], learned["encoder.stem.weight"])


def test_a_run_that_cannot_start_so_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the random agent does not have"):
        Run(config(tmp_path / "run", COUNTING, agent="random", init_from=tmp_path), quiet=True)
    with pytest.raises(ConfigError, match="is not a run"):
        Run(config(tmp_path / "run", COUNTING, init_from=tmp_path), quiet=True)
    assert not (tmp_path / "run").exists()

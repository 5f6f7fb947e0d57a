"""The agents behind Stable-Baselines3's API: its tools work on them, and there is no second trainer behind it."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize, VecVideoRecorder

from envs import EnvConfig, UnknownTask, UnsupportedActionSpace, make_env
from runners import MPC, Dreamer
from runners.checkpoint import CheckpointError
from runners.config import ConfigError
from runners.logger import write_video
from runners.replay import Replay, ReplayError
from runners.train import train
from runners.vecenv import VecEnvCollector
from tests.envs_helpers import LENGTH, Counting, Moody
from tests.loop_helpers import TINY, config, differing, newest_state

TASK = "dmc/cartpole-swingup"
STATE = EnvConfig(obs="state", time_limit=80)
"""Episodes of 10 agent steps."""

SMALL: dict[str, Any] = {name: value for name, value in TINY.items() if name not in ("task", "env-steps")} | {
    "env.obs": "state",
    "env.time-limit": 80,
    "loop.prefill": 80,
    "loop.train-ratio": 8,
}
COUNTED = SMALL | {"env.time-limit": None, "loop.prefill": 10}


def small(env: Any = TASK, **changes: Any) -> Dreamer:
    """Ten agent steps of prefill, then an update every fourth."""
    return Dreamer(env, preset="cpu", **SMALL | changes)


def cartpole(**changes: Any) -> gym.Env:
    return Monitor(make_env(TASK, dataclasses.replace(STATE, **changes)))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned for 30 agent steps, saved."""
    path = tmp_path_factory.mktemp("learned") / "model.zip"
    small().learn(30).save(path)
    return path


# -- one trainer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_envs", "agent"), [(1, "dreamer"), (2, "dreamer"), (1, "mpc")])
def test_learning_is_that_of_runners_train_bit_for_bit(num_envs: int, agent: str, tmp_path: Path) -> None:
    """The same weights, optimisers and random states, from the same rows: evaluations, checkpoints and processes on one
    side, none of them on the other."""
    steps = 40 * num_envs
    settings = SMALL | {
        "mpc.horizon": 2,
        "mpc.mppi.iterations": 2,
        "num-envs": num_envs,
        "loop.prefill": 80 * num_envs,
        "loop.eval-episodes": 1,
    }
    whole = config(tmp_path / "run", settings, task=TASK, agent=agent, env_steps=8 * steps)
    assert train(whole, quiet=True) is not None
    model = {"dreamer": Dreamer, "mpc": MPC}[agent](f"{TASK}-v0", **settings).learn(steps)
    trained = newest_state(tmp_path / "run")
    assert trained["updates"] == model.updates > 4
    state = model.agent.state_dict()
    for name in ("model", "policy", "average_policy", "critic", "scale"):
        assert differing(dict(trained["agent"][name]), dict(state[name])) == []
    assert differing(trained["agent"]["optimisers"], state["optimisers"]) == []
    assert differing(trained["generator"], model.generator.bit_generator.state) == []
    with Replay.open(tmp_path / "run" / "replay") as replay:
        for stream in range(num_envs):
            span = (np.array([stream]), np.array([0]), replay.rows_per_stream)
            assert differing(replay.take(*span)._asdict(), model.replay.take(*span)._asdict()) == []


# -- its tools ---------------------------------------------------------------------------------------------------------


def test_evaluation_checkpoints_and_a_threshold(tmp_path: Path) -> None:
    """EvalCallback, CheckpointCallback and StopTrainingOnRewardThreshold, unchanged, without a warning."""
    threshold = StopTrainingOnRewardThreshold(-1.0)  # rewards are not negative: the first evaluation is good enough
    evaluation = EvalCallback(
        cartpole(),
        callback_on_new_best=threshold,
        n_eval_episodes=2,
        eval_freq=15,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    checkpoint = CheckpointCallback(10, str(tmp_path / "saved"), name_prefix="walker")
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert model.learn(40, callback=[evaluation, checkpoint], progress_bar=True) is model
    assert model.num_timesteps == 15  # told to stop
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["walker_10_steps.zip"]
    found = np.load(tmp_path / "evaluations.npz")
    assert found["timesteps"].tolist() == [15]
    assert found["ep_lengths"].tolist() == [[10, 10]]
    best = Dreamer.load(tmp_path / "best_model.zip")
    assert best.num_timesteps == 15
    assert evaluate_policy(best, cartpole(), 2)[0] == pytest.approx(evaluation.best_mean_reward, abs=10)


def test_evaluate_policy_plays_what_the_deterministic_agent_plays(learned: Path) -> None:
    """Four episodes in two environments at once, and the same four by hand."""
    model = Dreamer.load(learned)
    env = VecMonitor(DummyVecEnv([lambda: make_env(TASK, STATE)] * 2))
    returns, lengths = evaluate_policy(model, env, 4, return_episode_rewards=True)
    assert lengths == [10] * 4
    by_hand = []
    one = make_env(TASK, STATE)
    for _ in range(2):
        (obs, _), carry, over, total = one.reset(), model.agent.initial(1), False, 0.0
        is_first = True
        while not over:
            action, carry = model.agent.act(obs[None], np.array([is_first]), carry, explore=False)
            obs, reward, _, over, _ = one.step(action[0])
            total, is_first = total + reward, False
        by_hand.append(total)
    assert returns[::2] == pytest.approx(by_hand, rel=1e-4)  # rewards pass as float32


def test_a_function_a_list_and_a_callback_that_counts_episodes() -> None:
    seen: list[tuple[int, int]] = []
    model = small()

    def see(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        seen.append((model.num_timesteps, len(locals_["infos"])))
        return True

    with pytest.warns(UserWarning, match="nothing was learned yet: 40 of loop.prefill=80 env_steps"):
        model.learn(5, callback=see)
    assert seen == [(n, 1) for n in range(1, 6)]
    model.learn(500, callback=CallbackList([StopTrainingOnMaxEpisodes(2)]))
    assert model.num_timesteps == 20


class ImageSequenceClip:
    """As much of moviepy's as VecVideoRecorder needs: moviepy 2.2 cannot be installed beside Pillow 12 or later."""

    def __init__(self, frames: list[np.ndarray], fps: float) -> None:
        self.frames, self.fps = frames, fps

    def write_videofile(self, path: str) -> None:
        write_video(Path(path), np.stack(self.frames), fps=self.fps)


@pytest.fixture
def moviepy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one where it is installed."""
    if importlib.util.find_spec("moviepy") is None:
        for name in ("moviepy", "moviepy.video", "moviepy.video.io", "moviepy.video.io.ImageSequenceClip"):
            module = types.ModuleType(name)
            module.ImageSequenceClip = ImageSequenceClip  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("moviepy")
def test_videos_of_pixels(tmp_path: Path) -> None:
    """VecVideoRecorder around the training environment, images, updates."""
    env = make_env(TASK, EnvConfig(size=32, time_limit=160))
    recorded = VecVideoRecorder(VecMonitor(DummyVecEnv([lambda: env])), str(tmp_path), lambda step: step == 0, 12)
    model = small(recorded, **{"loop.prefill": 160}).learn(22)
    assert model.updates >= 4
    assert [info["l"] for info in model.ep_info_buffer] == [20]
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]
    action, _ = model.predict(env.reset()[0])
    assert env.action_space.contains(action)


def test_its_logger_gets_the_metrics(tmp_path: Path) -> None:
    model = small(**{"loop.log-every": 80})
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(40, log_interval=1)
    model.logger.close()
    lines = (tmp_path / "progress.csv").read_text().splitlines()
    assert len(lines) == 5
    last = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    assert (last["time/total_timesteps"], last["rollout/ep_len_mean"]) == ("40", "10.0")
    assert float(last["time/env_steps"]) == 320  # eight simulator steps each
    assert float(last["train/pred_loss"]) > 0
    assert float(last["monitor/effective_rank"]) >= 1


# -- environments ------------------------------------------------------------------------------------------------------


def test_a_gymnasium_environment_and_images_with_channels_last(learned: Path) -> None:
    class Pictures(gym.ObservationWrapper):
        def __init__(self, env: gym.Env) -> None:
            super().__init__(env)
            self.observation_space = gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)

        def observation(self, observation: np.ndarray) -> np.ndarray:
            return observation.transpose(1, 2, 0)

    env = Pictures(gym.make("dmc/cartpole-swingup-v0", size=32, time_limit=80))
    model = small(env).learn(12)
    assert model.observation_space.shape == (3, 32, 32)
    image = env.reset(seed=0)[0]
    first, _ = model.predict(image, deterministic=True)
    second, _ = model.predict(image.transpose(2, 0, 1), deterministic=True)
    many, _ = model.predict(np.stack([image, image]), deterministic=True)
    assert first.shape == (1,)
    assert np.array_equal(first, second)
    assert many.shape == (2, 1)
    assert model.collector.env_steps == 12 * 8


def test_the_preset_follows_the_observations() -> None:
    assert Dreamer(TASK, device="cpu", **{"env.obs": "state"}).config.preset == "state"
    assert Dreamer(cartpole(), device="cpu").config.preset == "state"
    assert Dreamer(DummyVecEnv([cartpole, cartpole]), device="cpu").config.preset == "state"
    assert Dreamer(TASK, device="cpu").config.preset == "cpu"
    assert Dreamer(cartpole(obs="pixels"), device="cpu").config.preset == "cpu"


def test_actions_are_scaled_to_the_environments_box() -> None:
    """The counting environment takes actions from -2 to 2 and rewards with them."""
    model = Dreamer(Counting(), preset="cpu", **COUNTED)
    model.learn(10)
    everything = model.replay.take(np.array([0]), np.array([0]), 12)
    actions, rewards = everything.action[0, :, 0].numpy(), everything.reward[0].numpy()
    within = ~everything.is_first[0].numpy()[1:]
    assert rewards[1:][within] == pytest.approx(2 * actions[:-1][within])
    assert np.abs(rewards).max() > 1
    action, _ = model.predict(np.zeros(1))
    assert model.action_space.contains(action)


def test_rows_are_those_of_the_timeline_although_a_vec_env_resets_at_once() -> None:
    """Streams whose episodes end at different times: every last row is there, and no row is twice."""
    envs = DummyVecEnv([Moody, Moody, Moody])
    model = Dreamer(envs, preset="cpu", **COUNTED | {"loop.prefill": 60})
    model.learn(75)
    assert isinstance(model.collector, VecEnvCollector)
    ends = 0
    for stream in range(3):
        count = model.replay.rows_per_stream
        row = model.replay.take(np.array([stream]), np.array([0]), count)
        steps, lengths = row.obs[0, :, 0].numpy(), row.obs[0, :, 1].numpy()
        is_first, is_last = row.is_first[0].numpy(), row.is_last[0].numpy()
        assert is_first[0]
        assert np.array_equal(is_first[1:], is_last[:-1])
        assert np.array_equal(is_first, steps == 0)
        assert np.array_equal(is_last, steps == lengths)
        assert np.array_equal(row.is_terminal[0].numpy(), is_last)  # this environment terminates
        assert np.array_equal(steps[1:][~is_first[1:]], steps[:-1][~is_last[:-1]] + 1)
        assert np.array_equal(row.reward[0].numpy()[1:], np.where(is_first[1:], 0, row.action[0, :-1, 0].numpy()))
        ends += is_last.sum()
    assert ends > 9
    assert model.collector.agent_steps == model.num_timesteps == 75


def test_a_time_limit_truncates_and_a_terminal_row_is_kept_at_the_end_of_learning() -> None:
    model = Dreamer(Counting(), preset="cpu", **COUNTED)
    with pytest.warns(UserWarning, match="nothing was learned yet"):
        model.learn(LENGTH)
    for _ in range(5):
        model.learn(LENGTH)  # a reset precedes each
    row = model.replay.take(np.array([0]), np.array([0]), 6 * (LENGTH + 1))
    assert np.flatnonzero(row.is_last[0].numpy()).tolist() == list(range(LENGTH, 6 * (LENGTH + 1), LENGTH + 1))
    terminal = row.is_terminal[0].numpy()[LENGTH :: LENGTH + 1]
    assert 0 < terminal.sum() < 6  # the environment draws how an episode ends


def test_normalised_environments_work() -> None:
    env = VecNormalize(DummyVecEnv([cartpole]))
    model = small(env).learn(15)
    assert model.get_vec_normalize_env() is env
    assert model.get_env() is env


# -- acting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Dreamer, MPC])
def test_predict_along_an_episode_is_what_the_agent_does(kind: type[Dreamer], learned: Path) -> None:
    """The memory travels in ``state``; a start in the middle drops it for that environment alone."""
    model = kind.load(learned)
    generator = np.random.default_rng(0)
    state, carry = None, model.agent.initial(2)
    starts = np.zeros((6, 2), bool)
    starts[0] = True
    starts[4, 1] = True
    for start in starts:
        obs = generator.normal(size=(2, 5)).astype(np.float32)
        expected, carry = model.agent.act(obs, start, carry, explore=False)
        action, state = model.predict(obs, state, start, deterministic=True)
        assert np.array_equal(action, expected)
        assert all(isinstance(part, np.ndarray) for part in state)
    forgetful, _ = model.predict(obs, None, deterministic=True)
    assert not np.array_equal(action, forgetful)


def test_one_observation_gives_one_action_and_exploring_differs(learned: Path) -> None:
    model = Dreamer.load(learned)
    obs = np.zeros(5)
    action, state = model.predict(obs, deterministic=True)
    assert action.shape == (1,)
    again, _ = model.predict(obs, state, deterministic=True)
    assert again.shape == (1,)
    assert len({float(model.predict(obs)[0][0]) for _ in range(5)}) == 5


# -- saving ------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_goes_on(learned: Path, tmp_path: Path) -> None:
    """Weights, optimisers, counters; with the replay, two loaded models learn the same."""
    model = small(run_dir=tmp_path / "run").learn(30)
    assert (tmp_path / "run" / "replay" / "index.json").exists()
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "rows")
    results = []
    for _ in range(2):
        loaded = Dreamer.load(tmp_path / "model", env=TASK)
        assert differing(model.agent.state_dict(), loaded.agent.state_dict()) == []
        assert (loaded.num_timesteps, loaded.updates, loaded.learning) == (30, model.updates, True)
        loaded.load_replay_buffer(tmp_path / "rows")
        assert len(loaded.replay) == 33
        loaded.learn(20, reset_num_timesteps=False)
        assert loaded.num_timesteps == 50
        assert loaded.updates == model.updates + 5  # one for every fourth agent step
        results.append(loaded.agent.state_dict())
    assert differing(*results) == []
    assert differing(model.agent.state_dict()["model"], results[0]["model"]) != []


def test_loaded_without_its_rows_it_first_collects_with_its_own_policy(learned: Path) -> None:
    loaded = Dreamer.load(learned, env=cartpole(), **{"dreamer.random_actions": 0.0})
    before = loaded.updates
    loaded.learn(10)
    assert loaded.updates == before
    loaded.learn(10, reset_num_timesteps=False)
    assert loaded.num_timesteps == 20
    assert loaded.updates > before


def test_learning_twice_goes_on_or_counts_anew() -> None:
    model = small().learn(15)
    model.learn(10, reset_num_timesteps=False)
    assert model.num_timesteps == 25
    assert len(model.replay) == 27  # two episodes ended; the third went on
    model.learn(10)
    assert model.num_timesteps == 10
    assert model.collector.agent_steps == 35


def test_a_file_holds_nothing_that_could_run(learned: Path) -> None:
    with zipfile.ZipFile(learned) as file:
        names = file.namelist()
        assert all(name == "SHA256SUMS" or Path(name).suffix in {".json", ".safetensors"} for name in names)


def test_a_temporary_replay_goes_with_its_model() -> None:
    model = small(env=TASK)
    folder = model.replay.path
    assert folder.is_dir()
    del model
    assert not folder.exists()


# -- what it refuses ---------------------------------------------------------------------------------------------------


class Observing(gym.Env[Any, Any]):
    """Spaces alone."""

    def __init__(self, observations: gym.Space, actions: gym.Space | None = None) -> None:
        self.observation_space = observations
        self.action_space = actions or gym.spaces.Box(-1, 1, (1,), np.float32)


VECTOR = gym.spaces.Box(-1, 1, (5,), np.float32)


@pytest.mark.parametrize(
    ("env", "error", "says"),
    [
        (Observing(VECTOR, gym.spaces.Discrete(3)), UnsupportedActionSpace, r"Discrete\(3\).*discrete actions are not"),
        (DummyVecEnv([lambda: Counting(discrete=True)]), UnsupportedActionSpace, "discrete actions are not"),
        (Counting(unbounded=True), UnsupportedActionSpace, r"unbounded and cannot be scaled to \[-1, 1\]"),
        (Observing(gym.spaces.Dict({"a": VECTOR})), ConfigError, "reads images.* or vectors, not a Dict; choose"),
        (Observing(gym.spaces.Box(-1, 1, (2, 3))), ConfigError, r"not Box\(-1.0, 1.0, \(2, 3\), float32\); choose"),
        (Observing(gym.spaces.Box(0, 1, (3, 64, 64))), ConfigError, "uint8 from 0 to 255"),
        ("dmc/cartpole-swingupp-v0", UnknownTask, "The closest: dmc/cartpole-swingup"),
    ],
)
def test_an_environment_that_cannot_be_learned(env: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as raised:
        Dreamer(env, preset="cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dreamer.horizn": 8}, "there is no setting 'dreamer.horizn'. The closest: dreamer.horizon"),
        ({"horizon": 8}, "The closest: .*horizon"),
        ({"num_envs": "two"}, "num_envs is 'two', which is not of type"),
        ({"dreamer.horizon": 0}, "--dreamer.horizon is 0, but must be at least 1"),
        ({"env.size": 4}, "size must be 8 to 1024 pixels, not 4"),
        ({"preset": "cpuu"}, "there is no preset 'cpuu'. The closest: cpu"),
        ({"init_from": "runs/other"}, "init_from is for python -m runners.train only"),
    ],
)
def test_a_setting_that_does_not_exist_or_fit(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Dreamer(TASK, **{"preset": "cpu"} | settings)


@pytest.mark.parametrize("budget", [0, -5, float("nan")])
def test_no_budget(budget: float, learned: Path) -> None:
    with pytest.raises(ValueError, match="total_timesteps must be at least 1, not"):
        Dreamer.load(learned).learn(budget)


def test_no_environment(learned: Path) -> None:
    with pytest.raises(ConfigError, match="no environment to learn in: call set_env"):
        Dreamer.load(learned).learn(10)


def test_files_that_are_no_model(learned: Path, tmp_path: Path) -> None:
    SAC("MlpPolicy", cartpole(), buffer_size=10, policy_kwargs={"net_arch": [4]}).save(tmp_path / "sac.zip")
    content = learned.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    spot = content.index(b"model.safetensors") + 4000
    (tmp_path / "changed.zip").write_bytes(content[:spot] + bytes([content[spot] ^ 1]) + content[spot + 1 :])
    (tmp_path / "empty.zip").touch()
    for name, says in {
        "sac": "was not saved by this program",
        "cut": "is damaged",
        "changed": "is damaged",
        "empty": "is damaged",
        "missing": "there is no model",
    }.items():
        with pytest.raises(CheckpointError, match=rf"{name}(\.zip)?.*{says}|{says}.*{name}") as raised:
            Dreamer.load(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_a_model_of_another_task_or_size(learned: Path) -> None:
    message = "the model has learned dmc/cartpole-swingup, whose observations are float32 of shape .5,.; those of "
    with pytest.raises(ValueError, match=message + "dmc/walker-walk are float32 of shape .24,."):
        Dreamer.load(learned, env="dmc/walker-walk-v0")
    with pytest.raises(CheckpointError, match="is of another agent, task or size"):
        Dreamer.load(learned, **{"dreamer.policy.units": 17})
    model = Dreamer.load(learned, env=TASK)
    with pytest.raises(ValueError, match=message + "Counting are float64 of shape .1,."):
        model.set_env(Counting())
    with pytest.raises(ValueError, match="have other bounds than Observing's"):
        model.set_env(Observing(VECTOR))
    with pytest.raises(ValueError, match=r"learns in 1 environment\(s\), not in 2; .* give Dreamer.load the env"):
        model.set_env(DummyVecEnv([cartpole, cartpole]))
    model.set_env(cartpole())
    assert model.learn(5).num_timesteps == 5


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"observation": np.zeros(4)}, r"shape \(4,\) for Box environment, please use \(5,\) or \(n_env, 5\)"),
        ({"observation": {"a": np.zeros(5)}}, "is a dict, but this model reads an array of shape"),
        ({"observation": np.zeros((2, 5)), "state": (np.zeros(3),)}, "the state is not what predict returned for 2"),
        ({"observation": np.zeros((2, 5)), "episode_start": np.ones(3)}, r"episode_start has the shape \(3,\), but"),
    ],
)
def test_predicting_from_what_is_no_observation(given: dict[str, Any], says: str, learned: Path) -> None:
    model = Dreamer.load(learned)
    if "episode_start" in given:
        given["state"] = model.predict(given["observation"])[1]
    with pytest.raises(ValueError, match=says) as raised:
        model.predict(**given)
    assert "\n" not in str(raised.value)


def test_replays_that_do_not_fit(learned: Path, tmp_path: Path) -> None:
    model = Dreamer.load(learned, env=TASK)
    with pytest.raises(ReplayError, match="is not a replay"):
        model.load_replay_buffer(tmp_path)
    Dreamer(Counting(), preset="cpu", **COUNTED, run_dir=tmp_path).learn(10).replay.flush()
    with pytest.raises(ValueError, match=r"observation and action sizes \(1, \(1,\), 1\), but this model has"):
        model.load_replay_buffer(tmp_path / "replay")

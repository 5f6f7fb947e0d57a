"""OGBench's cubes: seeded scenes, pictures by our camera, and the physical state behind them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from envs import EnvConfig, UnsupportedSetting, make_env
from envs.physics import physical_names, physical_state, physical_units, set_physical_state, simulation
from runners.collect import CollectConfig, collect
from runners.dataset import Dataset
from runners.goals import Match, Tolerance

pytest.importorskip("ogbench", reason="needs the extra ogbench")

TASK = "gym/ogbench:visual-cube-single-v0"
CUBE = [f"qpos/object_joint_0[{i}]" for i in range(3)]
SMALL = EnvConfig(physics=True, size=32)


def test_a_seed_fixes_scene_and_pictures() -> None:
    """Other episodes are other scenes, and what NumPy's global generator gives has no part in it."""
    runs = []
    for seed in (0, 1):
        np.random.seed(seed)  # noqa: NPY002
        env = make_env(TASK, SMALL, seed=3)
        assert env.action_space.shape == (5,)
        actions = np.random.default_rng(0).uniform(-1, 1, (4, 5)).astype(np.float32)
        rows = [env.reset(seed=3)[0], *(env.step(action)[0] for action in actions), env.reset()[0]]
        runs.append([np.concatenate([row[key].ravel() for row in rows]) for key in ("observation", "physics")])
        states, names = [row["physics"] for row in rows], physical_names(env)
        env.close()
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)
    columns = [names.index(name) for name in CUBE]
    assert np.abs(states[0][columns] - states[-1][columns]).max() > 0.01
    assert np.abs(states[0] - states[4]).max() > 0.01


def test_a_moved_cube_is_seen_put_back_and_no_longer_at_its_goal() -> None:
    env = make_env(TASK, SMALL, seed=3)
    first = env.reset(seed=3)[0]
    goal = physical_state(env)
    names, units = physical_names(env), physical_units(env)
    match = Match(names, units, CUBE, Tolerance(length=0.04))
    moved = goal.copy()
    moved[names.index(CUBE[1])] += 0.05
    set_physical_state(env, moved)
    assert not match.reached(physical_state(env), goal)
    changed = np.abs(env.render().astype(int) - first["observation"].transpose(1, 2, 0)).max(-1) > 20
    assert 2 <= changed.sum() <= 60, "the cube's old and new places, of 1024 pixels"
    moved[names.index(CUBE[1])] -= 0.02
    assert match.reached(moved, goal)
    set_physical_state(env, goal)
    assert np.abs(env.render().astype(int) - first["observation"].transpose(1, 2, 0)).max() <= 2
    env.close()


def test_nothing_but_time_ends_an_episode() -> None:
    env = make_env(TASK, EnvConfig(size=16, time_limit=3), seed=0)
    assert env.metadata["render_fps"] == 20
    env.reset()
    endings = [env.step(np.zeros(5, np.float32))[2:4] for _ in range(3)]
    assert endings == [(False, False), (False, False), (False, True)]
    env.close()


def test_state_is_ogbenchs_and_both_is_refused() -> None:
    """And the picture is the same, whatever is observed: goals are looked at, not observed."""
    env = make_env(TASK, EnvConfig(size=32), seed=0)
    picture = env.reset()[0].transpose(1, 2, 0)
    env.close()
    env = make_env("gym/ogbench:cube-single-v0", EnvConfig(obs="state", size=32), seed=0)
    state, _ = env.reset()
    np.testing.assert_array_equal(env.render(), picture)
    _, data = simulation(env)
    np.testing.assert_allclose(state[:6], data.qpos[:6], rtol=1e-6)
    env.close()
    with pytest.raises(UnsupportedSetting, match="pixels or state, not both"):
        make_env(TASK, EnvConfig(obs="both"))


UNSEEN = EnvConfig(obs="state", physics=True)  # pictures of this arm take a processor 50 ms each


def test_the_script_moves_the_cube_whatever_it_is_told_and_its_actions_repeat_what_it_did() -> None:
    """Repeated from the same start, the recorded actions lead through the same states; so does the script itself,
    whatever NumPy's global generator gives."""
    scripted = make_env(TASK, replace(UNSEEN, scripted=True), seed=3)
    names = physical_names(scripted)
    place = [names.index(name) for name in CUBE]
    runs = []
    for seed in (0, 1):
        np.random.seed(seed)  # noqa: NPY002
        rows = [scripted.reset(seed=3)[0]]
        rows += [scripted.step(np.full(5, seed, np.float32))[0] for _ in range(60)]
        runs.append(rows)
        assert np.random.get_state()[2] == 624, "the global generator stands where it stood"  # noqa: NPY002
    scripted.close()
    for one, other in zip(*runs, strict=True):
        np.testing.assert_array_equal(one["physics"], other["physics"])
        np.testing.assert_array_equal(one["action"], other["action"])
    np.testing.assert_array_equal(runs[0][0]["action"], np.zeros(5))
    states = np.stack([row["physics"] for row in runs[0]])
    assert np.abs(states[:, place] - states[0, place]).max() > 0.05, "the cube was carried"

    env = make_env(TASK, UNSEEN, seed=3)
    env.reset(seed=3)
    repeated = [env.step(row["action"])[0]["physics"] for row in runs[0][1:]]
    env.close()
    np.testing.assert_array_equal(np.stack(repeated), states[1:])


def test_scripted_episodes_are_recorded_with_the_scripts_actions(tmp_path: Path) -> None:
    config = CollectConfig(
        out=str(tmp_path / "cubes"),
        task=TASK,
        policy="scripted",
        episodes=2,
        seed=5,
        env=EnvConfig(obs="state", time_limit=8, scripted=True),
    )
    collect(config, quiet=True)
    data = Dataset(tmp_path / "cubes")
    assert data.physics is not None
    assert data.about is not None
    assert data.about.starts is not None
    assert data.about.env == replace(config.env, scripted=False)
    env = make_env(TASK, replace(data.about.env, physics=True))
    for (seed, episode), (stream, first, length) in zip(data.about.starts, data.spans, strict=True):
        batch = data.replay.take(np.array([stream]), np.array([first]), length)
        rows = [env.reset(seed=seed, options={"episode": episode})[0]]
        rows += [env.step(action)[0] for action in batch.action[0, :-1].numpy()]
        np.testing.assert_array_equal(data.physics[first : first + length], [row["physics"] for row in rows])
        np.testing.assert_array_equal(batch.obs[0], [row["observation"] for row in rows])
    env.close()


def test_a_script_for_another_task_is_refused() -> None:
    with pytest.raises(UnsupportedSetting, match="OGBench's manipulation tasks only"):
        make_env("dmc/cartpole-swingup", EnvConfig(scripted=True))

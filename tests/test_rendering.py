"""Pictures: the two profiles, several environments in one process, and a machine without OpenGL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from dm_control import suite

import envs
from envs import EnvConfig, make_env
from envs.camera import average_blocks

pytestmark = pytest.mark.usefixtures("compiled_once")

ONE_PER_DOMAIN = [(domain, tasks[-1], 64) for domain, tasks in suite.TASKS_BY_DOMAIN.items()]
CAMERA = {"quadruped": 2, "fish": 3}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python with its own environment variables; an empty one is unset."""
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value}
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, check=False)


def pictures(env: gym.Env, steps: int = 4) -> list[np.ndarray]:
    """The pixels of a reset and of some steps."""
    frames = [env.reset(seed=0)[0]]
    action = 0.7 * np.ones_like(env.action_space.sample())
    return frames + [env.step(action)[0] for _ in range(steps)]


@pytest.mark.parametrize(
    ("domain", "task", "size"), [*ONE_PER_DOMAIN, ("quadruped", "escape", 64), ("walker", "walk", 100)]
)
def test_canonical_is_dm_controls_picture_pixel_for_pixel(domain: str, task: str, size: int) -> None:
    raw = suite.load(domain, task, task_kwargs={"random": np.random.RandomState(0)})  # lqr draws its model from it
    raw.task.random.seed(envs.episode_seed(0, 0))
    env = make_env(f"dmc/{domain}-{task}", EnvConfig(size=size, render="canonical", action_repeat=2))
    raw.reset()
    frame, _ = env.reset()
    for _ in range(3):
        expected = raw.physics.render(size, size, camera_id=CAMERA.get(domain, 0))
        np.testing.assert_array_equal(frame, expected.transpose(2, 0, 1))
        frame, *_ = env.step(np.full(env.action_space.shape, 0.7, np.float32))
        for _ in range(2):
            raw.step(env.unwrapped._env.physics.control())  # type: ignore[attr-defined]
    env.close()


@pytest.mark.parametrize(("name", "camera"), [("HalfCheetah-v5", "track"), ("InvertedDoublePendulum-v5", None)])
def test_canonical_is_gymnasiums_picture_on_its_own_tasks(name: str, camera: str | None) -> None:
    raw = gym.make(name, render_mode="rgb_array", width=64, height=64, camera_name=camera)
    env = make_env(f"mujoco/{name}", EnvConfig(render="canonical"))
    raw.reset(seed=envs.episode_seed(0, 0))
    action = 0.7 * raw.action_space.high  # type: ignore[attr-defined]
    for frame in pictures(env):
        renderer = raw.unwrapped.mujoco_renderer  # type: ignore[attr-defined]
        if renderer.viewer is not None:
            renderer.viewer.make_context_current()  # Gymnasium takes it for granted
        expected = raw.render()
        np.testing.assert_array_equal(frame, expected.transpose(2, 0, 1))  # type: ignore[union-attr]
        raw.step(action)
    env.close()
    raw.close()


@pytest.mark.parametrize("task", ["dmc/walker-walk", "dmc/cartpole-swingup", "mujoco/Hopper-v5"])
def test_fast_shows_the_same_scene_more_plainly(task: str) -> None:
    fast, canonical = (pictures(make_env(task, EnvConfig(render=profile)))[-1] for profile in ("fast", "canonical"))
    assert fast.shape == canonical.shape == (3, 64, 64)
    assert not np.array_equal(fast, canonical)
    assert np.abs(fast.astype(int) - canonical.astype(int)).mean() < 25
    assert np.corrcoef(fast.ravel(), canonical.ravel())[0, 1] > 0.7


def test_blocks_are_averaged_and_rounded() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2, 0] = [[255, 255], [255, 255]]
    image[:2, 2:, 0] = [[1, 0], [0, 1]]  # a mean of 0.5 rounds up
    image[2:, :2, 0] = [[1, 0], [0, 0]]
    image[2:, 2:, 2] = [[10, 20], [30, 41]]
    mean = average_blocks(image, 2)
    assert mean.dtype == np.uint8
    assert mean[..., 0].tolist() == [[255, 1], [0, 0]]
    assert mean[..., 2].tolist() == [[0, 0], [0, 25]]
    same = average_blocks(image, 1)
    assert np.array_equal(same, image)
    assert not np.shares_memory(same, image)


def test_fast_shows_what_is_thinner_than_a_pixel() -> None:
    """Cartpole's rail is half a pixel high at 64×64: drawn at that size it falls between two rows."""
    picture = pictures(make_env("dmc/cartpole-swingup", EnvConfig()))[0].astype(int)
    contrast = np.abs(np.diff(picture[2, 20:40, 8], axis=0))
    assert contrast.max() > 10


def test_cameras_differ() -> None:
    first, second = (pictures(make_env("dmc/walker-walk", EnvConfig(camera=camera)))[0] for camera in (0, 1))
    assert not np.array_equal(first, second)


def test_environments_alive_in_one_process_do_not_disturb_each_other() -> None:
    """Each alone, then alternating, with others opened and closed between: the pictures are the same, bit for bit."""
    chosen = [
        ("dmc/walker-walk", EnvConfig()),
        ("dmc/cartpole-swingup", EnvConfig(size=84, render="canonical")),
        ("mujoco/HalfCheetah-v5", EnvConfig()),
        ("dmc/quadruped-escape", EnvConfig(size=32)),
        ("mujoco/Hopper-v5", EnvConfig(render="canonical")),
        ("dmc/walker-walk", EnvConfig()),
    ]
    alone = []
    for task, config in chosen:
        env = make_env(task, config)
        alone.append(pictures(env))
        env.close()
    together = [make_env(task, config) for task, config in chosen]
    frames: list[list[np.ndarray]] = [[env.reset(seed=0)[0]] for env in together]
    for step in range(4):
        passing = make_env("dmc/fish-swim", EnvConfig(size=48))
        for env, seen in zip(together, frames, strict=True):
            seen.append(env.step(np.full(env.action_space.shape, 0.7, np.float32))[0])
            passing.reset()
            if step % 2:
                suite_physics = together[0].unwrapped._env.physics  # type: ignore[attr-defined]
                suite_physics.render(32, 32)  # dm_control's own way to draw, through the same context
        passing.close()
    for seen, expected in zip(frames, alone, strict=True):
        np.testing.assert_array_equal(seen, expected)
    for env in together:
        env.close()
        env.close()  # allowed


def test_the_backend_is_chosen_before_mujoco_is_imported() -> None:
    code = "import os, envs, mujoco; from dm_control import _render; print(os.environ['MUJOCO_GL'], _render.BACKEND)"
    chosen, used = run("-c", code, MUJOCO_GL="", PYOPENGL_PLATFORM="").stdout.split()
    assert chosen == used
    assert chosen in ("egl", "osmesa", "glfw")


def test_program_says_the_backend() -> None:
    answer = run("-m", "envs.rendering", "--gl", MUJOCO_GL="", PYOPENGL_PLATFORM="")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, os.environ["MUJOCO_GL"] + "\n", "")


def test_program_draws_and_says_how_fast() -> None:
    answer = run("-m", "envs.rendering")
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.splitlines()) == 1
    for word in (f"MUJOCO_GL={os.environ['MUJOCO_GL']}", "frames/s fast", "frames/s canonical"):
        assert word in answer.stdout


NO_EGL = {"__EGL_VENDOR_LIBRARY_FILENAMES": "/dev/null", "PYOPENGL_PLATFORM": ""}
"""The loader of EGL finds no driver, as on a machine that has none."""


def test_machine_without_a_driver_gets_one_line_that_says_what_to_do() -> None:
    answer = run("-m", "envs.rendering", MUJOCO_GL="egl", **NO_EGL)
    assert answer.returncode == 1
    assert len(answer.stderr.splitlines()) == 1
    assert "apt-get install libegl1 libgles2 libosmesa6" in answer.stderr


def test_machine_without_a_driver_can_still_simulate() -> None:
    code = (
        "from envs import *\n"
        "print(make_env('dmc/walker-walk', EnvConfig(obs='state')).reset()[0].shape)\n"
        "make_env('dmc/walker-walk')"
    )
    answer = run("-c", code, MUJOCO_GL="egl", **NO_EGL)
    assert answer.stdout == "(24,)\n"
    assert "NoOpenGL: No picture can be rendered: MUJOCO_GL=egl is set" in answer.stderr.splitlines()[-1]


TRITON = """
maps = open("/proc/self/maps").read()
assert "libEGL" not in maps and "libLLVM" not in maps, "Mesa came first"
print("triton was loaded")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is Linux's")
@pytest.mark.parametrize("broken", [False, True])
def test_triton_is_loaded_before_opengl(broken: bool, tmp_path: Path) -> None:
    """The other way round, the real one crashes the process. One that cannot be imported is nobody's trouble."""
    (tmp_path / "triton.py").write_text(TRITON + broken * "raise ImportError('built for another Python')")
    program = "import envs; print(envs.make_env('dmc/cartpole-swingup').reset()[0].shape)"
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["triton was loaded", "(3, 64, 64)"]


def test_a_process_forked_after_a_picture_says_so_and_one_that_was_spawned_draws() -> None:
    """Gymnasium's asynchronous vector draws in the parent, then forks. Mesa would then wait for ever."""
    code = (
        "import sys, gymnasium, envs\n"
        "if __name__ == '__main__':\n"
        "    made = gymnasium.make_vec('dmc/cartpole-swingup-v0', 2, 'async', vector_kwargs={'context': sys.argv[1]})\n"
        "    print(made.reset()[0].shape)\n"
        "    made.close()\n"
    )
    forked = run("-c", code, "fork", LP_NUM_THREADS="2")
    assert forked.returncode != 0
    assert "Start processes by spawn" in forked.stderr
    spawned = run("-c", code, "spawn")
    assert spawned.stdout.split("\n")[0] == "(2, 3, 64, 64)", spawned.stderr


def test_pictures_of_mujocos_own_renderer_between_ours_change_neither() -> None:
    env, size = make_env("mujoco/Hopper-v5"), 32
    model = env.unwrapped.model  # type: ignore[attr-defined]
    ours = env.reset(seed=0)[0]
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with mujoco.Renderer(model, size, size) as renderer:
        renderer.update_scene(data)
        theirs = renderer.render()
        assert np.array_equal(env.reset(seed=0, options={"episode": 0})[0], ours)
        other = make_env("dmc/cartpole-swingup")
        other.close()
    assert theirs.std() > 1
    assert np.array_equal(env.reset(seed=0, options={"episode": 0})[0], ours)
    env.close()

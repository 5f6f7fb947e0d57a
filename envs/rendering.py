"""Can this machine draw? ``python -m envs.rendering`` draws a frame, times both profiles, or says what to install.

``--gl`` prints the value of ``MUJOCO_GL`` that would be used and does nothing else. The exit status is 1 where no
picture can be drawn.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Literal

from envs import EnvConfig, NoOpenGL, choose_backend, make_env

_TASK = "dmc/cartpole-swingup"


def frames_per_second(
    task: str = _TASK, profile: Literal["fast", "canonical"] = "fast", size: int = 64, seconds: float = 1.0
) -> float:
    """Pictures per second of one environment, without its simulation.

    Raises:
        NoOpenGL: there is nothing to draw with.
    """
    env = make_env(task, EnvConfig(obs="state", size=size, render=profile))
    try:
        env.reset()
        frame = env.render()
        if frame.min() == frame.max():
            raise NoOpenGL(f"The picture of {task} is one flat colour, so this OpenGL draws nothing.")
        frames, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            env.render()
            frames += 1
        return frames / passed
    finally:
        env.close()


def main(arguments: list[str] | None = None) -> int:
    """The program. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m envs.rendering", description=__doc__.partition("\n")[0])
    parser.add_argument("--gl", action="store_true", help="print the chosen MUJOCO_GL only")
    chosen = choose_backend()
    if parser.parse_args(arguments).gl:
        print(chosen)
        return int(chosen == "disabled")
    try:
        speed = {profile: frames_per_second(profile=profile) for profile in ("fast", "canonical")}
    except NoOpenGL as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"MUJOCO_GL={chosen}: {_TASK} at 64x64 draws {speed['fast']:.0f} frames/s fast, "
        f"{speed['canonical']:.0f} frames/s canonical"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""All that can only be judged on a GPU, one after the other, as one command:

    python -m benchmarks.cuda --out cuda

Every stage writes into a folder of its own, with its output; one that fails does not stop the next.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro

from benchmarks.provenance import command_line, machine, now
from runners.config import ConfigError, resolve_device

Stage = Literal["same", "update", "loop", "walker", "dmc6"]


@dataclass(frozen=True)
class CudaConfig:
    """Check and time the CUDA loop, then train with it. Needs a GPU."""

    out: Path
    """Folder for the figures: summary.json, and a folder for each stage."""
    stages: tuple[Stage, ...] = get_args(Stage)
    """same: graphs and compiled updates against operator by operator. update: updates/s at the reference size, in each
    way. loop: collecting and learning at train_ratio 512. walker: walker-walk to the budget, timed. dmc6: its six tasks
    side by side."""
    env_steps: int = 100_000
    """Budget of each training."""
    jobs: int = 6
    """Trainings at once in dmc6."""


def commands(options: CudaConfig, stage: Stage) -> list[list[str]]:
    """The programs of a stage, with their arguments."""
    out, steps = options.out / stage, str(options.env_steps)
    speed = ["benchmarks.speed", "--preset", "cuda", "--task", "dmc/walker-walk", "--repeats", "5"]
    if stage == "same":
        return [["benchmarks.same_updates", "--device", "cuda"]]
    if stage == "update":
        ways = ("false", "graph", "true")
        size = ["--suite", "update", "--size", "reference"]
        return [[*speed, *size, "--compile", way, "--json", str(out / f"{way}.json")] for way in ways]
    if stage == "loop":
        return [[*speed, "--suite", "loop", "--seconds", "4", "--json", str(out / "loop.json")]]
    if stage == "walker":
        run = ["--task", "dmc/walker-walk", "--preset", "cuda", "--env-steps", steps, "--run-dir", str(out / "run")]
        return [["runners.train", *run]]
    grid = ["--suite", "dmc6", "--agents", "dreamer", "--seeds", "1", "--env-steps", steps, "--jobs", str(options.jobs)]
    return [["benchmarks.run", *grid, "--out", str(out / "grid"), "--", "--preset", "cuda"]]


def run_stage(options: CudaConfig, stage: Stage) -> dict[str, dict[str, float]]:
    """Every program's exit code and seconds; what they print goes to the stage's output.txt as well."""
    folder = options.out / stage
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict[str, float]] = {}
    for command in commands(options, stage):
        said, start = " ".join(command), time.perf_counter()
        print(f"{stage}: python -m {said}", flush=True)
        with (folder / "output.txt").open("a", encoding="utf-8") as output:
            program = [sys.executable, "-m", *command]
            result = subprocess.run(program, stdout=output, stderr=subprocess.STDOUT, env=os.environ, check=False)
        seconds = time.perf_counter() - start
        done[said] = {"exit": result.returncode, "wall_s": round(seconds, 1)}
        print(f"{stage}: {'done' if result.returncode == 0 else 'FAILED'} in {seconds:.0f} s", flush=True)
    return done


def main() -> int:
    """0, or 1 where a stage failed."""
    args = sys.argv[1:]
    options = tyro.cli(CudaConfig, args=args, prog="python -m benchmarks.cuda")
    try:
        resolve_device("cuda")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    about = {"command": command_line("benchmarks.cuda", args), "date": now(), "machine": machine()}
    stages: dict[str, dict[str, dict[str, float]]] = {}
    for stage in options.stages:
        stages[stage] = run_stage(options, stage)
        summary = json.dumps(about | {"stages": stages}, indent=2)
        (options.out / "summary.json").write_text(summary + "\n", encoding="utf-8")
    return int(any(program["exit"] for programs in stages.values() for program in programs.values()))


if __name__ == "__main__":
    sys.exit(main())

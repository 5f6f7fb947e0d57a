"""Two processes learn as one does on the same rows; a run of two leaves one record, stops in order and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from agents.random import RandomAgent
from envs.vector import VectorEnv
from runners.checks import check_parts
from runners.config import ConfigError, from_json
from runners.evaluate import EvaluateConfig, evaluate_run
from runners.replay import Replay
from runners.rollout import Collector
from runners.run import PREFILL_SEED
from runners.train import main
from tests.loop_helpers import ROOT, config, contents, differing, flags, newest_state, rows, without_wall_time
from tests.rank_helpers import ANSWERS, RUN, Answer, as_torchrun, free_ports, work
from worldmodels import ranks


class Pair(NamedTuple):
    """What two processes found and were told; the folder of a run that they stopped and went on with."""

    answers: list[dict[str, Answer]]
    told: list[dict[str, Any]]
    run: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(work, (free_ports(5), folder), nprocs=2)
    answers = [torch.load(folder / f"answers-{rank}.pt", weights_only=True) for rank in range(2)]
    told = [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(2)]
    return Pair(answers, told, folder / "run")


class Trained(NamedTuple):
    """A run of two processes from the command line, to its end."""

    path: Path
    process: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    path = tmp_path_factory.mktemp("trained") / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run(
        [*torchrun, "-m", "runners.train", *flags(path, RUN)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    return Trained(path, process)


# -- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANSWERS)
def test_two_halves_are_the_whole(name: str, pair: Pair) -> None:
    alone = ANSWERS[name]()
    for answers in pair.answers:
        torch.testing.assert_close(answers[name], alone, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["updates", "weights of a run"])
def test_both_have_the_same_bits(name: str, pair: Pair) -> None:
    first, second = (answers[name] for answers in pair.answers)
    assert differing(first, second) == []


def test_one_process_is_all_ranks() -> None:
    x = torch.randn(3)
    assert (ranks.size(), ranks.rank(), ranks.part(5), ranks.total(7)) == (1, 0, 5, 7)
    assert all(f(x) is x for f in (ranks.share, ranks.sum_over_ranks, ranks.all_rows, ranks.of_first))
    assert ranks.of_each(3) == [3]
    assert ranks.done_by_first(lambda: 4) == 4
    with ranks.together(torch.device("cpu")):
        assert ranks.size() == 1


# -- a run of two ------------------------------------------------------------------------------------------------------


def test_command_runs_to_the_end_and_says_so_once(trained: Trained) -> None:
    assert trained.process.returncode == 0, trained.process.stderr
    assert trained.process.stdout.count("evaluation: ") == trained.process.stdout.count("video: ") == 1
    assert "Traceback" not in trained.process.stderr


def test_two_leave_one_record(trained: Trained) -> None:
    path = trained.path
    assert from_json((path / "config.json").read_text()) == config(path, RUN)
    steps = [row["env_steps"] for row in rows(path / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert [step // RUN["loop.log-every"] for step in steps] == [4, 5, 6, 7]
    assert [row["env_steps"] // 280 for row in rows(path / "evals.jsonl")] == [1, 2]
    assert len(list(path.rglob("events.out.tfevents*"))) == 1
    # 32 replayed rows for each agent step, over 4·8 rows an update: of all environments, and of both batches.
    last = rows(path / "metrics.jsonl")[-1]
    assert last["updates"] == 4 + last["agent_steps"] - 40


def test_counters_are_those_of_both(trained: Trained) -> None:
    state = newest_state(trained.path)
    shards = [Replay.open(trained.path / name) for name in ("replay", "replay-1")]
    taken = [shard.sample(1, len(shard), np.random.default_rng(0)) for shard in shards]
    assert state["collector"]["agent_steps"] == sum(int((~rows.is_last).sum()) for rows in taken)
    (other,) = state["others"]
    for counter in ("env_steps", "agent_steps"):
        assert other["collector"][counter] == state["collector"][counter]
    first = [next(shard.episodes())["reward"].sum(dtype=np.float64) for shard in shards]
    assert rows(trained.path / "metrics.jsonl")[0]["train/return"] == pytest.approx(np.mean(first), abs=1e-4)
    assert rows(trained.path / "metrics.jsonl")[-1]["replay_rows"] == sum(map(len, shards))


def test_prefill_is_what_one_process_collects(trained: Trained, tmp_path: Path) -> None:
    """With as many environments: the same episodes, and the same random actions in them."""
    whole = config(trained.path, RUN)
    envs = VectorEnv(whole.task, whole.env, 2, whole.seed, processes=False)
    space = envs.single_observation_space
    with Replay.create(
        tmp_path / "replay", capacity=100, num_envs=2, obs_shape=space.shape, obs_dtype=space.dtype, action_dim=1
    ) as replay:
        collector, prefiller = Collector(envs, replay, 1), RandomAgent(1, whole.seed + PREFILL_SEED)
        for _ in range(20):
            collector.step(prefiller)
        alone = replay.take(np.arange(2), np.zeros(2, int), 20)
    envs.close()
    for stream, name in enumerate(("replay", "replay-1")):
        shard = Replay.open(trained.path / name).take(np.zeros(1, int), np.zeros(1, int), 20)
        for one, other in zip(shard, alone, strict=True):
            assert torch.equal(one[0], other[stream])


def test_evaluation_of_such_a_run(trained: Trained) -> None:
    result, env_steps, _ = evaluate_run(EvaluateConfig(str(trained.path), episodes=1, device="cpu", threads=1))
    assert result.lengths == [160]
    assert env_steps == newest_state(trained.path)["collector"]["env_steps"]


def test_a_signal_to_one_stops_both_and_they_go_on_to_the_same_bits(pair: Pair, trained: Trained) -> None:
    assert [told["stopped"] for told in pair.told] == [True, True]
    assert pair.told[0]["result"] == pair.told[1]["result"] == rows(pair.run / "evals.jsonl")[-1]["returns"]
    assert differing(newest_state(pair.run), newest_state(trained.path)) == []
    evaluations = [without_wall_time(rows(path / "evals.jsonl")) for path in (pair.run, trained.path)]
    assert evaluations[0] == evaluations[1]
    counters = ("env_steps", "updates", "agent_steps", "replay_rows")
    one, other = (
        [[row[name] for name in counters] for row in rows(path / "metrics.jsonl")] for path in (pair.run, trained.path)
    )
    assert one == other


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_another_number_of_processes_cannot_go_on(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(trained.path)
    assert main(flags(trained.path, RUN)) == 1
    error = capsys.readouterr().err
    assert "learned by 2 processes side by side, not by 1" in error
    assert "torchrun --nproc-per-node 2 -m runners.train" in error
    assert contents(trained.path) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_envs": 3}, "--num-envs is 3"),
        ({"loop__batch": 5}, "--loop.batch is 5"),
        ({"dreamer__starts": 15}, "--dreamer.starts is 15"),
    ],
)
def test_what_cannot_be_divided_is_refused(changes: dict[str, int], said: str, tmp_path: Path) -> None:
    odd = config(tmp_path, RUN, **changes)
    check_parts(odd, 1)
    with pytest.raises(ConfigError, match=f"{said}.*make it a multiple of 2"):
        check_parts(odd, 2)


def test_the_random_agent_is_for_one_process(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--agent random learns in one process, not in 2"):
        check_parts(replace(config(tmp_path, RUN), agent="random"), 2)


def test_a_baseline_is_for_one_process(pair: Pair) -> None:
    assert all("--agent sac learns in one process, not in 2" in told["baseline"] for told in pair.told)
    assert not (pair.run.parent / "baseline").exists()


def test_statistics_of_a_batch_are_refused(pair: Pair) -> None:
    assert all("BatchNorm" in told["BatchNorm"] for told in pair.told)


def test_who_waits_for_a_dead_process_hears_of_it(pair: Pair) -> None:
    assert "another process of this run has ended or failed" in pair.told[0]["lost"]


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with as_torchrun(0, 1), pytest.raises(ranks.RanksError, match="there are 1; use --nproc-per-node 1"):
        ranks.together(torch.device("cuda")).__enter__()


def test_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ranks.RanksError, match="2 processes were started, 1 of them"):
        ranks.together(torch.device("cpu")).__enter__()

"""The command line and config.json: what is accepted, what is explained, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from runners.checks import check
from runners.config import Config, advice, differences, from_json, parse_args, presets, to_json
from runners.train import main
from tests.loop_helpers import ROOT


def field_names(kind: Any, prefix: str = "") -> list[str]:
    """Dotted names of all settings below a dataclass or an instance of one."""
    names = []
    for field in dataclasses.fields(kind):
        value = getattr(kind, field.name)
        nested = dataclasses.is_dataclass(value)
        names += field_names(value, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return names


@pytest.fixture(scope="module")
def explained() -> dict[str, str]:
    """What --help says to each flag, on one line each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        lines = help_text().splitlines()
    found: dict[str, str] = {}
    flag = ""
    for line in (line.strip("│╭╮╰╯─ ") for line in lines):
        if line.startswith("-"):
            invocation, _, text = line.partition("  ")  # the text begins here, or on the next line
            flag = re.split(r"[ ,]", invocation)[0].removeprefix("--")
            found[flag] = text
        elif flag:
            found[flag] += f" {line}"
    return found


def help_text() -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_:
        parse_args(["--help"])
    assert exit_.value.code == 0
    return out.getvalue()


# -- presets and flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_parses_and_can_be_run(name: str) -> None:
    config = parse_args(["--preset", name])
    assert config == dataclasses.replace(presets()[name], preset=name)
    check(config)


def test_presets_that_the_help_names_exist(explained: dict[str, str]) -> None:
    named = re.search(r"everything else: (.*?);", explained["preset"])
    assert named is not None
    assert set(re.split(r",? or |, ", named[1])) == set(presets())


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_auto_preset_fits_the_device(device: str) -> None:
    cuda = device == "auto" and torch.cuda.is_available()
    assert parse_args(["--device", device]).preset == ("cuda" if cuda else "cpu")


def test_cuda_preset_follows_the_device_that_was_asked_for() -> None:
    config = parse_args(["--device", "cuda"])
    assert config == dataclasses.replace(presets()["cuda"], device="cuda", preset="cuda")


def test_the_preset_follows_what_is_observed_where_there_is_no_gpu() -> None:
    states = ["--device", "cpu", "--env.obs", "state"]
    assert parse_args(states) == dataclasses.replace(presets()["state"], device="cpu", preset="state")
    assert parse_args([*states, "--loop.train-ratio", "2"]).loop.train_ratio == 2
    for obs in ("pixels", "both"):
        assert parse_args(["--device", "cpu", "--env.obs", obs]).preset == "cpu"
    assert parse_args(["--device", "cuda", "--env.obs", "state"]).preset == "cuda"
    assert parse_args(["--preset", "cpu", "--env.obs", "state"]).preset == "cpu"


@pytest.mark.parametrize("said", ["false", "False"])
def test_a_switch_may_be_told_true_or_false(said: str) -> None:
    for name in ("overlap", "model.head-gradient", "mpc.terminal_value"):
        off = parse_args(["--seed", "2", f"--{name}", said, "--threads", "1"])
        group, _, leaf = name.rpartition(".")
        assert off == parse_args(["--seed", "2", f"--{group}{'.' if group else ''}no-{leaf}", "--threads", "1"])
        assert off != parse_args(["--seed", "2", f"--{name}", "true", "--threads", "1"])
        assert parse_args([f"--{name}", "true"]) == parse_args([f"--{name}"])
    assert parse_args(["--compile", "false"]).compile == "false"
    assert parse_args(["--run-dir", "overlap", "--compile", "true"]).run_dir == "overlap"


def test_flags_override_the_preset() -> None:
    config = parse_args(["--preset", "cuda", "--loop.length", "32", "--model.conv.channels", "8", "16"])
    assert config.loop == dataclasses.replace(presets()["cuda"].loop, length=32)
    assert config.model.conv.channels == (8, 16)
    assert config.env == presets()["cuda"].env


def test_the_preset_for_states_is_advised_to_those_who_observe_states_and_learn_little_from_them() -> None:
    assert parse_args(["--preset", "state"]).env.obs == "state"
    for preset in ("cpu", "state", "cuda"):
        assert (advice(parse_args(["--preset", preset, "--env.obs", "state"])) is None) == (preset != "cpu")
        assert advice(parse_args(["--preset", preset, "--env.obs", "pixels"])) is None
    assert advice(parse_args(["--preset", "cpu", "--env.obs", "state", "--agent", "sac"])) is None
    assert "--preset state" in (advice(parse_args(["--preset", "cpu", "--env.obs", "state"])) or "")


def test_presets_differ_where_the_machines_do() -> None:
    assert presets()["cpu"].env.render == "fast"
    assert presets()["cuda"].env.render == "canonical"


@pytest.mark.parametrize(("bf16", "budget"), [(True, 480_000), (False, 320_000)])
def test_processors_that_compute_in_bfloat16_have_a_larger_budget_and_nothing_else(
    bf16: bool, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = presets()["cpu"]
    monkeypatch.setattr("runners.config.computes_bf16", lambda device: bf16)
    assert presets()["cpu"] == dataclasses.replace(here, env_steps=budget)


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", field_names(Config()))
def test_every_setting_is_explained(name: str, explained: dict[str, str]) -> None:
    flag = name.replace("_", "-")
    assert flag in explained
    text = re.sub(r"\(default: .*?\)", "", explained[flag]).strip()
    assert len(text.split()) >= 2, f"--{flag} says {text!r}"


@pytest.mark.parametrize(
    ("flag", "unit"),
    {
        "env-steps": "env_steps",
        "threads": "cpu threads",
        "env.size": "pixels",
        "env.action-repeat": "simulator control steps",
        "env.time-limit": "simulator control steps",
        "loop.prefill": "env_steps",
        "loop.pretrain": "updates",
        "loop.train-ratio": "rows",
        "loop.batch": "sequences",
        "loop.length": "rows",
        "loop.capacity": "rows",
        "loop.log-every": "env_steps",
        "loop.eval-every": "env_steps",
        "loop.eval-episodes": "episodes",
        "loop.checkpoint-every": "env_steps",
        "dreamer.horizon": "decisions",
        "dreamer.discount": "one decision",
        "model.rollout": "steps",
        "model.rollout-every": "rows",
        "model.shift-pixels": "pixels",
    }.items(),
)
def test_units_are_named(flag: str, unit: str, explained: dict[str, str]) -> None:
    assert unit in explained[flag].lower()


# -- names that do not exist -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "closest"),
    [
        (["--loop.prefil", "10"], "--loop.prefill"),
        (["--num-env", "2"], "--num-envs"),
        (["--model.latent", "8"], "--model.latent-dim"),
        (["--agent", "dreamr"], "dreamer"),
        (["--gradient", "pathwize"], "pathwise"),
        (["--env.render", "fas"], "fast"),
        (["--env-steps", "many"], "INT"),
    ],
)
def test_wrong_flags_answer_with_the_closest(
    wrong: list[str], closest: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as exit_:
        main(wrong)
    assert exit_.value.code == 2
    assert closest in capsys.readouterr().err


def test_unknown_preset_answers_with_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "cdua"]) == 1
    error = capsys.readouterr().err
    assert "there is no preset 'cdua'" in error
    assert "The closest: cuda" in error


@pytest.mark.parametrize(
    ("task", "closest"),
    [
        ("dmc/cartpole-swingupp", "dmc/cartpole-swingup"),
        ("cartpole-swingup", "dmc/cartpole-swingup"),
        ("mujoco/HalfCheeta-v5", "mujoco/HalfCheetah-v5"),
        ("gym/Pendulun-v1", "gym/Pendulum-v1"),
        ("", "dmc/<domain>-<task>"),
        ("gym/no_such_module:Thing-v0", "gym/<module>:<Id>"),
    ],
)
def test_unknown_task_answers_with_the_closest(
    task: str, closest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--task", task, "--run-dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: There is no task")
    assert closest in error
    assert not (tmp_path / "run").exists()


# -- config.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(presets()))
def test_config_json_round_trip(name: str) -> None:
    config = parse_args(["--preset", name, "--env.camera", "-1", "--model.window.hidden", "7", "9"])
    assert from_json(to_json(config)) == config
    assert hash(from_json(to_json(config))) == hash(config)  # tuples came back as tuples


def test_floats_survive_the_round_trip_exactly() -> None:
    config = parse_args(["--loop.train-ratio", "0.1", "--dreamer.model-lr", "1e-300"])
    again = from_json(to_json(config))
    assert (again.loop.train_ratio, again.dreamer.model_lr) == (0.1, 1e-300)


def test_a_run_from_before_a_setting_had_a_flag_goes_on_as_it_was() -> None:
    command = ["--preset", "cpu"]
    now = parse_args(command)
    written = json.loads(to_json(now))
    del written["model"]["keypoint"]["kernel"], written["dreamer"]["critic"]["rows"]
    before = from_json(json.dumps(written))
    assert differences(before, now) == ["model.keypoint.kernel: 3 → 1", "dreamer.critic.rows: all → split"]
    as_it_was = ["--model.keypoint.kernel", "3", "--dreamer.critic.rows", "all"]
    assert not differences(before, parse_args([*command, *as_it_was]))


DEFAULT_JSON = json.loads(to_json(Config()))

GARBAGE = {
    "empty": "",
    "not json": "task: dmc/cartpole-swingup",
    "half a file": to_json(Config())[:200],
    "a list": "[]",
    "null": "null",
    "a number": "3",
    "unknown field": json.dumps(DEFAULT_JSON | {"colour": "red"}),
    "unknown nested field": json.dumps(DEFAULT_JSON | {"loop": {"colour": "red"}}),
    "number for a branch": json.dumps(DEFAULT_JSON | {"env": 3}),
    "list for a branch": json.dumps(DEFAULT_JSON | {"model": []}),
    "number for a task": json.dumps(DEFAULT_JSON | {"task": 5}),
    "branch for a number": json.dumps(DEFAULT_JSON | {"seed": {"value": 1}}),
    "text for a number": json.dumps(DEFAULT_JSON | {"env_steps": "many"}),
    "fraction for a count": json.dumps(DEFAULT_JSON | {"num_envs": 1.5}),
    "number for a flag": json.dumps(DEFAULT_JSON | {"model": DEFAULT_JSON["model"] | {"head_gradient": 0}}),
    "null for a number": json.dumps(DEFAULT_JSON | {"seed": None}),
    "no such choice": json.dumps(DEFAULT_JSON | {"agent": "__import__('os')"}),
    "impossible value": json.dumps(DEFAULT_JSON | {"env": DEFAULT_JSON["env"] | {"size": -1}}),
    "texts for numbers in a list": json.dumps(
        DEFAULT_JSON | {"model": DEFAULT_JSON["model"] | {"conv": {"channels": ["a"]}}}
    ),
    "nested without end": "[" * 100_000,
    "nested objects without end": '{"env":' * 100_000,
}


_JUDGE = """
import json, sys
from runners.config import ConfigError, from_json
for name, text in json.load(sys.stdin).items():
    try:
        verdict = f"accepted as {from_json(text)}"
    except ConfigError as error:
        verdict = f"refused: {error}"
    except BaseException as error:
        verdict = f"not caught: {type(error).__name__}"
    print(json.dumps([name, verdict]))
"""


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    """What becomes of each garbage, in a process where no test harness checks types."""
    words, given = [sys.executable, "-c", _JUDGE], json.dumps(GARBAGE)
    process = subprocess.run(words, cwd=ROOT, input=given, capture_output=True, text=True, check=True)
    return dict(json.loads(line) for line in process.stdout.splitlines())


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_a_config_error(name: str, verdicts: dict[str, str]) -> None:
    assert verdicts[name].startswith("refused: ")
    assert "config" in verdicts[name]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00garbage", b"[" * 100_000, b'{"task": 5}'])
def test_garbage_in_a_folder_is_refused_and_left_alone(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert main(["--run-dir", str(tmp_path), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(tmp_path) in error
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == content


def test_config_json_that_is_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").mkdir()
    assert main(["--run-dir", str(tmp_path), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_differences_name_every_field_but_the_folder() -> None:
    old = parse_args(["--preset", "cpu", "--run-dir", "a"])
    assert differences(old, dataclasses.replace(old, run_dir="b")) == []
    new = parse_args(["--preset", "cpu", "--seed", "9", "--dreamer.policy.units", "3", "--env.time-limit", "50"])
    units = old.dreamer.policy.units
    assert differences(old, new) == [
        f"seed: {old.seed} → 9",
        "env.time_limit: None → 50",
        f"dreamer.policy.units: {units} → 3",
    ]

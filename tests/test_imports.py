"""What holds for all of the source: the import rule, no call that could run code hidden in a file, shapes checked.

envs, worldmodels  import no sibling        agents     → worldmodels
runners            → agents, worldmodels, envs         benchmarks → runners and everything below
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from agents.returns import lambda_return
from worldmodels.sigreg import effective_rank

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "envs": set(),
    "worldmodels": set(),
    "agents": {"worldmodels"},
    "runners": {"agents", "worldmodels", "envs"},
    "benchmarks": {"runners", "agents", "worldmodels", "envs"},
}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
EVERY_PACKAGE = {*MAY_IMPORT, "tests"}
# Reading any of these formats can call any function.
CODE_CARRIERS = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
IMPORT_CALLS = {"importlib.import_module", "import_module", "__import__"}


def imported_names(tree: ast.AST) -> dict[str, str]:
    """What each name bound by an import stands for: ``{"th": "torch", "load": "torch.load"}``."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                names[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """The dotted name of an expression, as far as ``imported_names`` tells it."""
    head, dot, rest = ast.unparse(node).partition(".")
    return names.get(head, head) + dot + rest


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with its function's full name."""
    names = imported_names(tree)
    yield from ((full_name(node.func, names), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def unpickling(tree: ast.AST) -> list[str]:
    """Every use of pickle but ``dumps`` and ``loads(dumps(…))``, which reads back what this very line wrote."""
    names = imported_names(tree)
    safe = {
        call.func
        for name, call in calls(tree)
        if name == "pickle.loads"
        and isinstance(call.args[0], ast.Call)
        and full_name(call.args[0].func, names) == "pickle.dumps"
    }
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name) and node not in safe]
    return [
        f"line {node.lineno}: {name} reads what can run code"
        for node in uses
        if (name := full_name(node, names)).startswith("pickle.") and name.count(".") == 1 and name != "pickle.dumps"
    ]


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of every module imported, by statement or by ``import_module("…")``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
    for name, call in calls(tree):
        if name in IMPORT_CALLS and call.args and isinstance(call.args[0], ast.Constant):
            yield call.lineno, str(call.args[0].value)


def forbidden_imports(source: str, package: str) -> list[str]:
    allowed = MAY_IMPORT[package] | {package}
    modules = imported_modules(ast.parse(source))
    return [
        f"line {line}: {package} may not import {name}"
        for line, name in modules
        if name.split(".")[0] in EVERY_PACKAGE - allowed
    ]


def unsafe_loads(source: str) -> list[str]:
    """Places that could run code found in a file: pickles in any dress, eval and exec."""
    tree = ast.parse(source)
    found = [
        f"line {line}: {name} reads files that can run code"
        for line, name in imported_modules(tree)
        if name.split(".")[0] in CODE_CARRIERS
    ]
    found += unpickling(tree)
    for name, call in calls(tree):
        options = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in {"eval", "exec"}:
            found.append(f"line {call.lineno}: {name} runs a string")
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append(f"line {call.lineno}: torch.load without weights_only=True")
        if name == "numpy.load" and (len(call.args) > 2 or options.get("allow_pickle", "False") != "False"):
            found.append(f"line {call.lineno}: numpy.load with allow_pickle")
        if None in options and name in {"torch.load", "numpy.load"}:
            found.append(f"line {call.lineno}: {name} with options that cannot be read here")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_keeps_the_import_rule(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert forbidden_imports(path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_loads_nothing_that_runs_code(path: Path) -> None:
    assert unsafe_loads(path.read_text(encoding="utf-8")) == []


def test_shapes_in_signatures_are_checked_in_the_tests() -> None:
    with pytest.raises(TypeCheckError, match="effective_rank"):
        effective_rank(torch.zeros(2, 3, 4))
    with pytest.raises(TypeCheckError, match="lambda_return"):
        lambda_return(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3), 0.95)


def test_no_module_is_a_drawer_for_everything() -> None:
    names = {name for path in SOURCES for name in path.relative_to(ROOT).with_suffix("").parts}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("envs", "import worldmodels.lewm"),
        ("worldmodels", "from envs import factory"),
        ("agents", "import torch, runners.train as t"),
        ("agents", "def late():\n    from envs.factory import make"),
        ("runners", "import benchmarks"),
        ("benchmarks", "from tests.toys import Toy"),
        ("envs", "import importlib\nimportlib.import_module('agents.dreamer')"),
        ("envs", "from importlib import import_module as load\nload('agents')"),
    ],
)
def test_a_forbidden_import_is_found(package: str, source: str) -> None:
    assert len(forbidden_imports(source, package)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("envs", "import numpy\nfrom envs import dmc\nfrom . import wrappers"),
        ("agents", "from worldmodels.interface import Batch"),
        ("runners", "import agents, worldmodels.lewm\nfrom envs.factory import make"),
        ("benchmarks", "from runners import train\nimport envs"),
    ],
)
def test_an_allowed_import_is_not(package: str, source: str) -> None:
    assert forbidden_imports(source, package) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "import pickle\npickle.loads(text)",
        "from pickle import loads as read\nread(text)",
        "import pickle\nread = pickle.Unpickler",
        "from cloudpickle import loads",
        "import torch as th\nth.load(path)",
        "from torch import load\nload(path, weights_only=False)",
        "import torch\ntorch.load(path, **options)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, 'r', flag)",
        "eval(text)",
    ],
)
def test_an_unsafe_load_is_found(source: str) -> None:
    assert unsafe_loads(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, mmap_mode='r', allow_pickle=False)",
        "import numpy as np\nnp.load(path)",
        "model.eval()",
        "import pickle\npickle.loads(pickle.dumps(error))",
    ],
)
def test_a_safe_load_is_not(source: str) -> None:
    assert unsafe_loads(source) == []

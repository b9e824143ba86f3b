"""The one-way rule of imports, checked over the sources and proved to notice a violation."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each package may import of this project, itself aside.
ALLOWED = {
    "cluster": {"workers", "paramserver", "shuffler", "models", "benchmarks"},
    "workers": {"paramserver", "shuffler", "models"},
    "paramserver": set(),
    "shuffler": set(),
    "models": set(),
}
OURS = {*ALLOWED, "benchmarks", "tests"}


def imported_modules(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted name) of every import, wherever in the file it stands.

    Imports for type checking count: they couple two packages as much as any other. So do those
    through `import_module` and `__import__` with a literal name.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                # `from . import x` names a module; so may `from package import x`.
                yield node.lineno, ".".join((*names, alias.name))
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            literal = node.args[0] if node.args else None
            if name in ("import_module", "__import__") and isinstance(literal, ast.Constant):
                yield node.lineno, str(literal.value)


def violations(root: Path) -> list[str]:
    """Returns one line for each import under `root` that breaks a rule."""
    found = []
    for package, allowed in ALLOWED.items():
        files = sorted((root / package).rglob("*.py"))
        if not files:
            found.append(f"{package}/: no sources; was the package renamed?")
        for file in files:
            parts = file.relative_to(root).with_suffix("").parts
            for line, module in imported_modules(file.read_text(encoding="utf-8"), parts[:-1]):
                top = module.split(".")[0]
                where = f"{file.relative_to(root)}:{line}"
                if top in OURS and top != package and top not in allowed:
                    found.append(f"{where}: {package} must not import {module}")
                if top == "ray" and package != "cluster" and file.name != "actor.py":
                    found.append(f"{where}: ray belongs in actor.py and cluster/, not here")
                if top == "torch" and package == "shuffler":
                    found.append(f"{where}: the shuffler must start fast, without torch")
    return found


def test_imports_run_one_way():
    assert violations(ROOT) == []


CONTROLLER = (
    {"controller"},
    {"checkpointing", "processes", "evaluating"},
    {"partitions"},
    {"followers", "lending", "losses"},
    {"recovery", "telemetry", "tickets", "members", "settled", "ramp"},
    {"backend"},
)
"""Parts of `cluster/`, in the order of docs/architecture.md: each knows only those further down."""


@pytest.mark.parametrize("rank", range(len(CONTROLLER)))
def test_the_controllers_parts_know_only_those_below_them(rank):
    not_below = set().union(*CONTROLLER[: rank + 1])
    for name in CONTROLLER[rank]:
        source = (ROOT / "cluster" / f"{name}.py").read_text(encoding="utf-8")
        known = {module for _, module in imported_modules(source, ("cluster",))}
        assert not {of for of in not_below if any(f"cluster.{of}." in f"{m}." for m in known)}


@pytest.fixture
def planted(tmp_path):
    """A tree that keeps every rule, to plant violations in."""
    for package in ALLOWED:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text('"""Nothing."""\n')
    (tmp_path / "paramserver" / "transport").mkdir()

    def plant(path: str, source: str) -> list[str]:
        (tmp_path / path).write_text(source)
        return violations(tmp_path)

    return plant


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cluster/a.py", "import ray, torch, workers.step, models\nfrom shuffler import plan\n"),
        ("workers/a.py", "from paramserver.client import Client\nimport torch\n"),
        ("workers/a.py", "from . import step\nfrom .step import run\n"),
        ("paramserver/actor.py", "import ray\n"),
        ("paramserver/transport/a.py", "from ..messages import Push\nfrom .. import state\n"),
        ("shuffler/a.py", "import numpy\nfrom shuffler.plan import Plan\n"),
        ("models/a.py", "import raymond\nimport workerspace\n"),
    ],
)
def test_what_is_allowed_passes(planted, path, source):
    assert planted(path, source) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("workers/a.py", "import cluster.config\n", "workers must not import cluster.config"),
        ("models/a.py", "from paramserver import rules\n", "models must not import paramserver"),
        ("models/a.py", "import workers\n", "models must not import workers"),
        ("paramserver/a.py", "import shuffler\n", "paramserver must not import shuffler"),
        ("shuffler/a.py", "from models.mlp import Mlp\n", "shuffler must not import models.mlp"),
        ("paramserver/a.py", "def f():\n    import models\n", "a.py:2: paramserver must not"),
        (
            "paramserver/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import models\n",
            "a.py:3: paramserver must not",
        ),
        ("models/a.py", "import importlib\nimportlib.import_module('cluster.x')\n", "cluster.x"),
        ("models/a.py", "from .. import cluster\n", "models must not import cluster"),
        ("cluster/a.py", "import tests.fakes\n", "cluster must not import tests.fakes"),
        ("workers/step.py", "import ray.util\n", "ray belongs in actor.py"),
        ("shuffler/plan.py", "from ray import get\n", "ray belongs in actor.py"),
        ("shuffler/decode.py", "import torch.nn\n", "without torch"),
        ("shuffler/actor.py", "from torch import nn\n", "without torch"),
        ("paramserver/transport/a.py", "from ...workers import step\n", "must not import workers"),
    ],
)
def test_a_violation_is_noticed(planted, path, source, complaint):
    (found,) = planted(path, source)
    assert complaint in found


def test_a_missing_package_is_noticed(tmp_path):
    assert len(violations(tmp_path)) == len(ALLOWED)

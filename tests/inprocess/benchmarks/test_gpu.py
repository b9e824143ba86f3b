"""Every part of the script for GPUs, on processors and at a small size; and what it imports."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from downpour.benchmarks import gpu
from tests.helpers import tiny
from tests.helpers.sources import ROOT, parsed, statements, text_of

SIDE, CLASSES = 32, 4


def write_pictures(folder: Path) -> str:
    rng = np.random.default_rng(3)
    for split, count in (("train", 66), ("validation", 8)):
        labels = rng.integers(0, CLASSES, count)
        pixels = rng.integers(0, 60, (count, SIDE, SIDE, 3)) + 60 * labels[:, None, None, None]
        tiny.write_split(folder, split, pixels.astype(np.uint8), labels.astype(np.int64), 1)
    return str(folder)


@pytest.mark.soak
def test_every_part_runs_on_processors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--quick", "--data", write_pictures(tmp_path / "data")]
    words += ["--pixels", str(SIDE), "--classes", str(CLASSES), "--out", str(out)]
    threads = torch.get_num_threads()
    try:
        assert gpu.main(words) == 0, capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert found["skipped"].keys() == {"tests", "float32, plain loop as a CUDA graph"}
    steps = {name.removeprefix("float32, "): about for name, about in found["steps"].items()}
    assert steps.keys() == {
        "plain loop",
        "replicas in one process",
        "replicas in 2 processes",
        "replicas, steps together",
    }
    assert all(about["images_per_s"] > 0 for about in steps.values())
    (recipe,) = found["recipes"].values()
    assert recipe["batches"] > 0
    assert recipe["curve"][-1]["batches"] == recipe["batches"]
    assert 0 <= recipe["curve"][-1]["accuracy"] <= 1
    assert "skipped: tests: they need a GPU" in capsys.readouterr().out


def test_what_lacks_is_told(tmp_path: Path) -> None:
    record = gpu.Record(tmp_path / "gpu.json", {})
    clock = iter([0.0, 0.0, 50.0, 99.0])
    budget = gpu.Budget(100.0, lambda: next(clock))
    budget.part(30.0)
    assert budget.left == -20.0
    gpu.learn_recipes(record, budget, gpu.Lesson(data="", device="cpu"), gpu.LEARNT)
    assert "no --data was given" in json.loads(record.path.read_text())["skipped"]["recipes"]


def imported(module: str, seen: set[str]) -> set[str]:
    """Packages that the import of a module of ours imports; what functions import is left out."""
    if module in seen:
        return set()
    seen.add(module)
    path = ROOT.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if module == "downpour":
        return set()
    found: set[str] = set()
    for name in sorted(names_in(text_of(file))):
        if name.startswith("downpour"):
            inner = ROOT.joinpath(*name.split(".")[1:])
            whole = inner.is_dir() or inner.with_suffix(".py").exists()
            found |= imported(name if whole else name.rpartition(".")[0], seen)
        else:
            found.add(name.split(".")[0])
    parent = module.rpartition(".")[0]
    return found | (imported(parent, seen) if parent else set())


def names_in(source: str) -> set[str]:
    names: set[str] = set()
    skipped: set[ast.stmt] = set()
    for node in statements(parsed(source).body):
        if node in skipped:
            continue
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        lazy = lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        if lazy:
            skipped |= set(statements(node.body))  # type: ignore[attr-defined]
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= whole if node.module.startswith("downpour") else {node.module}
    return names


def test_a_bare_machine_has_all_that_it_imports() -> None:
    found = imported("downpour.benchmarks.gpu", set()) - set(sys.stdlib_module_names)
    assert found == {"torch", "numpy", "pyarrow"}


def test_the_recipes_need_the_packages_that_are_named() -> None:
    seen: set[str] = set()
    found: set[str] = set()
    for module in (
        "cluster.config.derive",
        "cluster.config.recipes",
        "cluster.config.resolve",
        "shuffler.actor",
        "shuffler.dataset.own",
        "shuffler.images.pixels",
        "workers.evaluation.split",
    ):
        found |= imported(f"downpour.{module}", seen)
    assert found - set(sys.stdlib_module_names) <= {
        *gpu.recipes.PACKAGES,
        "torch",
        "numpy",
        "pyarrow",
    }

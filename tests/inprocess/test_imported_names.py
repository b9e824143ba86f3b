"""Every name that a source imports from this project stands where the import says.

Tests load themselves and most modules; benchmarks and scripts are loaded only when they are run.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sources import ROOT, imports_of, parsed, sources_below, text_of

SOURCES = ("cluster", "models", "paramserver", "shuffler", "workers", "benchmarks")


def top_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields the statements that run when a module is loaded: not those inside of functions."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            parts = [node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
            parts += [handler.body for handler in getattr(node, "handlers", ())]
            for part in parts:
                yield from top_statements(part)


def targets(node: ast.Assign | ast.AnnAssign | ast.For | ast.With) -> list[ast.expr]:
    """What a statement assigns to; values, which are larger, are not looked through."""
    if isinstance(node, ast.Assign):
        return node.targets
    if isinstance(node, ast.With):
        return [item.optional_vars for item in node.items if item.optional_vars is not None]
    return [node.target]


@functools.cache
def bound_names(file: Path) -> frozenset[str]:
    """The names that a module binds at its top level, branches included."""
    names: set[str] = set()
    for node in top_statements(parsed(text_of(file)).body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((a.asname or a.name).split(".")[0] for a in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.For | ast.With):
            stored = (n for target in targets(node) for n in ast.walk(target))
            names.update(n.id for n in stored if isinstance(n, ast.Name))
    return frozenset(names)


def missing(root: Path, file: Path) -> Iterator[str]:
    """One line for each imported name, or module, that is not there."""
    for node in imports_of(text_of(file)):
        if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
            continue
        package, *rest = node.module.split(".")
        if package != "downpour" or not rest:
            continue
        path = root.joinpath(*rest)
        module = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        where = f"{file.relative_to(root)}:{node.lineno}"
        if not module.is_file():
            yield f"{where}: there is no {node.module}"
            continue
        for alias in node.names:
            inner = (path / alias.name, path / f"{alias.name}.py")
            dynamic = "__getattr__" in bound_names(module)
            if not (dynamic or alias.name in bound_names(module) or any(p.exists() for p in inner)):
                yield f"{where}: {node.module} has no {alias.name}"


@pytest.mark.parametrize("package", SOURCES)
def test_every_imported_name_is_there(package):
    files = sources_below(ROOT / package)
    assert files
    assert [line for file in files for line in missing(ROOT, file)] == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("from downpour.models.a import gone\n", "downpour.models.a has no gone"),
        ("def f():\n    from downpour.models import b\n", "downpour.models has no b"),
        ("from downpour.models.b import x\n", "there is no downpour.models.b"),
        ("from downpour.models.a import there, Kept, part, X\n", ""),
        ("from downpour.models import a\n", ""),
    ],
)
def test_a_missing_name_is_noticed(tmp_path, source, complaint):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "a.py").write_text(
        "import os.path as part\ndef there(): gone = 1\nclass Kept: pass\nif part: X = 1\n"
    )
    file = tmp_path / "user.py"
    file.write_text(source)
    assert [line.partition(": ")[2] for line in missing(tmp_path, file)] == [complaint] * bool(
        complaint
    )

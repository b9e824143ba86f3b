"""The repository's own sources, for the tests that read them. Each is read and parsed once."""

import ast
import functools
import gc
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


@functools.cache
def sources_below(folder: Path) -> tuple[Path, ...]:
    """Every Python source below a folder, sorted."""
    return tuple(sorted(folder.rglob("*.py")))


@functools.cache
def text_of(path: Path) -> str:
    """The text of a file."""
    return path.read_text(encoding="utf-8")


@functools.cache
def parsed(source: str) -> ast.Module:
    """The syntax tree of a source."""
    gc.disable()  # looking for garbage among so many new nodes takes longer than to parse them
    try:
        return ast.parse(source)
    finally:
        gc.enable()


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields every statement, those inside of others too; expressions are not entered."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, name, []))
        for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
            yield from statements(part.body)


@functools.cache
def imports_of(source: str) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """The import statements of a source, wherever they stand."""
    wanted = ast.Import | ast.ImportFrom
    return tuple(node for node in statements(parsed(source).body) if isinstance(node, wanted))

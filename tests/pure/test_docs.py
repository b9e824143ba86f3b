"""The documentation names what there is: paths, modules, classes, tests, options, commands, links.

Every name in backticks is compared with the sources, which are read and not imported.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sources import ROOT, parsed, sources_below, statements, text_of

TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = ("models", "paramserver", "shuffler", "workers", "cluster", "benchmarks")
IN_ROOT = {path.name for path in ROOT.iterdir()} - {"runs", ".venv"}
SUFFIXES = (".py", ".md", ".toml", ".yaml", ".lock")
# Files that a run or the user's machine has, not the repository.
ELSEWHERE = {"mine.py"}
# Options and settings of other programs.
FOREIGN = {"--build-arg", "--working-dir", "rule_files"}


def code_spans(text: str) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of every span in single backticks; fenced blocks are no such spans."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            for found in re.finditer(r"`([^`]+)`", line):
                yield number, found[1]


@functools.cache
def sources() -> dict[Path, str]:
    """The text of every source, tests aside."""
    return {path: text_of(path) for package in PACKAGES for path in sources_below(ROOT / package)}


def body_of(path: Path) -> list[ast.stmt]:
    return parsed(text_of(path)).body


@functools.cache
def names_of_files() -> frozenset[str]:
    """The names of all files below the repository's own folders."""
    folders = [ROOT / name for name in IN_ROOT if not name.startswith(".") or name == ".ci"]
    return frozenset(path.name for folder in folders for path in folder.rglob("*"))


def top_names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The names that a module or class binds, each with the statement that does."""
    names: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            names |= {t.id: node for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
        elif isinstance(node, ast.If):
            names |= top_names([*node.body, *node.orelse])
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: node for alias in node.names}
    return names


def members(node: ast.ClassDef) -> set[str]:
    """What a class defines itself: methods, fields, and attributes that its methods set."""
    names = set(top_names(node.body))
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            names.add(inner.attr)
    return names


@functools.cache
def members_of(name: str) -> set[str] | None:
    """The members of the project's classes of that name, inherited ones not; None: no such."""
    start = re.compile(rf"^ *class {name}\b", re.MULTILINE)
    found = [
        members(node)
        for path, text in sources().items()
        if start.search(text)
        for node in statements(body_of(path))
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    return set().union(*found) if found else None


def resolves(dotted: str) -> bool:
    """Whether `downpour.a.b.C.d` is a package, a module, or a name in one."""
    parts = dotted.split(".")[1:]
    place = ROOT / "downpour"
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    if not parts:
        return place == ROOT / "downpour" or any(place.glob("*.py"))
    if (place / f"{parts[0]}.py").is_file():
        body = body_of(place / f"{parts.pop(0)}.py")
    elif (place / "__init__.py").is_file():
        body = body_of(place / "__init__.py")
    else:
        return False
    while parts:
        name, node = parts[0], top_names(body).get(parts.pop(0))
        if node is None:
            return False
        if parts and isinstance(node, ast.ClassDef):
            return len(parts) == 1 and parts[0] in members(node)
        if parts:
            return len(parts) == 1 and parts[0] in (members_of(name) or ())
    return True


@functools.cache
def words() -> set[str]:
    """Every word in the sources, tests aside."""
    return {word for text in sources().values() for word in re.findall(r"[A-Za-z_][\w-]*", text)}


@functools.cache
def names_of_tests() -> set[str]:
    start = re.compile(r"^ *def (test_\w+)", re.MULTILINE)
    files = sources_below(ROOT / "tests")
    return {name for path in files for name in start.findall(text_of(path))}


def wrong(span: str) -> str | None:
    """What is wrong with a name in backticks; None if nothing is, or it names nothing of ours."""
    word = span.split("::", maxsplit=1)[0].rstrip("/")
    if re.fullmatch(r"[\w.-]+(/[\w.{},-]+)+", word) and word.split("/")[0] in IN_ROOT:
        return None if (ROOT / word).exists() else "is no path of the repository"
    if re.fullmatch(r"[\w-]+", word) and span.endswith("/") and word not in IN_ROOT:
        inside = (path for p in (*PACKAGES, "tests") for path in (ROOT / p).rglob(word))
        return None if any(path.is_dir() for path in inside) else "is no folder"
    if re.fullmatch(r"[\w-]+", word) is None and word.endswith(SUFFIXES) and "/" not in word:
        if not re.fullmatch(r"[\w.-]+", word) or word in ELSEWHERE or (ROOT / word).exists():
            return None
        return None if word in names_of_files() else "is no file of the repository"
    if re.fullmatch(r"downpour(\.\w+)+", span):
        return None if resolves(span) else "is neither a module nor a name in one"
    if re.fullmatch(r"test_\w+", span):
        return None if span in names_of_tests() else "is no test"
    if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+|[A-Z][a-z]\w*|[A-Z]+(_[A-Z0-9]+)+", span):
        # Ray puts its own name before a metric's.
        known = {span, span.removeprefix("ray_")} & (words() | FOREIGN)
        return None if known else "is no word of the sources"
    if found := re.fullmatch(r"([A-Z]\w+)\.(\w+)(\(.*\))?", span):
        has = members_of(found[1])
        return None if has is None or found[2] in has else f"is no attribute of {found[1]}"
    return wrong_command(span)


def wrong_command(span: str) -> str | None:
    """What is wrong with options, and with a command of ours."""
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
        field = option.removeprefix("--no-").removeprefix("--").replace("-", "_")
        if option not in FOREIGN and not {field, option, option[2:]} & words():
            return f"has the option {option}, which there is not"
    found = re.match(r"downpour ([a-z-]+)", span)
    if found and not {found[1], found[1].replace("-", "_")} & words():
        return f"has the command {found[1]}, which there is not"
    return None


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def wrong_link(page: Path, target: str) -> str | None:
    """What is wrong with a relative link of `page`."""
    if re.match(r"[a-z]+:", target):
        return None
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    if not there.exists():
        return "leads nowhere"
    if anchor and anchor not in anchors(there.read_text(encoding="utf-8")):
        return "leads to no heading"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_only_what_there_is(page):
    text = page.read_text(encoding="utf-8")
    found = [f"{n}: `{span}` {why}" for n, span in code_spans(text) if (why := wrong(span))]
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    found += [f"({link}) {why}" for link in links if (why := wrong_link(page, link))]
    assert not found, "\n".join((str(page.relative_to(ROOT)), *found))


def test_pages_that_sources_name_are_there():
    named = {
        (p, page) for p, t in sources().items() for page in re.findall(r"docs/[\w/.-]+\.md", t)
    }
    assert named
    assert not [(path, page) for path, page in sorted(named) if not (ROOT / page).exists()]


@pytest.mark.parametrize(
    "span",
    [
        "cluster/no_such_room/controller.py",
        "no_such_file.py",
        "no_such_room/",
        "tests/pure/test_no_such.py",
        "downpour.cluster.no_such",
        "downpour.cluster.config.run.RunConfig.no_such",
        "downpour.NoSuch",
        "test_of_nothing_at_all_that_there_is",
        "RunConfig.no_such_attribute",
        "no_such_function",
        "NoSuchClass",
        "NO_SUCH_CONSTANT",
        "--no-such-option-anywhere",
        "downpour nosuchcommand",
    ],
)
def test_a_name_that_is_not_there_is_found(span):
    assert wrong(span)


@pytest.mark.parametrize(
    "span",
    [
        "cluster/controller/controller.py",
        "docs/",
        "tests/pure/test_docs.py::test_a_page_names_only_what_there_is",
        "downpour",
        "downpour.RunConfig",
        "downpour.cluster.config.run",
        "downpour.cluster.config.run.RunConfig.policy",
        "RunConfig.policy",
        "num_batches",
        "IN_PLACE_BYTES",
        "torch.nn.Module",
        "--replicas-per-process",
        "downpour train mnist-bn",
        "4 P U / k",
    ],
)
def test_a_name_that_is_there_is_not(span):
    assert wrong(span) is None


def test_links_and_their_anchors_are_followed():
    page = ROOT / "README.md"
    assert wrong_link(page, "docs/architecture.md#the-parts") is None
    assert wrong_link(page, "https://example.org/") is None
    assert wrong_link(page, "docs/no_such_page.md") == "leads nowhere"
    assert wrong_link(page, "docs/architecture.md#no-such-heading") == "leads to no heading"

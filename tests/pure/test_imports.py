"""The rules of imports, checked over the sources, and proved to notice a violation.

Packages import one way; no two modules and no two rooms import each other in a circle; Ray is
imported at the edges only; no room has more modules than one can see at a glance.
"""

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.helpers.sources import ROOT, imports_of, parsed, sources_below, text_of

# What each package may import of this project, itself aside.
ALLOWED = {
    "cluster": {"workers", "paramserver", "shuffler", "models", "benchmarks"},
    "workers": {"paramserver", "shuffler", "models"},
    "paramserver": set(),
    "shuffler": set(),
    "models": set(),
}
OURS = {*ALLOWED, "benchmarks", "tests"}
TIME_OF_DAY = {
    "cluster/monitoring/telemetry.py": "a stamp for people",
    "cluster/monitoring/tensorboard.py": "stamps for people, and a file's name",
    "cluster/ray_backend/leavers.py": "Ray tells by it when a node leaves; read once a notice",
    "cluster/reproduce/report.py": "a stamp for people",
    "cluster/run/folder.py": "stamps for people",
    "cluster/trainer/trackers.py": "a stamp for people",
    "cluster/training/api.py": "a run's name",
    "paramserver/transport/network/security.py": "certificates, a day of doubt included",
}
"""Who looks at the time of day, and what for. It is set, and differs between machines: whoever
measures or waits by it ends or starves somebody one day."""
MAX_MODULES = 16
"""Of one room, `__init__` included."""
TIME = re.compile(
    r"\btime\.(?:time|time_ns|localtime|gmtime|strftime|ctime)\b|\bdatetime\.(?:utc)?now\b"
    r"|\bfrom time import\b|\bdate\.today\b"
)
BASES = {"errors", "messages", "workers.spec", "processors", "paths"}
"""Modules of a package's own folder that its rooms rest on; the others there rest on the rooms."""


@functools.cache
def imports_and_calls(source: str) -> tuple[ast.Import | ast.ImportFrom | ast.Call, ...]:
    """The nodes of a source that may import something, wherever they stand."""
    if "import_module" not in source and "__import__" not in source:
        return imports_of(source)
    wanted = ast.Import | ast.ImportFrom | ast.Call
    return tuple(node for node in ast.walk(parsed(source)) if isinstance(node, wanted))


def module_of(root: Path, file: Path) -> str:
    """The name of a source, below `downpour`."""
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yields (line, name below `downpour` or absolute) of every import, wherever it stands.

    Imports for type checking count: they couple two packages as much as any other. So do those
    through `import_module` and `__import__` with a literal name.
    """
    for node in imports_and_calls(source):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("downpour", *package)[: len(package) + 2 - node.level] if node.level else ()
            start = (*base, *(node.module.split(".") if node.module else ()))
            # `from . import x` names a module; so may `from package import x`.
            names = [".".join((*start, alias.name)) for alias in node.names]
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            literal = node.args[0] if node.args else None
            if name in ("import_module", "__import__") and isinstance(literal, ast.Constant):
                names = [str(literal.value)]
        for name in names:
            yield node.lineno, name.removeprefix("downpour.")


def bare(source: str) -> Iterator[tuple[int, str]]:
    """Yields imports of our packages by names that a user's own packages may bear."""
    for node in imports_and_calls(source):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module]
        for name in names:
            if name.split(".")[0] in OURS - {"tests"}:
                yield node.lineno, name


def violations(root: Path) -> list[str]:
    """Returns one line for each import under `root` that breaks a rule."""
    found = []
    for package, allowed in ALLOWED.items():
        files = sorted((root / package).rglob("*.py"))
        if not files:
            found.append(f"{package}/: no sources; was the package renamed?")
        for file in files:
            parts = file.relative_to(root).with_suffix("").parts
            source = file.read_text(encoding="utf-8")
            for line, name in bare(source):
                found.append(f"{file.relative_to(root)}:{line}: write downpour.{name}")
            for line, module in imported_modules(source, parts[:-1]):
                top = module.split(".")[0]
                where = f"{file.relative_to(root)}:{line}"
                if top in OURS and top != package and top not in allowed:
                    found.append(f"{where}: {package} must not import {module}")
                if top == "ray" and package != "cluster" and file.name != "actor.py":
                    found.append(f"{where}: ray belongs in actor.py and cluster/, not here")
                if top == "torch" and package == "shuffler":
                    found.append(f"{where}: the shuffler must start fast, without torch")
    return found


def import_graph(root: Path) -> dict[str, set[str]]:
    """Which modules of the product each of its modules imports."""
    files = {module_of(root, f): f for package in ALLOWED for f in sources_below(root / package)}

    def known(name: str) -> str | None:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name or None

    graph = {}
    for module, file in files.items():
        package = file.parent.relative_to(root).parts
        names = {known(n) for _, n in imported_modules(text_of(file), package)}
        graph[module] = {name for name in names if name not in (None, module)}
    return graph


def room_of(root: Path, module: str) -> str:
    """The room of a module; in a package's own folder, its base or its front."""
    path = root.joinpath(*module.split("."))
    if path.is_dir():
        return module if "." in module else f"{module} (base)"
    room, _, leaf = module.rpartition(".")
    return room if "." in room else f"{room} ({'base' if BASES & {leaf, module} else leaf})"


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """The groups of nodes that can all reach each other."""
    reach = {node: set(imports) for node, imports in graph.items()}
    while more := {n: set().union(*(reach[m] for m in reach[n])) - reach[n] for n in reach}:
        if not any(more.values()):
            break
        reach = {node: found | more[node] for node, found in reach.items()}
    groups = {frozenset(n for n in reach[node] if node in reach[n]) for node in graph}
    return [set(group) for group in groups if len(group) > 1]


def test_imports_run_one_way():
    assert violations(ROOT) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles(import_graph(ROOT)) == []


def test_no_rooms_import_each_other_in_a_circle():
    rooms: dict[str, set[str]] = {}
    for module, imports in import_graph(ROOT).items():
        room = room_of(ROOT, module)
        rooms.setdefault(room, set()).update(room_of(ROOT, m) for m in imports)
        rooms[room].discard(room)
    assert circles(rooms) == []


def test_a_room_can_be_seen_at_a_glance():
    counts: dict[str, int] = {}
    for module in import_graph(ROOT):
        path = ROOT.joinpath(*module.split("."))
        room = module if path.is_dir() else module.rpartition(".")[0]
        counts[room] = counts.get(room, 0) + 1
    assert {room: n for room, n in counts.items() if n > MAX_MODULES} == {}


CONTROLLER = (
    {"controller"},
    {"state"},
    {"stages"},
    {"reactions"},
    {"hang_reactions"},
    {"partition_reactions", "departure_reactions"},
    {"parts"},
    {"members.replica_processes", "members.evaluation", "members.checkpointing"},
    {"members.partitions"},
    {"members.followers"},
    {"failures.account"},
    {"protocol.waits", "protocol.events"},
    {"protocol.instructions"},
    {"leases.manager", "protocol.backend"},
    {"leases.book", "leases.warm_start"},
    {"leases.coverage", "failures.policy", "hangs.patience", "departures.notice"},
)
"""Parts of the controller: each knows only those further down."""
IMPURE = {"asyncio", "datetime", "io", "os", "pathlib", "ray", "socket", "threading", "time"}
"""What a state that is pure has no need of; all below `controller` belongs to it."""


def source_of(part: str) -> str:
    """The source of a part of the controller."""
    path = ROOT / "cluster" / "controller" / f"{part.replace('.', '/')}.py"
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("rank", range(len(CONTROLLER)))
def test_the_controllers_parts_know_only_those_below_them(rank):
    not_below = set().union(*CONTROLLER[: rank + 1])
    for name in CONTROLLER[rank]:
        source = source_of(name)
        known = {module for _, module in imported_modules(source, ("cluster", "controller"))}
        forbidden = {f"cluster.controller.{of}" for of in not_below}
        assert not {m for m in known if any(f"{m}.".startswith(f"{of}.") for of in forbidden)}


def test_the_order_has_every_part_of_the_controller():
    room = ROOT / "cluster" / "controller"
    parts = {".".join(p.relative_to(room).with_suffix("").parts) for p in room.rglob("*.py")}
    assert {p for p in parts if not p.endswith("__init__")} == set().union(*CONTROLLER)


@pytest.mark.parametrize("part", sorted(set().union(*CONTROLLER[1:])))
def test_the_state_of_a_run_is_pure(part):
    known = imported_modules(source_of(part), ("cluster", "controller"))
    assert not {name for _, name in known if name.split(".")[0] in IMPURE}


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
        ("cluster/a.py", "import ray, torch, downpour.workers.step\nimport downpour.models\n"),
        ("workers/a.py", "from downpour.paramserver.client import Client\nimport torch\n"),
        ("workers/a.py", "from . import step\nfrom .step import run\n"),
        ("paramserver/actor.py", "import ray\n"),
        ("paramserver/transport/a.py", "from ..messages import Push\nfrom .. import state\n"),
        ("shuffler/a.py", "import numpy\nfrom downpour.shuffler.plan import Plan\n"),
        ("models/a.py", "import raymond\nimport workerspace\n"),
    ],
)
def test_what_is_allowed_passes(planted, path, source):
    assert planted(path, source) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("workers/a.py", "import downpour.cluster.run\n", "workers must not import cluster.run"),
        ("models/a.py", "from downpour.paramserver import rules\n", "must not import paramserver"),
        ("models/a.py", "import downpour.workers\n", "models must not import workers"),
        ("paramserver/a.py", "import downpour.shuffler\n", "paramserver must not import shuffler"),
        ("shuffler/a.py", "from downpour.models.mlp import A\n", "must not import models.mlp"),
        ("paramserver/a.py", "def f():\n    import downpour.models\n", "a.py:2: paramserver must"),
        (
            "paramserver/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import downpour.models\n",
            "a.py:3: paramserver must not",
        ),
        ("models/a.py", "import importlib\nimportlib.import_module('downpour.cluster')\n", "clus"),
        ("models/a.py", "from .. import cluster\n", "models must not import cluster"),
        ("cluster/a.py", "import tests.fakes\n", "cluster must not import tests.fakes"),
        ("workers/step.py", "import ray.util\n", "ray belongs in actor.py"),
        ("shuffler/plan.py", "from ray import get\n", "ray belongs in actor.py"),
        ("shuffler/decode.py", "import torch.nn\n", "without torch"),
        ("shuffler/actor.py", "from torch import nn\n", "without torch"),
        ("paramserver/transport/a.py", "from ...workers import step\n", "must not import workers"),
        ("workers/a.py", "if True:\n    from workers import step\n", "write downpour.workers"),
    ],
)
def test_a_violation_is_noticed(planted, path, source, complaint):
    (found,) = planted(path, source)
    assert complaint in found


def test_a_missing_package_is_noticed(tmp_path):
    assert len(violations(tmp_path)) == len(ALLOWED)


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == [{"b", "c"}]


def times_of_day(source: str) -> set[str]:
    """What in a source looks at the time of day."""
    return set(TIME.findall(source))


def test_nobody_waits_or_measures_by_the_time_of_day():
    files = {
        str(file.relative_to(ROOT))
        for package in ALLOWED
        for file in sources_below(ROOT / package)
        if times_of_day(text_of(file))
    }
    assert files == TIME_OF_DAY.keys()


@pytest.mark.parametrize(
    "source",
    [
        "time.time()",
        "clock: Clock = time.time\n",
        "time.time_ns()",
        "datetime.datetime.now(UTC)",
        "from time import time",
        "time.strftime(FORM)",
    ],
)
def test_a_look_at_the_time_of_day_is_noticed(source):
    assert times_of_day(source)
    assert not times_of_day("time.monotonic(); self.time(); RandomState.now(); time.thread_time()")

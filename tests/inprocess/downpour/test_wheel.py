"""The wheel holds all of the package, and its commands work in a folder that holds nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers import wheel
from tests.helpers.commands import ROOT

PARTS = ("benchmarks", "cluster", "models", "paramserver", "shuffler", "workers")
COMMANDS = """
import importlib.util, pathlib, sys
import click
import downpour
from downpour.cluster.cli.commands import downpour as group
from downpour.cluster.errors import run_cli

assert pathlib.Path(downpour.__file__).is_relative_to(sys.prefix), downpour.__file__
found = [n for n in sys.argv[1].split(",") if importlib.util.find_spec(n) is not None]
assert not found, f"{found} are importable beside downpour"

def helps(command, path):
    assert run_cli(group, [*path, "--help"]) == 0, path
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            helps(below, [*path, name])

helps(group, [])
for name in downpour.__all__:
    getattr(downpour, name)
assert run_cli(group, ["recipes"]) == 0
assert run_cli(group, ["recipes", "mnist-bn"]) == 0
assert run_cli(group, ["cluster-files", "cluster"]) == 0
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.build(tmp_path_factory.mktemp("wheel"))


def test_every_module_and_every_data_file_is_in_it(built: Path) -> None:
    names = wheel.names_in(built)
    wanted = {
        f"downpour/{path.relative_to(ROOT)}"
        for part in PARTS
        for path in (ROOT / part).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }
    wanted = {name for name in wanted if not name.startswith("downpour/benchmarks/results/")}
    wanted |= {f"downpour/{path.relative_to(ROOT)}" for path in ROOT.glob("data/mnist-binary/*")}
    own = ("__init__.py", "__main__.py", "callbacks.py", "py.typed")
    wanted |= {f"downpour/{name}" for name in own}
    wanted.add("downpour/requirements.lock")
    assert wanted - names == set()
    others = {name for name in names - wanted if ".dist-info/" not in name}
    assert others == set(), "what a wheel has no need of"


def test_its_commands_work_in_an_empty_folder(built: Path, tmp_path: Path) -> None:
    environment = wheel.environment(tmp_path / "venv")
    environment.install(built)
    home, empty = tmp_path / "home", tmp_path / "empty"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0" * 64)
    empty.mkdir()
    variables = environment.variables(home)
    run = wheel.run(environment.downpour, "--version", cwd=empty, env=variables)
    assert re.search(r"\d+\.\d+", run)
    names = ",".join((*PARTS, "data"))
    wheel.run(environment.python, "-c", COMMANDS, names, cwd=empty, env=variables)
    written = empty / "cluster"
    said = wheel.run(environment.downpour, "check", "ray_cluster.yaml", cwd=written, env=variables)
    assert said == "ray_cluster.yaml: nothing to change\n"

"""Published networks, unchanged, all the way: an epoch by a `Trainer`, `evaluate`, `predict`,
`export` and a server's answer, one network after the other on one Ray (`tests.helpers.net_course`).

The oracle is the network itself, its batch normalization not folded; what float32 costs it, it
says itself in float64.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import commands, library_nets, net_course
from tests.helpers.ray_nodes import OPEN, RayNodes

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(900)]


class Course:
    """The process that networks are put through in."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        assert self.answer() == {"ready": True}

    def ask(self, number: int) -> Any:
        """What comes out for a network."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next line that it says."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"the process has ended: {self._log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def course(one_node: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    library_nets.skip_without_libraries()
    folder = tmp_path_factory.mktemp("nets")
    variables = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", net_course.__name__, one_node.address, str(folder)],
            cwd=commands.ROOT,
            env={**variables, **OPEN, "HOME": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield Course(process, folder / "log")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0, (folder / "log").read_text()[-3000:]
    finally:
        commands.end(process)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize(
    "number",
    range(len(library_nets.ALL)),
    ids=[f"{net.library}-{net.name}" for net in library_nets.ALL],
)
def test_a_published_network_is_trained_and_used(course: Course, number: int) -> None:
    net = library_nets.ALL[number]
    found = course.ask(number)
    assert "error" not in found, found["error"]
    sys.stdout.write(f"{net.name} {found['seconds']} {found['differences']}\n")
    rows = net_course.SCORED * library_nets.CLASSES
    trained = net_course.FEW if net.size > net_course.LARGE else net_course.TRAINED
    result, evaluated = found["result"], found["evaluated"]
    assert result["exactly_once"] is True
    assert result["examples"] == trained * library_nets.CLASSES
    assert result["refused"] == 0
    assert math.isfinite(evaluated["loss"])
    assert evaluated["examples"] == rows
    # An answer that is a tie but for rounding may fall either way.
    assert abs(evaluated["accuracy"] - result["accuracy"]) < 1.5 / rows
    assert found["exported"]["checked_on"] == rows
    differences = found["differences"]
    assert differences["allowed"] < 1e-2, differences
    assert all(value <= differences["allowed"] for value in differences.values()), differences

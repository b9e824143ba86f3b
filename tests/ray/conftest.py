"""A Ray and a run that several tests share: starting one costs more than most of what is tested.

Tests that are about Ray's start or end, or that change Ray itself, start their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import commands
from tests.helpers.ray_nodes import RayNodes, connecting, ray_nodes
from tests.helpers.small_run import SMALL


@pytest.fixture(scope="session")
def one_node() -> Iterator[RayNodes]:
    """A Ray of one node with two processors."""
    with ray_nodes([], head_cpus=2) as nodes:
        yield nodes


@pytest.fixture
def ray_here(one_node: RayNodes) -> Iterator[RayNodes]:
    """The same, for commands that this test starts."""
    with connecting():
        yield one_node


@pytest.fixture(scope="session")
def trained(one_node: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three epochs; beside it, as `log`, what the command said.

    Its rate decays, as it does by the end of a real run, and its statistics are the server's own.
    """
    root = tmp_path_factory.mktemp("trained")
    log, run = root / "log", root / "runs" / "a"
    with connecting():
        status = commands.run(
            *("train", "mnist-bn", "--runs", run.parent, "--name", "a", "--epochs", "3"),
            *("--address", one_node.address, "--partitions", "3", "--decay-factor", "0.2", *SMALL),
            *("--bn-statistics", "moving"),
            log=log,
        )
    assert status == 0, log.read_text()
    return run

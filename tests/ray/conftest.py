"""A Ray and a run that several tests share: starting one costs more than most of what is tested.

Tests that are about Ray's start or end, or that change Ray itself, start their own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import commands
from tests.helpers.ray_nodes import RayNodes, connecting, ray_nodes
from tests.helpers.small_run import SMALL, OwnRay


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


@pytest.fixture(scope="session")
def on_its_own_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRay]:
    """A run over the network with two partitions; it is told to stop when all have looked at it."""
    folder = tmp_path_factory.mktemp("own")
    home, log, run = folder / "home", folder / "log", folder / "a"
    home.mkdir()
    with tempfile.TemporaryDirectory(prefix="dp", dir="/tmp") as short:  # Ray's sockets are there
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(home))
            patch.setenv("RAY_TMPDIR", short)
            patch.setenv("RAY_metrics_report_interval_ms", "1000")
            process = commands.start(
                *("train", "mnist-bn", "--runs", folder, "--name", "a", "--epochs", "750", *SMALL),
                *("--transport", "network", "--partitions", "2", "--evaluate-every-s", "1"),
                *("--past-bound", "rekey"),
                log=log,
            )
        try:
            commands.wait_for(
                lambda: commands.updates(run) > 20 or process.poll() is not None, "updates"
            )
            assert process.poll() is None, log.read_text()
            yield OwnRay(process, run, log, home, Path(short))
            assert commands.run("stop", run, log=folder / "stop.log") == 0
            assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
        finally:
            commands.end(process)
    assert (run / "tensorboard").is_dir()

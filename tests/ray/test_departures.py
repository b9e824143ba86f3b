"""A node of replicas is to leave, as Ray tells: its processes move, and nothing is run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import commands
from tests.helpers.ray_nodes import connecting, ray_nodes
from tests.helpers.small_run import SMALL, check_result

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(480)]
NODES = ({"downpour": "replicas"}, {"downpour": "replicas"})


def test_processes_on_a_node_that_is_to_leave_move_and_nothing_is_run_again(
    tmp_path: Path,
) -> None:
    log, run = tmp_path / "log", tmp_path / "a"
    with ray_nodes(NODES, head_cpus=2) as nodes, connecting():
        process = commands.start(
            *("train", "mnist-bn", "--runs", tmp_path, "--name", "a", "--epochs", "12"),
            *("--address", nodes.address, *SMALL, "--replicas-per-process", "2"),
            log=log,
        )
        try:
            commands.wait_for(lambda: commands.updates(run) > 0, "updates")
            commands.wait_for(lambda: len(nodes.processes("Replicas")) == 2, "both processes")
            before = nodes.processes("Replicas")
            nodes.drain("replicas")
            commands.wait_for(
                lambda: len(nodes.processes("Replicas") - before) == 1, "the process elsewhere"
            )
            assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
        finally:
            commands.end(process)
    result = commands.result(run)
    check_result(result, epochs=12)
    assert result["restarts"] == {}
    assert result["duplicates"] == 0
    events = (run / "events.jsonl").read_text()
    assert "moves: its node is to leave" in events
    assert "are run again" not in events

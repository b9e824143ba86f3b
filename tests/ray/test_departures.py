"""A node is to leave, as Ray tells: all that is there moves, and nothing is run again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.helpers import commands
from tests.helpers.ray_nodes import connecting, ray_nodes
from tests.helpers.small_run import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(480)]
NODES = ({"downpour": "replicas"}, {"downpour": "replicas"})
THERE = (
    *("--partitions-on", "downpour=replicas", "--shufflers-on", "downpour=replicas"),
    *("--evaluator-on", "downpour=replicas", "--partitions", "2"),
)
"""One of two partitions, the shuffler, the evaluator and half of the replicas on the first node."""
MOVES = (
    "has moved, with all that it had",
    "1 shufflers have moved",
    "the evaluator moves: its node is to leave",
    "moves: its node is to leave",
)


def test_all_that_is_on_a_node_that_is_to_leave_moves_and_nothing_is_run_again(
    tmp_path: Path,
) -> None:
    """A run without end, stopped once it has gone on; it is the same to the bit in the replay."""
    log, run = tmp_path / "log", tmp_path / "a"
    with ray_nodes(NODES, head_cpus=2) as nodes, connecting():
        process = commands.start(
            *("train", "mnist-bn", "--runs", tmp_path, "--name", "a", "--epochs", "70"),
            *("--address", nodes.address, *SMALL, "--replicas-per-process", "2", *THERE),
            *("--record-pushes", "--checkpoint-every-s", "1000", "--no-dashboard"),
            log=log,
        )
        try:
            commands.wait_for(lambda: commands.updates(run) > 0, "updates")
            commands.wait_for(lambda: len(nodes.processes("Replicas")) == 2, "both processes")
            commands.wait_for(lambda: nodes.processes("Evaluator"), "the evaluator")
            replicas = nodes.processes("Replicas")
            nodes.drain("replicas")
            for what in MOVES:
                commands.wait_for(lambda what=what: told(run, what), what)
            commands.wait_for(
                lambda: len(nodes.processes("Replicas") - replicas) == 1, "the process elsewhere"
            )
            before = commands.updates(run)
            commands.wait_for(lambda: commands.updates(run) > before + 50, "updates after that")
            process.send_signal(signal.SIGTERM)
            assert process.wait(commands.DEADLINE_S) == 143, log.read_text()
        finally:
            commands.end(process)
    for what in ("replaced", "starts again from", "died"):
        assert told(run, what) == 0, log.read_text()
    assert told(run, "are run again") == told(run, 'event": "0 mini-batches are run again')
    replay = tmp_path / "replay"
    assert commands.run("replay", run, log=replay) == 0, replay.read_text()


def told(run: Path, what: str) -> int:
    """How many lines of `events.jsonl` have this in them."""
    path = run / "events.jsonl"
    return sum(what in line for line in path.read_text().splitlines()) if path.exists() else 0

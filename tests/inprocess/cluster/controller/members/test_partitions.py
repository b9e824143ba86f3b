"""Partitions that die, or whose thread fails, in the middle of a run: real ones, on threads."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from downpour.cluster.controller.leases.book import Lease
from downpour.paramserver.config import NetworkConfig
from downpour.paramserver.partition.state import PartitionState
from tests.helpers import tiny
from tests.helpers.runs import Run
from tests.helpers.thread_backend import ThreadBackend


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("transport", ["shared", "network"])
@pytest.mark.parametrize("checkpoint_every_s", [0.05, 1000.0])
def test_a_partition_that_dies_is_replaced_and_gets_what_it_lost(
    tmp_path: Path, data: str, transport: Literal["shared", "network"], checkpoint_every_s: float
) -> None:
    """From its last checkpoint, or from the initial weights where there is none yet."""
    config = tiny.config(data, epochs=3, checkpoint_every_s=checkpoint_every_s)
    network = NetworkConfig(transport=transport)
    config = dataclasses.replace(config, server=dataclasses.replace(config.server, network=network))
    killed: list[int] = []

    def kill(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        taken = any(run.folder.path.glob("checkpoints/*/manifest.json"))
        if checkpoint_every_s < 1 and not taken:
            return  # there is to be one to go on from, however fast the run is
        for number, partition in ((8, 1), (20, 0), (25, 1)):
            if lease.id >= number and number not in killed:
                backend.kill_partition(partition)
                killed.append(number)

    run = Run(tmp_path / "run", config)
    outcome = run.go(kill)
    assert killed == [8, 20, 25]
    run.assert_exactly_once(outcome)
    assert run.backend.partition_starts == [2, 3, 1]
    assert outcome.restarts["partition"] == 3
    versions = [r.version for r in outcome.reports]
    assert versions == [3 * run.plan.num_batches] * 3
    assert outcome.reports[2].duplicates > 0  # it ignored what only the others had lost
    events = (run.folder.path / "events.jsonl").read_text()
    assert "partition 1 died: replaced, 1 of 100" in events
    assert "mini-batches are run again" in events
    assert ("from the initial weights" in events) == (checkpoint_every_s > 1)


def test_a_partition_whose_thread_fails_is_replaced(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_all, failed = PartitionState.apply_all, []

    def failing(self: PartitionState, *arguments: Any) -> Any:
        if self.partition.index == 1 and self.version >= 40 and not failed:
            failed.append(self)
            raise MemoryError("by the test")
        return apply_all(self, *arguments)

    monkeypatch.setattr(PartitionState, "apply_all", failing)
    run = Run(tmp_path / "run", tiny.config(data, epochs=2, checkpoint_every_s=0.1))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    # The evaluator may have been connecting to the partition just then.
    assert outcome.restarts["partition"] == 1
    assert "replicas" not in outcome.restarts
    events = (run.folder.path / "events.jsonl").read_text()
    assert "partition 1 failed (MemoryError: by the test): replaced" in events
    assert "everybody is back after" in events


def test_resume_goes_on_from_partitions_of_different_instants(tmp_path: Path, data: str) -> None:
    """A checkpoint of snapshots taken at different times, as they are without a barrier."""
    run = Run(tmp_path / "run", tiny.config(data, epochs=2))
    early: dict[int, Any] = {}

    def look(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id in (6, 9, 12):
            index = lease.id // 3 - 2
            folder = run.store.begin(900)
            early[index] = backend.partitions[index].snapshot(folder)
        if lease.id == 14:
            run.controller.request_stop("SIGTERM")

    run.go(look)
    versions = [early[i].version for i in range(3)]
    assert len(set(versions)) > 1
    from downpour.cluster.run.checkpoint import Checkpoint, slowest

    files = tuple(early[i] for i in range(3))
    run.store.commit(Checkpoint(number=900, updates=slowest(files), elapsed_s=1.0, files=files))
    again = Run(tmp_path / "run", run.config, resume=True)
    assert again.resumed is not None
    assert again.resumed.number == 900
    outcome = again.go()
    again.assert_exactly_once(outcome)
    assert sum(r.duplicates for r in outcome.reports) > 0

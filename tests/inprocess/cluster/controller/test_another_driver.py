"""A driver dies, and the next one goes on with the processes that have outlived it, on threads."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from downpour.cluster.controller.controller import Controller
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.run.checkpoint import going_on
from tests.helpers import tiny
from tests.helpers.runs import Run
from tests.helpers.thread_backend import ThreadBackend


class Died(Exception):
    """What ends the first driver, wherever it stands."""


class Heir(ThreadBackend):
    """Takes over what another backend has left: `cluster.ray_backend.members` does it with Ray."""

    def __init__(self, left: ThreadBackend) -> None:
        super().__init__(left.config, left.plan, store=left.store)
        self.partitions, self.processes = left.partitions, left.processes
        self._left = list(left.actors)
        self.adopted = 0

    def start_partition(self, index: int, checkpoint: Any) -> Future[Any]:
        assert self.partition_starts[index] == 0, "one that lives is started again"
        self.partition_starts[index] += 1
        return self.pool.submit(self.partitions[index].endpoint)

    def start_process(self, index: int) -> Future[Any]:
        self.actors[index], self._left[index] = self._left[index], None
        if self.actors[index] is None:  # it was still being started
            return super().start_process(index)
        self.adopted += 1
        return self.reconnect_process(index)


def test_the_next_driver_goes_on_with_every_update(tmp_path: Path) -> None:
    """Windows are on their way when the driver dies, and there is no checkpoint."""
    data = tiny.dataset(tmp_path / "data")
    run = Run(tmp_path / "run", tiny.config(data, epochs=6, partitions=2, checkpoint_every_s=1e9))

    def die(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id >= 12:
            raise Died

    run.backend.on_window = die
    with pytest.raises(Died):
        run.controller.run()
    told = [partition.begin_session() for partition in run.backend.partitions]
    version = min(papers.version for papers in told)
    resumed = going_on(None, run.folder.status(), version=version, metric="accuracy")

    again = Run(tmp_path / "run", run.config, resume=True)
    assert again.resumed is None
    again.backend.stop()
    heir = again.backend = Heir(run.backend)
    again.controller = Controller(
        config=run.config,
        plan=run.plan,
        backend=heir,
        folder=again.folder,
        store=again.store,
        listener=again.telemetry,
        resumed=resumed,
        followers_before=(0, 0),
    )
    outcome = again.go()
    run.backend.partitions = []  # they are the heir's, and have ended
    run.backend.stop()
    again.assert_exactly_once(outcome)
    assert [report.updates_before for report in outcome.reports] == [p.version for p in told]
    total = run.config.policy.epochs * run.plan.num_batches
    assert [report.version for report in outcome.reports] == [total, total]
    assert sum(outcome.restarts.values()) == 0
    assert heir.adopted

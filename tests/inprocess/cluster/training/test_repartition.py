"""A run goes on with another number of partitions, and every mini-batch is applied once still."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.errors import UserError
from downpour.cluster.run.checkpoint import Checkpoint, slowest
from downpour.cluster.training import change, inputs
from downpour.paramserver.partition.applied_set import APPLIED
from downpour.paramserver.partition.snapshot import SnapshotFile
from downpour.paramserver.rules.choice import RuleName
from tests.helpers import tiny
from tests.helpers.runs import Run
from tests.helpers.served_partitions import by_deadline
from tests.helpers.thread_backend import ThreadBackend


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("before", "after", "rule"), [(3, 2, "lars"), (2, 5, "momentum"), (3, 1, "adam")]
)
def test_partitions_are_joined_and_cut_anew(
    tmp_path: Path, data: str, before: int, after: int, rule: RuleName
) -> None:
    """With Adam, weights are averaged and a layer is frozen besides."""
    config = tiny.config(data, epochs=3, partitions=before)
    config = dataclasses.replace(config, server=dataclasses.replace(config.server, rule=rule))
    if rule == "adam":
        model = dataclasses.replace(config.model, freeze=("hidden.0.linear",))
        server = dataclasses.replace(config.server, ema=0.9)
        config = dataclasses.replace(config, model=model, server=server)
    run = Run(tmp_path / "run", config)
    opened = inputs.check_data(config)
    inputs.check_data_unchanged(run.folder, opened)

    early: dict[int, SnapshotFile] = {}

    def stop(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        index = lease.id // 8 - 1  # far enough from each other for updates in between
        if lease.id % 8 == 0 and 0 <= index < before:
            if index:
                seen = early[index - 1].version
                by_deadline(lambda: backend.partitions[index].report().version > seen)
            early[index] = backend.partitions[index].snapshot(run.store.begin(900))
        if lease.id == 8 * before + 2:
            run.controller.request_stop("SIGTERM")

    run.go(stop)
    files = tuple(early[i] for i in range(before))
    assert len({f.version for f in files}) > 1, "of different instants"
    was = Checkpoint(number=900, updates=slowest(files), elapsed_s=1.0, files=files)
    run.store.commit(was)

    change.change(run.folder, opened, replicas=3, partitions=after)
    changed = run.folder.config()
    assert (changed.server.partitions, changed.replicas.replicas) == (after, 3)
    again = Run(tmp_path / "run", changed, resume=True)
    assert again.resumed is not None
    assert again.resumed.number == was.number + 1
    assert len(again.resumed.files) == after
    assert len({f.version for f in again.resumed.files}) == 1
    assert again.resumed.updates >= max(f.version for f in was.files)
    outcome = again.go()
    again.assert_exactly_once(outcome)
    assert all((flags == APPLIED).all() for flags in again.flags)
    assert outcome.evaluation is not None
    assert np.isfinite(outcome.evaluation.score.loss)


def test_what_cannot_be_cut_so_changes_nothing(tmp_path: Path, data: str) -> None:
    config = tiny.config(data, epochs=1)
    run = Run(tmp_path / "run", config)
    opened = inputs.check_data(config)
    with pytest.raises(Exception, match="partitions is 9999"):
        change.change(run.folder, opened, replicas=None, partitions=9999)
    assert run.folder.config() == config
    recorded = tiny.config(data, epochs=1, record_pushes=True)
    other = Run(tmp_path / "other", recorded)
    with pytest.raises(UserError, match="its pushes are recorded"):
        change.change(other.folder, opened, replicas=None, partitions=2)

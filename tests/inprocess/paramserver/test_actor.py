"""The actor of a partition, as a plain class."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
import torch

from downpour.paramserver import actor
from downpour.paramserver.client import ParameterClient
from downpour.paramserver.errors import (
    BadSnapshot,
)
from downpour.paramserver.messages import (
    Outcome,
)
from downpour.paramserver.partition import snapshot
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.spec import PartitionSpec, PartitionStart, Restore
from tests.helpers.served_partitions import EXACT, KEY, F, P, gradient_of, push

torch.set_num_threads(1)


def test_the_actor_serves_reports_snapshots_and_comes_back(tmp_path: Path) -> None:
    (part,) = split(num_parameters=P, num_features=F, num_decayed=0, num_partitions=1)
    spec = PartitionSpec(partition=part, update=EXACT)
    first = actor.PartitionActor(spec, PartitionStart(key=KEY, origin=np.zeros(P, np.float32)))
    assert repr(first) == "Partition 1 of 1"
    client = ParameterClient([first.endpoint()], key=KEY, num_mailboxes=1)
    assert push(client, 0, replica=4) is Outcome.APPLIED
    assert push(client, 1, replica=4, loss=float("nan")) is Outcome.REFUSED_LOSS
    assert push(client, 0, replica=4) is Outcome.DUPLICATE
    report = first.report()
    assert (report.version, report.examples, report.rate) == (1, 32, 0.5)
    assert (report.batches_applied, report.refused) == (1, 1)
    assert (report.duplicates, report.malformed) == (1, 0)
    assert (report.staleness, report.refusals) == ({4: [1]}, {4: 1})
    assert (report.connections, report.connections_closed) == (1, {})
    assert first.flags([0, 7])[0][:3].tolist() == [1, 2, 0]
    file = first.snapshot(tmp_path.as_uri())
    path = tmp_path / file.name
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
    client.close()

    assert (report.updates_before, report.first_update_age_s is None) == (0, False)
    papers = first.begin_session()  # for another driver
    assert (papers.version, papers.key) == (1, KEY)
    report = first.report()
    assert (report.updates_before, report.version) == (1, 1)
    assert (report.first_update_age_s, report.last_update_age_s) == (None, None)
    client = ParameterClient([first.endpoint()], key=papers.key, num_mailboxes=1)
    assert push(client, 0, replica=4) is Outcome.DUPLICATE
    assert push(client, 2, replica=4) is Outcome.APPLIED
    report = first.report()
    assert report.version == 2
    assert report.first_update_age_s is not None
    client.close()
    first.stop()

    origin = Restore(uri=path.as_uri(), sha256=file.sha256)
    second = actor.PartitionActor(spec, PartitionStart(key=KEY, origin=origin))
    client = ParameterClient([second.endpoint()], key=KEY, num_mailboxes=1)
    assert push(client, 0) is Outcome.DUPLICATE
    weights, versions = np.empty(P, np.float32), [0]
    client.pull(weights, versions)
    assert versions == [1]
    assert np.array_equal(weights, -0.5 * gradient_of(0).numpy())
    client.close()
    second.stop()
    origin = Restore(uri=path.as_uri(), sha256="0" * 64)
    with pytest.raises(BadSnapshot, match="checksum"):
        actor.PartitionActor(spec, PartitionStart(key=KEY, origin=origin))
    assert snapshot.read(pyarrow.fs.LocalFileSystem(), str(path)).partition == part

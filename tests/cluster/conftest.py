"""Four hosts for one test: head, partitions, shufflers, replicas."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import bed as hosts
from tests.cluster.launched import Cluster, launched

HEAD, PARTITIONS, SHUFFLERS = 0, 1, 2


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if reason := hosts.missing():
        pytest.skip(reason)
    with launched(4, {"partitions": PARTITIONS, "shufflers": SHUFFLERS}) as cluster:
        yield cluster

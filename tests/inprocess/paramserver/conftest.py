"""Partitions reached over shared memory."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.helpers.served_partitions import Bystander, Cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with contextlib.closing(Cluster()) as cluster:
        yield cluster


@pytest.fixture
def two() -> Iterator[Cluster]:
    with contextlib.closing(Cluster(2)) as cluster:
        yield cluster


@pytest.fixture
def bystander(cluster: Cluster) -> Bystander:
    return Bystander(cluster)

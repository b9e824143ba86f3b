"""Partitions reached over the network; encrypted and not, with a client's thread and without."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from downpour.paramserver.transport.network import client as network_client
from downpour.paramserver.transport.network.security import (
    RunCredentials,
)
from tests.helpers.networked import RUN, Networked
from tests.helpers.served_partitions import EXACT


@pytest.fixture(params=["encrypted", "plain"])
def keys(request: pytest.FixtureRequest) -> RunCredentials | None:
    return RUN if request.param == "encrypted" else None


@pytest.fixture
def one(keys: RunCredentials | None) -> Iterator[Networked]:
    with contextlib.closing(Networked(keys=keys)) as cluster:
        yield cluster


@pytest.fixture
def two(keys: RunCredentials | None) -> Iterator[Networked]:
    with contextlib.closing(Networked(2, keys=keys)) as cluster:
        yield cluster


@pytest.fixture(params=["inline", "thread"])
def driven(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who moves the client's bytes, whatever their number."""
    monkeypatch.setattr(network_client, "THREAD_BYTES", 0 if request.param == "thread" else 1 << 62)
    return str(request.param)


@pytest.fixture
def large(keys: RunCredentials | None) -> Iterator[Networked]:
    weights = torch.zeros(3_000_000)
    with contextlib.closing(
        Networked(keys=keys, weights=weights, num_features=0, config=EXACT)
    ) as cluster:
        yield cluster

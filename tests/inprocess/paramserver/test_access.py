"""Which way a process reaches a partition, and whole runs over each."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from downpour.paramserver.access import way
from downpour.paramserver.config import NetworkConfig
from downpour.paramserver.errors import (
    NotColocated,
)
from downpour.paramserver.messages import WireDtype
from downpour.paramserver.partition import record
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.transport.endpoint import Endpoint, NetworkAddress
from downpour.paramserver.transport.names import NODE
from tests.helpers import tiny
from tests.helpers.runs import Run, assert_replays_to_the_bit, recorded
from tests.helpers.thread_backend import ThreadBackend


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


def over_the_network(config: Any, **network: Any) -> Any:
    changed = dataclasses.replace(config.server.network, **{"transport": "network"} | network)
    return dataclasses.replace(config, server=dataclasses.replace(config.server, network=changed))


@pytest.mark.parametrize(
    "network",
    [{}, {"encrypt": False}, {"wire": "bfloat16"}, {"wire": "int4"}],
    ids=["encrypted", "plain", "bfloat16", "int4"],
)
def test_every_mini_batch_is_applied_exactly_once(
    tmp_path: Path, data: str, network: dict[str, Any]
) -> None:
    killed: list[int] = []

    def kill_one(backend: ThreadBackend, replica: int, lease: Any) -> None:
        if lease.id == 7:
            backend.kill_process(replica % 2)
            killed.append(lease.id)

    run = Run(tmp_path / "run", over_the_network(tiny.config(data), **network))
    outcome = run.go(kill_one)
    assert killed == [7]
    run.assert_exactly_once(outcome)
    assert outcome.evaluation is not None
    assert outcome.evaluation.score.accuracy > 0.5


def test_some_partitions_on_this_machine_and_some_on_another(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each goes by its own way, and is recorded so: a replay rounds what was rounded, no more."""
    monkeypatch.setattr("downpour.paramserver.access.measure", lambda *_, **__: 110.0)
    monkeypatch.setattr("downpour.paramserver.transport.network.link_speed.SMALLEST", 0)
    run = recorded(tmp_path / "run", over_the_network(tiny.config(data), wire="auto"))
    run.backend.access = dataclasses.replace(run.backend.access, transport="auto")
    here = run.backend._endpoints

    def endpoints() -> list[Any]:
        found = here()
        found[1] = dataclasses.replace(found[1], machine="another")
        return found

    monkeypatch.setattr(run.backend, "_endpoints", endpoints)
    networked: list[int] = []

    def look(backend: ThreadBackend, replica: int, lease: Any) -> None:
        networked.extend(a._client.num_networked for a in backend.actors if a and a._client)

    outcome = run.go(look)
    run.assert_exactly_once(outcome)
    assert set(networked) == {1}
    branches = [record.read(path) for path in record.files(tmp_path / "run" / "record")]
    wires = {(branch.partition, entry.wire) for branch in branches for entry in branch.entries}
    assert wires == {(0, WireDtype.FLOAT32), (1, WireDtype.INT4), (2, WireDtype.FLOAT32)}
    told = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    choices = [line for line in told if "partition 1 by int4, at 110 MB/s (wire auto)" in line]
    assert len(choices) == len(run.backend.actors)
    assert_replays_to_the_bit(tmp_path / "run", outcome)


@pytest.mark.parametrize("transport", ["auto", "network"])
def test_a_slot_that_is_alone_pulls_what_it_has_pushed(
    tmp_path: Path, data: str, transport: str
) -> None:
    config = tiny.config(data, replicas=1, concurrent_steps=1, epochs=1, partitions=2)
    run = Run(tmp_path / "run", over_the_network(config, transport=transport))
    outcome = run.go()
    for report in outcome.reports:
        assert report.staleness == {0: [run.plan.num_batches]}, "no step was ever stale"


(PARTITION,) = split(num_parameters=64, num_features=3, num_decayed=0, num_partitions=1)


ENDPOINT = Endpoint(
    partition=PARTITION,
    machine="here",
    address="a",
    network=NetworkAddress(host="10.0.0.1", port=7),
)


def test_the_way_to_a_partition() -> None:
    assert way(ENDPOINT, "auto", "here") == "shared"
    assert way(ENDPOINT, "auto", "there") == "network"
    assert way(ENDPOINT, "network", "here") == "network"
    assert way(ENDPOINT, "shared", "here") == "shared"
    with pytest.raises(NotColocated, match=r"another machine.*--transport auto"):
        way(ENDPOINT, "shared", "there")
    deaf = replace(ENDPOINT, network=None)
    assert way(deaf, "auto", "here") == "shared"
    with pytest.raises(NotColocated, match="--transport network"):
        way(deaf, "auto", "there")


def test_where_partitions_listen() -> None:
    assert NetworkConfig().listens_on(1) is None
    assert NetworkConfig().listens_on(2) == NODE
    assert NetworkConfig(transport="network").listens_on(1) == "127.0.0.1"
    assert NetworkConfig(transport="network", listen="10.0.0.7").listens_on(1) == "10.0.0.7"
    assert NetworkConfig(listen="10.0.0.7").listens_on(1) == "10.0.0.7"
    assert NetworkConfig(transport="shared").listens_on(3) is None
    with pytest.raises(ValueError, match="listen is 'everywhere': give auto"):
        NetworkConfig(listen="everywhere")

"""A run is computed again from its record, to the bit, whatever happened to it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from downpour.cluster.config.derive import make_plan
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.errors import UserError
from downpour.cluster.run.checkpoint import CheckpointStore
from downpour.cluster.run.folder import RunFolder
from downpour.paramserver.config import NetworkConfig
from downpour.paramserver.errors import BadRecord
from downpour.paramserver.messages import Push
from downpour.paramserver.partition import record
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.transport.names import WireName
from downpour.workers.spec import Precision
from tests.helpers import tiny
from tests.helpers.runs import killed_stopped_and_resumed, recorded, replay
from tests.helpers.thread_backend import ThreadBackend


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_whose_replicas_were_killed(tmp_path: Path, data: str, precision: Precision) -> None:
    def kill(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id in (5, 11, 17):
            backend.kill_process(replica % 2)

    config = tiny.config(data, epochs=3)
    steps = replace(config.replicas.steps, precision=precision)
    config = replace(config, replicas=replace(config.replicas, steps=steps))
    run = recorded(tmp_path / "run", config)
    outcome = run.go(kill)
    run.assert_exactly_once(outcome)
    found = replay(tmp_path / "run")
    assert found.differing == ()
    assert found.checkpoint == CheckpointStore(run.folder.checkpoints_uri).numbers()[-1]
    assert found.versions == (3 * run.plan.num_batches,) * 3
    assert found.pushes >= 9 * run.plan.num_batches


@pytest.mark.parametrize("wire", ["float32", pytest.param("int4", marks=pytest.mark.soak)])
def test_a_run_whose_partitions_were_killed_and_that_was_resumed(
    tmp_path: Path, data: str, wire: WireName
) -> None:
    config, folder = tiny.config(data, epochs=4), tmp_path / "run"
    if wire != "float32":
        network = NetworkConfig(transport="network", wire=wire)
        config = replace(config, server=replace(config.server, network=network))
    killed_stopped_and_resumed(folder, config, deaths={8: 1, 16: 0}, stop_at=24)
    assert len(record.files(folder / "record")) == 3 + 2 + 3
    q = make_plan(config, 1000).num_batches
    versions: dict[int, list[int]] = {0: [], 1: [], 2: []}
    batches: set[tuple[int, int, int]] = set()

    def taken(state: PartitionState, push: Push, moments: torch.Tensor) -> None:
        versions[state.partition.index].append(state.version)
        batches.add((state.partition.index, push.epoch, push.batches[0]))
        assert moments.shape == (1, 3, state.partition.num_features)

    found = replay(folder, taken)
    # What was lost and done again is told of once.
    assert versions == {p: list(range(1, 4 * q + 1)) for p in range(3)}
    assert len(batches) == 3 * 4 * q
    assert found.differing == ()
    assert found.versions == (4 * q,) * 3


def test_what_was_computed_otherwise_is_named(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recorded(tmp_path / "run", tiny.config(data, epochs=1))
    run.go()
    path = record.files(tmp_path / "run" / "record")[0]
    entry = record.read(path).entries[20]
    raw = bytearray(path.read_bytes())
    at = record._HEADER.size + 20 * record._ENTRY.size
    raw[at + record._ENTRY.size - 8] ^= 1  # the version that it was computed on
    path.write_bytes(raw)
    with pytest.raises(BadRecord, match=rf"\(epoch 0, {entry.batch}\)"):
        replay(tmp_path / "run")


def test_a_run_without_a_record_is_a_line(tmp_path: Path, data: str) -> None:
    RunFolder.create(tmp_path / "run", tiny.config(data))
    with pytest.raises(UserError, match="--record-pushes"):
        replay(tmp_path / "run")


@pytest.mark.parametrize("cut", [0, 10, 31])
def test_a_record_that_is_cut_off(tmp_path: Path, cut: int) -> None:
    writer = record.PushRecord(tmp_path, 0, 5)
    writer.close()
    path = record.files(tmp_path)[0]
    assert record.read(path).version == 5
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BadRecord, match="cut off"):
        record.read(path)
    path.write_bytes(np.random.default_rng(0).bytes(100))
    with pytest.raises(BadRecord, match="not a record"):
        record.read(path)

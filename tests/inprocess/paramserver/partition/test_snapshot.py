"""Snapshots: there and back through a file; a damaged file is `BadSnapshot`, in one line."""

import random
from dataclasses import replace
from pathlib import Path

import pyarrow.fs
import pytest
import safetensors.torch
import torch

from downpour.paramserver.errors import BadSnapshot
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition import snapshot
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.snapshot import Snapshot, SnapshotFile
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Version

torch.set_num_threads(1)

P, F = 40, 2
FILES = pyarrow.fs.LocalFileSystem()
PARTITION = split(num_parameters=P, num_features=F, num_decayed=20, num_partitions=2)[1]
CONFIG = UpdateConfig(batches_per_epoch=4, epoch_examples=16)


def new_version() -> Version:
    n, f = PARTITION.num_parameters, PARTITION.num_features
    return Version(weights=torch.zeros(n), statistics=torch.zeros(2, f))


def used_state() -> PartitionState:
    """A state with one of everything: an open epoch, a complete one, a refusal, staleness."""
    state = PartitionState(PARTITION, CONFIG, new_version())
    generator = torch.Generator().manual_seed(0)
    for n in range(6):
        push = Push(
            mailbox=0,
            replica=n % 2,
            epoch=n // 4,
            batches=(n % 4,),
            examples=4,
            version=0,
            loss=float("nan") if n == 2 else 1.0,
            gradient_norm=1.0,
        )
        gradient = torch.randn(PARTITION.num_parameters, generator=generator)
        moments = torch.rand(1, 3, PARTITION.num_features, generator=generator) + 4
        outcome = state.apply(push, gradient, moments, new_version)
        assert outcome is (Outcome.REFUSED_LOSS if n == 2 else Outcome.APPLIED)
    return state


@pytest.fixture
def taken() -> Snapshot:
    meta, tensors = used_state().dump()
    return Snapshot(partition=PARTITION, meta=meta, tensors=tensors)


@pytest.fixture
def written(taken: Snapshot, tmp_path: Path) -> tuple[Path, SnapshotFile]:
    file = snapshot.write(FILES, str(tmp_path), taken)
    return tmp_path / file.name, file


def bad(path: Path, sha256: str | None = None) -> str:
    """The message of the error that reading this file gives."""
    with pytest.raises(BadSnapshot) as caught:
        snapshot.read(FILES, str(path), sha256)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_process_that_slept_for_an_hour_does_not_make_snapshots_that_nobody_reads(
    tmp_path: Path,
) -> None:
    state = used_state()
    for replica in range(40):
        state.ledger.staleness.add(replica, 3_600 * 5_000 + replica)
    meta, tensors = state.dump()
    file = snapshot.write(
        FILES, str(tmp_path), Snapshot(partition=PARTITION, meta=meta, tensors=tensors)
    )
    assert file.num_bytes < 1 << 20
    assert snapshot.read(FILES, str(tmp_path / file.name), file.sha256).meta == meta


def test_what_no_reader_would_take_is_not_written(
    taken: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "MAX_HEADER_BYTES", 100)
    with pytest.raises(OSError, match="no reader would take it"):
        snapshot.write(FILES, str(tmp_path), taken)


def test_there_and_back(taken: Snapshot, written: tuple[Path, SnapshotFile]) -> None:
    path, file = written
    assert path.name == "partition-00001.safetensors"
    assert file.num_bytes == path.stat().st_size
    assert file.version == taken.meta["version"] == 5
    for sha256 in (None, file.sha256):
        found = snapshot.read(FILES, str(path), sha256)
        assert found.partition == taken.partition
        assert found.meta == taken.meta
        assert found.tensors.keys() == taken.tensors.keys()
        for name, tensor in taken.tensors.items():
            assert found.tensors[name].dtype == tensor.dtype
            assert torch.equal(found.tensors[name], tensor)
        found.check(PARTITION)


def test_a_state_goes_on_from_the_file(written: tuple[Path, SnapshotFile]) -> None:
    found = snapshot.read(FILES, str(written[0]))
    state = PartitionState(PARTITION, CONFIG, new_version())
    state.load(found.meta, found.tensors)
    (meta, tensors), (again, copies) = used_state().dump(), state.dump()
    assert meta == again
    assert all(torch.equal(tensors[name], copies[name]) for name in tensors)


def test_holds_no_pickle_and_any_reader_of_the_format_can_open_it(
    written: tuple[Path, SnapshotFile],
) -> None:
    tensors = safetensors.torch.load_file(written[0])
    names = {"weights", "statistics", "rule.velocity", "ledger", "by_feature", "applied.1"}
    assert names == set(tensors)


def test_cut_short(written: tuple[Path, SnapshotFile]) -> None:
    path, file = written
    data = path.read_bytes()
    for length in [*range(0, len(data), 29), len(data) - 1]:
        path.write_bytes(data[:length])
        bad(path)
        assert "checksum" in bad(path, file.sha256)


def test_bits_flipped_with_a_checksum(written: tuple[Path, SnapshotFile]) -> None:
    path, file = written
    data = path.read_bytes()
    chosen = random.Random(0)
    for at in range(0, len(data), 41):
        damaged = bytearray(data)
        damaged[at] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        assert "checksum" in bad(path, file.sha256)


def test_bits_flipped_without_a_checksum_are_never_another_error(
    written: tuple[Path, SnapshotFile],
) -> None:
    # Without one, damage to the numbers themselves may go unseen; damage to the rest may not.
    path, _ = written
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    chosen, errors = random.Random(1), []
    places = [*range(8), *range(8, header, 3), *range(header, len(data), 37)]
    for at in places:
        damaged = bytearray(data)
        damaged[at] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        try:
            found = snapshot.read(FILES, str(path))
            found.check(PARTITION)
            PartitionState(PARTITION, CONFIG, new_version()).load(found.meta, found.tensors)
        except BadSnapshot as error:
            errors.append(str(error))
    assert len(errors) > len(places) // 2
    assert not any("\n" in message for message in errors)


def test_another_partition_or_another_model(written: tuple[Path, SnapshotFile]) -> None:
    found = snapshot.read(FILES, str(written[0]))
    for other in (
        split(num_parameters=P, num_features=F, num_decayed=20, num_partitions=2)[0],
        split(num_parameters=P, num_features=F, num_decayed=20, num_partitions=1)[0],
        replace(PARTITION, num_decayed=5),
        replace(PARTITION, total_features=9),
    ):
        with pytest.raises(BadSnapshot, match="resume with the model") as caught:
            found.check(other)
        assert "\n" not in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    assert "cannot be read" in bad(tmp_path / "absent.safetensors")
    assert "cannot be read" in bad(tmp_path)  # a folder


def test_tensors_that_are_no_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"downpour": "[]"}, {"downpour": "{}"}, {"downpour": '{"format": 1}'}):
        path.write_bytes(safetensors.torch.save({"weights": torch.zeros(3)}, metadata=metadata))
        assert "not a snapshot" in bad(path)


def test_a_format_to_come(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    metadata = {"downpour": '{"format": 99, "partition": {}, "meta": {}}'}
    path.write_bytes(safetensors.torch.save({"weights": torch.zeros(3)}, metadata=metadata))
    assert "format 99" in bad(path)


def test_a_snapshot_is_a_copy() -> None:
    state = used_state()
    _, tensors = state.dump()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in (
        state.current.weights,
        state.current.statistics,
        *state.vectors.rule_state.values(),
    ):
        tensor.fill_(7)
    state.vectors.statistics.recent.pooled()
    state.vectors.statistics.recent.add(torch.ones(3, PARTITION.num_features).numpy())
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)

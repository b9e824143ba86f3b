"""Checkpoints are whole or do not exist, and a damaged one is passed over by name."""

import hashlib
from pathlib import Path

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.config.options import apply
from downpour.cluster.errors import UserError
from downpour.cluster.run.checkpoint import (
    Checkpoint,
    CheckpointStore,
    going_on,
    partitions_before,
    slowest,
)
from downpour.cluster.run.folder import RESOLVED, RunFolder
from downpour.paramserver.partition.snapshot import SnapshotFile


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore((tmp_path / "checkpoints").as_uri())


def write(store: CheckpointStore, number: int, *, commit: bool = True) -> Path:
    folder = Path(store.begin(number).removeprefix("file://"))
    files = []
    for index in range(2):
        data = f"partition {index} of {number}".encode()
        name = f"partition-{index:05d}.safetensors"
        (folder / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        files.append(
            SnapshotFile(name=name, num_bytes=len(data), sha256=digest, version=10 * number + index)
        )
    if commit:
        store.commit(
            Checkpoint(
                number=number, updates=slowest(files), elapsed_s=1.5 * number, files=tuple(files)
            )
        )
    return folder


def test_no_checkpoint_is_not_an_error(store: CheckpointStore) -> None:
    assert store.latest() == (None, [])
    assert store.numbers() == []


def test_the_newest_whole_checkpoint_is_found(store: CheckpointStore) -> None:
    write(store, 1)
    write(store, 2)
    checkpoint, passed = store.latest()
    assert checkpoint is not None
    assert (checkpoint.number, checkpoint.updates, checkpoint.elapsed_s) == (2, 20, 3.0)
    assert [f.version for f in checkpoint.files] == [20, 21]
    assert passed == []


def test_one_without_a_manifest_does_not_exist(store: CheckpointStore) -> None:
    write(store, 1)
    write(store, 2, commit=False)
    checkpoint, passed = store.latest()
    assert checkpoint is not None
    assert checkpoint.number == 1
    assert passed == ["checkpoint 2 was not finished"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_one_is_passed_over_and_named(store: CheckpointStore, damage: str) -> None:
    write(store, 1)
    folder = write(store, 2)
    victim = folder / "partition-00001.safetensors"
    data = victim.read_bytes()
    match damage:
        case "truncate":
            victim.write_bytes(data[:-1])
        case "flip":
            victim.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        case "remove":
            victim.unlink()
        case "manifest":
            (folder / "manifest.json").write_text("{")
    checkpoint, passed = store.latest()
    assert checkpoint is not None
    assert checkpoint.number == 1
    assert len(passed) == 1
    assert passed[0].startswith("checkpoint 2 is damaged")
    assert "\n" not in passed[0]


def test_pruning_keeps_the_last_and_what_is_being_written(store: CheckpointStore) -> None:
    for number in (1, 2, 3, 5):
        write(store, number)
    write(store, 4, commit=False)
    write(store, 6, commit=False)
    store.prune(2)
    assert store.numbers() == [3, 5, 6]


def test_pruning_never_removes_the_only_one(store: CheckpointStore) -> None:
    write(store, 1)
    write(store, 2, commit=False)
    store.prune(1)
    assert store.numbers() == [1, 2]


def test_a_place_that_is_none_is_a_line() -> None:
    with pytest.raises(UserError, match="nowhere://x") as caught:
        CheckpointStore("nowhere://x")
    assert "\n" not in str(caught.value)


def test_the_number_of_partitions_is_chosen_or_noted_or_that_of_the_newest_checkpoint(
    tmp_path: Path,
) -> None:
    folder = RunFolder.create(tmp_path / "run", recipes.find("mnist-bn"))
    assert partitions_before(folder) is None
    write(CheckpointStore(folder.checkpoints_uri), 1)  # of a run from before it was noted
    assert partitions_before(folder) == 2
    folder.write_json(RESOLVED, {"partitions": 3, "processes": 2, "threads": 1})
    assert partitions_before(folder) == 3
    chosen = apply(recipes.find("mnist-bn"), {"partitions": 5})
    assert partitions_before(RunFolder.create(tmp_path / "chosen", chosen)) == 5


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(
    store: CheckpointStore,
) -> None:
    for number in (1, 2, 3):
        for path in write(store, number).iterdir():
            path.write_bytes(b"")  # as a power failure leaves what was never synced
    with pytest.raises(UserError, match=r"none of the checkpoints at .*can be used.*checkpoint 3"):
        store.to_resume()


def test_a_run_whose_manifests_are_gone_does_not_begin_anew(store: CheckpointStore) -> None:
    write(store, 1, commit=False)
    write(store, 2, commit=False)
    with pytest.raises(UserError, match="remove that folder to begin the run anew"):
        store.to_resume()


def test_a_run_that_ended_in_its_first_checkpoint_begins_anew(store: CheckpointStore) -> None:
    assert store.to_resume() == (None, [])
    write(store, 1, commit=False)
    assert store.to_resume() == (None, ["checkpoint 1 was not finished"])
    write(store, 2)
    found, passed = store.to_resume()
    assert found is not None
    assert (found.number, passed) == (2, [])


def test_a_run_whose_partitions_live_stands_where_its_last_status_says() -> None:
    scores = {"best": 0.5, "metric": "accuracy", "training_s": 8.0, "reached": {"0.5": {}}}
    newest = Checkpoint(
        number=3, updates=70, elapsed_s=10.0, ramp={"a": 1}, scores=scores, files=()
    )
    status = {"elapsed_s": 14.0, "best_accuracy": 0.6}
    found = going_on(newest, status, version=90, metric="accuracy")
    assert (found.number, found.updates, found.elapsed_s, found.ramp) == (3, 90, 14.0, {"a": 1})
    assert found.scores == {**scores, "best": 0.6, "training_s": 12.0}
    # Without a status, or a checkpoint: it may not have come so far.
    assert going_on(newest, {}, version=90, metric="accuracy").scores == scores
    found = going_on(None, {"elapsed_s": 4.0}, version=5, metric="accuracy")
    assert (found.number, found.updates, found.elapsed_s, found.scores) == (0, 5, 4.0, {})

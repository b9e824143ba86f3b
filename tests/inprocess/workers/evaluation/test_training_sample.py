"""The training rows that statistics are recomputed on: which they are, and what is kept of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.images.decode import Decoder
from downpour.workers.evaluation import training_sample
from downpour.workers.evaluation.training_sample import TrainingSample, drawn_rows
from downpour.workers.spec import RecomputeSpec
from tests.helpers import tiny

NUM_ROWS = 500


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With many row groups."""
    folder = tmp_path_factory.mktemp("data")
    tiny.dataset(folder, NUM_ROWS)
    for shard in folder.glob("train-*.parquet"):
        pq.write_table(pq.read_table(shard), shard, row_group_size=20)
    return str(folder)


def spec(data: str, batch_size: int = 16, seed: int = 1) -> RecomputeSpec:
    return RecomputeSpec(
        data=data,
        split="train",
        batch_size=batch_size,
        decoder=Decoder(spec=tiny.IMAGE, on_bad_image="skip"),
        num_classes=tiny.CLASSES,
        seed=seed,
        most_s=1.0,
    )


def test_it_is_whole_mini_batches_of_rows_that_stand_once(data: str) -> None:
    sample = TrainingSample(spec(data))
    first, second = list(sample()), list(sample())
    assert sample.num_batches == len(first) == NUM_ROWS // 16
    assert {len(inputs) for inputs, _ in first} == {16}
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    rows = drawn_rows(Dataset.open(data, "train"), spec(data))
    assert sorted(rows.tolist()) == list(range(NUM_ROWS))
    pixels, labels = tiny.images(NUM_ROWS, 1)
    assert torch.cat([t for _, t in first]).tolist() == labels[rows][: 31 * 16].tolist()
    np.testing.assert_array_equal(
        torch.cat([inputs for inputs, _ in first]).numpy(),
        (pixels[rows][: 31 * 16].reshape(31 * 16, -1) > 127).astype(np.float32),
    )


def test_the_seed_says_which_rows(data: str) -> None:
    dataset = Dataset.open(data, "train")
    one, same, other = (drawn_rows(dataset, spec(data, seed=s)).tolist() for s in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("bounds", "num_rows", "num_groups"),
    [
        ({"MOST_ROWS": 100}, 100, 26),
        ({"READ_BYTES": "5 groups"}, 100, 5),
        ({"READ_BYTES": 0, "SAMPLE_BYTES": 0}, 16, 1),
    ],
)
def test_it_is_bounded(
    data: str,
    bounds: dict[str, object],
    num_rows: int,
    num_groups: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = Dataset.open(data, "train")
    for name, value in bounds.items():
        bound = int(102 * dataset.row_bytes) if value == "5 groups" else value
        monkeypatch.setattr(training_sample, name, bound)
    rows = drawn_rows(dataset, spec(data))
    assert len(rows) == len(set(rows.tolist())) == num_rows
    groups = np.searchsorted(dataset.row_group_starts(), rows, side="right")
    assert len(set(groups.tolist())) <= num_groups
    if num_groups == 26:
        assert len(set(groups.tolist())) > 20  # from everywhere


def test_what_is_too_large_decoded_is_decoded_each_time(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = list(TrainingSample(spec(data))())
    input_bytes = 4 * tiny.SIDE * tiny.SIDE
    monkeypatch.setattr(training_sample, "SAMPLE_BYTES", NUM_ROWS * input_bytes - 1)
    sample = TrainingSample(spec(data))
    for _ in range(2):
        found = list(sample())
        assert all(torch.equal(a[0], b[0]) for a, b in zip(found, kept, strict=True))
    assert sample._decoded == []


def test_a_split_smaller_than_a_mini_batch_is_one(data: str) -> None:
    ((inputs, targets),) = TrainingSample(spec(data, batch_size=4 * NUM_ROWS))()
    assert (len(inputs), len(targets)) == (NUM_ROWS, NUM_ROWS)


def test_a_mini_batch_with_an_image_that_cannot_be_decoded_is_left_out(tmp_path: Path) -> None:
    data = tmp_path / "data"
    tiny.dataset(data, 160)
    shard = next(data.glob("train-00000*"))
    table = pq.read_table(shard)
    rows = table["image"].to_pylist()
    rows[3]["bytes"] = b"not an image"
    bad = table.set_column(0, "image", pa.array(rows, table.schema.field("image").type))
    pq.write_table(bad, shard)
    sample = TrainingSample(spec(str(data)))
    assert len(list(sample())) == len(list(sample())) == 9
    strict = dataclasses.replace(spec(str(data)), decoder=Decoder(spec=tiny.IMAGE))
    with pytest.raises(ValueError, match="decode"):
        list(TrainingSample(strict)())

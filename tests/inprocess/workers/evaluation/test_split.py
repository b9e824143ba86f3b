"""The split that is scored: whole, but for images that cannot be decoded, which are told of."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.options import apply
from downpour.cluster.training import inputs
from downpour.shuffler.errors import DecodeError
from downpour.workers.evaluation import split as splits
from downpour.workers.evaluation.split import SplitBatches
from tests.helpers import tiny


def spoil(data: Path, positions: tuple[int, ...]) -> None:
    """Make images of the test split ones that cannot be decoded."""
    (shard,) = data.glob("test-*")
    table = pq.read_table(shard)
    rows = table["image"].to_pylist()
    for position in positions:
        rows[position]["bytes"] = rows[position]["bytes"][:40]
    column = pa.array(rows, table.schema.field("image").type)
    pq.write_table(table.set_column(0, "image", column), shard)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    tiny.dataset(tmp_path / "data", 160)
    return tmp_path / "data"


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
def test_bad_images_are_left_out_and_named(
    data: Path, keep_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits, "EVALUATION_ROWS", 30)
    monkeypatch.setattr(SplitBatches, "KEEP_BYTES", keep_bytes)
    spec = model_spec(tiny.config(str(data)))
    whole = SplitBatches(spec, str(data), "test")
    assert sum(len(targets) for _, targets in whole()) == 200
    assert (whole.skipped, whole.note) == ((), None)
    spoil(data, (7, 31, 199, *range(60, 90)))  # a whole batch of them, too
    batches = SplitBatches(spec, str(data), "test")
    batches.load()
    for _ in range(2):
        found = list(batches())
        assert sum(len(targets) for _, targets in found) == 200 - 33
        assert len(batches.skipped) == 33
    assert batches.skipped[0].startswith("the image of row 7 (7.png, label ")
    assert batches.skipped[1].startswith("the image of row 31 (31.png, ")
    assert (batches.note or "").startswith("not scored: the image of row 7 (7.png, label ")
    assert "(32 more like it)" in (batches.note or "")


def test_a_split_without_one_good_image_is_an_error(data: Path) -> None:
    spoil(data, tuple(range(200)))
    with pytest.raises(DecodeError, match="no image of split 'test' can be decoded"):
        SplitBatches(model_spec(tiny.config(str(data))), str(data), "test").load()


def test_a_small_split_is_looked_at_before_ray_starts(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(data, (150,))
    config = tiny.config(str(data))
    with pytest.raises(DecodeError, match=r"row 150 .*--on-bad-image skip"):
        inputs.check_data(config)
    inputs.check_data(apply(config, {"on_bad_image": "skip"}))
    monkeypatch.setattr(inputs, "CHECKED_BYTES", 100)
    inputs.check_data(config)  # too large to look at: the evaluator leaves it out, and tells

"""The labels of a whole split, from the footers of its files or from the rows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from downpour.shuffler.dataset.image_columns import IMAGE_TYPE
from downpour.shuffler.dataset.labels import check_images, check_labels, highest_label
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.errors import DatasetError


def split(folder: Path, *shards: list[int | None], statistics: bool) -> Dataset:
    for number, labels in enumerate(shards):
        images = pa.array([{"bytes": b"", "path": ""}] * len(labels), IMAGE_TYPE)
        table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
        name = f"train-{number:05d}-of-{len(shards):05d}.parquet"
        pq.write_table(table, folder / name, row_group_size=4, write_statistics=statistics)
    return Dataset.open(folder, "train")


@pytest.mark.parametrize("statistics", [True, False])
class TestLabels:
    def test_the_highest(self, tmp_path: Path, *, statistics: bool) -> None:
        dataset = split(tmp_path, [3, 0, 1, 2, 1], [0, 5, 0], [None], statistics=statistics)
        assert highest_label(dataset) == 5

    def test_all_in_range(self, tmp_path: Path, *, statistics: bool) -> None:
        check_labels(split(tmp_path, [0, 1, 2, 1, 2], [2], statistics=statistics), 3)

    @pytest.mark.parametrize(
        ("labels", "words"),
        [
            ([0, 1, 2, 1, 0, 3], r"label 3 out of range: row 7 \(row 5 of train-00001"),
            ([0, 1, -4, 1], r"label -4 out of range: row 4 \(row 2 of train-00001"),
            ([0, 1, 1, None], r"row 5 \(row 3 of train-00001.*has no label"),
        ],
    )
    def test_the_first_that_is_not_is_named(
        self, tmp_path: Path, labels: list[int | None], words: str, *, statistics: bool
    ) -> None:
        dataset = split(tmp_path, [0, 2], labels, [9], statistics=statistics)
        with pytest.raises(DatasetError, match=words):
            check_labels(dataset, 3)


def test_rows_with_a_path_and_no_bytes_are_found(tmp_path: Path) -> None:
    rows = [{"bytes": b"x", "path": "a.png"}] * 5 + [{"bytes": None, "path": "b.png"}, None]
    labels = pa.array([0] * len(rows), pa.int64())
    table = pa.table({"image": pa.array(rows, IMAGE_TYPE), "label": labels})
    pq.write_table(table[:5], tmp_path / "test-00000-of-00001.parquet", row_group_size=2)
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet", row_group_size=2)
    check_images(Dataset.open(tmp_path, "test"))
    with pytest.raises(DatasetError, match=r"row 5 .*a path \(b.png\) and no bytes.*skip"):
        check_images(Dataset.open(tmp_path, "train"))
    pq.write_table(table[6:], tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(DatasetError, match=r"row 0 .*no image"):
        check_images(Dataset.open(tmp_path, "train"))

"""The labels of a whole split: their range, the first that is outside of one, rows without image.

Parquet files keep the least and the greatest value of each row group in their footer, which is read
when a dataset is opened. Only where a writer left them out are labels read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.encoding import EncodedImages, label_values
from downpour.shuffler.dataset.records import Dataset, Shard
from downpour.shuffler.errors import DatasetError


@dataclass(frozen=True, slots=True)
class _Group:
    """What is known of the labels of a row group."""

    shard: Shard
    number: int
    """Of the row group in its shard."""
    first_row: int
    """Of the row group in the split."""
    lowest: int
    highest: int
    missing: int
    """Rows without a label."""


def highest_label(dataset: Dataset) -> int:
    """The greatest label of a split; -1 if no row has one, or targets are no labels.

    Raises:
        DatasetError: labels have to be read, and a shard cannot be.
    """
    if dataset.columns.kind != "label":
        return -1
    return max((group.highest for group in _groups(dataset)), default=-1)


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Check that each row of a split has a label in [0, num_classes).

    Raises:
        DatasetError: a row has none, or another one; names the row and the shard.
    """
    if dataset.columns.kind != "label":
        return
    for group in _groups(dataset):
        if group.missing or group.lowest < 0 or group.highest >= num_classes:
            labels = _labels(dataset, group.shard, group.number)
            _check(dataset, labels, group.first_row, num_classes)


def check_images(dataset: Dataset) -> None:
    """Check that each row of a split has an image's bytes, as far as the footers say.

    Raises:
        DatasetError: a row has none; names the row and the shard.
    """
    if not isinstance(dataset.encoding, EncodedImages):
        return
    first_row = 0
    for shard in dataset.shards:
        for number, num_rows in enumerate(shard.row_group_rows):
            kept = _statistics(shard, number, f"{dataset.encoding.column}.bytes")
            if kept is not None and kept.has_null_count and kept.null_count:
                images = _read(dataset, shard, number, dataset.encoding.column)
                missing = images.flatten()[images.type.get_field_index("bytes")].is_null()
                bad = int(np.flatnonzero(missing.to_numpy(zero_copy_only=False))[0])
                path = (images[bad].as_py() or {}).get("path")
                raise DatasetError(
                    f"{dataset.describe_row(first_row + bad)} has "
                    f"{f'a path ({path}) and no bytes' if path else 'no image'}, as have "
                    f"{kept.null_count} of its {num_rows} neighbours; store the images' bytes in "
                    "the table, or leave such rows out with --on-bad-image skip"
                )
            first_row += num_rows


def _statistics(shard: Shard, number: int, column: str) -> pq.Statistics | None:
    """What a footer says of a column of a row group."""
    group = shard.metadata.row_group(number)
    columns = (group.column(i) for i in range(group.num_columns))
    return next((c.statistics for c in columns if c.path_in_schema == column), None)


def _check(dataset: Dataset, column: pa.Array, first_row: int, num_classes: int) -> None:
    labels = label_values(column)
    absent = column.is_null().to_numpy(zero_copy_only=False)
    bad: NDArray[np.int64] = np.flatnonzero(absent | (labels < 0) | (labels >= num_classes))
    if not len(bad):
        return
    row = dataset.describe_row(first_row + int(bad[0]))
    if absent[bad[0]]:
        raise DatasetError(f"{row} has no label; label it or remove it")
    raise DatasetError(
        f"label {labels[bad[0]]} out of range: {row} must have a label in [0, {num_classes}); "
        "correct the label or the number of classes"
    )


def _groups(dataset: Dataset) -> Iterator[_Group]:
    first_row = 0
    for shard in dataset.shards:
        for number, num_rows in enumerate(shard.row_group_rows):
            if num_rows:
                yield _Group(shard, number, first_row, *_range(dataset, shard, number))
            first_row += num_rows


def _range(dataset: Dataset, shard: Shard, number: int) -> tuple[int, int, int]:
    """The least and the greatest label of a row group, and how many rows have none."""
    kept = _statistics(shard, number, dataset.columns.targets[0])
    if kept is not None and kept.has_min_max and kept.has_null_count:
        return int(kept.min), int(kept.max), int(kept.null_count)
    column = _labels(dataset, shard, number)
    labels = label_values(column.drop_null())
    lowest, highest = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    return lowest, highest, column.null_count


def _labels(dataset: Dataset, shard: Shard, number: int) -> pa.Array:
    """The labels of one row group, as int64."""
    return _read(dataset, shard, number, dataset.columns.targets[0]).cast(pa.int64())


def _read(dataset: Dataset, shard: Shard, number: int, name: str) -> pa.Array:
    """One column of one row group."""
    try:
        with (
            dataset.filesystem.open_input_file(shard.path) as source,
            pq.ParquetFile(source, metadata=shard.metadata) as parquet,
        ):
            column = parquet.read_row_group(number, columns=[name]).column(name)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{shard.path} cannot be read ({files.one_line(error)}); copy it again"
        ) from error
    chunks: pa.Array = column.combine_chunks()
    return chunks.chunk(0) if isinstance(chunks, pa.ChunkedArray) else chunks

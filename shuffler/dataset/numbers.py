"""The numbers of a whole split: whether each of them is there, and is one that float32 has."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.columns import Columns, pack, pack_target
from downpour.shuffler.dataset.encoding import PLAIN
from downpour.shuffler.dataset.records import Dataset, Shard, shards_of_split
from downpour.shuffler.errors import BadValueError, DatasetError

CHECKED_BYTES = 64 << 20
"""Columns of numbers of up to this in their files are read whole; of more, the first row group of
each shard, and the others when their turn comes."""


def check_numbers(dataset: Dataset) -> None:
    """Check the columns of numbers that make up inputs and targets, before anything is started.

    Raises:
        DatasetError: a value is missing, is not finite, or float32 does not hold it; names the
            column, the row and the shard.
    """
    columns = dataset.columns
    wanted = [*columns.inputs, *(columns.targets if _has_numbers(columns) else ())]
    if columns == PLAIN or not dataset.shards or not wanted:
        return
    whole = _size(dataset, wanted) <= CHECKED_BYTES
    first_row = 0
    for shard in dataset.shards:
        for number, num_rows in enumerate(shard.row_group_rows):
            if whole or number == 0:
                _check(dataset, shard, number, first_row, wanted)
            first_row += num_rows


def _has_numbers(columns: Columns) -> bool:
    """Whether targets are numbers, and not labels or masks."""
    return columns.kind in ("numbers", "indices")


def _size(dataset: Dataset, wanted: list[str]) -> int:
    """Bytes of columns in all files of a split."""
    total = 0
    for shard in dataset.shards:
        for number in range(len(shard.row_group_rows)):
            group = shard.metadata.row_group(number)
            for about in map(group.column, range(group.num_columns)):
                if about.path_in_schema.split(".list.")[0] in wanted:
                    total += about.total_compressed_size
    return total


def _check(dataset: Dataset, shard: Shard, number: int, first_row: int, wanted: list[str]) -> None:
    columns = dataset.columns
    try:
        with (
            dataset.filesystem.open_input_file(shard.path) as source,
            pq.ParquetFile(source, metadata=shard.metadata) as parquet,
        ):
            table = parquet.read_row_group(number, columns=wanted)
        if columns.inputs:
            pack(table, columns.inputs, columns.input_widths)
        if _has_numbers(columns):
            pack_target(table, columns)
    except BadValueError as error:
        row = dataset.describe_row(first_row + error.position)
        raise DatasetError(f"{row}: {error.what}") from None
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{shard.path} cannot be read ({files.one_line(error)}); copy it again"
        ) from error


def first_width(uri: str, split: str, name: str) -> int:
    """Return how many numbers the first row of a column of lists has.

    Raises:
        DatasetError: the split cannot be read, or its first list is missing or empty.
    """
    for column in _lists(uri, split, name):
        first = column.slice(0, 1)
        length = first.value_lengths()[0].as_py() if len(first) else None
        if not length:
            raise DatasetError(
                f"the first row of split {split!r} of {uri} has no numbers in column {name!r}; "
                "fill it in, or remove the row"
            )
        return int(length)
    raise DatasetError(f"split {split!r} of {uri} has zero rows; write some")


def highest_index(uri: str, split: str, name: str) -> int:
    """Return the greatest number in a column of lists; -1 of none.

    Raises:
        DatasetError: the split cannot be read.
    """
    found = -1
    for column in _lists(uri, split, name):
        greatest = pa.compute.max(column.flatten()).as_py()
        found = found if greatest is None else max(found, int(greatest))
    return found


def _lists(uri: str, split: str, name: str) -> Iterator[pa.Array]:
    """A column of a split, in pieces."""
    for path, filesystem in shards_of_split(uri, split):
        try:
            with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as parquet:
                for batch in parquet.iter_batches(columns=[name]):
                    yield batch.column(0)
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(
                f"{path} cannot be read ({files.one_line(error)}); copy it again"
            ) from error

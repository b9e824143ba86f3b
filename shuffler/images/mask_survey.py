"""The masks of a split, looked at before anything is started: which classes occur, what is wrong.

How one mask is read is in `masks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.image_columns import as_images
from downpour.shuffler.dataset.reader import NOT_COUNTED
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.errors import DatasetError, DecodeError
from downpour.shuffler.images.masks import Mask, check_classes, check_size, read, size_of
from downpour.shuffler.images.reading import Reading
from downpour.shuffler.images.rows import Buffer, image_buffers
from downpour.shuffler.processors import processors

CHECKED_BYTES: Final = 64 << 20
"""Splits of up to this in their files, and of up to `CHECKED_ROWS`, have all of their masks checked
before a run starts; of others, the first rows of each shard."""
CHECKED_ROWS: Final = 2000
FIRST_ROWS: Final = 64


def check_masks(
    dataset: Dataset, reading: Reading, *, skip_bad: bool = False, several: bool = True
) -> None:
    """Check masks before anything is started: that they are some, of their pictures' sizes, and
    have classes in range.

    Args:
        dataset: a split.
        reading: how its pictures are turned.
        skip_bad: whether masks that cannot be used are left out, and told of later.
        several: whether there have to be two classes, if all masks are checked.

    Raises:
        DatasetError: a mask is not as it should be; names the row and the shard.
    """
    if dataset.columns.kind != "mask":
        return
    num_classes = dataset.columns.target_width
    size = sum(shard.num_bytes for shard in dataset.shards)
    complete = dataset.num_rows <= CHECKED_ROWS and size <= CHECKED_BYTES
    seen: set[int] = set()
    for row, classes in _surveyed(dataset, reading, FIRST_ROWS if not complete else None):
        if isinstance(classes, DecodeError):
            if not skip_bad:
                raise DatasetError(f"the mask of {dataset.describe_row(row)}: {classes}")
            continue
        check_classes(classes, num_classes, dataset.describe_row(row))
        seen.update(classes.tolist())
    if complete and several:
        check_several(seen, f"split {dataset.split!r} of {dataset.uri}")


def classes_in(dataset: Dataset, reading: Reading) -> set[int]:
    """Return the classes that occur in the masks of a split, with what does not count.

    Raises:
        DatasetError: a mask cannot be used; names the row and the shard.
    """
    seen: set[int] = set()
    for row, classes in _surveyed(dataset, reading, None):
        if isinstance(classes, DecodeError):
            raise DatasetError(f"the mask of {dataset.describe_row(row)}: {classes}")
        seen.update(classes.tolist())
    return seen


def check_several(seen: set[int], what: str) -> None:
    """Check that classes that were seen are more than one, beside what does not count.

    Raises:
        DatasetError: they are not; names `what` they are in.
    """
    if len(seen - {NOT_COUNTED}) > 1:
        return
    found = " and ".join(map(str, sorted(seen)))
    why = f": {NOT_COUNTED} does not count, so write another number if it is a class"
    raise DatasetError(
        f"the masks of {what} have {found or 'no class'} alone"
        f"{why if NOT_COUNTED in seen else ', and there is nothing to tell apart'}"
    )


def _surveyed(
    dataset: Dataset, reading: Reading, first: int | None
) -> Iterator[tuple[int, Mask | DecodeError]]:
    """Yield each row with the classes that occur in its mask, or with what is wrong with it.

    Args:
        dataset: a split.
        reading: how its pictures are turned.
        first: rows of each shard that are looked at; None looks at all.
    """
    begin = 0
    with ThreadPoolExecutor(processors()) as pool:
        for shard in dataset.shards:
            left = shard.num_rows if first is None else min(first, shard.num_rows)
            row = begin
            for pictures, masks in _read(dataset, shard.path, left):
                found = pool.map(_classes, pictures, masks, [reading] * len(masks))
                for each in found:
                    yield row, each
                    row += 1
            begin += shard.num_rows


def _classes(picture: Buffer | None, mask: Buffer | None, reading: Reading) -> Mask | DecodeError:
    """The classes of a mask, each once, ascending; or what is wrong."""
    try:
        if mask is None:
            return DecodeError("there is none: store its bytes, or remove the row")
        found = read(mask, reading)
        size = None if picture is None else _size_if_known(picture, reading)
        if size is not None:
            check_size(found, *size)
    except DecodeError as error:
        return error
    return np.unique(found)


def _size_if_known(picture: Buffer, reading: Reading) -> tuple[int, int] | None:
    try:
        return size_of(picture, reading)
    except DecodeError:  # what is wrong with a picture is told where it is read
        return None


def _read(
    dataset: Dataset, path: str, most: int
) -> Iterator[tuple[list[Buffer | None], list[Buffer | None]]]:
    """Yield the pictures and the masks of a shard's first rows, some at a time."""
    columns = [dataset.encoding.column, dataset.columns.targets[0]]
    try:
        with dataset.filesystem.open_input_file(path) as source, pq.ParquetFile(source) as parquet:
            for batch in parquet.iter_batches(batch_size=FIRST_ROWS, columns=columns):
                part = batch.slice(0, most)
                most -= len(part)
                pictures, masks = (image_buffers(as_images(part.column(name))) for name in columns)
                yield pictures, masks
                if most <= 0:
                    return
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} cannot be read ({files.one_line(error)}); copy it again"
        ) from error

"""Rows that hold image files: their bytes, and words for messages about them."""

from __future__ import annotations

import itertools
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from downpour.shuffler.dataset.columns import LABEL
from downpour.shuffler.errors import DecodeError

Buffer = bytes | memoryview

REMEDY: Final = "replace it, remove the row, or leave it out with --on-bad-image skip"
"""What to do about an image that cannot be decoded."""


def image_buffers(images: Any) -> list[Buffer | None]:
    """Return each row's bytes without a copy; None where the row or its bytes are null."""
    data = images.field("bytes")
    if not len(data) or data.buffers()[2] is None:
        return [None] * len(data)
    ends = np.frombuffer(data.buffers()[1], dtype=np.int32)
    bounds = ends[data.offset : data.offset + len(data) + 1].tolist()
    view = memoryview(data.buffers()[2]).cast("B")
    buffers: list[Buffer | None] = [view[start:stop] for start, stop in itertools.pairwise(bounds)]
    if images.null_count or data.null_count:
        missing = images.is_null().to_numpy(zero_copy_only=False)
        missing |= data.is_null().to_numpy(zero_copy_only=False)
        for position in np.flatnonzero(missing).tolist():
            buffers[position] = None
    return buffers


def undecodable(
    batch: pa.RecordBatch, position: int, rows: NDArray[np.int64] | None, error: DecodeError
) -> str:
    """Return the line about an image that cannot be decoded, without a remedy."""
    return f"{describe(batch, position, rows)} cannot be decoded ({error})"


def unusable_mask(
    batch: pa.RecordBatch, position: int, rows: NDArray[np.int64] | None, error: DecodeError
) -> str:
    """Return the line about a mask that cannot be used, without a remedy."""
    where = describe(batch, position, rows).removeprefix("the image of ")
    return f"the mask of {where} cannot be used ({error})"


def describe(batch: pa.RecordBatch, position: int, rows: NDArray[np.int64] | None) -> str:
    """Return words for messages: the row's number or place, its path if known, its label.

    Of a file that is no row of a dataset, and so has no label, it is the path alone.
    """
    name = f"row {rows[position]}" if rows is not None else f"row {position} of the batch"
    path = batch.column("image").field("path")[position].as_py()
    if LABEL not in batch.schema.names:
        return f"the image of {name}{f' ({path})' if path else ''}"
    label = batch.column(LABEL)[position].as_py()
    if label is None and path:
        return str(path)
    where = f"{path}, label {label}" if path else f"label {label}"
    return f"the image of {name} ({where})"

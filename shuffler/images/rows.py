"""Rows that hold image files: their bytes or their pixels, and words for messages about them.

A row on its way to a replica may have pixels in place of its file (`pixel_store`): in column
`pixels`, two bytes each of height and width, then uint8 [h, w, c]. Its file is null then; where
there are no pixels, they are null.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from downpour.shuffler.dataset.columns import LABEL
from downpour.shuffler.dataset.image_columns import IMAGE_TYPE
from downpour.shuffler.errors import DecodeError

Buffer = bytes | memoryview

Pixels = NDArray[np.uint8]
"""[height, width, channels]."""

PIXELS: Final = "pixels"
"""Column of rows' pixels."""

SIZE: Final = struct.Struct("<HH")
"""Height and width, before a row's pixels."""

REMEDY: Final = "replace it, remove the row, or leave it out with --on-bad-image skip"
"""What to do about an image that cannot be decoded."""


def image_buffers(images: Any) -> list[Buffer | None]:
    """Return each row's bytes without a copy; None where the row or its bytes are null."""
    data = images.field("bytes")
    buffers = _buffers(data)
    if images.null_count or data.null_count:
        missing = images.is_null().to_numpy(zero_copy_only=False)
        missing |= data.is_null().to_numpy(zero_copy_only=False)
        for position in np.flatnonzero(missing).tolist():
            buffers[position] = None
    return buffers


def _buffers(data: Any) -> list[Buffer | None]:
    """Return the bytes of each value of a binary column without a copy; b"" of those null."""
    if not len(data) or data.buffers()[2] is None:
        return [None] * len(data)
    view = memoryview(data.buffers()[2]).cast("B")
    return [view[start:stop] for start, stop in itertools.pairwise(_edges(data).tolist())]


def _edges(data: Any) -> NDArray[np.int32]:
    """Return where the values of a binary column begin and end in its bytes, int32 [n + 1]."""
    ends = np.frombuffer(data.buffers()[1], dtype=np.int32)
    return ends[data.offset : data.offset + len(data) + 1]


def with_pixels(batch: pa.RecordBatch, pixels: Sequence[bytes | None]) -> pa.RecordBatch:
    """Return rows that have their pixels in place of their files, where there are pixels.

    Args:
        batch: n rows of image files.
        pixels: of each row, with its size before them; None leaves the row its file.
    """
    there = np.array([each is not None for each in pixels], dtype=bool)
    lengths = [0 if each is None else len(each) for each in pixels]
    edges = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = b"".join(each for each in pixels if each is not None)
    column = pa.Array.from_buffers(
        pa.binary(), len(pixels), [_bitmap(there), pa.py_buffer(edges), pa.py_buffer(values)]
    )
    if there.any():
        batch = _without_files(batch, there)
    return batch.append_column(PIXELS, column)


def _without_files(batch: pa.RecordBatch, gone: NDArray[np.bool_]) -> pa.RecordBatch:
    """Return rows of which some have no file any more."""
    images = batch.column("image")
    data, paths = images.field("bytes"), images.field("path")
    if gone.all():
        data = pa.nulls(len(data), pa.binary())
    else:
        mask = pa.Array.from_buffers(pa.bool_(), len(gone), [None, _bitmap(gone)])
        data = pa.compute.if_else(mask, pa.scalar(None, pa.binary()), data)
    images = pa.StructArray.from_arrays(
        [data, paths], fields=list(IMAGE_TYPE), mask=images.is_null() if images.null_count else None
    )
    at = batch.schema.get_field_index("image")
    return batch.set_column(at, batch.schema.field(at), images)


def _bitmap(bits: NDArray[np.bool_]) -> pa.Buffer:
    """Return truth values as Arrow keeps them. `pa.array` would import pandas (`indices`)."""
    return pa.py_buffer(np.packbits(bits, bitorder="little"))


def row_pixels(batch: pa.RecordBatch, channels: int) -> list[Pixels | None]:
    """Return the pixels of each row that has some, without a copy; None of the others."""
    if PIXELS not in batch.schema.names:
        return [None] * len(batch)
    return [
        np.frombuffer(data, np.uint8, offset=SIZE.size).reshape(*SIZE.unpack_from(data), channels)
        if data
        else None
        for data in _buffers(batch.column(PIXELS))
    ]


def pixel_block(batch: pa.RecordBatch, height: int, width: int, channels: int) -> Pixels | None:
    """Return the pixels of n rows, uint8 [n, h, w, c], without a copy.

    None if a row has none, or has another size.
    """
    if PIXELS not in batch.schema.names or not len(batch):
        return None
    column = batch.column(PIXELS)
    edges = _edges(column)
    size = SIZE.size + height * width * channels
    if column.null_count or (np.diff(edges) != size).any():
        return None
    start, stop = int(edges[0]), int(edges[-1])
    values = np.frombuffer(column.buffers()[2], np.uint8)[start:stop].reshape(len(batch), size)
    if (values[:, : SIZE.size] != np.frombuffer(SIZE.pack(height, width), np.uint8)).any():
        return None
    block: Pixels = values[:, SIZE.size :].reshape(len(batch), height, width, channels)
    return block


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

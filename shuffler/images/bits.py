"""Binary images as packed bits, eight pixels a byte: there and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from downpour.shuffler.dataset.encoding import PackedBits
from downpour.shuffler.errors import DecodeError


def pack_bits(pixels: NDArray[np.uint8], threshold: int) -> NDArray[np.uint8]:
    """Return grey images [n, h, w] as packed bits [n, ceil(h*w / 8)], big-endian in each byte."""
    return np.packbits(pixels.reshape(len(pixels), -1) > threshold, axis=1)


def bits_array(packed: NDArray[np.uint8]) -> pa.Array:
    """Return packed bits [n, num_bytes] as an Arrow column."""
    count, width = packed.shape
    buffer = pa.py_buffer(np.ascontiguousarray(packed))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), count, [None, buffer])


def unpack(
    column: Any, encoding: PackedBits, height: int, width: int, channels: int
) -> NDArray[np.float32]:
    """Return a column of packed bits as 0 and 1, float32 [n, height * width].

    Args:
        column: n rows.
        encoding: how they are packed.
        height: of the images that are wanted.
        width: likewise.
        channels: likewise.

    Raises:
        DecodeError: they are of another size, or missing.
    """
    if (height, width, channels) != (encoding.height, encoding.width, 1):
        raise DecodeError(
            f"the dataset holds binary images of {encoding.height}x{encoding.width} in 1 channel, "
            f"not {height}x{width} in {channels}; choose a recipe for that size, or "
            "ingest without a binary threshold"
        )
    num_bytes = encoding.num_bytes
    if not len(column):
        return np.zeros((0, height * width), dtype=np.float32)
    if column.null_count:
        raise DecodeError(f"{column.null_count} rows have no bits; remove them, or ingest again")
    flat = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    packed = flat[column.offset * num_bytes : (column.offset + len(column)) * num_bytes]
    order: Any = encoding.bit_order
    pixels = np.unpackbits(
        packed.reshape(-1, num_bytes), axis=1, count=height * width, bitorder=order
    )
    return pixels.astype(np.float32)

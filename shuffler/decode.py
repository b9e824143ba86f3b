"""Pixels: from rows as they are kept to the arrays that a network takes.

Packed bits are unpacked all at once; encoded images go through Pillow, which is imported only
then. Images must have the size that the network takes: cropping and distortion are `augment`'s.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shuffler.encoding import PackedBits, encoding_of
from shuffler.errors import DecodeError
from shuffler.files import one_line

_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpec:
    """The images that a network takes."""

    height: int
    """Pixels from top to bottom."""

    width: int
    """Pixels from left to right."""

    channels: int = 3
    """1: grey, 3: RGB. Images are converted to it."""

    binary_threshold: int | None = None
    """Grey values above it become 1, others 0 (section 4.1: 127). None: values / 255."""

    flatten: bool = False
    """Whether inputs are vectors [n, c*h*w] for fully connected layers, or [n, c, h, w]."""

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise DecodeError(
                f"an image of {self.height}x{self.width} has no pixels; give 1 or more"
            )
        if self.channels not in _MODES:
            raise DecodeError(
                f"channels={self.channels} is not supported; give 1 (grey) or 3 (RGB)"
            )
        if self.binary_threshold is not None and not 0 <= self.binary_threshold <= 254:
            raise DecodeError(
                f"binary_threshold={self.binary_threshold} splits no grey values; give 0 to 254"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        if self.flatten:
            return (self.channels * self.height * self.width,)
        return (self.channels, self.height, self.width)


def decode(
    batch: pa.RecordBatch, spec: ImageSpec, *, rows: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the inputs and the labels of rows.

    Args:
        batch: n rows as `reader` returns them, of either encoding.
        spec: the images wanted.
        rows: int64 [n], the rows' numbers in the dataset: for messages only.

    Returns:
        inputs: float32 [n, *spec.input_shape], in [0, 1].
        labels: int64 [n], a copy.

    Raises:
        DecodeError: an image cannot be decoded or has another size; it names the row.
        DatasetError: the batch has no image column or no label.
    """
    encoding = encoding_of(batch.schema, "the record batch")
    if isinstance(encoding, PackedBits):
        inputs = _unpack(batch.column("bits"), encoding, spec)
    else:
        inputs = _decode_images(batch, spec, rows)
    labels = batch.column("label").to_numpy(zero_copy_only=False).astype(np.int64)
    return inputs.reshape(len(batch), *spec.input_shape), labels


def decode_image(data: bytes, channels: int) -> NDArray[np.uint8]:
    """Return the pixels of an image file of any size, uint8 [h, w, channels].

    Raises:
        DecodeError: the bytes are not an image, are cut short, or have more than 8 bits a pixel
            and channel.
    """
    from PIL import Image  # packed bits never need it

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise DecodeError(f"mode {image.mode} has more than 8 bits a pixel and channel")
            pixels = np.asarray(image.convert(_MODES[channels]))
    except DecodeError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise DecodeError(one_line(error)) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def pack_bits(pixels: NDArray[np.uint8], threshold: int) -> NDArray[np.uint8]:
    """Return grey images [n, h, w] as packed bits [n, ceil(h*w / 8)], big-endian in each byte."""
    return np.packbits(pixels.reshape(len(pixels), -1) > threshold, axis=1)


def bits_array(packed: NDArray[np.uint8]) -> pa.Array:
    """Return packed bits [n, num_bytes] as an Arrow column."""
    count, width = packed.shape
    buffer = pa.py_buffer(np.ascontiguousarray(packed))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), count, [None, buffer])


def _unpack(column: Any, encoding: PackedBits, spec: ImageSpec) -> NDArray[np.float32]:
    if (spec.height, spec.width, spec.channels) != (encoding.height, encoding.width, 1):
        raise DecodeError(
            f"the dataset holds binary images of {encoding.height}x{encoding.width} in 1 channel, "
            f"not {spec.height}x{spec.width} in {spec.channels}; choose a recipe for that size, or "
            "ingest without a binary threshold"
        )
    width = encoding.num_bytes
    if not len(column):
        return np.zeros((0, spec.height * spec.width), dtype=np.float32)
    if column.null_count:
        raise DecodeError(f"{column.null_count} rows have no bits; remove them, or ingest again")
    flat = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    packed = flat[column.offset * width : (column.offset + len(column)) * width]
    order: Any = encoding.bit_order
    pixels = np.unpackbits(
        packed.reshape(-1, width), axis=1, count=spec.height * spec.width, bitorder=order
    )
    return pixels.astype(np.float32)


def _decode_images(
    batch: pa.RecordBatch, spec: ImageSpec, rows: NDArray[np.int64] | None
) -> NDArray[np.float32]:
    shape = (len(batch), spec.height, spec.width, spec.channels)
    pixels = np.empty(shape, dtype=np.uint8)
    images = batch.column("image")
    for position, data in enumerate(_image_bytes(images)):
        if data is None:
            raise DecodeError(f"{_describe(batch, position, rows)} has no bytes; remove the row")
        try:
            found = decode_image(data, spec.channels)
        except DecodeError as error:
            name = _describe(batch, position, rows)
            raise DecodeError(
                f"{name} cannot be decoded ({error}); replace it or remove the row"
            ) from error
        if found.shape != shape[1:]:
            raise DecodeError(
                f"{_describe(batch, position, rows)} has {found.shape[0]}x{found.shape[1]} pixels, "
                f"and {spec.height}x{spec.width} are wanted; resize the images or choose a recipe "
                "for their size"
            )
        pixels[position] = found
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    if spec.binary_threshold is not None:
        return (planes > spec.binary_threshold).astype(np.float32)
    return np.divide(planes, np.float32(255), dtype=np.float32)


def _image_bytes(images: Any) -> Iterable[bytes | None]:
    """Yield each row's bytes, None where the row or its bytes are null."""
    data = images.field("bytes")
    missing = images.is_null()
    for position in range(len(images)):
        yield None if missing[position].as_py() else data[position].as_py()


def _describe(batch: pa.RecordBatch, position: int, rows: NDArray[np.int64] | None) -> str:
    """Return words for messages: the row's number or place, its path if known, its label."""
    name = f"row {rows[position]}" if rows is not None else f"row {position} of the batch"
    image = batch.column("image")[position].as_py() or {}
    path = image.get("path")
    label = batch.column("label")[position].as_py()
    where = f"{path}, label {label}" if path else f"label {label}"
    return f"the image of {name} ({where})"

"""The IDX format of MNIST: big-endian headers, then bytes; plain or gzipped.

A file begins with the magic number 0x0000_08_dd (unsigned bytes in dd dimensions), then dd sizes
of four bytes each. Which files make a dataset is `sources`'.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from downpour.shuffler.dataset.files import one_line
from downpour.shuffler.errors import IngestError


def read_shape(filesystem: fs.FileSystem, path: str, dimensions: int) -> tuple[int, ...]:
    """Return the sizes that an IDX file of unsigned bytes declares.

    Raises:
        IngestError: the file is not IDX, or not of `dimensions` dimensions.
    """
    with _open(filesystem, path) as stream:
        return _header(stream, path, dimensions)


def read_labels(filesystem: fs.FileSystem, path: str) -> NDArray[np.uint8]:
    """Return a label file whole: uint8 [n].

    Raises:
        IngestError: the file is not IDX of one dimension, or is cut short.
    """
    with _open(filesystem, path) as stream:
        (count,) = _header(stream, path, dimensions=1)
        return _read(stream, path, (count,))


def read_images(
    filesystem: fs.FileSystem, path: str, chunk_images: int
) -> Iterator[NDArray[np.uint8]]:
    """Yield an image file in pieces: uint8 [<= chunk_images, h, w], grey values.

    Raises:
        IngestError: the file is not IDX of three dimensions, or is cut short.
    """
    with _open(filesystem, path) as stream:
        count, height, width = _header(stream, path, dimensions=3)
        for start in range(0, count, chunk_images):
            size = min(chunk_images, count - start)
            yield _read(stream, path, (size, height, width))


def _open(filesystem: fs.FileSystem, path: str) -> Any:
    return filesystem.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None)


def _header(stream: Any, path: str, dimensions: int) -> tuple[int, ...]:
    size = 4 * (1 + dimensions)
    header = _read_bytes(stream, path, size)
    magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
    if magic != 0x0800 + dimensions:
        raise IngestError(
            f"{path} begins with {magic:#010x}, not {0x0800 + dimensions:#010x}; give IDX files of "
            f"unsigned bytes in {dimensions} dimension(s)"
        )
    return tuple(shape)


def _read(stream: Any, path: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    data = _read_bytes(stream, path, int(np.prod(shape)))
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _read_bytes(stream: Any, path: str, size: int) -> bytes:
    try:
        data: bytes = stream.read(size)
    except (pa.ArrowException, OSError) as error:
        raise IngestError(
            f"{path} cannot be read ({one_line(error)}); download it again"
        ) from error
    if len(data) < size:
        raise IngestError(
            f"{path} ends {size - len(data)} bytes before its header says; download it again"
        )
    return data

"""The IDX format of MNIST: big-endian headers, then bytes; plain or gzipped.

A file begins with the magic number 0x0000_08_dd (unsigned bytes in dd dimensions), then dd sizes
of four bytes each. A dataset is pairs of files, `train-images-idx3-ubyte` and
`train-labels-idx1-ubyte` or the like.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.encoding import EncodedImages, PackedBits, schema_for
from downpour.shuffler.dataset.files import one_line
from downpour.shuffler.dataset.image_columns import IMAGE_TYPE
from downpour.shuffler.errors import IngestError
from downpour.shuffler.images.bits import bits_array, pack_bits
from downpour.shuffler.ingest.formats import splits as names_of
from downpour.shuffler.ingest.formats.source import Batches, Source, SourceSplit, chunk_rows, png

_IDX_IMAGES = re.compile(r"(?P<prefix>.+)-images[-.]idx3-ubyte(?P<gz>\.gz)?")


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


def is_images(name: str) -> bool:
    """Whether a file's name is that of IDX images."""
    return _IDX_IMAGES.fullmatch(name) is not None


def open_idx(
    filesystem: fs.FileSystem, folder: str, threshold: int | None, chunk_bytes: int
) -> Source:
    """Open a folder of IDX pairs as a source.

    Raises:
        IngestError: a file is missing or not as it should be.
    """
    names = [entry.base_name for entry in files.list_folder(filesystem, folder)]
    pairs = {m["prefix"]: name for name in names if (m := _IDX_IMAGES.fullmatch(name))}
    if not pairs:
        raise IngestError(
            f"{folder} holds no file named like train-images-idx3-ubyte; give the folder of IDX "
            "pairs (.gz or not)"
        )
    sizes: set[tuple[int, ...]] = set()
    num_classes = 0
    splits = []
    for prefix, images_name in sorted(pairs.items()):
        labels_name = images_name.replace("-images", "-labels").replace("idx3", "idx1")
        labels_name = labels_name if labels_name in names else _other_gz(labels_name)
        if labels_name not in names:
            raise IngestError(f"{folder}/{images_name} has no labels; add {labels_name}")
        path = f"{folder}/{images_name}"
        count, *size = read_shape(filesystem, path, dimensions=3)
        labels = read_labels(filesystem, f"{folder}/{labels_name}")
        if len(labels) != count:
            raise IngestError(
                f"{path} has {count} images and {labels_name} {len(labels)} labels; download both "
                "again"
            )
        sizes.add(tuple(size))
        num_classes = max(num_classes, int(labels.max(initial=0)) + 1)
        splits.append((names_of.WORDS.get(prefix, prefix), path, labels))
    if len(sizes) != 1:
        raise IngestError(
            f"the IDX files of {folder} have images of {len(sizes)} sizes; ingest them apart"
        )
    height, width = sizes.pop()
    encoding = EncodedImages() if threshold is None else PackedBits(height, width)
    class_names = tuple(str(number) for number in range(num_classes))
    schema = schema_for(encoding, class_names)
    row_bytes = height * width if isinstance(encoding, EncodedImages) else encoding.num_bytes
    chunk = chunk_rows(chunk_bytes, height * width)

    def batches(path: str, labels: NDArray[np.uint8]) -> Batches:
        return lambda: _idx_batches(filesystem, path, labels, schema, threshold, chunk)

    return Source(
        format="idx",
        encoding=encoding,
        class_names=class_names,
        splits=tuple(
            SourceSplit(
                name=name,
                num_rows=len(labels),
                num_bytes=len(labels) * (row_bytes + 8),
                batches=batches(path, labels),
            )
            for name, path, labels in splits
        ),
    )


def _other_gz(name: str) -> str:
    return name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"


def _idx_batches(
    filesystem: fs.FileSystem,
    path: str,
    labels: NDArray[np.uint8],
    schema: pa.Schema,
    threshold: int | None,
    chunk: int,
) -> Iterator[pa.RecordBatch]:
    start = 0
    for pixels in read_images(filesystem, path, chunk):
        if threshold is None:
            images = pa.array([{"bytes": png(image)} for image in pixels], IMAGE_TYPE)
        else:
            images = bits_array(pack_bits(pixels, threshold))
        label = pa.array(labels[start : start + len(pixels)].astype(np.int64))
        yield pa.RecordBatch.from_arrays([images, label], schema=schema)
        start += len(pixels)

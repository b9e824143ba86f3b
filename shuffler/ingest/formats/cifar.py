"""CIFAR's binary files: records of one or two label bytes and 3,072 pixels, plane after plane.

CIFAR-10 has `data_batch_<n>.bin` and `test_batch.bin` with one label, names in `batches.meta.txt`;
CIFAR-100 has `train.bin` and `test.bin` with a coarse and a fine label, names in
`fine_label_names.txt`, and the fine one is taken. (Krizhevsky 2009.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.encoding import EncodedImages, schema_for
from downpour.shuffler.dataset.files import one_line
from downpour.shuffler.dataset.image_columns import IMAGE_TYPE
from downpour.shuffler.errors import IngestError
from downpour.shuffler.ingest.formats.source import Batches, Source, SourceSplit, chunk_rows, png

SIDE = 32
_PIXELS = 3 * SIDE * SIDE
_BATCH = re.compile(r"data_batch_(\d+)\.bin")


@dataclass(frozen=True, kw_only=True, slots=True)
class CifarFiles:
    """The files of one of the two datasets."""

    label_bytes: int
    """Labels of a record: 1, or 2 of which the second counts."""

    splits: dict[str, tuple[str, ...]]
    """Names of the files of each split, in order."""

    names: str
    """Name of the file with the classes' names."""

    @property
    def record_bytes(self) -> int:
        """Size of a record."""
        return self.label_bytes + _PIXELS


def find(names: list[str]) -> CifarFiles | None:
    """Return which of a folder's files are CIFAR's; None where none are."""
    numbered = {int(m[1]): name for name in names if (m := _BATCH.fullmatch(name))}
    if numbered:
        train = tuple(numbered[number] for number in sorted(numbered))
        splits = {"train": train, "test": ("test_batch.bin",)}
        label_bytes, listed = 1, "batches.meta.txt"
    elif "train.bin" in names:
        splits = {"train": ("train.bin",), "test": ("test.bin",)}
        label_bytes, listed = 2, "fine_label_names.txt"
    else:
        return None
    there = {split: files for split, files in splits.items() if set(files) <= set(names)}
    return CifarFiles(label_bytes=label_bytes, splits=there, names=listed)


def count_records(filesystem: fs.FileSystem, path: str, record_bytes: int) -> int:
    """Return the records of a file.

    Raises:
        IngestError: its size is not that of whole records.
    """
    size = int(filesystem.get_file_info(path).size)
    if size % record_bytes or not size:
        raise IngestError(
            f"{path} has {size} bytes, which are not records of {record_bytes}; download it again"
        )
    return size // record_bytes


def read_records(
    filesystem: fs.FileSystem, path: str, files: CifarFiles, chunk_records: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Yield a file in pieces: pixels uint8 [<= chunk_records, 32, 32, 3], and labels [n].

    Raises:
        IngestError: the file cannot be read.
    """
    size = files.record_bytes
    try:
        with filesystem.open_input_stream(path) as stream:
            while data := stream.read(chunk_records * size):
                records = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
                planes = records[:, files.label_bytes :].reshape(-1, 3, SIDE, SIDE)
                labels = records[:, files.label_bytes - 1].astype(np.int64)
                yield np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels
    except (pa.ArrowException, OSError, ValueError) as error:
        raise IngestError(
            f"{path} cannot be read ({one_line(error)}); download it again"
        ) from error


def open_cifar(filesystem: fs.FileSystem, folder: str, chunk_bytes: int) -> Source:
    """Open a folder of CIFAR's binary files as a source.

    Raises:
        IngestError: a file is missing or not as it should be.
    """
    names = [entry.base_name for entry in files.list_folder(filesystem, folder)]
    found = find(names)
    if found is None:
        raise IngestError(
            f"{folder} holds no data_batch_1.bin and no train.bin; give the folder of CIFAR's "
            "binary version"
        )
    class_names: tuple[str, ...] = tuple(
        str(n) for n in range(10 if found.label_bytes == 1 else 100)
    )
    if found.names in names:
        with filesystem.open_input_stream(f"{folder}/{found.names}") as stream:
            class_names = tuple(bytes(stream.read()).decode(errors="replace").split())
    schema = schema_for(EncodedImages(), class_names)
    chunk = chunk_rows(chunk_bytes, found.record_bytes)

    def batches(paths: tuple[str, ...]) -> Batches:
        def read() -> Iterator[pa.RecordBatch]:
            for path in paths:
                for pixels, labels in read_records(filesystem, path, found, chunk):
                    images = pa.array([{"bytes": png(image)} for image in pixels], IMAGE_TYPE)
                    yield pa.RecordBatch.from_arrays([images, pa.array(labels)], schema=schema)

        return read

    splits = []
    for name, members in found.splits.items():
        paths = tuple(f"{folder}/{member}" for member in members)
        num_rows = sum(count_records(filesystem, p, found.record_bytes) for p in paths)
        num_bytes = num_rows * found.record_bytes
        splits.append(
            SourceSplit(name=name, num_rows=num_rows, num_bytes=num_bytes, batches=batches(paths))
        )
    return Source(
        format="cifar", encoding=EncodedImages(), class_names=class_names, splits=tuple(splits)
    )

"""What can be ingested: IDX pairs, folders of class folders, Parquet shards.

Each source is opened to the same few facts and a stream of record batches in the source's order,
never more than about `chunk_bytes` at once. Shuffling and writing are `ingest`'s.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from shuffler import files, idx
from shuffler.decode import ImageSpec, bits_array, decode, decode_image, pack_bits
from shuffler.encoding import IMAGE_TYPE, EncodedImages, Encoding, PackedBits, schema_for
from shuffler.errors import DecodeError, IngestError
from shuffler.reader import conform
from shuffler.records import Dataset, split_names

Format = Literal["idx", "folder", "huggingface"]
Batches = Callable[[], Iterator[pa.RecordBatch]]

IMAGE_SUFFIXES: Final = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
_IDX_IMAGES = re.compile(r"(?P<prefix>.+)-images[-.]idx3-ubyte(?P<gz>\.gz)?")
_SPLIT_NAMES: Final = {"t10k": "test", "val": "validation", "valid": "validation"}
_FOLDER_SPLITS: Final = ("train", "val", "valid", "validation", "test")
_STREAM_BYTES = 1 << 20
_MAX_CHUNK_ROWS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSplit:
    """One split of a source."""

    name: str
    """Its name in the dataset: `train`, `validation`, `test`, ..."""

    num_rows: int
    """Its rows."""

    num_bytes: int
    """About what its rows take in memory."""

    batches: Batches
    """Streams its rows, in the schema of the source, in the source's order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A source of any format, opened."""

    format: Format
    """What it is."""

    encoding: Encoding
    """How its batches keep images."""

    class_names: tuple[str, ...]
    """Names of the labels; empty where the source names none."""

    splits: tuple[SourceSplit, ...]
    """Its splits, by name."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of its batches and of the shards made of them."""
        return schema_for(self.encoding, self.class_names)


def open_source(
    uri: str | os.PathLike[str],
    format: Format | Literal["auto"] = "auto",
    *,
    binary_threshold: int | None = None,
    chunk_bytes: int = 8 << 20,
) -> Source:
    """Open a source, finding out its format where that is `auto`.

    Args:
        uri: the folder of the source, on any filesystem of `pyarrow.fs`.
        format: what to take it for.
        binary_threshold: make every image binary (grey value > threshold) and pack it as bits.
        chunk_bytes: about the most bytes of a batch.

    Raises:
        IngestError: nothing here can be ingested, or not as `format`.
        DatasetError: the source is Parquet and cannot be opened.
    """
    filesystem, folder = files.locate(uri)
    info = filesystem.get_file_info(folder)
    if info.type != fs.FileType.Directory:
        raise IngestError(f"source {os.fspath(uri)} is not a folder; give the folder of the data")
    found = _detect(filesystem, folder) if format == "auto" else format
    if found == "idx":
        return _open_idx(filesystem, folder, binary_threshold, chunk_bytes)
    if found == "folder":
        source = _open_folder(filesystem, folder, chunk_bytes)
    else:
        source = _open_parquet(os.fspath(uri), chunk_bytes)
    return source if binary_threshold is None else _binarised(source, binary_threshold)


def _detect(filesystem: fs.FileSystem, folder: str) -> Format:
    entries = files.list_folder(filesystem, folder)
    names = [entry.base_name for entry in entries]
    if any(_IDX_IMAGES.fullmatch(name) for name in names):
        return "idx"
    if any(name.endswith(".parquet") for name in names):
        return "huggingface"
    if any(e.base_name in _FOLDER_SPLITS and e.type == fs.FileType.Directory for e in entries):
        return "folder"
    raise IngestError(
        f"{folder} holds no IDX files, no Parquet shards and no folder train/ of class folders; "
        "give a folder that does, or name its format"
    )


def _open_idx(
    filesystem: fs.FileSystem, folder: str, threshold: int | None, chunk_bytes: int
) -> Source:
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
        count, *size = idx.read_shape(filesystem, path, dimensions=3)
        labels = idx.read_labels(filesystem, f"{folder}/{labels_name}")
        if len(labels) != count:
            raise IngestError(
                f"{path} has {count} images and {labels_name} {len(labels)} labels; download both "
                "again"
            )
        sizes.add(tuple(size))
        num_classes = max(num_classes, int(labels.max(initial=0)) + 1)
        splits.append((_SPLIT_NAMES.get(prefix, prefix), path, labels))
    if len(sizes) != 1:
        raise IngestError(
            f"the IDX files of {folder} have images of {len(sizes)} sizes; ingest them apart"
        )
    height, width = sizes.pop()
    encoding = EncodedImages() if threshold is None else PackedBits(height, width)
    class_names = tuple(str(number) for number in range(num_classes))
    schema = schema_for(encoding, class_names)
    row_bytes = height * width if isinstance(encoding, EncodedImages) else encoding.num_bytes
    chunk = _chunk_rows(chunk_bytes, height * width)

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
    for pixels in idx.read_images(filesystem, path, chunk):
        if threshold is None:
            images = pa.array([{"bytes": _png(image)} for image in pixels], IMAGE_TYPE)
        else:
            images = bits_array(pack_bits(pixels, threshold))
        label = pa.array(labels[start : start + len(pixels)].astype(np.int64))
        yield pa.RecordBatch.from_arrays([images, label], schema=schema)
        start += len(pixels)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image  # Parquet and folders need no encoder

    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format="PNG")
    return target.getvalue()


def _open_folder(filesystem: fs.FileSystem, folder: str, chunk_bytes: int) -> Source:
    found = {
        entry.base_name: [
            child.base_name
            for child in files.list_folder(filesystem, entry.path)
            if child.type == fs.FileType.Directory
        ]
        for entry in files.list_folder(filesystem, folder)
        if entry.base_name in _FOLDER_SPLITS and entry.type == fs.FileType.Directory
    }
    if not found.get("train"):
        raise IngestError(
            f"{folder} has no folder train/ of class folders; lay images out as "
            "train/<class>/<image>"
        )
    class_names = tuple(found["train"])
    splits = []
    for name, classes in found.items():
        unknown = sorted(set(classes) - set(class_names))
        if unknown:
            raise IngestError(
                f"{folder}/{name} has class {unknown[0]!r}, which train/ does not have "
                f"({len(unknown)} such); give both the same class folders"
            )
        splits.append(_folder_split(filesystem, f"{folder}/{name}", classes, class_names))
    return Source(
        format="folder",
        encoding=EncodedImages(),
        class_names=class_names,
        splits=tuple(
            SourceSplit(
                name=_SPLIT_NAMES.get(files.base_name(path), files.base_name(path)),
                num_rows=num_rows,
                num_bytes=num_bytes,
                batches=_folder_reader(filesystem, path, class_names, chunk_bytes),
            )
            for path, num_rows, num_bytes in splits
        ),
    )


def _folder_split(
    filesystem: fs.FileSystem, path: str, classes: list[str], class_names: tuple[str, ...]
) -> tuple[str, int, int]:
    """Count a split's images and their bytes, one class folder in memory at a time."""
    num_rows = num_bytes = 0
    for name in classes:
        images = _images(filesystem, f"{path}/{name}")
        if not images:
            raise IngestError(
                f"{path}/{name} holds no image ({', '.join(IMAGE_SUFFIXES)}); add some or remove "
                f"the class from the {len(class_names)}"
            )
        num_rows += len(images)
        num_bytes += sum(image.size + 64 for image in images)
    return path, num_rows, num_bytes


def _images(filesystem: fs.FileSystem, path: str) -> list[fs.FileInfo]:
    """Return the image files of a class folder; files of other suffixes are not images."""
    return [
        entry
        for entry in files.list_folder(filesystem, path)
        if entry.type == fs.FileType.File and entry.base_name.lower().endswith(IMAGE_SUFFIXES)
    ]


def _folder_reader(
    filesystem: fs.FileSystem, path: str, class_names: tuple[str, ...], chunk_bytes: int
) -> Batches:
    schema = schema_for(EncodedImages(), class_names)

    def rows() -> Iterator[tuple[dict[str, bytes | str], int]]:
        present = {entry.base_name for entry in files.list_folder(filesystem, path)}
        for label, name in enumerate(class_names):
            if name not in present:
                continue
            for image in _images(filesystem, f"{path}/{name}"):
                with filesystem.open_input_stream(image.path) as stream:
                    data = stream.read()
                yield {"bytes": data, "path": f"{name}/{image.base_name}"}, label

    def batches() -> Iterator[pa.RecordBatch]:
        images: list[dict[str, bytes | str]] = []
        labels: list[int] = []
        size = 0
        for image, label in rows():
            images.append(image)
            labels.append(label)
            size += len(image["bytes"])
            if size >= chunk_bytes or len(images) >= _MAX_CHUNK_ROWS:
                yield _batch(images, labels, schema)
                images, labels, size = [], [], 0
        if images:
            yield _batch(images, labels, schema)

    return batches


def _batch(
    images: list[dict[str, bytes | str]], labels: list[int], schema: pa.Schema
) -> pa.RecordBatch:
    columns = [pa.array(images, IMAGE_TYPE), pa.array(labels, pa.int64())]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _open_parquet(uri: str, chunk_bytes: int) -> Source:
    names = split_names(uri)
    if not names:
        raise IngestError(f"{uri} holds no shards named like train-00000-of-00004.parquet")
    datasets = [Dataset.open(uri, name) for name in names]
    first = datasets[0]
    for dataset in datasets[1:]:
        if (dataset.encoding, dataset.class_names) != (first.encoding, first.class_names):
            raise IngestError(
                f"splits {first.split!r} and {dataset.split!r} of {uri} differ in their encoding "
                "or class names; ingest them apart"
            )
    return Source(
        format="huggingface",
        encoding=first.encoding,
        class_names=first.class_names,
        splits=tuple(_parquet_split(dataset, chunk_bytes) for dataset in datasets),
    )


def _parquet_split(dataset: Dataset, chunk_bytes: int) -> SourceSplit:
    num_bytes = sum(
        _uncompressed_bytes(shard.metadata.row_group(group), dataset.schema.names)
        for shard in dataset.shards
        for group in range(shard.metadata.num_row_groups)
    )
    chunk = _chunk_rows(chunk_bytes, num_bytes // dataset.num_rows)

    def batches() -> Iterator[pa.RecordBatch]:
        schema = dataset.schema
        for shard in dataset.shards:
            with (
                dataset.filesystem.open_input_file(shard.path) as source,
                pq.ParquetFile(
                    source, metadata=shard.metadata, buffer_size=_STREAM_BYTES, pre_buffer=False
                ) as parquet,
            ):
                for batch in parquet.iter_batches(chunk, columns=schema.names, use_threads=False):
                    yield conform(pa.Table.from_batches([batch]), schema)

    return SourceSplit(
        name=dataset.split, num_rows=dataset.num_rows, num_bytes=num_bytes, batches=batches
    )


def _uncompressed_bytes(group: pq.RowGroupMetaData, names: list[str]) -> int:
    """Return the bytes of the named columns, and of their fields, in a row group."""
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(
        int(column.total_uncompressed_size)
        for column in columns
        if column.path_in_schema.partition(".")[0] in names
    )


def _binarised(source: Source, threshold: int) -> Source:
    """Return the source with every image made binary and packed; all must have one size."""
    if isinstance(source.encoding, PackedBits):
        raise IngestError(
            f"binary_threshold={threshold} cannot be applied to a source that is packed bits "
            "already; leave it out"
        )
    first = next(iter(source.splits[0].batches()))
    try:
        data = first.column("image").field("bytes")[0].as_py() or b""
        height, width, _ = decode_image(data, channels=1).shape
    except DecodeError as error:
        raise IngestError(
            f"the first image of split {source.splits[0].name!r} cannot be decoded ({error}); "
            "replace it"
        ) from error
    spec = ImageSpec(height=height, width=width, channels=1, binary_threshold=threshold)
    encoding = PackedBits(height, width)
    schema = schema_for(encoding, source.class_names)

    def packed(split: SourceSplit) -> Batches:
        def batches() -> Iterator[pa.RecordBatch]:
            start = 0
            for batch in split.batches():
                numbers = np.arange(start, start + len(batch), dtype=np.int64)
                inputs, labels = decode(batch, spec, rows=numbers)
                bits = bits_array(pack_bits(inputs.astype(np.uint8), threshold=0))
                yield pa.RecordBatch.from_arrays([bits, pa.array(labels)], schema=schema)
                start += len(batch)

        return batches

    return Source(
        format=source.format,
        encoding=encoding,
        class_names=source.class_names,
        splits=tuple(
            SourceSplit(
                name=split.name,
                num_rows=split.num_rows,
                num_bytes=split.num_rows * (encoding.num_bytes + 8),
                batches=packed(split),
            )
            for split in source.splits
        ),
    )


def _chunk_rows(chunk_bytes: int, row_bytes: int) -> int:
    return max(1, min(_MAX_CHUNK_ROWS, chunk_bytes // max(1, row_bytes)))

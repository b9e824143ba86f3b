"""What can be ingested: IDX pairs, CIFAR's files, folders of class folders, Parquet shards.

Each source is opened to the same few facts and a stream of record batches in the source's order,
never more than about `chunk_bytes` at once. Shuffling and writing are `ingest`'s.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.encoding import IMAGE_TYPE, EncodedImages, PackedBits, schema_for
from downpour.shuffler.dataset.records import Dataset, split_names
from downpour.shuffler.dataset.row_groups import conform
from downpour.shuffler.errors import DecodeError, IngestError
from downpour.shuffler.images.decode import ImageSpec, bits_array, decode, decode_image, pack_bits
from downpour.shuffler.ingest import cifar, idx
from downpour.shuffler.ingest.folders import FOLDER_SPLITS, open_folder
from downpour.shuffler.ingest.source import (
    SPLIT_NAMES,
    Batches,
    Format,
    Source,
    SourceSplit,
    chunk_rows,
    png,
)

_IDX_IMAGES = re.compile(r"(?P<prefix>.+)-images[-.]idx3-ubyte(?P<gz>\.gz)?")
_STREAM_BYTES = 1 << 20


def open_source(
    uri: str | os.PathLike[str],
    format: Format | Literal["auto"] = "auto",
    *,
    splits: tuple[str, ...] = (),
    class_list: str | None = None,
    ground_truth: str | None = None,
    binary_threshold: int | None = None,
    chunk_bytes: int = 8 << 20,
) -> Source:
    """Open a source, finding out its format where that is `auto`.

    Args:
        uri: the folder of the source, on any filesystem of `pyarrow.fs`.
        format: what to take it for.
        splits: that are wanted, by their names in the dataset; () for all. Folders of others are
            not looked into.
        class_list: of a folder; see `folders`.
        ground_truth: of a folder; see `folders`.
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
    if found == "cifar":
        source = _open_cifar(filesystem, folder, chunk_bytes)
    elif found == "folder":
        source = open_folder(
            filesystem,
            folder,
            chunk_bytes,
            splits=splits,
            class_list=class_list,
            ground_truth=ground_truth,
        )
    else:
        source = _open_parquet(os.fspath(uri), chunk_bytes)
    return source if binary_threshold is None else _binarised(source, binary_threshold)


def _detect(filesystem: fs.FileSystem, folder: str) -> Format:
    entries = files.list_folder(filesystem, folder)
    names = [entry.base_name for entry in entries]
    if any(_IDX_IMAGES.fullmatch(name) for name in names):
        return "idx"
    if cifar.find(names) is not None:
        return "cifar"
    if any(name.endswith(".parquet") for name in names):
        return "huggingface"
    if any(e.base_name in FOLDER_SPLITS and e.type == fs.FileType.Directory for e in entries):
        return "folder"
    raise IngestError(
        f"{folder} holds no IDX files, no CIFAR files, no Parquet shards and no folder train/ of "
        "class folders; "
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
        splits.append((SPLIT_NAMES.get(prefix, prefix), path, labels))
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
    for pixels in idx.read_images(filesystem, path, chunk):
        if threshold is None:
            images = pa.array([{"bytes": png(image)} for image in pixels], IMAGE_TYPE)
        else:
            images = bits_array(pack_bits(pixels, threshold))
        label = pa.array(labels[start : start + len(pixels)].astype(np.int64))
        yield pa.RecordBatch.from_arrays([images, label], schema=schema)
        start += len(pixels)


def _open_cifar(filesystem: fs.FileSystem, folder: str, chunk_bytes: int) -> Source:
    names = [entry.base_name for entry in files.list_folder(filesystem, folder)]
    found = cifar.find(names)
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
                for pixels, labels in cifar.read_records(filesystem, path, found, chunk):
                    images = pa.array([{"bytes": png(image)} for image in pixels], IMAGE_TYPE)
                    yield pa.RecordBatch.from_arrays([images, pa.array(labels)], schema=schema)

        return read

    splits = []
    for name, members in found.splits.items():
        paths = tuple(f"{folder}/{member}" for member in members)
        num_rows = sum(cifar.count_records(filesystem, p, found.record_bytes) for p in paths)
        num_bytes = num_rows * found.record_bytes
        splits.append(
            SourceSplit(name=name, num_rows=num_rows, num_bytes=num_bytes, batches=batches(paths))
        )
    return Source(
        format="cifar", encoding=EncodedImages(), class_names=class_names, splits=tuple(splits)
    )


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
    chunk = chunk_rows(chunk_bytes, num_bytes // dataset.num_rows)

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

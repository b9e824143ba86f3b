"""What can be ingested: IDX pairs, CIFAR's files, class folders, tables, archives, lists.

Each source is opened to the same few facts and a stream of record batches in the source's order,
never more than about `chunk_bytes` at once. Shuffling and writing are `ingest`'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.encoding import PackedBits, schema_for
from downpour.shuffler.dataset.manifest import MANIFEST_NAME, MARKER_NAME
from downpour.shuffler.dataset.records import Dataset, split_names
from downpour.shuffler.dataset.row_groups import conform
from downpour.shuffler.errors import DecodeError, IngestError
from downpour.shuffler.images.bits import bits_array, pack_bits
from downpour.shuffler.images.decode import decode, decode_image
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.ingest.config import IngestConfig
from downpour.shuffler.ingest.formats import cifar, idx, listings, rows, tables, tars
from downpour.shuffler.ingest.formats import splits as names_of
from downpour.shuffler.ingest.formats.class_folders import is_folder_of_data
from downpour.shuffler.ingest.formats.folders import open_folder, split_folders
from downpour.shuffler.ingest.formats.imagenet import GROUND_TRUTHS
from downpour.shuffler.ingest.formats.report import Report
from downpour.shuffler.ingest.formats.source import (
    Batches,
    Format,
    Source,
    SourceSplit,
    chunk_rows,
)

_STREAM_BYTES = 1 << 20
_MOST_BESIDE = 16
"""Entries of a folder, such as a README, beside the one that holds the data."""
_MOST_FOLDERS = 64
"""Folders that are looked into for files, to find out a source's format."""

SUFFIXES: dict[str, tuple[str, ...]] = {
    "huggingface": (".parquet", ".parq", ".pq", ".parquet.gz"),
    "arrow": (".arrow", ".feather"),
    "webdataset": tars.SUFFIXES,
    "list": listings.SUFFIXES,
}
"""Ends of the names of the files of each format that is made of files, in lower case."""

_PACKED = (".zip", ".rar", ".7z", ".gz", ".bz2", ".xz", ".zst")


def open_source(
    uri: str | os.PathLike[str], config: IngestConfig | None = None, report: Report | None = None
) -> Source:
    """Open a source, finding out its format if that is `auto`.

    Args:
        uri: the folder of the source, on any filesystem of `pyarrow.fs`.
        config: what to take it for, and which of it. Splits that are not wanted are not looked
            into, if they have folders or files of their own.
        report: told what is assumed of the source, and what of it is left out.

    Raises:
        IngestError: nothing here can be ingested, or not as the format that is named.
        DatasetError: the source is Parquet and cannot be opened.
    """
    config, report = config or IngestConfig(), report or Report()
    filesystem, folder = files.locate(uri)
    info = filesystem.get_file_info(folder)
    if info.type != fs.FileType.Directory:
        raise IngestError(f"source {os.fspath(uri)} is not a folder; give the folder of the data")
    found = _detect(filesystem, folder) if config.format == "auto" else config.format
    if found == "folder":
        folder = _unwrapped(filesystem, folder, report)
    threshold, chunk_bytes = config.binary_threshold, config.memory_bytes // 16
    if found == "idx":
        return idx.open_idx(filesystem, folder, threshold, chunk_bytes)
    if found == "cifar":
        source = cifar.open_cifar(filesystem, folder, chunk_bytes)
    elif found == "folder":
        source = open_folder(
            filesystem,
            folder,
            chunk_bytes,
            splits=config.splits,
            class_list=config.class_list,
            ground_truth=config.ground_truth,
            whole=config.validation_share is not None,
            report=report,
        )
    elif found == "huggingface" and _is_ours(filesystem, folder):
        source = _open_parquet(os.fspath(uri), chunk_bytes)
    else:
        source = _open_files(filesystem, folder, found, config, chunk_bytes, report)
    return source if threshold is None else _binarised(source, threshold)


def _open_files(
    filesystem: fs.FileSystem,
    folder: str,
    found: Format,
    config: IngestConfig,
    chunk_bytes: int,
    report: Report,
) -> Source:
    """Open tables, archives or lists, whose files may lie in folders."""
    suffixes = SUFFIXES[found]
    there = tables.find(filesystem, folder, suffixes)
    there = [info for info in there if info.base_name not in GROUND_TRUTHS]
    if not there:
        raise IngestError(
            f"{folder} holds no file that ends with {' or '.join(suffixes)}; give a folder that "
            "does, or another format"
        )
    choice = tables.Choice(
        image_column=config.image_column,
        label_column=config.label_column,
        patterns=tuple((name, str(pattern)) for name, pattern in config.split.items()),
        splits=config.splits,
    )
    if found == "webdataset":
        return tars.open_tars(filesystem, folder, there, chunk_bytes, choice, report)
    if found == "list":
        return listings.open_listings(filesystem, folder, there, chunk_bytes, choice, report)
    open_table = tables.open_arrow if found == "arrow" else tables.open_parquet
    return tables.open_tables(filesystem, folder, there, open_table, chunk_bytes, choice, report)


def _unwrapped(filesystem: fs.FileSystem, folder: str, report: Report) -> str:
    """Return the folder of the splits' folders: the one that is named, or the only one in it."""
    entries = files.list_folder(filesystem, folder)
    inside = [e for e in entries if e.type == fs.FileType.Directory if is_folder_of_data(e)]
    if len(inside) != 1 or names_of.of_folder(inside[0].base_name):
        return folder
    there = split_folders(files.list_folder(filesystem, inside[0].path))
    if "train" not in there.values() or len(entries) > _MOST_BESIDE:
        return folder
    report.note(f"the data is taken from {inside[0].base_name}/, which holds {', '.join(there)}")
    return str(inside[0].path)


def _detect(filesystem: fs.FileSystem, folder: str) -> Format:
    entries = files.list_folder(filesystem, folder)
    names = [entry.base_name for entry in entries]
    if any(map(idx.is_images, names)):
        return "idx"
    if cifar.find(names) is not None:
        return "cifar"
    found = _detect_files(names)
    there = split_folders(entries)
    inner = {name: files.list_folder(filesystem, f"{folder}/{name}") for name in there}
    if found in (None, "list") and any(_holds_images(children) for children in inner.values()):
        return "folder"
    level = [entry for entry in entries if entry.type == fs.FileType.Directory]
    for _ in range(tables.MAX_DEPTH - 1):
        if found is not None or not 0 < len(level) <= _MOST_FOLDERS:
            break
        below = [child for each in level for child in files.list_folder(filesystem, each.path)]
        found = _detect_files([child.base_name for child in below])
        if found is None and any(rows.is_image(child.base_name) for child in below):
            return "folder"
        level = [child for child in below if child.type == fs.FileType.Directory]
    if found is not None:
        return found
    if there or level:
        return "folder"
    if packed := [name for name in names if name.lower().endswith(_PACKED)]:
        raise IngestError(
            f"{folder} holds {packed[0]}, which is packed as a whole; unpack it first"
        )
    if any(map(rows.is_image, names)):
        raise IngestError(
            f"{folder} holds images that are in no class's folder; lay them out as "
            "train/<class>/<image>, or write their paths and labels as train.csv"
        )
    raise IngestError(
        f"{folder} holds no IDX or CIFAR files, no Parquet, Arrow, tar, CSV or JSON lines files, "
        "and no folder train/ of class folders; give a folder that does, or name its format"
    )


def _detect_files(names: list[str]) -> Format | None:
    """Return the format that files' names mean, the most telling first."""
    kinds: tuple[Format, ...] = ("huggingface", "arrow", "webdataset", "list")
    listed = [name.lower() for name in names if name not in GROUND_TRUTHS]
    return next((kind for kind in kinds if any(n.endswith(SUFFIXES[kind]) for n in listed)), None)


def _holds_images(children: list[fs.FileInfo]) -> bool:
    """Whether a split's folder has class folders or images, and nothing that lists them."""
    if _detect_files([child.base_name for child in children]) is not None:
        return False
    return any(
        child.type == fs.FileType.Directory or rows.is_image(child.base_name) for child in children
    )


def _is_ours(filesystem: fs.FileSystem, folder: str) -> bool:
    """Whether Parquet is a dataset that `ingest` has written, or holds packed bits."""
    entries = files.list_folder(filesystem, folder)
    if any(entry.base_name in (MANIFEST_NAME, MARKER_NAME) for entry in entries):
        return True
    first = next((e for e in entries if e.base_name.endswith(".parquet")), None)
    if first is None:
        return False
    return "bits" in tables.open_parquet(filesystem, first).schema.names


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

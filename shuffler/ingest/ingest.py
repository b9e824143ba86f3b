"""Ingest: make a dataset of shuffled Parquet shards from what there is, once.

Rows are shuffled globally, a split at a time, in bounded memory (`scatter`); the plan relies on
that when it takes runs of neighbouring rows for a window. What can be read is in `sources`, what a
shard holds in `encoding`, and the list of all that was written in `manifest`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.manifest import (
    MANIFEST_NAME,
    MARKER_NAME,
    Manifest,
    ShardEntry,
    SplitEntry,
)
from downpour.shuffler.errors import IngestError
from downpour.shuffler.ingest.config import IngestConfig
from downpour.shuffler.ingest.formats.report import Report
from downpour.shuffler.ingest.formats.rows import why_unread
from downpour.shuffler.ingest.formats.source import Source, SourceSplit
from downpour.shuffler.ingest.held_out import hold_out
from downpour.shuffler.ingest.scatter import Scatter
from downpour.shuffler.ingest.sources import open_source
from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.permutation import Permutation

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all; a row is half done once it is in a bucket."""

_ROW_GROUP_BYTES = 4 << 20
_SHARD_BYTES = 256 << 20
_ZSTD_LEVELS = {"bits": 19, "image": 1}  # image files are compressed already


def ingest(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    config: IngestConfig | None = None,
    *,
    progress: Progress | None = None,
    say: Callable[[str], object] | None = None,
) -> Manifest:
    """Write a source's rows, shuffled, as a dataset, and return its manifest.

    Until the manifest is written, which is last, the destination holds a marker by which
    `Dataset.open` refuses it; an error or an interruption removes what was written.

    Args:
        source: folder of the source, or a URI of one.
        destination: folder to make; it must not exist, or be empty.
        config: how.
        progress: told how far it is, after every batch of rows.
        say: told, a line at a time, what is assumed of the source and what of it is left out.

    Raises:
        IngestError: the source cannot be ingested, or the destination is not empty.
        DecodeError: an image that should become binary cannot be decoded.
        DatasetError: a Parquet source is damaged.
    """
    config, report, seen = config or IngestConfig(), Report(), Report()
    try:
        opened = open_source(source, config, report)
        if config.validation_share is not None:
            opened = hold_out(opened, config.validation_share, config.seed)
    finally:
        if say is not None:
            for line in report.lines:
                say(line)
    splits = _chosen(opened, config.splits)
    filesystem, folder = files.locate(destination)
    existed = _check_destination(filesystem, folder)
    counter = _Counter(sum(split.num_rows for split in splits), progress)
    try:
        _claim(filesystem, folder)
        with _scratch(filesystem, folder, config.scratch) as scratch:
            entries = {
                split.name: _ingest_split(
                    opened, split, filesystem, folder, scratch, config, counter, seen
                )
                for split in splits
            }
        manifest = Manifest(
            encoding=opened.encoding,
            class_names=opened.class_names,
            seed=config.seed,
            source_format=opened.format,
            binary_threshold=config.binary_threshold,
            splits=entries,
        )
        _write(filesystem, f"{folder}/{MANIFEST_NAME}", manifest.to_json().encode())
    except (pa.ArrowException, OSError) as error:
        _remove(filesystem, folder, existed)
        raise IngestError(
            f"ingest of {os.fspath(source)} into {folder} failed ({files.one_line(error)}), and "
            "what was written is removed; see that both can be reached, make room, or name "
            "another destination or scratch folder"
        ) from error
    except BaseException:
        _remove(filesystem, folder, existed)
        raise
    filesystem.delete_file(f"{folder}/{MARKER_NAME}")
    if say is not None and seen.lines:
        for line in seen.lines:
            say(line.replace("left out", "will not be decoded"))
        say("training stops at these, or leaves them out with --on-bad-image skip")
    return manifest


class _Counter:
    """Turns rows of both passes into rows done."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._half_rows = 0
        self._progress = progress

    def add(self, num_rows: int) -> None:
        """Count rows that went through one of the two passes."""
        self._half_rows += num_rows
        if self._progress is not None:
            self._progress(self._half_rows // 2, self._total)


def _chosen(source: Source, names: tuple[str, ...]) -> tuple[SourceSplit, ...]:
    by_name = {split.name: split for split in source.splits}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise IngestError(
            f"the source has no split {missing[0]!r} (it has {', '.join(by_name)}); choose of those"
        )
    splits = tuple(by_name[name] for name in names) if names else source.splits
    for split in splits:
        if split.num_rows == 0:
            raise IngestError(f"split {split.name!r} of the source has no rows; leave it out")
    return splits


def _check_destination(filesystem: fs.FileSystem, folder: str) -> bool:
    """Check that the destination may be written; return whether its folder is there already."""
    info = filesystem.get_file_info(folder)
    if info.type == fs.FileType.File:
        raise IngestError(f"destination {folder} is a file; give a folder that is not there yet")
    existed = bool(info.type == fs.FileType.Directory)
    if existed and (entries := filesystem.get_file_info(fs.FileSelector(folder))):
        names = {entry.base_name for entry in entries}
        if MARKER_NAME in names and MANIFEST_NAME not in names:
            raise IngestError(
                f"destination {folder} is not empty: an ingest that was killed left it half "
                "written, or one writes into it now; remove it, or give a new folder"
            )
        raise IngestError(
            f"destination {folder} is not empty; give a new folder, or remove this one first"
        )
    return existed


def _claim(filesystem: fs.FileSystem, folder: str) -> None:
    """Make the destination and mark it."""
    try:
        filesystem.create_dir(folder)
        _write(filesystem, f"{folder}/{MARKER_NAME}", b"An ingest writes here.\n")
    except OSError as error:
        raise IngestError(
            f"destination {folder} cannot be written ({files.one_line(error)}); give another"
        ) from error


@contextlib.contextmanager
def _scratch(filesystem: fs.FileSystem, folder: str, chosen: str | None) -> Iterator[Path]:
    """A temporary folder on this machine, removed at the end."""
    parent = chosen or (folder if files.is_local(filesystem) else None)
    try:
        path = Path(tempfile.mkdtemp(prefix=".ingest-", dir=parent))
    except OSError as error:
        raise IngestError(
            f"scratch folder {parent} cannot be written ({files.one_line(error)}); give another"
        ) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove(filesystem: fs.FileSystem, folder: str, existed: bool) -> None:
    """Remove what was written; the error that led here matters more than one of removal.

    The folder was empty when it was claimed, so all that is in it is ours. The marker goes last,
    so that a removal that is itself cut short leaves nothing that opens.
    """
    with contextlib.suppress(OSError):
        for entry in filesystem.get_file_info(fs.FileSelector(folder)):
            if entry.type == fs.FileType.File and entry.base_name != MARKER_NAME:
                filesystem.delete_file(entry.path)
        filesystem.delete_file(f"{folder}/{MARKER_NAME}")
        if not existed:
            filesystem.delete_dir(folder)


def _ingest_split(
    source: Source,
    split: SourceSplit,
    filesystem: fs.FileSystem,
    folder: str,
    scratch: Path,
    config: IngestConfig,
    counter: _Counter,
    seen: Report,
) -> SplitEntry:
    """Shuffle and write one split; tell `seen` of what is no image by its first bytes."""
    permutation = Permutation(split.num_rows, stream_key(config.seed, "ingest", split.name))
    scatter = Scatter(scratch, permutation, split.num_bytes, config.memory_bytes)
    num_read = 0
    for batch in split.batches():
        _check_labels(batch, len(source.class_names), split.name, num_read)
        _look_at(batch, source.encoding.column, split.name, num_read, seen)
        scatter.add(batch)
        num_read += len(batch)
        counter.add(len(batch))
    row_bytes = max(1, split.num_bytes // split.num_rows)
    group_rows = config.row_group_rows or max(32, _ROW_GROUP_BYTES // row_bytes)
    shard_rows = config.rows_per_shard or max(group_rows, _SHARD_BYTES // row_bytes)
    plan = _row_groups(split.num_rows, shard_rows, group_rows)
    pieces = scatter.ordered(size for sizes in plan for size in sizes)
    shards = []
    for number, sizes in enumerate(plan):
        name = f"{split.name}-{number:05d}-of-{len(plan):05d}.parquet"
        with filesystem.open_output_stream(f"{folder}/{name}") as target:
            sink = _HashingSink(target)
            level = _ZSTD_LEVELS[source.encoding.column]
            with pq.ParquetWriter(
                pa.PythonFile(sink, mode="w"),
                source.schema,
                compression="zstd",
                compression_level=level,
                use_dictionary=["label"],
                write_statistics=["label"],
                write_page_checksum=True,
            ) as writer:
                for size in sizes:
                    writer.write_batch(next(pieces), row_group_size=size)
                    counter.add(size)
        shards.append(
            ShardEntry(name=name, num_rows=sum(sizes), num_bytes=sink.num_bytes, sha256=sink.sha256)
        )
    return SplitEntry(num_rows=split.num_rows, shards=tuple(shards))


def _row_groups(num_rows: int, shard_rows: int, group_rows: int) -> list[list[int]]:
    """Return the sizes of the row groups of each shard; shards differ by a row at most."""
    num_shards = -(-num_rows // shard_rows)
    ends = [num_rows * (number + 1) // num_shards for number in range(num_shards)]
    plan = []
    for start, end in zip([0, *ends], ends, strict=False):
        size = end - start
        plan.append([min(group_rows, size - at) for at in range(0, size, group_rows)])
    return plan


def _check_labels(batch: pa.RecordBatch, num_classes: int, split: str, start: int) -> None:
    column = batch.column("label")
    labels = column.fill_null(-1).to_numpy()
    outside = labels < 0
    if num_classes:
        outside |= labels >= num_classes
    if outside.any():
        bad = int(np.flatnonzero(outside)[0])
        raise IngestError(
            f"row {start + bad} of split {split!r} of the source has label {column[bad].as_py()}, "
            f"not one of the {num_classes or 'unnamed'} classes; correct it or remove the row"
        )


def _look_at(batch: pa.RecordBatch, column: str, split: str, start: int, seen: Report) -> None:
    """Count files that are no images, by their first bytes."""
    if column != "image":
        return
    images = batch.column(column)
    beginnings = pc.binary_slice(images.field("bytes"), 0, 12).to_pylist()
    names = images.field("path").to_pylist()
    for row, (beginning, name) in enumerate(zip(beginnings, names, strict=True), start):
        if reason := why_unread(beginning or b"", name):
            seen.leave_out(reason, name or f"row {row} of split {split!r}")


def _write(filesystem: fs.FileSystem, path: str, data: bytes) -> None:
    with filesystem.open_output_stream(path) as target:
        target.write(data)


class _HashingSink(io.RawIOBase):
    """A file that Parquet is written to, and that knows its size and checksum at the end."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self._target = target
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        """Checksum of what was written, in hexadecimal."""
        return self._digest.hexdigest()

    def writable(self) -> bool:
        """Whether one can write: yes."""
        return True

    def tell(self) -> int:
        """Return the bytes written."""
        return self.num_bytes

    def write(self, data: Any) -> int:
        """Write and count bytes."""
        self._target.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)
        return len(data)

"""A dataset on disk: its shards, their rows, and whether they are what they should be.

A dataset is a folder of `<split>-*.parquet` shards on any filesystem that pyarrow reaches, with a
`manifest.json` if `ingest` made it. Opening reads the footers of the shards and no row; rows are
`reader`'s, their pixels `decode`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.columns import Columns
from downpour.shuffler.dataset.encoding import (
    PLAIN,
    Encoding,
    class_names_of,
    encoding_of,
    schema_for,
)
from downpour.shuffler.dataset.manifest import Manifest, ShardEntry, SplitEntry, read_manifest
from downpour.shuffler.errors import DatasetError

_NUMBERED_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.parquet")
_ANY_SHARD = re.compile(r"(?P<split>[^-]+)-.*\.parquet")
_NUMBER = re.compile(r".+-(?P<number>\d+)-of-(?P<total>\d+)(-[0-9a-f]+)?\.[a-z]+")
_FOOTER_THREADS = 16

VERIFIED_BYTES = 32 << 20
"""Splits of up to this are compared with their checksums whenever they are opened."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One Parquet file of a split."""

    path: str
    """Path on the dataset's filesystem."""

    num_bytes: int
    """Size of the file."""

    metadata: pq.FileMetaData = field(repr=False, compare=False)
    """Its footer, so that no later read fetches it again."""

    schema: pa.Schema = field(repr=False, compare=False)
    """Its Arrow schema, whole."""

    row_group_rows: tuple[int, ...] = field(repr=False)
    """Rows of each of its row groups."""

    @property
    def name(self) -> str:
        """File name."""
        return files.base_name(self.path)

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return int(self.metadata.num_rows)


@dataclass(frozen=True, slots=True)
class Dataset:
    """One split of a dataset, opened and checked. Rows are numbered through the shards by name."""

    uri: str
    """What the user gave."""

    split: str
    """Name of the split."""

    filesystem: fs.FileSystem = field(repr=False, compare=False)
    """Where the shards are."""

    shards: tuple[Shard, ...] = field(repr=False)
    """Shards in the order of their names."""

    encoding: Encoding
    """How rows keep their inputs."""

    class_names: tuple[str, ...] = field(repr=False)
    """Names of the labels 0, 1, ...; empty where the dataset names none."""

    fingerprint: str
    """Changes when the split does: a hash of its shards' names, sizes and rows, and of their
    checksums where a manifest has them. A resumed run compares it."""

    columns: Columns = PLAIN
    """Which columns are the input and the target."""

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def row_bytes(self) -> float:
        """Mean bytes of a row on disk."""
        return sum(shard.num_bytes for shard in self.shards) / max(1, self.num_rows)

    @property
    def decoded_bytes(self) -> int:
        """About as many bytes as all row groups take in memory."""
        metadata = [shard.metadata for shard in self.shards]
        return sum(
            each.row_group(i).total_byte_size
            for each in metadata
            for i in range(each.num_row_groups)
        )

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of each shard."""
        return tuple(shard.num_rows for shard in self.shards)

    @property
    def schema(self) -> pa.Schema:
        """Schema of the rows that a reader returns: the input's column and the target's."""
        return schema_for(self.encoding, self.class_names, self.columns)

    def shard_of(self, row: int) -> tuple[Shard, int]:
        """Return the shard that holds `row`, and the row's number in it."""
        ends = np.cumsum([shard.num_rows for shard in self.shards])
        number = int(np.searchsorted(ends, row, side="right"))
        shard = self.shards[number]
        return shard, row - (int(ends[number]) - shard.num_rows)

    def describe_row(self, row: int) -> str:
        """Return words for messages: the row, and where it is."""
        shard, position = self.shard_of(row)
        return f"row {row} (row {position} of {shard.name})"

    def row_group_starts(self) -> NDArray[np.int64]:
        """Return the first row of each row group of the split, and the end: int64 [groups + 1]."""
        sizes = [size for shard in self.shards for size in shard.row_group_rows]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)

    def shard_group_starts(self) -> NDArray[np.int64]:
        """Return each shard's first row group, numbered through the shards, and the end."""
        counts = [len(shard.row_group_rows) for shard in self.shards]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    def share(self, index: int, count: int) -> tuple[int, int]:
        """Return the rows [start, stop) that are reader `index`'s of `count` readers.

        Shares are disjoint and make up the split. Each is of whole shards where there are as many
        shards as readers, otherwise of whole row groups; they are as even as that allows.
        """
        ends = np.cumsum([0, *(shard.num_rows for shard in self.shards)])
        edges = ends if len(self.shards) >= count else self.row_group_starts()
        wanted = self.num_rows * np.arange(count + 1) / count
        cuts = edges[np.abs(np.subtract.outer(wanted, edges)).argmin(axis=1)]
        return int(cuts[index]), int(cuts[index + 1])

    @classmethod
    def open(
        cls,
        uri: str | os.PathLike[str],
        split: str,
        columns: Columns = PLAIN,
        *,
        verify_checksums: bool | None = None,
    ) -> Dataset:
        """Open a split and check all that can be checked without reading rows.

        Args:
            uri: a folder, or a URI of one on any filesystem of `pyarrow.fs`.
            split: `train`, `test`, `validation`, ...
            columns: which are the input and the target.
            verify_checksums: read every shard and compare it with the manifest's checksum. None
                does so where that takes no time, with splits of up to `VERIFIED_BYTES`; pages of
                larger ones are compared with their own checksums as they are read.

        Raises:
            DatasetError: the folder, the split or a shard is missing, damaged, empty or unlike
                the others, or is not what the manifest says.
        """
        where = os.fspath(uri)
        filesystem, folder = files.locate(uri)
        entries = _shards_by_split(filesystem, folder, where)
        manifest = read_manifest(filesystem, folder)
        chosen = _chosen(entries, split, where)
        check_numbering(chosen, where)
        listed = _listed_split(manifest, split, where)
        return cls._opened(filesystem, where, split, chosen, listed, verify_checksums, columns)

    @classmethod
    def open_part(
        cls,
        uri: str | os.PathLike[str],
        split: str,
        listed: SplitEntry,
        columns: Columns = PLAIN,
    ) -> Dataset:
        """Open some of a split's shards, those that a folder has, as a dataset of their own.

        Args:
            uri: the folder; other shards there may be, or not be, and it needs no manifest.
            split: their split.
            listed: what the manifest says of these shards.
            columns: which are the input and the target.

        Raises:
            DatasetError: a shard is missing, damaged, or is not what the manifest says.
        """
        where = os.fspath(uri)
        filesystem, folder = files.locate(uri)
        infos = filesystem.get_file_info([f"{folder}/{shard.name}" for shard in listed.shards])
        chosen = [info for info in infos if info.type == fs.FileType.File]
        return cls._opened(filesystem, where, split, chosen, listed, None, columns)

    @classmethod
    def _opened(
        cls,
        filesystem: fs.FileSystem,
        where: str,
        split: str,
        chosen: list[fs.FileInfo],
        listed: SplitEntry | None,
        verify_checksums: bool | None,
        columns: Columns,
    ) -> Dataset:
        if listed:
            _check_listing(chosen, listed, where)
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            shards = tuple(pool.map(lambda info: _open_shard(filesystem, info), chosen))
        if listed:
            _check_rows(shards, listed)
        if verify_checksums is None:
            verify_checksums = sum(shard.num_bytes for shard in shards) <= VERIFIED_BYTES
        if listed and verify_checksums:
            _check_checksums(filesystem, shards, listed)
        if sum(shard.num_rows for shard in shards) == 0:
            raise DatasetError(f"split {split!r} of {where} has zero rows; run ingest again")
        encoding, class_names = _common_schema(shards, columns)
        return cls(
            uri=where,
            split=split,
            filesystem=filesystem,
            shards=shards,
            encoding=encoding,
            class_names=class_names,
            fingerprint=_fingerprint(split, shards, listed),
            columns=columns,
        )


def schema_of_split(uri: str | os.PathLike[str], split: str) -> tuple[pa.Schema, str]:
    """Return the whole schema of a split's first shard, and the shard's path.

    Raises:
        DatasetError: there is no such split, or its first shard cannot be read.
    """
    path, filesystem = shards_of_split(uri, split)[0]
    shard = _open_shard(filesystem, filesystem.get_file_info(path))
    return shard.schema, shard.path


def shards_of_split(uri: str | os.PathLike[str], split: str) -> list[tuple[str, fs.FileSystem]]:
    """Return the paths of a split's shards, and the filesystem that each is on.

    Raises:
        DatasetError: there is no such split.
    """
    where = os.fspath(uri)
    filesystem, folder = files.locate(uri)
    entries = _shards_by_split(filesystem, folder, where)
    return [(info.path, filesystem) for info in _chosen(entries, split, where)]


def _chosen(entries: dict[str, list[fs.FileInfo]], split: str, where: str) -> list[fs.FileInfo]:
    chosen = entries.get(split)
    if not chosen:
        known = ", ".join(sorted(entries)) or "none"
        raise DatasetError(
            f"{where} has no shards of split {split!r} (it has: {known}); choose one of "
            "those, or run ingest on the source"
        )
    return chosen


def split_names(uri: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the names of the splits of a dataset's folder, sorted.

    Raises:
        DatasetError: there is no such folder.
    """
    filesystem, folder = files.locate(uri)
    return tuple(sorted(_shards_by_split(filesystem, folder, os.fspath(uri))))


def _shards_by_split(
    filesystem: fs.FileSystem, folder: str, where: str
) -> dict[str, list[fs.FileInfo]]:
    try:
        info = filesystem.get_file_info(folder)
        if info.type == fs.FileType.NotFound:
            raise DatasetError(f"{where} does not exist; give the folder of a dataset")
        if info.type != fs.FileType.Directory:
            raise DatasetError(f"{where} is not a folder; give the folder that holds the shards")
        entries = files.list_folder(filesystem, folder)
    except OSError as error:
        raise DatasetError(
            f"{where} cannot be listed ({files.one_line(error)}); check access to it"
        ) from error
    shards: dict[str, list[fs.FileInfo]] = {}
    for entry in entries:
        name = entry.base_name
        match = _NUMBERED_SHARD.fullmatch(name) or _ANY_SHARD.fullmatch(name)
        if match:
            shards.setdefault(match["split"], []).append(entry)
    return shards


def check_numbering(chosen: list[fs.FileInfo], where: str) -> None:
    """Check that of files named `-00001-of-00004` all four are there.

    Raises:
        DatasetError: one is missing; it is named.
    """
    numbers: dict[int, set[int]] = {}
    for info in chosen:
        match = _NUMBER.fullmatch(info.base_name)
        if match:
            numbers.setdefault(int(match["total"]), set()).add(int(match["number"]))
    for total, found in numbers.items():
        missing = sorted(set(range(total)) - found)
        if missing:
            raise DatasetError(
                f"{where} lacks shard {missing[0]} of {total} ({len(missing)} missing beside "
                f"{chosen[0].base_name}); copy the dataset whole"
            )


def _listed_split(manifest: Manifest | None, split: str, where: str) -> SplitEntry | None:
    if manifest is None:
        return None
    if split not in manifest.splits:
        raise DatasetError(
            f"{where} has shards of split {split!r} that its manifest does not list; remove them "
            "or run ingest again"
        )
    return manifest.splits[split]


def _check_listing(chosen: list[fs.FileInfo], listed: SplitEntry, where: str) -> None:
    sizes = {info.base_name: info.size for info in chosen}
    wanted = {shard.name: shard.num_bytes for shard in listed.shards}
    if sizes.keys() != wanted.keys():
        name = min(sizes.keys() ^ wanted.keys())
        state = "is not in the manifest" if name in sizes else "is missing"
        raise DatasetError(
            f"{name} {state} in {where}; copy the dataset whole, or run ingest again"
        )
    for name, size in sizes.items():
        if size != wanted[name]:
            raise DatasetError(
                f"{name} in {where} has {size} bytes and should have {wanted[name]}; copy it again"
            )


def _check_rows(shards: tuple[Shard, ...], listed: SplitEntry) -> None:
    wanted = {shard.name: shard.num_rows for shard in listed.shards}
    for shard in shards:
        if shard.num_rows != wanted[shard.name]:
            raise DatasetError(
                f"{shard.path} has {shard.num_rows} rows and should have {wanted[shard.name]}; "
                "copy it again"
            )


def _check_checksums(
    filesystem: fs.FileSystem, shards: tuple[Shard, ...], listed: SplitEntry
) -> None:
    wanted = {shard.name: shard.sha256 for shard in listed.shards}
    for shard in shards:
        found = files.sha256_of(filesystem, shard.path)
        if found != wanted[shard.name]:
            raise DatasetError(
                f"{shard.path} has SHA-256 {found[:12]}... and should have "
                f"{wanted[shard.name][:12]}...; it is damaged: copy it again"
            )


def _open_shard(filesystem: fs.FileSystem, info: fs.FileInfo) -> Shard:
    try:
        with filesystem.open_input_file(info.path) as source, pq.ParquetFile(source) as parquet:
            about = parquet.metadata
            groups = tuple(about.row_group(i).num_rows for i in range(about.num_row_groups))
            return Shard(info.path, int(info.size), about, parquet.schema_arrow, groups)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{info.path} is not readable as Parquet ({files.one_line(error)}); remove it or copy "
            "it again"
        ) from error


def _common_schema(shards: tuple[Shard, ...], columns: Columns) -> tuple[Encoding, tuple[str, ...]]:
    """Return the one encoding and the one list of class names of all shards."""
    found = [
        (
            encoding_of(shard.schema, shard.path, columns),
            class_names_of(shard.schema, shard.path, columns),
        )
        for shard in shards
    ]
    for shard, (encoding, class_names) in zip(shards, found, strict=True):
        if encoding != found[0][0]:
            raise DatasetError(
                f"{shard.path} holds {encoding} and {shards[0].name} holds {found[0][0]}; keep "
                "datasets of different encodings in different folders"
            )
        if class_names != found[0][1]:
            raise DatasetError(
                f"{shard.path} and {shards[0].name} name their classes differently "
                f"({len(class_names)} and {len(found[0][1])} names); write them with one list"
            )
    return found[0]


def fingerprint_of(split: str, shards: Iterable[ShardEntry]) -> str:
    """Return the fingerprint of a split whose shards are these."""
    parts = [[shard.name, shard.num_bytes, shard.num_rows, shard.sha256] for shard in shards]
    return hashlib.sha256(json.dumps([split, parts]).encode()).hexdigest()[:32]


def _fingerprint(split: str, shards: tuple[Shard, ...], listed: SplitEntry | None) -> str:
    checksums = {shard.name: shard.sha256 for shard in listed.shards} if listed else {}
    return fingerprint_of(
        split,
        (
            ShardEntry(
                name=shard.name,
                num_rows=shard.num_rows,
                num_bytes=shard.num_bytes,
                sha256=checksums.get(shard.name, ""),
            )
            for shard in shards
        ),
    )

"""Tables of images and labels, as Hugging Face and others write them: Parquet and Arrow files.

    FOLDER/**/train-00000-of-00002.parquet      by name, or by the folder's name, or --split
    FOLDER/train/data-00000-of-00001.arrow      what `save_to_disk` of `datasets` writes

Which column is what, and how it is cast, is in `columns`; which split a file belongs to in
`splits`. Parquet that `ingest` has written, and packed bits, are read by `sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.encoding import EncodedImages, schema_for
from downpour.shuffler.dataset.records import check_numbering
from downpour.shuffler.errors import IngestError
from downpour.shuffler.ingest.formats import columns as cols
from downpour.shuffler.ingest.formats import splits as names_of
from downpour.shuffler.ingest.formats.columns import Columns
from downpour.shuffler.ingest.formats.report import Report
from downpour.shuffler.ingest.formats.rows import note_idle, note_twins
from downpour.shuffler.ingest.formats.source import Batches, Source, SourceSplit, chunk_rows

MAX_DEPTH: Final = 4
"""Folders below the source's that are looked into."""

_STREAM_BYTES: Final = 1 << 20
_LABEL_ROWS: Final = 1 << 16

Read = Callable[[Sequence[str], int], Iterator[pa.RecordBatch]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One file, opened."""

    path: str
    """On its filesystem."""

    schema: pa.Schema
    """All of its columns."""

    num_rows: int
    """Its rows."""

    num_bytes: int
    """About what its rows take in memory."""

    read: Read
    """Streams some of its columns, in batches of so many rows at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What the user says of a table source."""

    image_column: str | None = None
    label_column: str | None = None
    patterns: tuple[tuple[str, str], ...] = ()
    """Splits and the patterns of their files."""
    splits: tuple[str, ...] = ()
    """Splits that are wanted; () for all."""


def find(filesystem: fs.FileSystem, folder: str, suffixes: tuple[str, ...]) -> list[fs.FileInfo]:
    """Return the files of a folder and of those in it whose names end so, by their paths."""
    found: list[fs.FileInfo] = []
    folders = [folder]
    for _ in range(MAX_DEPTH):
        entries = [entry for path in folders for entry in files.list_folder(filesystem, path)]
        folders = [entry.path for entry in entries if entry.type == fs.FileType.Directory]
        found += [
            entry
            for entry in entries
            if entry.type == fs.FileType.File and entry.base_name.lower().endswith(suffixes)
        ]
    return sorted(found, key=lambda entry: str(entry.path))


def by_split(
    folder: str, found: Sequence[fs.FileInfo], choice: Choice, report: Report
) -> dict[str, list[fs.FileInfo]]:
    """Return the files of each split that is wanted.

    If no file's name means a split, all of them are the training split, and that is told.
    """
    sorted_files: dict[str, list[fs.FileInfo]] = {}
    unknown: list[fs.FileInfo] = []
    for info in found:
        relative = info.path.removeprefix(folder).lstrip("/")
        split = (
            names_of.by_pattern(relative, choice.patterns)
            if choice.patterns
            else names_of.of_file(relative)
        )
        if split is None:
            unknown.append(info)
        else:
            sorted_files.setdefault(split, []).append(info)
    if unknown and not sorted_files and not choice.patterns:
        report.note(
            f"{len(unknown)} file(s) such as {unknown[0].base_name} name no split, and are taken "
            "for train; --split NAME=PATTERN says otherwise"
        )
        return {"train": unknown}
    for info in unknown:
        report.leave_out("files of no split", info.path.removeprefix(folder).lstrip("/"))
    empty = [split for split, _ in choice.patterns if split not in sorted_files]
    if empty:
        pattern = dict(choice.patterns)[empty[0]]
        raise IngestError(
            f"no file of {folder} fits {empty[0]}={pattern}; correct the pattern (files are such "
            f"as {found[0].path.removeprefix(folder).lstrip('/')})"
        )
    wanted = choice.splits
    return {s: infos for s, infos in sorted_files.items() if not wanted or s in wanted}


def open_tables(
    filesystem: fs.FileSystem,
    folder: str,
    found: Sequence[fs.FileInfo],
    open_table: Callable[[fs.FileSystem, fs.FileInfo], Table],
    chunk_bytes: int,
    choice: Choice,
    report: Report,
) -> Source:
    """Open files that hold images and labels as a source.

    Args:
        filesystem: of the source.
        folder: of the source.
        found: its files.
        open_table: opens one of them.
        chunk_bytes: about the most bytes of a batch.
        choice: what the user says of them.
        report: told what is assumed and left out.

    Raises:
        IngestError: a file cannot be read, or a column is missing or cannot be cast.
    """
    chosen = by_split(folder, found, choice, report)
    tables: dict[str, list[tuple[Table, Columns]]] = {}
    for split, infos in chosen.items():
        check_numbering(infos, folder)
        for info in infos:
            table = open_table(filesystem, info)
            if not table.num_rows:
                continue
            what = cols.choose(table.schema, table.path, choice.image_column, choice.label_column)
            cols.check_image_type(table.schema, what, table.path)
            tables.setdefault(split, []).append((table, what))
    _note_columns(tables, report)
    _note_folders(folder, chosen, report)
    labelled = {s: t for s, t in tables.items() if _is_labelled(s, t, choice, report)}
    if not labelled:
        raise IngestError(
            f"{folder} has no split with labels; name their column with --label-column"
            if tables
            else f"the files of {folder} have no rows; give others"
        )
    names = _class_names(labelled, report)
    schema = schema_for(EncodedImages(), names)
    return Source(
        format="huggingface",
        encoding=EncodedImages(),
        class_names=names,
        splits=tuple(
            SourceSplit(
                name=split,
                num_rows=sum(table.num_rows for table, _ in parts),
                num_bytes=sum(table.num_bytes for table, _ in parts),
                batches=_batches(parts, names, schema, chunk_bytes),
            )
            for split, parts in sorted(labelled.items())
        ),
    )


def _note_columns(tables: dict[str, list[tuple[Table, Columns]]], report: Report) -> None:
    for table, what in (part for parts in tables.values() for part in parts):
        if what.passed_over:
            report.note(
                f"column {what.label!r} is taken for the label, not {', '.join(what.passed_over)}; "
                "--label-column says otherwise"
            )
        for name in table.schema.names:
            if name.lower() in names_of.COLUMNS and name not in (what.image, what.label):
                report.note(
                    f"column {name!r} is not followed: a row's split is that of its file; write "
                    "a file for each split if the column says otherwise"
                )


def _note_folders(folder: str, chosen: dict[str, list[fs.FileInfo]], report: Report) -> None:
    """Tell of a split whose files come from several folders, which may be several datasets."""
    for split, infos in chosen.items():
        folders = sorted({info.path.rpartition("/")[0] for info in infos})
        if len(folders) > 1:
            told = [path.removeprefix(folder).strip("/") or "." for path in folders[:2]]
            report.note(
                f"split {split!r} is of the files of {len(folders)} folders, such as "
                f"{' and '.join(told)}; --split {split}=PATTERN chooses"
            )


def _is_labelled(
    split: str, parts: list[tuple[Table, Columns]], choice: Choice, report: Report
) -> bool:
    """Whether a split's rows have labels; tells of one that is left out because none has.

    Raises:
        IngestError: some rows have labels and others have none, or a split that is asked for by
            name has none.
    """
    num_rows = sum(table.num_rows for table, _ in parts)
    missing, first, seen = 0, "", 0
    for table, what in parts:
        if what.label is None:
            missing += table.num_rows
            first = first or f"row 0 of {table.path}"
            continue
        start = 0
        for batch in table.read([what.label], _LABEL_ROWS):
            labels = cols.plain_labels(batch.column(0), start, table.path)
            if what.names and cols.is_words(labels.type):
                labels = cols.numbered(labels, what.names)
            if labels.null_count:
                bad = int(pc.index(labels.is_null(), True).as_py())
                value = batch.column(0)[bad].as_py()
                first = first or f"row {start + bad} of {table.path} (label {value!r})"
            missing += labels.null_count
            start += len(batch)
        seen += table.num_rows
    if missing == num_rows:
        reason = "has no column of labels" if not seen else "has no row with a label"
        if split in choice.splits:
            raise IngestError(
                f"split {split!r} {reason}; leave it out, or name the column with --label-column"
            )
        report.note(f"split {split!r} {reason}, and is left out ({num_rows:,} rows)")
        return False
    if missing:
        raise IngestError(
            f"{first} has no label, and {missing:,} of {num_rows:,} rows of split {split!r} have "
            "none; label them or remove them"
        )
    return True


def _class_names(tables: dict[str, list[tuple[Table, Columns]]], report: Report) -> tuple[str, ...]:
    """Return the one list of names of all files, or the words that labels are, sorted."""
    every = [part for parts in tables.values() for part in parts]
    given = {what.names: table.path for table, what in every if what.names}
    if len(given) > 1:
        (first, one), (second, other) = list(given.items())[:2]
        raise IngestError(
            f"{one} and {other} name their classes differently ({len(first)} and {len(second)} "
            "names); ingest them apart"
        )
    if given:
        names = next(iter(given))
        note_twins(names, report)
        return names
    kinds = {_kind(table.schema.field(what.label).type) for table, what in every if what.label}
    if len(kinds) > 1:
        raise IngestError(
            f"labels are {' in some files and '.join(sorted(kinds))} in others; give all files "
            "the same kind, or ingest them apart"
        )
    if kinds == {"truth values"}:
        return ("false", "true")
    used: set[int | str] = set()
    for table, what in every:
        for batch in table.read([what.label or ""], _LABEL_ROWS):
            labels = cols.plain_labels(batch.column(0), 0, table.path)
            used.update(pc.unique(labels).to_pylist())
    if kinds == {"words"}:
        names = tuple(sorted(map(str, used)))
        note_twins(names, report)
        return names
    note_idle({int(number) for number in used}, report)
    return ()


def _kind(label: pa.DataType) -> str:
    if cols.is_words(label):
        return "words"
    return "truth values" if cols.names_of_truth(label) else "numbers"


def _batches(
    parts: list[tuple[Table, Columns]],
    names: tuple[str, ...],
    schema: pa.Schema,
    chunk_bytes: int,
) -> Batches:
    def batches() -> Iterator[pa.RecordBatch]:
        for table, what in parts:
            assert what.label is not None
            start = 0
            rows = chunk_rows(chunk_bytes, table.num_bytes // table.num_rows)
            for batch in table.read([what.image, what.label], rows):
                image = cols.images(batch.column(what.image), start, table.path)
                labels = cols.plain_labels(batch.column(what.label), start, table.path)
                labels = cols.numbered(labels, names)
                yield pa.RecordBatch.from_arrays([image, labels], schema=schema)
                start += len(batch)

    return batches


def open_parquet(filesystem: fs.FileSystem, info: fs.FileInfo) -> Table:
    """Open one Parquet file.

    Raises:
        IngestError: it is not readable as Parquet.
    """
    path = info.path
    try:
        with filesystem.open_input_file(path) as source:
            if source.read(2) == b"\x1f\x8b":
                raise IngestError(f"{path} is compressed as a whole; unpack it with gunzip")
            source.seek(0)
            with pq.ParquetFile(source) as parquet:
                about, schema = parquet.metadata, parquet.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "Parquet", error) from error

    def read(names: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        try:
            with (
                filesystem.open_input_file(path) as source,
                pq.ParquetFile(
                    source, metadata=about, buffer_size=_STREAM_BYTES, pre_buffer=False
                ) as parquet,
            ):
                for batch in parquet.iter_batches(rows, columns=list(names), use_threads=False):
                    if len(batch):
                        yield batch.select(list(names))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, "Parquet", error) from error

    size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    return Table(path=path, schema=schema, num_rows=about.num_rows, num_bytes=int(size), read=read)


def open_arrow(filesystem: fs.FileSystem, info: fs.FileInfo) -> Table:
    """Open one Arrow file, a stream or not; its batches are passed over once, to count rows.

    Raises:
        IngestError: it is not readable as Arrow.
    """
    path = info.path

    def every() -> Iterator[pa.RecordBatch]:
        try:
            local = files.is_local(filesystem)
            with pa.memory_map(path) if local else filesystem.open_input_file(path) as source:
                if source.read(6) == b"ARROW1":
                    with pa.ipc.open_file(source) as opened:
                        for number in range(opened.num_record_batches):
                            yield opened.get_batch(number)
                else:
                    source.seek(0)
                    with pa.ipc.open_stream(source) as stream:
                        yield from stream
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, "Arrow", error) from error

    def read(names: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        for batch in every():
            some = batch.select(list(names))
            for start in range(0, len(batch), rows):
                yield some.slice(start, rows)

    schema = pa.schema([])
    num_rows = 0
    for batch in every():
        schema, num_rows = batch.schema, num_rows + len(batch)
    return Table(path=path, schema=schema, num_rows=num_rows, num_bytes=int(info.size), read=read)


def _unreadable(path: str, kind: str, error: BaseException) -> IngestError:
    return IngestError(
        f"{path} is not readable as {kind} ({files.one_line(error)}); remove it or copy it again"
    )

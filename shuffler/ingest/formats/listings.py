"""Lists of images and their labels as a source: CSV, TSV and JSON lines.

    train.csv       path,label            paths are relative to the list's folder
    metadata.jsonl  {"file_name": "a.jpg", "label": "cat"}
    labels.csv      path,label,split      a list of several splits

A list is read twice: for the labels and to see that the images are there, then for the images.
"""

from __future__ import annotations

import array
import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from pyarrow import fs

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.encoding import EncodedImages, schema_for
from downpour.shuffler.errors import IngestError
from downpour.shuffler.ingest.formats import rows as rows_of
from downpour.shuffler.ingest.formats import splits as names_of
from downpour.shuffler.ingest.formats.columns import LABEL_COLUMNS
from downpour.shuffler.ingest.formats.report import Report
from downpour.shuffler.ingest.formats.rows import Labels
from downpour.shuffler.ingest.formats.source import Batches, Source, SourceSplit
from downpour.shuffler.ingest.formats.tables import Choice, by_split

SUFFIXES: Final = (".csv", ".tsv", ".jsonl", ".ndjson")
PATH_COLUMNS: Final = (
    *("path", "file_name", "filename", "file", "filepath", "file_path", "image", "img"),
    *("image_path", "image_id", "image_name", "name", "paths", "filenames", "filepaths", "images"),
)
_DELIMITERS: Final = ",;\t|"
_CHECKED_AT_ONCE: Final = 256
_HEADING_BYTES: Final = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listing:
    """One list, and which of its columns are what."""

    path: str
    image: str
    label: str | None
    split: str | None
    """That says which split a row is of; None if the list is of one."""
    delimiter: str


def open_listings(
    filesystem: fs.FileSystem,
    folder: str,
    found: Sequence[fs.FileInfo],
    chunk_bytes: int,
    choice: Choice,
    report: Report,
) -> Source:
    """Open lists as a source.

    Raises:
        IngestError: a list cannot be understood, or an image that it names is not there.
    """
    splits = by_split(folder, found, choice, report)
    labels = Labels()
    opened: list[tuple[str, _Listing, int, int]] = []
    given = bool(choice.patterns)
    for split, infos in splits.items():
        if len(infos) > 1:
            raise IngestError(
                f"{infos[0].path} and {infos[1].base_name} are both lists of split {split!r}; keep "
                f"one, or choose with --split {split}={infos[0].base_name}"
            )
        listing = _open(filesystem, infos[0].path, choice, follows_splits=not given)
        if listing.label is None:
            report.note(f"{infos[0].base_name} has no column of labels, and is left out")
            continue
        counts = _survey(filesystem, listing, labels, report)
        for named, (count, size) in counts.items():
            if not named or not choice.splits or named in choice.splits:
                opened.append((named or split, listing, count, size))
        if "" not in counts:
            report.note(
                f"column {listing.split!r} of {infos[0].base_name} says which split is whose"
            )
    split, lists = Counter(each[0] for each in opened).most_common(1)[0] if opened else ("", 0)
    if lists > 1:
        raise IngestError(
            f"several lists of {folder} have rows of split {split!r}; keep one list, or choose "
            f"with --split {split}=NAME"
        )
    if not opened:
        raise IngestError(
            f"the lists of {folder} have no column of labels; name it with --label-column"
        )
    numbers, names = labels.classes(report)
    schema = schema_for(EncodedImages(), names)

    def batches(split: str, listing: _Listing) -> Batches:
        def images() -> Iterator[tuple[bytes, str, int]]:
            for _, path, text, named in _entries(filesystem, listing):
                if named not in ("", split):
                    continue
                where = _located(listing, path)
                with filesystem.open_input_stream(where) as stream:
                    yield bytes(stream.read()), path, numbers[text]

        return lambda: rows_of.batches_of(images(), schema, chunk_bytes)

    return Source(
        format="list",
        encoding=EncodedImages(),
        class_names=names,
        splits=tuple(
            SourceSplit(name=split, num_rows=count, num_bytes=size, batches=batches(split, listing))
            for split, listing, count, size in sorted(opened, key=lambda each: each[0])
        ),
    )


def _open(
    filesystem: fs.FileSystem, path: str, choice: Choice, *, follows_splits: bool
) -> _Listing:
    delimiter = _delimiter(filesystem, path)
    first = next(_records(filesystem, path, delimiter), None)
    if first is None:
        raise IngestError(f"{path} lists nothing; give a line for each image")
    names = [name for name in first if name]
    by_name = {name.strip().lower(): name for name in reversed(names)}
    split = next((by_name[name] for name in names_of.COLUMNS if name in by_name), None)
    return _Listing(
        split=split if follows_splits else None,
        delimiter=delimiter,
        path=path,
        image=_column(names, choice.image_column, PATH_COLUMNS, path, "--image-column")
        or _missing(path, names),
        label=_column(names, choice.label_column, LABEL_COLUMNS, path, "--label-column"),
    )


def _column(
    names: list[str], chosen: str | None, known: tuple[str, ...], path: str, option: str
) -> str | None:
    if chosen is not None and chosen not in names:
        raise IngestError(
            f"{path} has no column {chosen!r} (it has {', '.join(names)}); give one of those to "
            f"{option}"
        )
    by_name = {name.strip().lower(): name for name in reversed(names)}
    return chosen or next((by_name[name] for name in known if name in by_name), None)


def _missing(path: str, names: list[str]) -> str:
    raise IngestError(
        f"{path} has no column of paths that is known (it has {', '.join(names)}); name it with "
        "--image-column, or add a heading such as path,label if it has none"
    )


def _survey(
    filesystem: fs.FileSystem, listing: _Listing, labels: Labels, report: Report
) -> dict[str, tuple[int, int]]:
    """Return how many images a list names and about what they take, by split; collect its labels.

    A list of one split has "" for it.
    """
    found: dict[str, tuple[int, int]] = {}
    hashes = array.array("q")
    entries = _entries(filesystem, listing)
    while some := list(itertools.islice(entries, _CHECKED_AT_ONCE)):
        infos = filesystem.get_file_info([_located(listing, path) for _, path, *_ in some])
        for (line, path, text, split), info in zip(some, infos, strict=True):
            if info.type != fs.FileType.File:
                raise IngestError(
                    f"entry {line} of {listing.path} names {path}, which is not there; correct the "
                    "path (relative to the list's folder), or remove the entry"
                )
            labels.add(text)
            hashes.append(hash(path))
            count, size = found.get(split, (0, 0))
            found[split] = count + 1, size + info.size + 64
    again = len(hashes) - len(np.unique(np.frombuffer(hashes, np.int64)))
    if again:
        report.note(f"{again:,} entries of {listing.path} name an image that another one names too")
    return found


def _located(listing: _Listing, path: str) -> str:
    if "/" not in path:
        path = path.replace("\\", "/")  # as Windows writes it
    return path if path.startswith("/") else f"{listing.path.rpartition('/')[0]}/{path}"


def _entries(filesystem: fs.FileSystem, listing: _Listing) -> Iterator[tuple[int, str, str, str]]:
    """Yield the number, the path, the label and the split of each entry; "" if the list is of one.

    Raises:
        IngestError: one has no path or no label.
    """
    records = _records(filesystem, listing.path, listing.delimiter)
    for number, record in enumerate(records, 1):
        if None in record:
            raise IngestError(
                f"entry {number} of {listing.path} has more fields than the heading; put fields "
                "that hold the separator into quotes"
            )
        path, label = record.get(listing.image), record.get(listing.label or "")
        if isinstance(label, list) and len(label) == 1:
            label = label[0]
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if not isinstance(path, str) or not path.strip():
            raise IngestError(
                f"entry {number} of {listing.path} has no {listing.image!r}; add it or remove the "
                "entry"
            )
        if not isinstance(label, str | int) or not str(label).strip() or str(label) == "-1":
            raise IngestError(
                f"entry {number} of {listing.path} has the label {label!r}; give a class, or "
                "remove the entry"
            )
        yield number, path.strip(), str(label).strip(), _split_of(record, listing, number)


def _split_of(record: dict[str, Any], listing: _Listing, number: int) -> str:
    """Return the split that an entry names, "" if the list has no column of splits."""
    if listing.split is None:
        return ""
    word = str(record.get(listing.split)).strip()
    split = names_of.of_folder(word)
    if split is None:
        raise IngestError(
            f"entry {number} of {listing.path} has {word!r} in column {listing.split!r}, which "
            "names no split; write train, validation or test there, or take all rows for one "
            "split with --split train=PATTERN"
        )
    return split


def _delimiter(filesystem: fs.FileSystem, path: str) -> str:
    """Return what stands between the fields of a list: what its heading has most of."""
    if path.lower().endswith(".tsv"):
        return "\t"
    with filesystem.open_input_stream(path) as stream:
        heading = bytes(stream.read(_HEADING_BYTES)).split(b"\n")[0].decode(errors="replace")
    return max(_DELIMITERS, key=heading.count)


def _records(filesystem: fs.FileSystem, path: str, delimiter: str) -> Iterator[dict[str, Any]]:
    """Yield the entries of a list, each by its columns' names."""
    try:
        with (
            filesystem.open_input_stream(path) as stream,
            io.TextIOWrapper(stream, "utf-8-sig", newline="") as text,
        ):
            if path.lower().endswith((".csv", ".tsv")):
                yield from csv.DictReader(text, delimiter=delimiter)
            else:
                for line in filter(str.strip, text):
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError(f"{line[:40]!r} is no JSON object")
                    yield record
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, IngestError):
            raise
        raise IngestError(
            f"{path} cannot be understood ({files.one_line(error)}); give UTF-8 with a heading, or "
            "a JSON object a line"
        ) from error

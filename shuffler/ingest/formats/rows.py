"""Images that lie in files of their own, on their way to batches: what folders, lists and archives
of images have in common.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import pyarrow as pa

from downpour.shuffler.dataset.image_columns import IMAGE_TYPE
from downpour.shuffler.errors import IngestError
from downpour.shuffler.ingest.formats.report import Report
from downpour.shuffler.ingest.formats.source import MAX_CHUNK_ROWS

IMAGE_SUFFIXES: Final = (
    *(".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".jp2", ".j2k", ".jpx", ".avif"),
)
"""Ends of the names of files that are taken for images, in lower case."""

_BEGINNINGS: Final = (
    *(b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II", b"MM", b"\0\0\1\0", b"\0\0\2\0"),
    *(b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"P7", b"Pf", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51"),
)
"""First bytes of the image formats that are read, but for AVIF's, and TGA's, which has none."""

MOST_CLASSES: Final = 1 << 16
"""Classes above which labels have to be numbered closely."""


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def why_unread(beginning: bytes, name: str | None) -> str | None:
    """Return words for a file that can be no image by its first 12 bytes; None if it may be one."""
    if beginning.startswith(_BEGINNINGS) or (name or "").lower().endswith((".tga", ".dib")):
        return None
    if beginning[4:8] == b"ftyp":
        is_heic = beginning[8:11] in (b"hei", b"hev", b"msf")
        return "files that are HEIC, which is not read" if is_heic else None
    return "files that are no images, though named so" if beginning else "empty files"


def kind_of(name: str) -> str:
    """Return words for a file that is no image, for what is told of it."""
    _, dot, suffix = name.rpartition(".")
    return (
        f"files with the suffix .{suffix.lower()}" if dot and suffix else "files without a suffix"
    )


def batches_of(
    rows: Iterable[tuple[bytes, str, int]], schema: pa.Schema, chunk_bytes: int
) -> Iterator[pa.RecordBatch]:
    """Yield rows (a file's bytes, its path, its label) in batches of about `chunk_bytes`."""
    images: list[dict[str, bytes | str]] = []
    labels: list[int] = []
    size = 0
    for data, path, label in rows:
        images.append({"bytes": data, "path": path})
        labels.append(label)
        size += len(data)
        if size >= chunk_bytes or len(images) >= MAX_CHUNK_ROWS:
            yield _batch(images, labels, schema)
            images, labels, size = [], [], 0
    if images:
        yield _batch(images, labels, schema)


def _batch(
    images: list[dict[str, bytes | str]], labels: list[int], schema: pa.Schema
) -> pa.RecordBatch:
    columns = [pa.array(images, IMAGE_TYPE), pa.array(labels, pa.int64())]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


_NUMBER = re.compile(r"[0-9]+(\.0*)?", re.ASCII)


class Labels:
    """Labels as texts, of which some are numbers: collected first, then turned into class numbers.

    If all of them are whole numbers (3 or 3.0), they are the classes' numbers. Otherwise they are
    names, and the classes are numbered in the order of the names.
    """

    def __init__(self) -> None:
        self._texts: set[str] = set()

    def add(self, text: str) -> None:
        """Take note of a label."""
        self._texts.add(text)

    def classes(self, report: Report) -> tuple[dict[str, int], tuple[str, ...]]:
        """Return the number of each label, and the classes' names; () if labels are numbers."""
        if all(_NUMBER.fullmatch(text) for text in self._texts):
            numbers = {text: int(text.partition(".")[0]) for text in self._texts}
            note_idle(set(numbers.values()), report)
            return numbers, ()
        names = tuple(sorted(self._texts))
        note_twins(names, report)
        return {name: number for number, name in enumerate(names)}, names


def note_twins(names: Sequence[str], report: Report) -> None:
    """Tell of classes whose names differ in case, blanks or Unicode's form only, or not at all."""
    alike = [" ".join(unicodedata.normalize("NFC", name).casefold().split()) for name in names]
    counts = Counter(alike)
    if len(counts) < len(names):
        first = next(plain for plain in alike if counts[plain] > 1)
        told = [repr(name) for name, plain in zip(names, alike, strict=True) if plain == first]
        report.note(
            f"classes {' and '.join(told[:3])} are two classes though their names are so alike; "
            "correct the names if they are one"
        )


def note_idle(used: set[int], report: Report) -> None:
    """Tell of numbers below the highest label that no row has.

    Raises:
        IngestError: labels are so high and so few that they are no numbers of classes.
    """
    num_classes = max(used, default=-1) + 1
    num_idle = num_classes - len(used)
    if num_classes > MOST_CLASSES and num_idle > len(used):
        raise IngestError(
            f"labels go up to {num_classes - 1:,}, and only {len(used):,} of them occur: these are "
            "no class numbers; number the classes from 0, or give them as words"
        )
    if num_idle:
        first = next(number for number in itertools.count() if number not in used)
        report.note(
            f"labels go up to {num_classes - 1}, so there are {num_classes} classes; {num_idle} of "
            f"them, such as {first}, have no row"
        )

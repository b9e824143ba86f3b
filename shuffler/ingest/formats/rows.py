"""Images that lie in files of their own, on their way to batches: what folders, lists and archives
of images have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import pyarrow as pa

from downpour.shuffler.dataset.encoding import IMAGE_TYPE
from downpour.shuffler.ingest.formats.report import Report
from downpour.shuffler.ingest.formats.source import MAX_CHUNK_ROWS

IMAGE_SUFFIXES: Final = (
    *(".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".jp2", ".j2k", ".jpx", ".avif"),
)
"""Ends of the names of files that are taken for images, in lower case."""


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


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


class Labels:
    """Labels as texts, of which some are numbers: collected first, then turned into class numbers.

    If all of them are whole numbers, they are the classes' numbers. Otherwise they are names, and
    the classes are numbered in the order of the names.
    """

    def __init__(self) -> None:
        self._texts: set[str] = set()

    def add(self, text: str) -> None:
        """Take note of a label."""
        self._texts.add(text)

    def classes(self, report: Report) -> tuple[dict[str, int], tuple[str, ...]]:
        """Return the number of each label, and the classes' names; () if labels are numbers."""
        if all(text.isascii() and text.isdigit() for text in self._texts):
            numbers = {text: int(text) for text in self._texts}
            note_idle(set(numbers.values()), report)
            return numbers, ()
        names = tuple(sorted(self._texts))
        return {name: number for number, name in enumerate(names)}, names


def note_idle(used: set[int], report: Report) -> None:
    """Tell of numbers below the highest label that no row has."""
    idle = [number for number in range(max(used, default=-1) + 1) if number not in used]
    if idle:
        report.note(
            f"labels go up to {max(used)}, so there are {max(used) + 1} classes; {len(idle)} of "
            f"them, such as {idle[0]}, have no row"
        )

"""WebDataset's archives as a source: tar files of images with their labels beside them.

    train-000000.tar:  000000.jpg 000000.cls 000001.jpg 000001.cls ...

Files of one sample follow one another, and share their name up to its first dot. The label is in
`<sample>.cls`, as a number or a word, or in `<sample>.json` as `label`, `cls` or `class`. Archives
are read twice: for the labels, then for the images.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, Final

from pyarrow import fs

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.encoding import EncodedImages, schema_for
from downpour.shuffler.errors import IngestError
from downpour.shuffler.ingest.formats import rows as rows_of
from downpour.shuffler.ingest.formats.columns import LABEL_COLUMNS
from downpour.shuffler.ingest.formats.report import Report
from downpour.shuffler.ingest.formats.rows import Labels
from downpour.shuffler.ingest.formats.source import Batches, Source, SourceSplit
from downpour.shuffler.ingest.formats.tables import Choice, by_split

SUFFIXES: Final = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_LABEL_SUFFIXES: Final = ("cls", "label", "class", "cls.txt", "label.txt")
_MOST_LABEL_BYTES: Final = 1 << 20


def open_tars(
    filesystem: fs.FileSystem,
    folder: str,
    found: Sequence[fs.FileInfo],
    chunk_bytes: int,
    choice: Choice,
    report: Report,
) -> Source:
    """Open archives as a source.

    Raises:
        IngestError: an archive cannot be read, or a sample has no label.
    """
    labels = Labels()
    opened: dict[str, tuple[list[str], int, int]] = {}
    for split, infos in by_split(folder, found, choice, report).items():
        count = size = 0
        paths = [str(info.path) for info in infos]
        for path in paths:
            for member, _, label in _samples(filesystem, path, choice, report):
                labels.add(label)
                count, size = count + 1, size + member.size + 64
        if not count:
            raise IngestError(f"{paths[0]} holds no image with a label; give others")
        opened[split] = (paths, count, size)
    numbers, names = labels.classes(report)
    schema = schema_for(EncodedImages(), names)

    def batches(paths: list[str]) -> Batches:
        def images() -> Iterator[tuple[bytes, str, int]]:
            for path in paths:
                for member, data, label in _samples(filesystem, path, choice, None):
                    yield data, member.name, numbers[label]

        return lambda: rows_of.batches_of(images(), schema, chunk_bytes)

    return Source(
        format="webdataset",
        encoding=EncodedImages(),
        class_names=names,
        splits=tuple(
            SourceSplit(name=split, num_rows=count, num_bytes=size, batches=batches(paths))
            for split, (paths, count, size) in sorted(opened.items())
        ),
    )


def _samples(
    filesystem: fs.FileSystem, path: str, choice: Choice, report: Report | None
) -> Iterator[tuple[tarfile.TarInfo, bytes, str]]:
    """Yield the image of each sample (its place, its bytes) and its label.

    If there is a report, images are not read, and it is told of what is left out.
    """
    image: tuple[tarfile.TarInfo, bytes] | None = None
    label: str | None = None
    current = ""
    try:
        with (
            filesystem.open_input_file(path) as source,
            tarfile.open(fileobj=source, mode="r:*") as archive,
        ):
            members: list[tarfile.TarInfo] = vars(archive)["members"]
            for member in archive:
                members.clear()  # it would grow with the archive
                if not member.isfile():
                    continue
                key, suffix = _split_name(member.name)
                if key != current:
                    if image is not None:
                        yield (*image, _found(label, image[0], path))
                    image, label, current = None, None, key
                if rows_of.is_image(member.name) and (choice.image_column in (None, suffix)):
                    if image is not None and report is not None:
                        report.leave_out("second images of a sample", member.name)
                    elif image is None:
                        data = b"" if report is not None else _bytes(archive, member)
                        image = (member, data)
                elif label is None:
                    label = _label(archive, member, suffix, choice)
                    if label is None and report is not None:
                        report.leave_out(f"files .{suffix} of samples", member.name)
            if image is not None:
                yield (*image, _found(label, image[0], path))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, IngestError):
            raise
        raise IngestError(
            f"{path} is not readable as a tar archive ({files.one_line(error)}); remove it or copy "
            "it again"
        ) from error


def _split_name(name: str) -> tuple[str, str]:
    """Return a member's sample and its suffix: `a/b.c.jpg` is of `a/b`, with `c.jpg`."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _found(label: str | None, member: tarfile.TarInfo, path: str) -> str:
    if label in (None, "", "-1"):
        key = _split_name(member.name)[0]
        folders = "; or unpack it, if its folders are the classes" if "/" in key else ""
        raise IngestError(
            f"sample {key!r} of {path} has no label; add {key}.cls, or name the part that holds it "
            f"with --label-column{folders}"
        )
    assert label is not None
    return label


def _label(
    archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, choice: Choice
) -> str | None:
    """Return the label that a member holds, None if it holds none."""
    wanted = choice.label_column
    if suffix in ((wanted,) if wanted else _LABEL_SUFFIXES):
        try:
            return _bytes(archive, member).decode().strip()
        except UnicodeDecodeError as error:
            raise _no_label(member) from error
    if suffix == "json" and member.size <= _MOST_LABEL_BYTES:
        try:
            values: Any = json.loads(_bytes(archive, member))
        except ValueError as error:
            raise _no_label(member) from error
        for name in (wanted,) if wanted else LABEL_COLUMNS:
            value = values.get(name) if isinstance(values, dict) else None
            if isinstance(value, str | int) and not isinstance(value, bool):
                return str(value)
    return None


def _no_label(member: tarfile.TarInfo) -> IngestError:
    return IngestError(
        f"{member.name} in an archive is no text that holds a label; write a number, a word or JSON"
    )


def _bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    assert opened is not None
    with opened:
        return opened.read()

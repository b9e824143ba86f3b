"""Folders of class folders, and ImageNet's layout, as a source.

    train/<class>/<image>
    val/<class>/<image>, or val/<image> with a ground truth beside it

Labels are the places of the classes' folders in the class list where there is one, otherwise among
the folders of train/ by name. What the lists say is `imagenet`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
from pyarrow import fs

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.encoding import IMAGE_TYPE, EncodedImages, schema_for
from downpour.shuffler.errors import IngestError
from downpour.shuffler.ingest.imagenet import (
    CLASS_LISTS,
    GROUND_TRUTHS,
    parse_class_list,
    parse_ground_truth,
)
from downpour.shuffler.ingest.source import (
    MAX_CHUNK_ROWS,
    SPLIT_NAMES,
    Batches,
    Source,
    SourceSplit,
)

IMAGE_SUFFIXES: Final = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
FOLDER_SPLITS: Final = ("train", "val", "valid", "validation", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Classes:
    """The classes by label."""

    folders: list[str]
    names: list[str]
    listed: bool


def open_folder(
    filesystem: fs.FileSystem,
    folder: str,
    chunk_bytes: int,
    *,
    splits: tuple[str, ...] = (),
    class_list: str | None = None,
    ground_truth: str | None = None,
) -> Source:
    """Open folders of images.

    Args:
        filesystem: of the source.
        folder: that holds train/ and perhaps others.
        chunk_bytes: about the most bytes of a batch.
        splits: by their names in the dataset; () for all that there are.
        class_list: path or URI of one; None looks for it beside train/.
        ground_truth: path or URI of one, for a split without class folders; None looks for it.

    Raises:
        IngestError: a folder or a list is not as it should be; the message says which.
    """
    entries = {
        entry.base_name: files.list_folder(filesystem, entry.path)
        for entry in files.list_folder(filesystem, folder)
        if entry.base_name in FOLDER_SPLITS
        and entry.type == fs.FileType.Directory
        and (not splits or _split_name(entry.base_name) in splits)
    }
    classes = _classes(filesystem, folder, class_list)
    found = []
    for name, children in entries.items():
        path = f"{folder}/{name}"
        present = [c.base_name for c in children if c.type == fs.FileType.Directory]
        if present:
            unknown = sorted(set(present) - set(classes.folders))
            if unknown:
                where = "the class list" if classes.listed else "train/"
                raise IngestError(
                    f"{path} has class {unknown[0]!r}, which {where} does not have "
                    f"({len(unknown)} such); give both the same class folders"
                )
            images = [image for c in present for image in _images_of_class(filesystem, path, c)]
            labels = None
        else:
            images = _image_files(children)
            labels = _labels(filesystem, folder, path, images, classes, ground_truth)
        size = sum(image.size + 64 for image in images)
        found.append((name, path, len(images), size, labels))
    return Source(
        format="folder",
        encoding=EncodedImages(),
        class_names=tuple(classes.names),
        splits=tuple(
            SourceSplit(
                name=_split_name(name),
                num_rows=num_rows,
                num_bytes=num_bytes,
                batches=_reader(filesystem, path, classes, labels, chunk_bytes),
            )
            for name, path, num_rows, num_bytes, labels in found
        ),
    )


def _split_name(name: str) -> str:
    return SPLIT_NAMES.get(name, name)


def _classes(filesystem: fs.FileSystem, folder: str, class_list: str | None) -> _Classes:
    text, where = _text(filesystem, folder, class_list, CLASS_LISTS)
    if text is not None:
        folders, names = parse_class_list(text, where)
        return _Classes(folders=folders, names=names, listed=True)
    train = f"{folder}/train"
    if filesystem.get_file_info(train).type == fs.FileType.Directory:
        children = files.list_folder(filesystem, train)
        folders = [c.base_name for c in children if c.type == fs.FileType.Directory]
        if folders:
            return _Classes(folders=folders, names=folders, listed=False)
    raise IngestError(
        f"{folder} has no folder train/ of class folders; lay images out as train/<class>/<image>"
    )


def _labels(
    filesystem: fs.FileSystem,
    folder: str,
    path: str,
    images: list[fs.FileInfo],
    classes: _Classes,
    ground_truth: str | None,
) -> dict[str, int]:
    """Return the labels of the images of a split without class folders, by name."""
    if not images:
        raise IngestError(f"{path} holds no class folders and no images; fill it or remove it")
    text, where = _text(filesystem, folder, ground_truth, GROUND_TRUTHS)
    if text is None:
        raise IngestError(
            f"{path} has images without class folders, so their labels are missing; name a "
            f"ground truth, or put one of {', '.join(GROUND_TRUTHS)} into {folder}, or choose "
            "other splits"
        )
    names = [image.base_name for image in images]
    if not classes.listed and text.split() and all(word.isdigit() for word in text.split()):
        raise IngestError(
            f"{where} gives classes by number, and nothing says which number is which; name a "
            f"class list, or put one of {', '.join(CLASS_LISTS)} into {folder}"
        )
    labels = parse_ground_truth(text, names, classes.folders, where)
    return dict(zip(names, labels, strict=True))


def _text(
    filesystem: fs.FileSystem, folder: str, chosen: str | None, names: tuple[str, ...]
) -> tuple[str | None, str]:
    """Return the text of a list, and where it is; None where there is none."""
    if chosen is not None:
        where, candidates = files.locate(chosen)[0], [files.locate(chosen)[1]]
    else:
        where, candidates = filesystem, [f"{folder}/{name}" for name in names]
    for path in candidates:
        if where.get_file_info(path).type == fs.FileType.File:
            with where.open_input_stream(path) as stream:
                return bytes(stream.read()).decode(errors="replace"), path
    if chosen is not None:
        raise IngestError(f"{chosen} does not exist; give the path of the list")
    return None, ""


def _images_of_class(filesystem: fs.FileSystem, path: str, name: str) -> list[fs.FileInfo]:
    images = _image_files(files.list_folder(filesystem, f"{path}/{name}"))
    if not images:
        raise IngestError(
            f"{path}/{name} holds no image ({', '.join(IMAGE_SUFFIXES)}); add some or remove the "
            "class"
        )
    return images


def _image_files(entries: list[fs.FileInfo]) -> list[fs.FileInfo]:
    """Return the image files among entries; files of other suffixes are not images."""
    return [
        entry
        for entry in entries
        if entry.type == fs.FileType.File and entry.base_name.lower().endswith(IMAGE_SUFFIXES)
    ]


def _reader(
    filesystem: fs.FileSystem,
    path: str,
    classes: _Classes,
    labels: dict[str, int] | None,
    chunk_bytes: int,
) -> Batches:
    schema = schema_for(EncodedImages(), classes.names)

    def found() -> Iterator[tuple[fs.FileInfo, str, int]]:
        entries = files.list_folder(filesystem, path)
        if labels is not None:
            for image in _image_files(entries):
                if image.base_name not in labels:
                    raise IngestError(
                        f"{image.path} has appeared since the ingest began; keep the source "
                        "unchanged while it is ingested"
                    )
                yield image, image.base_name, labels[image.base_name]
            return
        present = {entry.base_name for entry in entries}
        for label, name in enumerate(classes.folders):
            if name in present:
                for image in _image_files(files.list_folder(filesystem, f"{path}/{name}")):
                    yield image, f"{name}/{image.base_name}", label

    def batches() -> Iterator[pa.RecordBatch]:
        images: list[dict[str, bytes | str]] = []
        numbers: list[int] = []
        size = 0
        for image, shown, label in found():
            with filesystem.open_input_stream(image.path) as stream:
                data = stream.read()
            images.append({"bytes": data, "path": shown})
            numbers.append(label)
            size += len(data)
            if size >= chunk_bytes or len(images) >= MAX_CHUNK_ROWS:
                yield _batch(images, numbers, schema)
                images, numbers, size = [], [], 0
        if images:
            yield _batch(images, numbers, schema)

    return batches


def _batch(
    images: list[dict[str, bytes | str]], labels: list[int], schema: pa.Schema
) -> pa.RecordBatch:
    columns = [pa.array(images, IMAGE_TYPE), pa.array(labels, pa.int64())]
    return pa.RecordBatch.from_arrays(columns, schema=schema)

"""Folders of class folders, and ImageNet's layout, as a source.

    train/<class>/<image>
    val/<class>/<image>, or val/<image> or val/images/<image> with a ground truth beside it
    <class>/<image>, without split folders, if a share is held out for validation

An image may also lie one folder deeper, if its class folder has no other images and no other
folders (`train/n01443537/images/<image>`). What else is there is counted and left out.

Labels are the places of the classes' folders in the class list where there is one, otherwise among
the folders of train/ by name. What the lists say is `imagenet`'s.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

from pyarrow import fs

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.encoding import EncodedImages, schema_for
from downpour.shuffler.errors import IngestError
from downpour.shuffler.ingest.formats import rows as rows_of
from downpour.shuffler.ingest.formats import splits as names_of
from downpour.shuffler.ingest.formats.class_folders import (
    NOT_CLASSES,
    class_folders,
    image_files,
    images_of_class,
)
from downpour.shuffler.ingest.formats.imagenet import (
    CLASS_LISTS,
    GROUND_TRUTHS,
    parse_class_list,
    parse_ground_truth,
)
from downpour.shuffler.ingest.formats.report import Report
from downpour.shuffler.ingest.formats.source import Batches, Source, SourceSplit


@dataclass(frozen=True, kw_only=True, slots=True)
class _Classes:
    """The classes by label."""

    folders: list[str]
    names: list[str]
    listed: bool
    labels: dict[str, int] = field(default_factory=dict)
    """The label of each folder, by its name as `_same` gives it."""

    @classmethod
    def of(cls, folders: list[str], names: list[str], *, listed: bool) -> _Classes:
        labels = {_same(folder): label for label, folder in enumerate(folders)}
        if len(labels) < len(folders):
            twice = next(f for label, f in enumerate(folders) if labels[_same(f)] != label)
            raise IngestError(
                f"there are two classes {twice!r}, whose names differ only in how Unicode writes "
                "an accent; join their folders"
            )
        return cls(folders=folders, names=names, listed=listed, labels=labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """What a split's folder holds."""

    split: str
    path: str
    """Folder of the class folders, or of the images."""

    classes: dict[str, str]
    """The folder of the images of each class folder; empty if images are not in class folders."""

    labels: dict[str, int] | None
    """Labels of images that are not in class folders, by name."""

    num_rows: int
    num_bytes: int


def split_folders(entries: list[fs.FileInfo]) -> dict[str, str]:
    """Return the split of each folder that is named like one, by the folder's name."""
    return {
        entry.base_name: split
        for entry in entries
        if entry.type == fs.FileType.Directory and (split := names_of.of_folder(entry.base_name))
    }


def open_folder(
    filesystem: fs.FileSystem,
    folder: str,
    chunk_bytes: int,
    *,
    splits: tuple[str, ...] = (),
    class_list: str | None = None,
    ground_truth: str | None = None,
    whole: bool = False,
    report: Report | None = None,
) -> Source:
    """Open folders of images.

    Args:
        filesystem: of the source.
        folder: that holds train/ and perhaps others, or class folders.
        chunk_bytes: about the most bytes of a batch.
        splits: by their names in the dataset; () for all that there are.
        class_list: path or URI of one; None looks for it beside train/.
        ground_truth: path or URI of one, for a split without class folders; None looks for it.
        whole: whether class folders without train/ are taken, as split `train`.
        report: told what is left out, and why.

    Raises:
        IngestError: a folder or a list is not as it should be; the message says which.
    """
    report = report or Report()
    entries = files.list_folder(filesystem, folder)
    there = split_folders(entries)
    twice = [name for name, split in there.items() if list(there.values()).count(split) > 1]
    if twice:
        raise IngestError(
            f"{folder} has {' and '.join(sorted(twice))}, which are one split; join them or remove "
            "one"
        )
    if not there:
        return _class_folders(filesystem, folder, entries, chunk_bytes, class_list, whole, report)
    for entry in entries:
        if entry.type == fs.FileType.File and rows_of.is_image(entry.base_name):
            report.leave_out("images outside of a split's folder", entry.base_name)
    train = next((name for name, split in there.items() if split == "train"), "train")
    classes = _classes(filesystem, folder, train, class_list)
    if not classes.listed:
        rows_of.note_twins(classes.names, report)
    found = [
        each
        for name, split in there.items()
        if not splits or split in splits
        if (
            each := _look_at(
                filesystem,
                folder,
                name,
                split,
                classes,
                ground_truth,
                report,
                may_lack_labels=split == "test" and not splits,
            )
        )
    ]
    return _source(filesystem, classes, found, chunk_bytes)


def _class_folders(
    filesystem: fs.FileSystem,
    folder: str,
    entries: list[fs.FileInfo],
    chunk_bytes: int,
    class_list: str | None,
    whole: bool,
    report: Report,
) -> Source:
    """Open class folders that are in no split's folder."""
    if not whole:
        raise IngestError(
            f"{folder} has no folder train/ of class folders; hold out a share of these images "
            "with --validation-share 0.1 (0: none), or lay them out as train/<class>/<image>"
        )
    text, where = _text(filesystem, folder, class_list, CLASS_LISTS)
    present = class_folders(entries)
    if text is not None:
        classes = _Classes.of(*parse_class_list(text, where, present), listed=True)
    else:
        classes = _Classes.of(present, present, listed=False)
    path, name = folder.rpartition("/")[::2]
    rows_of.note_twins(classes.names, report)
    found = _look_at(filesystem, path, name, "train", classes, None, report)
    assert found is not None
    return _source(filesystem, classes, [found], chunk_bytes)


def _source(
    filesystem: fs.FileSystem, classes: _Classes, found: list[_Found], chunk_bytes: int
) -> Source:
    return Source(
        format="folder",
        encoding=EncodedImages(),
        class_names=tuple(classes.names),
        splits=tuple(
            SourceSplit(
                name=each.split,
                num_rows=each.num_rows,
                num_bytes=each.num_bytes,
                batches=_reader(filesystem, each, classes, chunk_bytes),
            )
            for each in found
        ),
    )


def _same(name: str) -> str:
    """A folder's name in the one of its Unicode forms by which names are compared."""
    return unicodedata.normalize("NFC", name)


def _classes(
    filesystem: fs.FileSystem, folder: str, train: str, class_list: str | None
) -> _Classes:
    text, where = _text(filesystem, folder, class_list, CLASS_LISTS)
    path = f"{folder}/{train}"
    folders: list[str] = []
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        folders = class_folders(files.list_folder(filesystem, path))
    if text is not None:
        return _Classes.of(*parse_class_list(text, where, folders), listed=True)
    if folders:
        return _Classes.of(folders, folders, listed=False)
    raise IngestError(
        f"{folder} has no folder train/ of class folders; lay images out as train/<class>/<image>"
    )


def _look_at(
    filesystem: fs.FileSystem,
    folder: str,
    name: str,
    split: str,
    classes: _Classes,
    ground_truth: str | None,
    report: Report,
    *,
    may_lack_labels: bool = False,
) -> _Found | None:
    """Find the images of one split, and count what is left out.

    None if no labels are found, and it `may_lack_labels`: that is told.
    """
    path = f"{folder}/{name}"
    children = files.list_folder(filesystem, path, report.leave_out)
    present = class_folders(children)
    for folder_name in set(NOT_CLASSES) & {child.base_name for child in children}:
        report.leave_out("folders of the system's", f"{name}/{folder_name}")
    if present == ["images"] and "images" not in classes.labels:  # as Tiny ImageNet's val/
        path, present = f"{path}/images", []
        children = files.list_folder(filesystem, path, report.leave_out)
    if not present:
        images = image_files(children, path, report)
        labels = _labels(filesystem, folder, path, images, classes, ground_truth)
        if labels is None and may_lack_labels:
            report.note(
                f"split {split!r} has no class folders and no list of labels, and is left out "
                f"({len(images):,} images)"
            )
            return None
        if labels is None:
            raise IngestError(
                f"{path} has images without class folders, so their labels are missing; name a "
                f"ground truth, or put one of {', '.join(GROUND_TRUTHS)} into {folder}, or choose "
                "other splits"
            )
        return _found(split, path, {}, labels, images)
    unknown = sorted(each for each in present if _same(each) not in classes.labels)
    if unknown:
        where = "the class list" if classes.listed else "train/"
        raise IngestError(
            f"{path} has class {unknown[0]!r}, which {where} does not have "
            f"({len(unknown)} such); give both the same class folders"
        )
    for child in children:
        if child.type == fs.FileType.File:
            is_image = rows_of.is_image(child.base_name)
            reason = "images outside of a class folder" if is_image else "files beside classes"
            report.leave_out(reason, f"{name}/{child.base_name}")
    folders: dict[str, str] = {}
    num_rows = num_bytes = 0
    for each in present:
        folders[each], images = images_of_class(filesystem, path, each, report)
        num_rows += len(images)
        num_bytes += sum(image.size + 64 for image in images)
    absent = set(classes.labels) - {_same(each) for each in present}
    if absent:
        first = next(f for f in classes.folders if _same(f) in absent)
        report.note(
            f"{len(absent)} of {len(classes.folders)} classes, such as {first!r}, have no image "
            f"in split {split!r}"
        )
    return _Found(
        split=split,
        path=path,
        classes=folders,
        labels=None,
        num_rows=num_rows,
        num_bytes=num_bytes,
    )


def _found(
    split: str,
    path: str,
    classes: dict[str, str],
    labels: dict[str, int] | None,
    images: list[fs.FileInfo],
) -> _Found:
    return _Found(
        split=split,
        path=path,
        classes=classes,
        labels=labels,
        num_rows=len(images),
        num_bytes=sum(image.size + 64 for image in images),
    )


def _labels(
    filesystem: fs.FileSystem,
    folder: str,
    path: str,
    images: list[fs.FileInfo],
    classes: _Classes,
    ground_truth: str | None,
) -> dict[str, int] | None:
    """Return the labels of the images of a split without class folders, by name; None if no list
    gives them.
    """
    if not images:
        raise IngestError(f"{path} holds no class folders and no images; fill it or remove it")
    text, where = _text(filesystem, folder, ground_truth, GROUND_TRUTHS)
    for place in (path, path.removesuffix("/images")):
        if text is None:
            text, where = _text(filesystem, place, None, GROUND_TRUTHS)
    if text is None:
        return None
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


def _reader(
    filesystem: fs.FileSystem, found: _Found, classes: _Classes, chunk_bytes: int
) -> Batches:
    schema = schema_for(EncodedImages(), classes.names)

    def infos() -> Iterator[tuple[fs.FileInfo, str, int]]:
        if found.labels is not None:
            for image in _images(filesystem, found.path):
                if image.base_name not in found.labels:
                    raise IngestError(
                        f"{image.path} has appeared since the ingest began; keep the source "
                        "unchanged while it is ingested"
                    )
                yield image, image.base_name, found.labels[image.base_name]
            return
        by_label = sorted((classes.labels[_same(n)], n) for n in found.classes)
        for label, name in by_label:
            where = found.classes[name]
            for image in _images(filesystem, where):
                yield image, f"{name}/{image.base_name}", label

    def images() -> Iterator[tuple[bytes, str, int]]:
        for image, shown, label in infos():
            with filesystem.open_input_stream(image.path) as stream:
                yield stream.read(), shown, label

    return lambda: rows_of.batches_of(images(), schema, chunk_bytes)


def _images(filesystem: fs.FileSystem, path: str) -> list[fs.FileInfo]:
    return image_files(files.list_folder(filesystem, path), path, Report())

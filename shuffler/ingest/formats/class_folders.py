"""What a class's folder holds: its images, and what is left out of it and counted."""

from __future__ import annotations

from typing import Final

from pyarrow import fs

from downpour.shuffler.dataset import files
from downpour.shuffler.errors import IngestError
from downpour.shuffler.ingest.formats import rows as rows_of
from downpour.shuffler.ingest.formats.report import Report

NOT_CLASSES: Final = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")
"""Folders that systems leave beside one's own."""
_MOST_DEEP: Final = 4


def is_folder_of_data(entry: fs.FileInfo) -> bool:
    """Whether a folder is none that a system leaves beside one's own."""
    return entry.base_name not in NOT_CLASSES


def class_folders(entries: list[fs.FileInfo]) -> list[str]:
    """Return the names of the folders among entries that may be classes'."""
    return [
        entry.base_name
        for entry in entries
        if entry.type == fs.FileType.Directory and is_folder_of_data(entry)
    ]


def images_of_class(
    filesystem: fs.FileSystem, path: str, name: str, report: Report
) -> tuple[str, list[fs.FileInfo]]:
    """Return the images of a class, and the folder that they are in."""
    where = f"{path}/{name}"
    entries = files.list_folder(filesystem, where, report.leave_out)
    inner = class_folders(entries)
    images = image_files(entries, where, report)
    if not images and len(inner) == 1:
        where = f"{where}/{inner[0]}"
        images = image_files(files.list_folder(filesystem, where, report.leave_out), where, report)
        inner = []
    if not images:
        holds = f"no image itself, but folders such as {inner[0]!r}" if inner else "no image"
        raise IngestError(
            f"{where} holds {holds}; put images into it as <class>/<image> (names end with "
            f"{', '.join(rows_of.IMAGE_SUFFIXES[:5])} or the like), or remove the class"
        )
    for each in inner:
        count = _images_below(filesystem, f"{where}/{each}")
        if count:
            report.leave_out("images deeper in a class folder", f"{name}/{each}", count)
    return where, images


def _images_below(filesystem: fs.FileSystem, path: str) -> int:
    """Return how many images a folder holds, at most a few folders deep: a link may lead round."""
    count, folders = 0, [path]
    for _ in range(_MOST_DEEP):
        entries = [entry for each in folders for entry in files.list_folder(filesystem, each)]
        count += sum(
            entry.type == fs.FileType.File and rows_of.is_image(entry.base_name)
            for entry in entries
        )
        folders = [entry.path for entry in entries if entry.type == fs.FileType.Directory]
    return count


def image_files(entries: list[fs.FileInfo], path: str, report: Report) -> list[fs.FileInfo]:
    """Return the image files among entries; tell of other files, and of empty ones."""
    images = []
    for entry in entries:
        if entry.type == fs.FileType.Directory:
            continue
        shown = f"{files.base_name(path)}/{entry.base_name}"
        if rows_of.is_image(entry.base_name) and entry.size == 0:
            report.leave_out("images whose files are empty", shown)
        elif rows_of.is_image(entry.base_name):
            images.append(entry)
        else:
            report.leave_out(rows_of.kind_of(entry.base_name), shown)
    return images

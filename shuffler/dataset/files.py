"""Where files are: from what a user types to a `pyarrow.fs` filesystem and a path on it.

Local paths and URIs (`s3://`, `gs://`, `hdfs://`, `file://`) are alike from here on. What the
files hold is not known here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from downpour.shuffler.errors import DatasetError

_CHUNK_BYTES = 1 << 20


def locate(uri: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of `uri` and the path of it there, without a slash at the end.

    Raises:
        DatasetError: the URI's scheme is unknown or its filesystem cannot be reached.
    """
    text = os.fspath(uri)
    if "://" not in text:
        return fs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    if text.startswith("hf://"):
        name = "/".join(text.removeprefix("hf://").removeprefix("datasets/").split("/")[:2])
        raise DatasetError(
            f"{text!r} is on Hugging Face's hub, which is not read from here; download it with "
            f"`hf download --repo-type dataset {name} --local-dir FOLDER`, and give the folder"
        )
    try:
        filesystem, path = fs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise DatasetError(
            f"{text!r} cannot be reached ({one_line(error)}); give a folder or a URI of a "
            "filesystem that pyarrow knows, such as s3://bucket/folder"
        ) from error
    return filesystem, path.rstrip("/") or "/"


def is_local(filesystem: fs.FileSystem) -> bool:
    """Whether paths of `filesystem` are paths of this machine."""
    return isinstance(filesystem, fs.LocalFileSystem)


def base_name(path: str) -> str:
    """Return the last part of a path of any filesystem."""
    return path.rstrip("/").rpartition("/")[2]


def list_folder(
    filesystem: fs.FileSystem, path: str, leave_out: Callable[[str, str], None] | None = None
) -> list[fs.FileInfo]:
    """Return what a folder holds, by name; hidden entries (".name") are left out.

    Args:
        filesystem: of the folder.
        path: of the folder.
        leave_out: told of each hidden entry: a reason, and what it is.
    """
    entries = filesystem.get_file_info(fs.FileSelector(path))
    visible = []
    for entry in entries:
        if not entry.base_name.startswith("."):
            visible.append(entry)
        elif leave_out is not None:
            leave_out("hidden files", f"{base_name(path)}/{entry.base_name}")
    if leave_out is not None and is_local(filesystem):
        for name in sorted(set(os.listdir(path)) - {entry.base_name for entry in entries}):
            leave_out("links that lead nowhere", f"{base_name(path)}/{name}")
    return sorted(visible, key=lambda entry: str(entry.base_name))


def sha256_of(filesystem: fs.FileSystem, path: str) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text, for a message of one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

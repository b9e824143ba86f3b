"""Files that are whole after a power failure: written beside their place, synced, then moved there.

A file system writes data back when it likes, half a minute later by default. What has to be there
after a power failure is synced: the file before it gets its name, and the folder that holds the
name afterwards. `pyarrow.fs` has no such call, so files on a local file system are opened once more
for it. Buckets keep a file for good once its stream is closed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.fs

if TYPE_CHECKING:
    from torch import Tensor

_UNKNOWN = (errno.EINVAL, errno.ENOTSUP)


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file's data, or a folder's names, are on the disk.

    Raises:
        OSError: They cannot be written.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some file systems know no sync of folders: there is nothing to wait for.
        if not os.path.isdir(path) or error.errno not in _UNKNOWN:
            raise
    finally:
        os.close(fd)


def sync_on(filesystem: pyarrow.fs.FileSystem, path: str) -> None:
    """As `sync`, of a file or folder of any file system of pyarrow's.

    Raises:
        OSError: It cannot be written.
    """
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        sync(path)
    elif isinstance(filesystem, pyarrow.fs.SubTreeFileSystem):
        sync_on(filesystem.base_fs, f"{filesystem.base_path}{path}")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that their names outlive a power failure.

    Raises:
        OSError: It cannot be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], partial: str | None = None) -> Iterator[str]:
    """Write a file whole or not at all, whatever ends the writer.

    The file gets its name once its data is on the disk, and the name is there when this returns. If
    the writer fails, what it has written is removed and an earlier file of that name stays.

    Args:
        path: The file.
        partial: What it is called while it is written; `path` with `.partial` behind by default.

    Yields:
        The path to write to.

    Raises:
        OSError: It cannot be written.
    """
    partial = f"{os.fspath(path)}.partial" if partial is None else partial
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    sync(os.path.dirname(os.path.abspath(path)))


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    partial: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as safetensors, whole or not at all.

    Args:
        tensors: By name.
        path: The file.
        partial: As for `replacing`.
        metadata: Texts for the file's header.

    Raises:
        OSError: The file cannot be written. The library says so by an error of its own.
    """
    import safetensors
    import safetensors.torch

    with replacing(path, partial) as there:
        try:
            safetensors.torch.save_file(
                dict(tensors), there, metadata=None if metadata is None else dict(metadata)
            )
        except safetensors.SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            if found is None:
                raise
            number = int(found[1])
            raise OSError(number, os.strerror(number), os.fspath(path)) from None


def append(path: str | os.PathLike[str], data: bytes, *, end: int | None = None) -> None:
    """Add data to a file, all of it or nothing; does not wait for the disk.

    Args:
        path: The file; it is made if it is not there.
        data: What to add.
        end: Where to. What follows is cut off. The file's end by default.

    Raises:
        OSError: It cannot be written.
    """
    with open(path, "ab", buffering=0) as file:
        before = file.tell() if end is None else end
        file.truncate(before)
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(before)
            raise

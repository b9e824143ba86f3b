"""Sealed memory that travels as a file descriptor.

A segment is a memfd: memory without a name. Only processes that were handed its descriptor can
open it, the kernel frees it with the last of them, and so nothing is left behind after any kind of
death. What lies in such memory is `published`'s, `mailboxes`' and `replication`'s.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from downpour.paramserver.errors import MalformedMessage

_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW if hasattr(fcntl, "F_SEAL_SHRINK") else 0
PAGE = 4096


def supported() -> bool:
    """Whether this machine has sealed memfds, and keeps stores in order."""
    return hasattr(os, "memfd_create") and platform.machine() in ("x86_64", "AMD64")


def create_memory(name: str, size: int) -> int:
    """Return a descriptor of `size` bytes of memory that nobody can shrink.

    Raises:
        OSError: There is no such memory.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        # Nobody who is handed this can shrink it under the feet of another.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def check_memory(fd: int, size: int) -> None:
    """Make sure that this is a descriptor that `create_memory` gave.

    Raises:
        MalformedMessage: It is not, or its memory is of another size.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise MalformedMessage("the memory handed over is not a memfd") from None
    if seals & _SIZE_SEALS != _SIZE_SEALS:
        raise MalformedMessage("the memory handed over could still be shrunk")
    if os.fstat(fd).st_size != size:
        raise MalformedMessage(
            f"the memory handed over has {os.fstat(fd).st_size} bytes, not {size}"
        )


def rounded(num_bytes: int) -> int:
    """Return `num_bytes`, or the next multiple of a cache line's 64 bytes."""
    return -(-num_bytes // 64) * 64


def words(memory: mmap.mmap, offset: int, count: int) -> npt.NDArray[np.int64]:
    """Return `count` words of `memory`, int64 [count], from that byte on."""
    return np.frombuffer(memory, np.int64, count, offset)


def floats(memory: mmap.mmap, offset: int, count: int) -> Tensor:
    """Return `count` numbers of `memory`, float32 [count], from that byte on."""
    if not count:
        return torch.empty(0)
    return torch.frombuffer(memory, dtype=torch.float32, count=count, offset=offset)

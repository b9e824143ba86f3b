"""Actors whose process ends with the raylet that started it.

When a driver is killed its raylet is at once; but Ray's workers may take a minute to notice.
Imported by every actor's process, so nothing heavy is imported here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1


def leashed(actor: type) -> type:
    """A class like `actor`, under the same name."""

    class Leashed(actor):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            end_with_parent()
            super().__init__(*arguments)

    Leashed.__name__ = Leashed.__qualname__ = actor.__name__
    return Leashed


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies. Linux only."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == 1:  # it had died before
            os._exit(1)

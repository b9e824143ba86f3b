"""Actors whose process ends when the raylet that started it ends.

When a driver is killed, its raylet ends at once, but Ray's workers may take a minute to notice.
Every actor's process imports this module, so it imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1


def ending_with_parent(actor: type) -> type:
    """A class like `actor`, under the same name, whose process ends with its parent."""

    class EndingWithParent(actor):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            end_with_parent()
            super().__init__(*arguments)

    EndingWithParent.__name__ = EndingWithParent.__qualname__ = actor.__name__
    return EndingWithParent


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies. Linux only."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == 1:  # the parent died before this
            os._exit(1)

"""Which files a thread waits on, and what it does when one of them is ready."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable
from typing import Protocol


class HasFileno(Protocol):
    """Whatever has a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""


class Poller:
    """An `epoll`, with a handler for those files that come and go rarely."""

    def __init__(self) -> None:
        """Nothing to wait on yet."""
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[], object]] = {}
        """What to call when a descriptor is readable."""
        self._writable: set[int] = set()

    def watch(self, file: HasFileno | int, handler: Callable[[], object]) -> None:
        """Have `handler` called when `file` is readable."""
        self.epoll.register(file, select.EPOLLIN)
        self.handlers[_number(file)] = handler

    def watch_writable(self, file: HasFileno | int, watch: bool) -> None:
        """Have the handler of `file` called when that is writable, too, or no longer."""
        fd = _number(file)
        if (fd in self._writable) != watch:
            self._writable ^= {fd}
            self.epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if watch else 0))

    def unwatch(self, file: HasFileno | int) -> None:
        """Wait on `file`, which is still open, no more. Does nothing the second time."""
        self._writable.discard(_number(file))
        if self.handlers.pop(_number(file), None) is not None:
            with contextlib.suppress(OSError, ValueError):
                self.epoll.unregister(file)

    def close(self) -> None:
        """Close the `epoll`."""
        self.epoll.close()


def _number(file: HasFileno | int) -> int:
    return file if isinstance(file, int) else file.fileno()

"""What other threads hand to the one that owns a partition's state, and by which they wake it."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.server.command import Command
from downpour.paramserver.transport.handshake import Admitted

T = TypeVar("T")


class Door:
    """Commands, and connections that have been greeted. Whatever is handed in is taken, or told
    that the thread has ended.
    """

    def __init__(self, why_ended: Callable[[], BaseException]) -> None:
        """`why_ended` gives what those are told who come too late."""
        self._why_ended = why_ended
        self._commands: queue.SimpleQueue[Command[Any]] = queue.SimpleQueue()
        self._admitted: queue.SimpleQueue[Admitted] = queue.SimpleQueue()
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when there is something to take."""
        # Of all of these, which end with the thread.
        self._lock = threading.Lock()
        self._ended = False

    # On any thread

    def call(self, function: Callable[[PartitionState], T]) -> Future[T]:
        """Have `function` run on the state; raises `why_ended`."""
        command = Command(function)
        with self._lock:
            if self._ended:
                raise self._why_ended()
            self._commands.put(command)
            os.eventfd_write(self.wake, 1)
        return command.future

    def admit(self, admitted: Admitted) -> None:
        """Hand in a connection that has been greeted."""
        with self._lock:
            if self._ended:
                admitted.channel.socket.close()
                return
            self._admitted.put(admitted)
            os.eventfd_write(self.wake, 1)

    def ring(self) -> None:
        """Wake the thread, if it has not ended."""
        with self._lock:
            if not self._ended:
                os.eventfd_write(self.wake, 1)

    # On the thread that owns the state

    def take_admitted(self) -> Iterator[Admitted]:
        """All connections that have been handed in; what wakes us is read before we look."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake)
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._admitted.get_nowait()

    def take_commands(self) -> Iterator[Command[Any]]:
        """All commands that wait."""
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            yield command

    def close(self) -> bool:
        """Take nothing more in; false where that was so."""
        with self._lock:
            if self._ended:
                return False
            self._ended = True
            os.close(self.wake)
        return True

    def turn_away(self) -> None:
        """Close the connections, and fail the commands, that nobody takes any more."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._admitted.get_nowait().channel.socket.close()
        for command in self.take_commands():
            command.future.set_exception(self._why_ended())

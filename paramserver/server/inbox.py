"""What other threads hand to the thread that owns a partition's state, and how they wake it."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.transport.network.acceptor import Accepted

T = TypeVar("T")


class Command(Generic[T]):
    """A function to be run on the state; `future` gets its result."""

    def __init__(self, function: Callable[[PartitionState], T]) -> None:
        """Not run yet."""
        self.future: Future[T] = Future()
        self._function = function

    def run(self, state: PartitionState) -> None:
        """Run the function. An error that is no `Exception` is raised here, too."""
        try:
            result = self._function(state)
        except BaseException as error:
            self.future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self.future.set_result(result)


class Inbox:
    """Commands, and accepted connections, for the serving thread.

    Whatever is handed in is taken, or told that the thread has ended.
    """

    def __init__(self, why_ended: Callable[[], BaseException]) -> None:
        """`why_ended` gives the error for those who come too late."""
        self._why_ended = why_ended
        self._commands: queue.SimpleQueue[Command[Any]] = queue.SimpleQueue()
        self._accepted: queue.SimpleQueue[Accepted] = queue.SimpleQueue()
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when there is something to take."""
        # Of all of these, which end with the thread.
        self._lock = threading.Lock()
        self._ended = False

    # On any thread

    def call(self, function: Callable[[PartitionState], T]) -> Future[T]:
        """Hand in a function to be run on the state.

        Returns:
            A future with what `function` returns or raises.

        Raises:
            BaseException: The serving thread has ended: what `why_ended` gave.
        """
        command = Command(function)
        with self._lock:
            if self._ended:
                raise self._why_ended()
            self._commands.put(command)
            os.eventfd_write(self.wake, 1)
        return command.future

    def connect(self, accepted: Accepted) -> None:
        """Hand in a connection whose handshake is done."""
        with self._lock:
            if self._ended:
                accepted.channel.socket.close()
                return
            self._accepted.put(accepted)
            os.eventfd_write(self.wake, 1)

    def ring(self) -> None:
        """Wake the thread, if it has not ended."""
        with self._lock:
            if not self._ended:
                os.eventfd_write(self.wake, 1)

    # On the thread that owns the state

    def take_connections(self) -> Iterator[Accepted]:
        """Yield the connections that were handed in; reads the wake-up before it looks."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake)
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._accepted.get_nowait()

    def take_commands(self) -> Iterator[Command[Any]]:
        """Yield the commands that wait."""
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            yield command

    def close(self) -> bool:
        """Take nothing more in.

        Returns:
            False if it was closed before.
        """
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
                self._accepted.get_nowait().channel.socket.close()
        for command in self.take_commands():
            command.future.set_exception(self._why_ended())

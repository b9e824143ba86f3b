"""A function that waits for its turn on the state of a partition."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from downpour.paramserver.partition.state import PartitionState

T = TypeVar("T")


class Command(Generic[T]):
    """Run by the thread that owns the state; `future` has what comes of it."""

    def __init__(self, function: Callable[[PartitionState], T]) -> None:
        """Not run yet."""
        self.future: Future[T] = Future()
        self._function = function

    def run(self, state: PartitionState) -> None:
        """Run it. What is no `Exception` ends the thread, too."""
        try:
            result = self._function(state)
        except BaseException as error:
            self.future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self.future.set_result(result)

"""Work done ahead of its use by threads, a bounded number of pieces at a time.

The pieces are jobs by number; what a job does is not known here. A job's error comes out where its
result is taken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

ResultT = TypeVar("ResultT")


class Ahead(Generic[ResultT]):
    """Results of jobs [0, count), each taken once, by any thread, in about ascending order."""

    def __init__(
        self, pool: ThreadPoolExecutor, count: int, job: Callable[[int], ResultT], depth: int
    ) -> None:
        """Start the first `depth` jobs; from then on, `depth` are under way or wait to be taken.

        Args:
            pool: whose threads do the jobs.
            count: how many there are.
            job: what is done for a number.
            depth: bound of the results that are held, besides those that were taken.
        """
        self._pool = pool
        self._count = count
        self._job = job
        self._depth = depth
        self._lock = threading.Lock()
        self._next = 0
        self._started: dict[int, Future[ResultT]] = {}
        with self._lock:
            self._refill()

    def take(self, number: int) -> ResultT:
        """Return the result of a job; waits for it, or does it now where it has not begun."""
        with self._lock:
            future = self._started.pop(number, None)
            self._next = max(self._next, number + 1) if future is None else self._next
            self._refill()
        if future is None or future.cancel():
            return self._job(number)
        return future.result()

    def close(self) -> None:
        """Forget what was not taken; jobs that have not begun are not done."""
        with self._lock:
            self._next = self._count
            for future in self._started.values():
                future.cancel()
            self._started.clear()

    def _refill(self) -> None:
        while self._next < self._count and len(self._started) < self._depth:
            self._started[self._next] = self._pool.submit(self._job, self._next)
            self._next += 1


def map_ahead(
    pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], ResultT]], depth: int
) -> Iterator[ResultT]:
    """Yield the results of `jobs` in their order, with at most `depth` begun and not yet taken."""
    waiting: list[Future[ResultT]] = []
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) >= depth:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        for future in waiting:
            future.cancel()

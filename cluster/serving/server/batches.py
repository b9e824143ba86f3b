"""Requests on their way to the replicas, in batches: one call for many.

A call of Serve's costs the proxy and the replica several times what a small image does. So the gate
collects requests that may begin, and hands on as many as go through the network together.
Not here: who may begin (`line`), and what a replica answers (`classifier`).
"""

from __future__ import annotations

import asyncio
import collections
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

CALL_BYTES = 64 << 20
"""Most of the bodies that one call carries, unless a single one is larger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A request for an answer, as a replica is told of it."""

    query: str
    """What stood behind the path's question mark."""
    headers: Mapping[str, str]
    """That say what the body is, with names in lower case."""
    body: bytes
    left_s: float
    """How long it may still wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What is sent in answer."""

    status: int
    body: bytes
    """JSON."""
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Answer:
    """Return an answer that is an error."""
    body = json.dumps({"error": sentence}).encode()
    return Answer(status=status, body=body, headers=headers or {})


Send = Callable[[Sequence[Asked]], Awaitable[Sequence[Answer]]]
"""Has a replica answer requests together, each by itself."""


@dataclass(frozen=True, kw_only=True)
class BatchBounds:
    """How large batches are, and how many are under way."""

    max_batch: int
    """Most requests of a batch."""
    batch_wait_s: float
    """Longest that a request waits for others."""
    under_way: int
    """Most batches that have been sent and are not answered yet."""


class Batches:
    """Collects requests and sends them together. Belongs to one event loop."""

    def __init__(self, send: Send, bounds: BatchBounds) -> None:
        """`send` is called with as many requests as the bounds allow."""
        self._send, self._bounds = send, bounds
        self._waiting: collections.deque[tuple[Asked, asyncio.Future[Answer], float]] = (
            collections.deque()
        )
        self._alarm: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, asked: Asked) -> Answer:
        """Return the answer to one request.

        Raises:
            Exception: whatever the batch's call raised.
        """
        loop = asyncio.get_running_loop()
        due: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((asked, due, loop.time() + self._bounds.batch_wait_s))
        self._go()
        return await due

    def _go(self) -> None:
        """Send what is to be sent now, and wake up for what is not."""
        loop = asyncio.get_running_loop()
        while self._waiting and len(self._tasks) < self._bounds.under_way:
            begins_s = self._waiting[0][2]
            if len(self._waiting) < self._bounds.max_batch and loop.time() < begins_s:
                if self._alarm is None:
                    self._alarm = loop.call_at(begins_s, self._ring)
                return
            task = loop.create_task(self._deliver(self._take()))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _ring(self) -> None:
        self._alarm = None
        self._go()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._go()

    def _take(self) -> list[tuple[Asked, asyncio.Future[Answer]]]:
        """Return the first requests, as many as go together."""
        taken: list[tuple[Asked, asyncio.Future[Answer]]] = []
        num_bytes = 0
        while self._waiting and len(taken) < self._bounds.max_batch:
            asked, due, _ = self._waiting[0]
            num_bytes += len(asked.body)
            if taken and num_bytes > CALL_BYTES:
                break
            self._waiting.popleft()
            if not due.done():  # its caller has not gone
                taken.append((asked, due))
        return taken

    async def _deliver(self, taken: list[tuple[Asked, asyncio.Future[Answer]]]) -> None:
        if not taken:
            return
        try:
            answers = await self._send([asked for asked, _ in taken])
            for (_, due), answer in zip(taken, answers, strict=True):
                if not due.done():
                    due.set_result(answer)
        except Exception as error:
            for _, due in taken:
                if not due.done():
                    due.set_exception(error)

"""Waiting for a message that will come in a moment, or not for long.

A thread that sleeps in the kernel is woken through an interrupt to a processor that has gone idle:
some 30 to 100 microseconds on a virtual machine, as long as the whole update of a small model. So a
wait looks for a moment before it sleeps, but only while messages keep coming within that moment. If
they do not, other threads want the processor or there is nothing to do, and looking would take time
from those who have work. Each look lets others have the processor.
"""

from __future__ import annotations

import os
import time
from typing import Protocol

LOOK_S = 200e-6
"""How long a wait looks before it sleeps."""
SHORT_WAITS = 8
"""Waits in a row that have to end within that time before the next one looks first."""


class Poll(Protocol):
    """What `select.poll` and `select.epoll` have in common but for the unit of time."""

    def poll(self, timeout: float, /) -> list[tuple[int, int]]:
        """What is ready after at most `timeout`."""


class Patience:
    """One thread's way to wait; `usable_processors` is for tests."""

    def __init__(self, usable_processors: int | None = None) -> None:
        """Has seen no wait yet."""
        count = usable_processors or len(os.sched_getaffinity(0))
        self._alone = count < 2  # nobody could send anything while we look
        self._short = 0

    @property
    def looks(self) -> bool:
        """Whether the next wait looks before it sleeps."""
        return self._short >= SHORT_WAITS and not self._alone

    def wait(self, poll: Poll, timeout: float) -> list[tuple[int, int]]:
        """Return what is ready; `timeout` is in the unit that `poll` takes."""
        began_s = time.perf_counter()
        if self.looks:
            while time.perf_counter() - began_s < LOOK_S:
                ready = poll.poll(0)
                if ready:
                    return ready
                os.sched_yield()
        ready = poll.poll(timeout)
        took_s = time.perf_counter() - began_s
        self._short = self._short + 1 if ready and took_s < LOOK_S else 0
        return ready

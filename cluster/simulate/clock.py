"""A virtual clock, processors that are shared, wires, and threads that run on them.

Nothing here knows what is simulated. Times are seconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator

Then = Callable[[], None]
Body = Generator[float | None, None, None]
"""What a thread does: it yields the processor seconds of its next piece of work, or None to sleep
until it is woken."""


class Clock:
    """Events in the order of their time; those of one time in the order in which they came."""

    def __init__(self) -> None:
        """It is zero."""
        self.now_s = 0.0
        self._events: list[tuple[float, int, Then]] = []
        self._count = 0

    def at(self, time_s: float, then: Then) -> None:
        """Have `then` called at a time, which must not be past."""
        self._count += 1
        heapq.heappush(self._events, (time_s, self._count, then))

    def after(self, delay_s: float, then: Then) -> None:
        """Have `then` called in so many seconds."""
        self.at(self.now_s + delay_s, then)

    def advance(self) -> bool:
        """Go on to the next event; False where there is none."""
        if not self._events:
            return False
        self.now_s, _, then = heapq.heappop(self._events)
        then()
        return True


class Processors:
    """The processors of one machine, shared evenly by what runs on them.

    Processor sharing: of n threads that are at work, each proceeds at min(1, capacity / n). So
    each thread's remaining work falls at one rate that is common to all, and is kept against a
    clock of work done by any of them (Kleinrock 1967).
    """

    def __init__(self, clock: Clock, capacity: float) -> None:
        """`capacity` is in processors; what others always use of them is not in it."""
        assert capacity > 0, f"a machine with {capacity} processors"
        self._clock = clock
        self._capacity = capacity
        self._done_s = 0.0
        """What any one thread has worked that was there from the beginning."""
        self._since_s = 0.0
        self._rate = 1.0
        self._jobs: list[tuple[float, int, Then]] = []
        self._count = 0
        self._due: float | None = None
        """When the next job ends that an event is out for."""
        self.busy_s = 0.0
        """Processor seconds worked so far."""

    def work(self, seconds: float, then: Then, width: int = 1) -> None:
        """Work for so many processor seconds, then call `then`.

        `width` threads work as long as that each, side by side; they end together.
        """
        self._catch_up()
        for helper in range(width - 1, -1, -1):
            self._count += 1
            ends_s = self._done_s + seconds
            heapq.heappush(self._jobs, (ends_s, self._count, _nothing if helper else then))
        self._plan()

    def _catch_up(self) -> None:
        now_s = self._clock.now_s
        if now_s > self._since_s and self._jobs:
            done_s = (now_s - self._since_s) * self._rate
            self._done_s += done_s
            self.busy_s += done_s * len(self._jobs)
        self._since_s = now_s

    def _plan(self) -> None:
        if not self._jobs:
            self._due = None
            return
        self._rate = min(1.0, self._capacity / len(self._jobs))
        left_s = max(0.0, self._jobs[0][0] - self._done_s)
        due_s = self._since_s + left_s / self._rate
        if due_s != self._due:
            self._due = due_s
            self._clock.at(due_s, lambda: self._end(due_s))

    def _end(self, due_s: float) -> None:
        if due_s != self._due:
            return  # something else has begun or ended meanwhile
        self._due = None
        self._catch_up()
        ended_s, _, then = heapq.heappop(self._jobs)
        self._done_s = max(self._done_s, ended_s)  # rounding must not leave it unfinished
        self._plan()
        then()


def _nothing() -> None:
    """What follows the end of a helper's work."""


class Wire:
    """A machine's way to the network: so many bytes a second in each direction, one after another.

    A message leaves when those before it have left, and comes in when those before it are in;
    the two overlap, as streams do.
    """

    def __init__(self, clock: Clock, bytes_per_s: float, latency_s: float) -> None:
        """`latency_s` is that of a message on its way to another machine."""
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._out_s = self._in_s = 0.0

    def send(self, to: Wire, num_bytes: float, then: Then, not_before_s: float = 0.0) -> float:
        """Send a message, and call `then` when all of it is there; gives the time of that.

        A message of no bytes to speak of slips in between the others, but does not come before
        `not_before_s`: what went ahead of it on its own connection.
        """
        if not num_bytes:
            comes_s = max(self._clock.now_s + self._latency_s, not_before_s)
            self._clock.at(comes_s, then)
            return comes_s
        takes_s = num_bytes / min(self._bytes_per_s, to._bytes_per_s)
        leaves_s = max(self._clock.now_s, self._out_s)
        self._out_s = leaves_s + takes_s
        comes_s = max(leaves_s + self._latency_s, to._in_s)
        to._in_s = comes_s + takes_s
        self._clock.at(to._in_s, then)
        return to._in_s


class Thread:
    """A body that runs on processors, and sleeps in between."""

    def __init__(self, processors: Processors, body: Body, width: int = 1) -> None:
        """It does not run before it is woken. Its work is done by `width` threads side by side."""
        self._width = width
        self._processors = processors
        self._body = body
        self._asleep, self._woken, self._ended = True, False, False

    def wake(self) -> None:
        """Have it go on; if it is at work, it will not fall asleep the next time."""
        if self._ended:
            return
        if self._asleep:
            self._asleep = False
            self._go_on()
        else:
            self._woken = True

    def end(self) -> None:
        """It does nothing any more; what it was working on is left half done."""
        self._ended = True

    def _go_on(self) -> None:
        while not self._ended:
            try:
                seconds = next(self._body)
            except StopIteration:
                self._ended = True
                return
            if seconds is not None:
                self._processors.work(seconds, self._go_on, self._width)
                return
            if not self._woken:
                self._asleep = True
                return
            self._woken = False

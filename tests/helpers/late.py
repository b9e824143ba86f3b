"""A device whose work is really late, for tests of what waits for what.

Its memory is the processor's, but a stream does nothing before it has to: work that was given is
queued until somebody waits for an event behind it, or until the schedule lets some of it happen.
While a copy may be under way its destination holds NaN (whole numbers: -100, a class that no loss
counts). So whatever is read too early or written over too early shows in the results.

`ignored` names waits that do nothing, as (who waits, whose event): that is how a test shows that it
would notice if one of them were missing.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.helpers.tape_graph import TapeGraph

Wait = tuple[str, str]
NO_CLASS = -100


class LateEvent:
    """After so many operations of a stream."""

    def __init__(self, stream: LateStream, count: int) -> None:
        self.stream, self.count = stream, count

    def wait(self) -> None:
        """Have everything done that this depends on."""
        if ("host", self.stream.name) not in self.stream.device.ignored:
            self.stream.drive(self.count)

    @property
    def over(self) -> bool:
        return self.stream.done >= self.count


class LateStream:
    """A queue of operations, each of which has a beginning and an end."""

    def __init__(self, name: str, device: LateDevice) -> None:
        self.name, self.device = name, device
        self.done = self.given = 0
        self._queue: deque[tuple[Callable[[], object] | None, Any]] = deque()
        """What an operation's end does, or None with the event that is waited for; and what holds
        garbage once it has begun."""

    def run(self, work: Callable[[], object]) -> None:
        self._give((work, None))

    def copy(self, destination: Tensor, source: Tensor) -> None:
        if self.name == "down":  # the host may not look at it from here on
            spoil(destination)
        self._give((lambda: destination.copy_(source), destination))

    def record(self) -> LateEvent:
        return LateEvent(self, self.given)

    def wait(self, event: LateEvent) -> None:
        if (self.name, event.stream.name) not in self.device.ignored:
            self._give((None, event))

    def _give(self, operation: tuple[Callable[[], object] | None, Any]) -> None:
        self._queue.append(operation)
        self.given += 1
        self.device.happen()

    def begin(self) -> None:
        """Let what may begin do so: waits that are over pass, and a copy spoils what it fills."""
        while self._queue:
            work, about = self._queue[0]
            if work is None and about.over:
                self._queue.popleft()
                self.done += 1
                continue
            if work is not None and about is not None:
                spoil(about)
            return

    def end(self) -> bool:
        """End what has begun, if anything has."""
        self.begin()
        if not self._queue or self._queue[0][0] is None:
            return False
        work, _ = self._queue.popleft()
        assert work is not None
        work()
        self.done += 1
        self.device.begin()
        return True

    def drive(self, count: int) -> None:
        """Do all up to an operation, and on other streams what it waits for."""
        while self.done < count:
            work, about = self._queue[0]
            if work is None:
                about.stream.drive(about.count)
                self.begin()
            else:
                self.end()


class LateDevice:
    """See `workers.step.device.Device`."""

    def __init__(
        self,
        *,
        seed: int | None = None,
        ahead: int = 1,
        locks: bool = True,
        ignored: frozenset[Wait] = frozenset(),
    ) -> None:
        """Without a `seed` nothing happens before it is waited for; with one, some of it may."""
        self.where = torch.device("cpu")
        self.ahead, self.ignored = ahead, ignored
        self._locks = locks
        self._random = None if seed is None else random.Random(seed)
        self.compute = LateStream("compute", self)
        self.up = LateStream("up", self)
        self.down = LateStream("down", self)
        self._streams = (self.up, self.compute, self.down)
        self.locked = 0

    def happen(self) -> None:
        """Whatever the schedule lets happen now."""
        self.begin()
        if self._random is not None:
            for _ in range(self._random.randrange(4)):
                self._random.choice(self._streams).end()

    def begin(self) -> None:
        """Whatever waits for nothing any more begins at once."""
        for stream in self._streams:
            stream.begin()

    def page_locked(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return spoil(torch.empty(*shape, dtype=dtype))

    def lock(self, memory: Tensor) -> LateLock | None:
        return LateLock(self, memory) if self._locks else None

    def capture(self, work: Callable[[], object]) -> TapeGraph:
        return TapeGraph(work)

    def seed(self, number: int) -> None:
        torch.default_generator.manual_seed(number)

    def finish(self) -> None:
        for stream in self._streams:
            stream.drive(stream.given)


class LateLock:
    """Counts what is locked, and finds the device idle when it lets go."""

    def __init__(self, device: LateDevice, memory: Tensor) -> None:
        self._device, self._memory = device, memory
        device.locked += 1

    def release(self) -> None:
        for stream in self._device._streams:
            idle = stream.done == stream.given or self._device.ignored
            assert idle, f"work is under way on stream {stream.name}"
        self._device.locked -= 1


def spoil(tensor: Tensor) -> Tensor:
    """What memory holds that is being written to."""
    return tensor.fill_(torch.nan if tensor.is_floating_point() else NO_CLASS)

"""A partition's published weights: written by the partition, copied by the processes beside it.

`PublishedWeights` has a few buffers. A header points at the buffer of the latest version. The
writer marks a buffer void, writes it, stamps it with its version, and only then points the header
at it. A reader copies the buffer that the header points at, and takes the copy only if the buffer
bore the same stamp before and after: so it sees that a copy is torn, and tries again. Stores and
loads of the stamps are aligned 8-byte ones, whose order x86-64 keeps; `memory.supported` refuses
other machines.

The writer takes the latest version's own buffer, if nobody is reading it: an update in place moves
the fewest bytes. It does not if a version fits into a processor's cache. To write over lines that
readers have copies of, the writer has to take them back one at a time, which costs four times as
much as to fill another buffer and go on from there.

A reader says what it reads with a pin: a word in memory of its own that the writer looks at before
an update. The writer then takes another buffer. Pins are there for speed and fairness alone. A
reader that was just missed sees a void stamp or a torn copy, and the next update sees its pin, so
it cannot starve. The pin of a reader that dies goes with its connection.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Collection

import numpy as np
import numpy.typing as npt

from downpour.paramserver.errors import BadConfiguration, DeadlineExceeded
from downpour.paramserver.partition.vectors import Version
from downpour.paramserver.rules.update import updates_in_place
from downpour.paramserver.transport.shared.memory import (
    PAGE,
    check_memory,
    create_memory,
    floats,
    rounded,
)

_F_SEAL_FUTURE_WRITE = 0x0010  # fcntl.h; Python has no name for it yet

NUM_BUFFERS = 4
"""Buffers of a partition's weights: one is being written, and the others may be pinned."""

_LATEST, _STAMPS = 0, 8
_VOID = -1
_UNPINNED = 0
SPINS, PAUSE_S = 20, 1e-3
"""While weights are written: how often a reader only yields, and how long it then waits at once."""
MAX_TORN = 10_000
"""Tries in a row, torn or found void, after which a reader gives up."""


class _Layout:
    """Geometry of published weights: a header, then buffers of weights and statistics.

    The header is one page, or as many as the buffers' stamps need.
    """

    def __init__(self, num_parameters: int, num_features: int, num_buffers: int) -> None:
        self.num_parameters = num_parameters
        self.num_features = num_features
        self.num_buffers = num_buffers
        self.weights_bytes = rounded(4 * num_parameters)
        self.stride = rounded(self.weights_bytes + 8 * num_features)
        self.header_bytes = max(PAGE, rounded(8 * (_STAMPS + num_buffers)))
        self.size = self.header_bytes + self.stride * num_buffers

    def weights_at(self, buffer: int) -> int:
        return self.header_bytes + buffer * self.stride

    def statistics_at(self, buffer: int) -> int:
        return self.weights_at(buffer) + self.weights_bytes


def check_room(num_parameters: int, kept: int) -> None:
    """Make sure that the machine has memory for so many versions.

    Raises:
        BadConfiguration: It has not.
    """
    wanted = 4 * num_parameters * kept
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted > memory:
        raise BadConfiguration(
            f"staleness bound is {kept}: a partition of {num_parameters:,} parameters would keep "
            f"as many versions, {wanted / 1e9:.1f} GB, and its machine has {memory / 1e9:.1f} GB: "
            "give a smaller one"
        )


class PublishedWeights:
    """The partition's side: versions in a few buffers."""

    def __init__(
        self,
        num_parameters: int,
        num_features: int,
        num_buffers: int = NUM_BUFFERS,
        *,
        in_place: bool | None = None,
        kept: int = 0,
    ) -> None:
        """Make the memory; buffer 0 is current, zero, and published as version 0.

        Args:
            num_parameters: n of the partition.
            num_features: f of the partition.
            num_buffers: How many buffers to have.
            in_place: Whether to write over a version that nobody reads; by default, by size.
            kept: Versions before the latest that are not written over. There are so many more
                buffers. Those that were never written take no memory.
        """
        num_buffers += kept
        layout = _Layout(num_parameters, num_features, num_buffers)
        self.fd = create_memory("downpour-weights", layout.size)
        memory = mmap.mmap(self.fd, layout.size)
        with contextlib.suppress(OSError):  # a kernel before 5.1
            # With this mapping made, nobody else can make another that writes.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        self._header: npt.NDArray[np.int64] = np.frombuffer(
            memory, np.int64, layout.header_bytes // 8
        )
        self.versions: list[Version] = []
        for buffer in range(num_buffers):
            weights = floats(memory, layout.weights_at(buffer), num_parameters)
            statistics = floats(memory, layout.statistics_at(buffer), 2 * num_features)
            self.versions.append(
                Version(weights=weights, statistics=statistics.view(2, num_features))
            )
        self._header[_STAMPS : _STAMPS + num_buffers] = _VOID
        self._in_place = updates_in_place(num_parameters) if in_place is None else in_place
        self._kept = kept
        self._old: deque[int] = deque()
        """Buffers with versions that may be needed once more, oldest first; with `kept` only."""
        self._free = deque(range(1, num_buffers))
        """The others but the current one, those that were used last in front."""
        self._current = self._begun = 0
        self.publish(0)

    @property
    def num_buffers(self) -> int:
        """How many buffers there are."""
        return len(self.versions)

    @property
    def current_buffer(self) -> int:
        """The buffer that is published."""
        return self._current

    def begin(self, pinned: Collection[int] = ()) -> int:
        """Return the buffer for the next version, void until `commit`: the latest's, or a free one.

        Args:
            pinned: The buffers that are being read. If all are, the next one is taken all the same.
        """
        buffer = self._current
        if self._kept:
            buffer = self._begin_beside(pinned)
        elif buffer in pinned or not self._in_place:
            num = len(self.versions)
            free = [s for s in range(num) if s != buffer and s not in pinned]
            buffer = free[0] if free else (buffer + 1) % num
        # Between this store and the first one to the buffer are locked instructions (of reference
        # counts), which even stores past the cache do not overtake.
        self._header[_STAMPS + buffer] = _VOID
        self._begun = buffer
        return buffer

    def _begin_beside(self, pinned: Collection[int]) -> int:
        """Return a buffer whose version is no longer needed. There is always one."""
        oldest = int(self._header[_STAMPS + self._current]) - self._kept
        while self._old and int(self._header[_STAMPS + self._old[0]]) < oldest:
            self._free.appendleft(self._old.popleft())
        return next((buffer for buffer in self._free if buffer not in pinned), self._free[0])

    def commit(self, version: int) -> None:
        """Publish the buffer that `begin` gave, as `version`."""
        if self._kept:
            self._free.remove(self._begun)
            self._old.append(self._current)
        self._current = self._begun
        self.publish(version)

    def publish(self, version: int) -> None:
        """Stamp the current buffer with `version`, and point readers at it."""
        self._header[_STAMPS + self._current] = version
        self._header[_LATEST] = self._current

    def close(self) -> None:
        """Close the descriptor. The memory is freed with its last mapping."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def yield_or_sleep(tries: int) -> None:
    """Let a writer finish, which may be waiting for this very processor."""
    if tries < SPINS:
        os.sched_yield()
    else:
        time.sleep(PAUSE_S)


class WeightsReader:
    """A replica's side: whole copies of the latest version."""

    def __init__(
        self,
        fd: int,
        num_parameters: int,
        num_features: int,
        num_buffers: int,
        pin: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Map what `PublishedWeights` made. Takes over and closes `fd`.

        `pin`, int64 [1], is where the writer looks for what is being read, if it does.

        Raises:
            MalformedMessage: The memory is of another size or kind.
        """
        self._pin = np.zeros(1, np.int64) if pin is None else pin
        try:
            layout = _Layout(num_parameters, num_features, num_buffers)
            check_memory(fd, layout.size)
            memory = mmap.mmap(fd, layout.size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._header: npt.NDArray[np.int64] = np.frombuffer(
            memory, np.int64, layout.header_bytes // 8
        )
        self._weights = [
            np.frombuffer(memory, np.float32, num_parameters, layout.weights_at(i))
            for i in range(num_buffers)
        ]
        self._statistics = [
            np.frombuffer(memory, np.float32, 2 * num_features, layout.statistics_at(i)).reshape(
                2, num_features
            )
            for i in range(num_buffers)
        ]
        self.torn = 0
        """Copies thrown away because the writer had written what was being copied."""

    @property
    def version(self) -> int:
        """The latest version, or -1 while it is being written over."""
        return int(self._header[_STAMPS + int(self._header[_LATEST])])

    def read(
        self,
        weights: npt.NDArray[np.float32],
        statistics: npt.NDArray[np.float32] | None = None,
        pause: Callable[[int], None] = yield_or_sleep,
    ) -> int:
        """Copy the latest weights and, if wanted, statistics.

        Args:
            weights: Where they go, float32 [n].
            statistics: Where they go, float32 [2, f].
            pause: Called with the number of tries until now while the version is being written; it
                may raise.

        Returns:
            Their version.

        Raises:
            DeadlineExceeded: `MAX_TORN` tries in a row found a version that was being written.
        """
        header, pin = self._header, self._pin
        try:
            for tries in range(MAX_TORN):
                buffer = int(header[_LATEST])
                pin[0] = buffer + 1
                stamp = int(header[_STAMPS + buffer])
                if stamp == _VOID:
                    pause(tries)
                    continue
                np.copyto(weights, self._weights[buffer])
                if statistics is not None:
                    np.copyto(statistics, self._statistics[buffer])
                if int(header[_STAMPS + buffer]) == stamp:
                    return stamp
                self.torn += 1
        finally:
            pin[0] = _UNPINNED
        raise DeadlineExceeded(f"the partition has overtaken {MAX_TORN} copies of its weights")

"""Shared memory between a partition and the replicas on its machine.

Every segment is a sealed memfd: memory without a name that travels as a file descriptor over the
connection's socket. Only processes that were handed it can open it, the kernel frees it with the
last of them, and so nothing is left behind after any kind of death.

`PublishedWeights` is written by the partition: a few slots, of which the header points at the
latest version's. The writer marks a slot void, writes it, stamps it with its version, and only then
points the header at it. A reader copies the slot that the header points at, and takes the copy only
if the slot bore the same stamp before and after: a torn copy is seen, and tried again. Stores and
loads of the stamps are aligned 8-byte ones, whose order x86-64 keeps; `supported` refuses other
machines.

The slot that the writer takes is the latest version's own, if nobody is reading it: an update in
place moves the fewest bytes. Not so where a version fits into a processor's cache: to write over
lines that readers have copies of, the writer has to take them back one at a time, which costs four
times as much as to fill another slot and go on from there. A reader says what it reads with a pin,
a word in memory of its own that the writer looks at before an update; the writer then takes
another slot. Pins are there for speed and fairness alone: a reader that has just been missed
sees a void stamp or a torn copy, its pin is seen by the next update, and so it cannot starve; one
that dies with its pin set takes the pin along, as its connection closes.

`Mailboxes` is written by a replica's process: autograd leaves gradients and moments there, and the
partition reads its own slice when a push names the mailbox. The pins are there, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Collection

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from downpour.paramserver.errors import BadConfiguration, DeadlineExceeded, MalformedMessage
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.vectors import Version
from downpour.paramserver.rules.update import updates_in_place

_F_SEAL_FUTURE_WRITE = 0x0010  # fcntl.h; Python has no name for it yet
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW if hasattr(fcntl, "F_SEAL_SHRINK") else 0

NUM_SLOTS = 4
"""Slots of a partition's weights: one is being written, and the others may be pinned."""

_PAGE = 4096
_LATEST, _STAMPS = 0, 8
_VOID = -1
_UNPINNED = 0
_LINE = 64
"""Bytes of a cache line; no two partitions poll words of the same one."""
SPINS, PAUSE_S = 20, 1e-3
"""While weights are written: how often a reader only yields, and how long it then waits at once."""
MAX_MAILBOX_BYTES = 1 << 40
MAX_TORN = 10_000
"""Tries in a row, torn or found void, after which a reader gives up."""


def supported() -> bool:
    """Whether this machine has sealed memfds, and keeps stores in order."""
    return hasattr(os, "memfd_create") and platform.machine() in ("x86_64", "AMD64")


def create_memory(name: str, size: int) -> int:
    """A descriptor of so many bytes of memory that nobody can shrink."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        # Nobody who is handed this can shrink it under the feet of another.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def check_memory(fd: int, size: int) -> None:
    """Raise `MalformedMessage` unless this is a descriptor that `create_memory` gave."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise MalformedMessage("the memory handed over is not a memfd") from None
    if seals & _SIZE_SEALS != _SIZE_SEALS:
        raise MalformedMessage("the memory handed over could still be shrunk")
    if os.fstat(fd).st_size != size:
        raise MalformedMessage(
            f"the memory handed over has {os.fstat(fd).st_size} bytes, not {size}"
        )


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64


class _Slots:
    """Geometry of published weights: a header page, then slots of weights and statistics."""

    def __init__(self, num_parameters: int, num_features: int, num_slots: int) -> None:
        self.num_parameters = num_parameters
        self.num_features = num_features
        self.num_slots = num_slots
        self.weights_bytes = _rounded(4 * num_parameters)
        self.stride = _rounded(self.weights_bytes + 8 * num_features)
        self.size = _PAGE + self.stride * num_slots

    def weights_at(self, slot: int) -> int:
        return _PAGE + slot * self.stride

    def statistics_at(self, slot: int) -> int:
        return self.weights_at(slot) + self.weights_bytes


def check_room(num_parameters: int, kept: int) -> None:
    """Raise `BadConfiguration` where so many versions are more than the machine has memory for."""
    wanted = 4 * num_parameters * kept
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted > memory:
        raise BadConfiguration(
            f"staleness bound is {kept}: a partition of {num_parameters:,} parameters would keep "
            f"as many versions, {wanted / 1e9:.1f} GB, and its machine has {memory / 1e9:.1f} GB: "
            "give a smaller one"
        )


class PublishedWeights:
    """The partition's side: versions in a few slots."""

    def __init__(
        self,
        num_parameters: int,
        num_features: int,
        num_slots: int = NUM_SLOTS,
        *,
        in_place: bool | None = None,
        kept: int = 0,
    ) -> None:
        """Make the memory; slot 0 is current, zero, and published as version 0.

        `in_place` says whether a version that nobody reads is written over; by default, by size.
        Versions that are up to `kept` older than the latest are not written over; there are as many
        more slots, of which those that were never written take no memory.
        """
        num_slots += kept
        self._geometry = slots = _Slots(num_parameters, num_features, num_slots)
        self.fd = create_memory("downpour-weights", slots.size)
        memory = mmap.mmap(self.fd, slots.size)
        with contextlib.suppress(OSError):  # a kernel before 5.1
            # With this mapping made, nobody else can make another that writes.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        self._header: npt.NDArray[np.int64] = np.frombuffer(memory, np.int64, _PAGE // 8)
        self.versions: list[Version] = []
        for slot in range(num_slots):
            weights = floats(memory, slots.weights_at(slot), num_parameters)
            statistics = floats(memory, slots.statistics_at(slot), 2 * num_features)
            self.versions.append(
                Version(weights=weights, statistics=statistics.view(2, num_features))
            )
        self._header[_STAMPS : _STAMPS + num_slots] = _VOID
        self._in_place = updates_in_place(num_parameters) if in_place is None else in_place
        self._kept = kept
        self._old: deque[int] = deque()
        """Slots with versions that may be needed once more, oldest first; with `kept` only."""
        self._free = deque(range(1, num_slots))
        """The others but the current one, those that were used last in front."""
        self._slot = self._begun = 0
        self.publish(0)

    @property
    def num_slots(self) -> int:
        """How many slots there are."""
        return len(self.versions)

    @property
    def current_slot(self) -> int:
        """The slot that is published."""
        return self._slot

    def begin(self, pinned: Collection[int] = ()) -> int:
        """The slot for the next version, void until `commit`: the latest one's, or a free one.

        `pinned` are the slots that are being read. Where all are, the next is taken all the same.
        """
        slot = self._slot
        if self._kept:
            slot = self._begin_beside(pinned)
        elif slot in pinned or not self._in_place:
            num = len(self.versions)
            free = [s for s in range(num) if s != slot and s not in pinned]
            slot = free[0] if free else (slot + 1) % num
        # Between this store and the first one to the slot are locked instructions (of reference
        # counts), which even stores past the cache do not overtake.
        self._header[_STAMPS + slot] = _VOID
        self._begun = slot
        return slot

    def _begin_beside(self, pinned: Collection[int]) -> int:
        """A slot whose version is not needed any more. There is always one."""
        oldest = int(self._header[_STAMPS + self._slot]) - self._kept
        while self._old and int(self._header[_STAMPS + self._old[0]]) < oldest:
            self._free.appendleft(self._old.popleft())
        return next((slot for slot in self._free if slot not in pinned), self._free[0])

    def commit(self, version: int) -> None:
        """Publish the slot that `begin` gave, as `version`."""
        if self._kept:
            self._free.remove(self._begun)
            self._old.append(self._slot)
        self._slot = self._begun
        self.publish(version)

    def publish(self, version: int) -> None:
        """Stamp the current slot with `version`, and point readers at it."""
        self._header[_STAMPS + self._slot] = version
        self._header[_LATEST] = self._slot

    def close(self) -> None:
        """Close the descriptor; the memory goes with its last mapping."""
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
        num_slots: int,
        pin: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Map what `PublishedWeights` made. Takes over and closes `fd`.

        `pin` [1] is where the writer looks for what is being read, if it does.
        """
        self._pin = np.zeros(1, np.int64) if pin is None else pin
        try:
            slots = _Slots(num_parameters, num_features, num_slots)
            check_memory(fd, slots.size)
            memory = mmap.mmap(fd, slots.size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._header: npt.NDArray[np.int64] = np.frombuffer(memory, np.int64, _PAGE // 8)
        self._weights = [
            np.frombuffer(memory, np.float32, num_parameters, slots.weights_at(i))
            for i in range(num_slots)
        ]
        self._statistics = [
            np.frombuffer(memory, np.float32, 2 * num_features, slots.statistics_at(i)).reshape(
                2, num_features
            )
            for i in range(num_slots)
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
        """Copy the latest weights [num_parameters] (and statistics [2, F]); return their version.

        Where they are just being written, `pause` is called with the number of tries until now, and
        may raise. Raises `DeadlineExceeded` after `MAX_TORN` tries.
        """
        header, pin = self._header, self._pin
        try:
            for tries in range(MAX_TORN):
                slot = int(header[_LATEST])
                pin[0] = slot + 1
                stamp = int(header[_STAMPS + slot])
                if stamp == _VOID:
                    pause(tries)
                    continue
                np.copyto(weights, self._weights[slot])
                if statistics is not None:
                    np.copyto(statistics, self._statistics[slot])
                if int(header[_STAMPS + slot]) == stamp:
                    return stamp
                self.torn += 1
        finally:
            pin[0] = _UNPINNED
        raise DeadlineExceeded(f"the partition has overtaken {MAX_TORN} copies of its weights")


class _Boxes:
    """Geometry: a pin for each partition, then the mailboxes.

    Each of these has a whole model's gradient, then `depth` sets of moments.
    """

    def __init__(
        self, num_parameters: int, num_features: int, num_partitions: int, num: int, depth: int
    ) -> None:
        self.gradient_bytes = _rounded(4 * num_parameters)
        self.stride = _rounded(self.gradient_bytes + 12 * depth * num_features)
        self._first = -(-_LINE * num_partitions // _PAGE) * _PAGE
        self.size = self._first + self.stride * num
        if self.size > MAX_MAILBOX_BYTES:
            raise MalformedMessage(f"mailboxes of {self.size} bytes")

    def pin_at(self, partition: int) -> int:
        return partition * _LINE

    def gradient_at(self, box: int) -> int:
        return self._first + box * self.stride

    def moments_at(self, box: int) -> int:
        return self.gradient_at(box) + self.gradient_bytes


class Mailboxes:
    """A process of replicas' side: mailboxes that autograd writes into, and pins."""

    def __init__(
        self,
        num_parameters: int,
        num_features: int,
        num: int,
        depth: int,
        num_partitions: int = 1,
    ) -> None:
        """Make the memory, zeroed. `num` is 0 where nothing will be pushed."""
        boxes = _Boxes(num_parameters, num_features, num_partitions, num, depth)
        self.num, self.depth = num, depth
        self.fd = create_memory("downpour-mailboxes", boxes.size)
        memory = mmap.mmap(self.fd, boxes.size)
        self.memory = torch.frombuffer(memory, dtype=torch.uint8)
        """All of it, for whoever wants it page-locked."""
        self.gradients = [floats(memory, boxes.gradient_at(i), num_parameters) for i in range(num)]
        """Flat gradients, float32 [P] each."""
        self.moments = [
            floats(memory, boxes.moments_at(i), depth * 3 * num_features).view(
                depth, 3, num_features
            )
            for i in range(num)
        ]
        """Sets of moments, float32 [depth, 3, F] each."""
        self.pins = [_words(memory, boxes.pin_at(i)) for i in range(num_partitions)]
        """For each partition, the slot of its weights that is being read, plus 1; int64 [1]."""

    def close(self) -> None:
        """Close the descriptor; the memory goes with its last mapping."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class MailboxViews:
    """The partition's side of a process's mailboxes: its own slice of each."""

    def __init__(self, fd: int, partition: Partition, num: int, depth: int) -> None:
        """Map what `Mailboxes` made. Takes over and closes `fd`."""
        try:
            boxes = _Boxes(
                partition.total_parameters,
                partition.total_features,
                partition.num_partitions,
                num,
                depth,
            )
            check_memory(fd, boxes.size)
            memory = mmap.mmap(fd, boxes.size)
        finally:
            os.close(fd)
        start, stop = partition.start, partition.stop
        low, high = partition.feature_start, partition.feature_stop
        self.gradients = [
            floats(memory, boxes.gradient_at(i), partition.total_parameters)[start:stop]
            for i in range(num)
        ]
        self.moments = [
            floats(memory, boxes.moments_at(i), depth * 3 * partition.total_features).view(
                depth, 3, partition.total_features
            )[:, :, low:high]
            for i in range(num)
        ]
        self._pin = _words(memory, boxes.pin_at(partition.index))

    @property
    def pinned(self) -> int:
        """The slot that the process is reading; -1 for none."""
        return int(self._pin[0]) - 1


def _words(memory: mmap.mmap, offset: int) -> npt.NDArray[np.int64]:
    return np.frombuffer(memory, np.int64, 1, offset)


def floats(memory: mmap.mmap, offset: int, count: int) -> Tensor:
    """So many float32 of `memory`, from that byte on."""
    if not count:
        return torch.empty(0)
    return torch.frombuffer(memory, dtype=torch.float32, count=count, offset=offset)

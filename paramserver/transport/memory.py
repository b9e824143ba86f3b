"""Shared memory between a partition and the replicas on its machine.

Every segment is a sealed memfd: memory without a name that travels as a file descriptor over the
connection's socket. Only processes that were handed it can open it, the kernel frees it with the
last of them, and so nothing is left behind after any kind of death.

`PublishedWeights` is written by the partition: a ring of slots, one version in each. The writer
takes the next slot, marks it void, fills it, stamps it with its version, and only then points the
header at it. A reader copies the slot that the header points at, and takes the copy only if the
slot bore the same stamp before and after: a torn copy is seen, and tried again. Stores and loads
of the stamps are aligned 8-byte ones, whose order x86-64 keeps; `supported` refuses other machines.

`Mailboxes` is written by a replica's process: autograd leaves gradients and moments there, and the
partition reads its own slice when a push names the mailbox.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import platform

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from paramserver.errors import DeadlineExceeded, MalformedMessage
from paramserver.partition import Partition
from paramserver.state import Version

_F_SEAL_FUTURE_WRITE = 0x0010  # fcntl.h; Python has no name for it yet
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW if hasattr(fcntl, "F_SEAL_SHRINK") else 0

NUM_SLOTS = 4
"""Versions in the ring; a copy is torn only if the writer laps it by this many updates."""

_PAGE = 4096
_LATEST, _STAMPS = 0, 8
_VOID = -1
MAX_MAILBOX_BYTES = 1 << 40
MAX_TORN = 10_000
"""Copies torn in a row after which a reader gives up."""


def supported() -> bool:
    """Whether this machine has sealed memfds, and keeps stores in order."""
    return hasattr(os, "memfd_create") and platform.machine() in ("x86_64", "AMD64")


def _create(name: str, size: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        # Nobody who is handed this can shrink it under the feet of another.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def _check(fd: int, size: int) -> None:
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


class PublishedWeights:
    """The partition's side: versions in a ring of slots."""

    def __init__(self, num_parameters: int, num_features: int, num_slots: int = NUM_SLOTS) -> None:
        """Make the memory; slot 0 is current, zero, and published as version 0."""
        self._geometry = slots = _Slots(num_parameters, num_features, num_slots)
        self.fd = _create("downpour-weights", slots.size)
        memory = mmap.mmap(self.fd, slots.size)
        with contextlib.suppress(OSError):  # a kernel before 5.1
            # With this mapping made, nobody else can make another that writes.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        self._header: npt.NDArray[np.int64] = np.frombuffer(memory, np.int64, _PAGE // 8)
        self.versions: list[Version] = []
        for slot in range(num_slots):
            weights = _floats(memory, slots.weights_at(slot), num_parameters)
            statistics = _floats(memory, slots.statistics_at(slot), 2 * num_features)
            self.versions.append(
                Version(weights=weights, statistics=statistics.view(2, num_features))
            )
        self._header[_STAMPS : _STAMPS + num_slots] = _VOID
        self._slot = 0
        self.publish(0)

    @property
    def num_slots(self) -> int:
        """Versions in the ring."""
        return len(self.versions)

    @property
    def current_slot(self) -> int:
        """The slot that is published."""
        return self._slot

    @property
    def next_slot(self) -> int:
        """The slot that `begin` gives."""
        return (self._slot + 1) % len(self.versions)

    def begin(self) -> Version:
        """The next slot, void until `publish`."""
        slot = self.next_slot
        self._header[_STAMPS + slot] = _VOID
        return self.versions[slot]

    def commit(self, version: int) -> None:
        """Publish the slot that `begin` gave, as `version`."""
        self._slot = self.next_slot
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


class WeightsReader:
    """A replica's side: whole copies of the latest version."""

    def __init__(self, fd: int, num_parameters: int, num_features: int, num_slots: int) -> None:
        """Map what `PublishedWeights` made. Takes over and closes `fd`."""
        try:
            slots = _Slots(num_parameters, num_features, num_slots)
            _check(fd, slots.size)
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
        """Copies thrown away because the writer had lapped them."""

    @property
    def version(self) -> int:
        """The latest version, or -1 while it is being replaced."""
        return int(self._header[_STAMPS + int(self._header[_LATEST])])

    def read(
        self,
        weights: npt.NDArray[np.float32],
        statistics: npt.NDArray[np.float32] | None = None,
    ) -> int:
        """Copy the latest weights [num_parameters] (and statistics [2, F]); return their version.

        Raises `DeadlineExceeded` if the writer laps the copy `MAX_TORN` times in a row.
        """
        header = self._header
        for _ in range(MAX_TORN):
            slot = int(header[_LATEST])
            stamp = int(header[_STAMPS + slot])
            if stamp != _VOID:
                np.copyto(weights, self._weights[slot])
                if statistics is not None:
                    np.copyto(statistics, self._statistics[slot])
                if int(header[_STAMPS + slot]) == stamp:
                    return stamp
            self.torn += 1
        raise DeadlineExceeded(f"the partition has overtaken {MAX_TORN} copies of its weights")


class _Boxes:
    """Geometry of mailboxes: each a whole model's gradient, then `depth` sets of moments."""

    def __init__(self, num_parameters: int, num_features: int, num: int, depth: int) -> None:
        self.gradient_bytes = _rounded(4 * num_parameters)
        self.stride = _rounded(self.gradient_bytes + 12 * depth * num_features)
        self.size = max(_PAGE, self.stride * num)
        if self.size > MAX_MAILBOX_BYTES:
            raise MalformedMessage(f"mailboxes of {self.size} bytes")

    def gradient_at(self, box: int) -> int:
        return box * self.stride

    def moments_at(self, box: int) -> int:
        return box * self.stride + self.gradient_bytes


class Mailboxes:
    """A process of replicas' side: one mailbox a slot, that autograd writes into."""

    def __init__(self, num_parameters: int, num_features: int, num: int, depth: int) -> None:
        """Make the memory, zeroed."""
        boxes = _Boxes(num_parameters, num_features, num, depth)
        self.num, self.depth = num, depth
        self.fd = _create("downpour-mailboxes", boxes.size)
        memory = mmap.mmap(self.fd, boxes.size)
        self.gradients = [_floats(memory, boxes.gradient_at(i), num_parameters) for i in range(num)]
        """Flat gradients, float32 [P] each."""
        self.moments = [
            _floats(memory, boxes.moments_at(i), depth * 3 * num_features).view(
                depth, 3, num_features
            )
            for i in range(num)
        ]
        """Sets of moments, float32 [depth, 3, F] each."""

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
            boxes = _Boxes(partition.total_parameters, partition.total_features, num, depth)
            _check(fd, boxes.size)
            memory = mmap.mmap(fd, boxes.size)
        finally:
            os.close(fd)
        start, stop = partition.start, partition.stop
        low, high = partition.feature_start, partition.feature_stop
        self.gradients = [
            _floats(memory, boxes.gradient_at(i), partition.total_parameters)[start:stop]
            for i in range(num)
        ]
        self.moments = [
            _floats(memory, boxes.moments_at(i), depth * 3 * partition.total_features).view(
                depth, 3, partition.total_features
            )[:, :, low:high]
            for i in range(num)
        ]


def _floats(memory: mmap.mmap, offset: int, count: int) -> Tensor:
    if not count:
        return torch.empty(0)
    return torch.frombuffer(memory, dtype=torch.float32, count=count, offset=offset)

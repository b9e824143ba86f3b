"""Mailboxes: written by a process of replicas, read by the partitions beside it.

Autograd leaves gradients and moments in a mailbox, and a partition reads its own slice when a push
names that mailbox. The pins (see `published`) are in the same memory.
"""

from __future__ import annotations

import mmap
import os

import torch

from downpour.paramserver.errors import MalformedMessage
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.transport.shared.memory import (
    PAGE,
    check_memory,
    create_memory,
    floats,
    rounded,
    words,
)

_LINE = 64
"""Bytes of a cache line; no two partitions poll words of the same one."""
MAX_MAILBOX_BYTES = 1 << 40


class _Boxes:
    """Geometry: a pin for each partition, then the mailboxes.

    Each of these has a whole model's gradient, then `depth` sets of moments.
    """

    def __init__(
        self, num_parameters: int, num_features: int, num_partitions: int, num: int, depth: int
    ) -> None:
        self.gradient_bytes = rounded(4 * num_parameters)
        self.stride = rounded(self.gradient_bytes + 12 * depth * num_features)
        self._first = -(-_LINE * num_partitions // PAGE) * PAGE
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
        """Make the memory, zeroed. `num` is 0 if nothing will be pushed.

        Raises:
            MalformedMessage: It would be larger than `MAX_MAILBOX_BYTES`.
        """
        boxes = _Boxes(num_parameters, num_features, num_partitions, num, depth)
        self.num, self.depth = num, depth
        self.fd = create_memory("downpour-mailboxes", boxes.size)
        memory = mmap.mmap(self.fd, boxes.size)
        self.memory = torch.frombuffer(memory, dtype=torch.uint8)
        """All of it, uint8 [bytes], to be page-locked if a device copies from it."""
        self.gradients = [floats(memory, boxes.gradient_at(i), num_parameters) for i in range(num)]
        """Flat gradients, float32 [P] each."""
        self.moments = [
            floats(memory, boxes.moments_at(i), depth * 3 * num_features).view(
                depth, 3, num_features
            )
            for i in range(num)
        ]
        """Sets of moments, float32 [depth, 3, F] each."""
        self.pins = [words(memory, boxes.pin_at(i), 1) for i in range(num_partitions)]
        """For each partition, the buffer of its weights that is being read, plus 1: int64 [1]."""

    def close(self) -> None:
        """Close the descriptor. The memory is freed with its last mapping."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class MailboxViews:
    """The partition's side of a process's mailboxes: its own slice of each."""

    def __init__(self, fd: int, partition: Partition, num: int, depth: int) -> None:
        """Map what `Mailboxes` made. Takes over and closes `fd`.

        Raises:
            MalformedMessage: The memory is of another size or kind.
        """
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
        low, high = partition.feature_start, partition.feature_stop
        self.gradients = [
            floats(memory, boxes.gradient_at(i), partition.total_parameters)[partition.trained]
            for i in range(num)
        ]
        self.moments = [
            floats(memory, boxes.moments_at(i), depth * 3 * partition.total_features).view(
                depth, 3, partition.total_features
            )[:, :, low:high]
            for i in range(num)
        ]
        self._pin = words(memory, boxes.pin_at(partition.index), 1)

    @property
    def pinned(self) -> int:
        """The buffer that the process is reading; -1 for none."""
        return int(self._pin[0]) - 1

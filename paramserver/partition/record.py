"""The record of a partition: every push in the order in which it was taken, 20 bytes each.

With the plan of the mini-batches it is all that is needed to compute a run again
(`cluster.replay`). An entry names the mini-batch, the replica, the version that the push was
computed on, how it travelled, and what became of it. It also has a fingerprint of the loss and the
gradient's norm. The fingerprint tells two computations of one mini-batch apart, on all partitions.

The file is mapped, so an entry costs no system call and outlives its process. An entry is written
before its version is published, so the record explains all weights that were ever pulled. It need
not outlive the machine. Each start of a partition has its own file.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from downpour.paramserver.errors import BadRecord
from downpour.paramserver.messages import Outcome, Push, WireDtype

MAGIC = b"DPRPUSH1"
_HEADER = struct.Struct("<8sQIIB7x")
_ROLE_AT = _HEADER.size - 8
_PRIMARY, _FOLLOWER = 0, 1
_ENTRY = struct.Struct("<IIHBBII")
"""Epoch, mini-batch, replica, outcome, wire less 1, version pulled, fingerprint. Records of earlier
releases have a 0 for the wire, which is float32."""
_NUMBERS = struct.Struct("<dd")
CHUNK_BYTES = 1 << 20


def fingerprint(loss: float, gradient_norm: float) -> int:
    """Return 32 bits that depend on every bit of a computation's results."""
    return zlib.crc32(_NUMBERS.pack(loss, gradient_norm))


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One push that a partition took in, or did not."""

    epoch: int
    batch: int
    replica: int
    outcome: Outcome
    version: int
    """The version that it was computed on."""
    fingerprint: int
    wire: WireDtype = WireDtype.FLOAT32
    """How its gradient came, and the weights for it went."""


class PushRecord:
    """Writes the record of one start of a partition."""

    def __init__(
        self, folder: Path, partition: int, version: int, *, follows: bool = False
    ) -> None:
        """Start a new file in `folder`, which is made if need be.

        Args:
            folder: Where the records of all partitions lie.
            partition: Index of the partition.
            version: The version that it starts from.
            follows: Whether it is a follower; its record counts only once it is promoted.

        Raises:
            OSError: The file cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        start = len(files(folder, partition))
        path = folder / f"partition-{partition:05d}-{start:05d}.pushes"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._size = 0
        self.failure: OSError | None = None
        """Why the record is incomplete, if it is."""
        self._grow()
        role = _FOLLOWER if follows else _PRIMARY
        _HEADER.pack_into(self._map, 0, MAGIC, version, partition, start, role)
        self._at = _HEADER.size

    def add(self, push: Push, outcome: Outcome) -> None:
        """Note what became of a push of one mini-batch. Raises nothing; see `failure`."""
        at = self._at
        if at + _ENTRY.size > self._size:
            if self.failure is not None:
                return
            try:
                self._grow()
            except OSError as error:  # training is worth more than its record
                self.failure = error
                return
        _ENTRY.pack_into(
            self._map,
            at,
            push.epoch,
            push.batches[0],
            push.replica,
            outcome,
            push.wire - 1,
            push.version,
            fingerprint(push.loss, push.gradient_norm),
        )
        self._at = at + _ENTRY.size

    def _grow(self) -> None:
        size = self._size + CHUNK_BYTES
        # Not a hole: a full disk must be an error here, not a signal at some later entry.
        os.posix_fallocate(self._fd, 0, size)
        self._map = mmap.mmap(self._fd, size)
        self._size = size

    def promote(self) -> None:
        """The follower has become the partition."""
        self._map[_ROLE_AT] = _PRIMARY

    def close(self) -> None:
        """Cut the file to what was written."""
        self._map.close()
        os.ftruncate(self._fd, self._at)
        os.close(self._fd)


@dataclass(frozen=True, kw_only=True)
class Branch:
    """What one start of a partition recorded."""

    partition: int
    number: int
    """Counts the partition's starts from 0."""
    version: int
    """The version that it started from."""
    entries: tuple[Entry, ...]
    counts: bool = True
    """False for a follower that never became the partition."""


def files(folder: Path, partition: int | None = None) -> list[Path]:
    """Return the files of one partition, or of all, in order."""
    name = "*" if partition is None else f"{partition:05d}"
    return sorted(folder.glob(f"partition-{name}-*.pushes"))


def read(path: Path) -> Branch:
    """Read what a `PushRecord` wrote.

    Raises:
        BadRecord: The file holds something else, or is damaged.
        OSError: It cannot be read.
    """
    data = path.read_bytes()
    if len(data) < _HEADER.size:
        raise BadRecord(f"{path} is shorter than a record's header: it was cut off")
    magic, version, partition, number, role = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise BadRecord(f"{path} is not a record of pushes")
    try:
        entries = tuple(_entries(data))
    except ValueError as error:
        raise BadRecord(f"{path} is damaged: {error}") from None
    return Branch(
        partition=partition,
        number=number,
        version=version,
        entries=entries,
        counts=role == _PRIMARY,
    )


def _entries(data: bytes) -> Iterator[Entry]:
    for at in range(_HEADER.size, len(data) - _ENTRY.size + 1, _ENTRY.size):
        epoch, batch, replica, outcome, wire, version, mark = _ENTRY.unpack_from(data, at)
        if not outcome:
            return  # the rest was never written
        yield Entry(
            epoch=epoch,
            batch=batch,
            replica=replica,
            outcome=Outcome(outcome),
            version=version,
            fingerprint=mark,
            wire=WireDtype(wire + 1),
        )

"""What a primary and its follower say to each other, over a unix socket on one machine.

A follower knocks at the door that replicas come in by, with the run's key (`FOLLOW`). It is handed
the primary's state in memory of its own, and a token (`JOINED`); from then on every packet of
pushes that the primary takes (`PUSHES`), after the memory of the mailboxes that they are in
(`MAILBOXES`, `GONE`). So gradients do not travel: both read them where the replica left them. How
many packets it has applied, the follower adds to an eventfd, and never says on the socket: Linux
before 6.2 throws away what a process has not read yet when it sends to one that is just dying.

The token is an eventfd that holds one count, which only one of the two can take, alive or not:
whoever has it is the one that answers from then on. The kernel sees to that.
"""

from __future__ import annotations

import hmac
import mmap
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from downpour.paramserver.errors import ConnectionLost, MalformedMessage, NotAuthenticated
from downpour.paramserver.messages import KEY_BYTES
from downpour.paramserver.partition import snapshot
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.snapshot import Snapshot
from downpour.paramserver.transport.shared.memory import check_memory, create_memory, floats

MAGIC = b"DPRF"
FOLLOW, JOINED, MAILBOXES, GONE, PUSHES = range(1, 6)
MAX_PACKET = 1 << 14
_KIND = struct.Struct("<4sB")
_FOLLOW = struct.Struct(f"<4sB{KEY_BYTES}sIQQ")
_MAILBOXES = struct.Struct("<4sBIII")
_GONE = struct.Struct("<4sBI")
_PUSHES = struct.Struct("<4sBIQ")
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Opened:
    """A connection of a replica's process, with the memory of its mailboxes."""

    source: int
    num_mailboxes: int
    depth: int
    fd: int


@dataclass(frozen=True, slots=True)
class Closed:
    """A connection is gone; no push of it comes any more."""

    source: int


@dataclass(frozen=True, slots=True)
class Pushes:
    """A packet of pushes, as it came from a connection."""

    source: int
    version: int
    """The primary's, before it."""
    packet: bytes


def follow(key: bytes, partition: Partition) -> bytes:
    """The follower's first message."""
    sizes = (partition.index, partition.total_parameters, partition.total_features)
    return _FOLLOW.pack(MAGIC, FOLLOW, key, *sizes)


def is_follow(data: bytes) -> bool:
    """Whether a connection's first message is a follower's."""
    return data.startswith(MAGIC)


def check_follow(data: bytes, key: bytes, partition: Partition) -> None:
    """Raise `NotAuthenticated` or `MalformedMessage` unless this may follow `partition`."""
    try:
        _, kind, theirs, *sizes = _FOLLOW.unpack(data)
    except struct.error as error:
        raise MalformedMessage(f"a follower's message of {len(data)} bytes: {error}") from None
    if not hmac.compare_digest(theirs, key):
        raise NotAuthenticated("a follower with a key that is not this run's")
    ours = [partition.index, partition.total_parameters, partition.total_features]
    if kind != FOLLOW or sizes != ours:
        raise MalformedMessage(f"a follower of another partition: {sizes}")


def joined() -> bytes:
    """Comes with four descriptors: large tensors, everything else, token, count of packets."""
    return _KIND.pack(MAGIC, JOINED)


def is_joined(data: bytes) -> bool:
    """Whether this is the answer to `follow`."""
    return data == joined()


def mailboxes(source: int, num_mailboxes: int, depth: int) -> bytes:
    """Comes with the descriptor of the mailboxes' memory."""
    return _MAILBOXES.pack(MAGIC, MAILBOXES, source, num_mailboxes, depth)


def gone(source: int) -> bytes:
    """A connection was lost."""
    return _GONE.pack(MAGIC, GONE, source)


def pushes(source: int, version: int, packet: bytes) -> bytes:
    """A packet of pushes; the primary is at `version` before it."""
    return _PUSHES.pack(MAGIC, PUSHES, source, version) + packet


def receive(peer: socket.socket) -> Opened | Closed | Pushes | None:
    """The primary's next message; None where none has come, `ConnectionLost` after the last."""
    try:
        data, fds = _receive(peer)
    except BlockingIOError:
        return None
    except OSError as error:
        raise ConnectionLost(f"the primary: {error}") from None
    if not data:
        raise ConnectionLost("the primary is gone")
    try:
        message = _read(data, fds)
    except struct.error as error:
        raise MalformedMessage(f"a primary's message of {len(data)} bytes: {error}") from None
    finally:
        for fd in fds:
            os.close(fd)
    return message


def _receive(peer: socket.socket) -> tuple[bytes, list[int]]:
    try:
        data, fds, _, _ = socket.recv_fds(peer, MAX_PACKET, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        # It died with something of ours unread. That is said once, ahead of what it had sent.
        data, fds, _, _ = socket.recv_fds(peer, MAX_PACKET, 1, socket.MSG_CMSG_CLOEXEC)
    return data, fds


def _read(data: bytes, fds: list[int]) -> Opened | Closed | Pushes:
    magic, kind = _KIND.unpack_from(data)
    if magic == MAGIC and kind == PUSHES:
        _, _, source, version = _PUSHES.unpack_from(data)
        return Pushes(source, version, data[_PUSHES.size :])
    if magic == MAGIC and kind == MAILBOXES and fds:
        _, _, source, num, depth = _MAILBOXES.unpack(data)
        return Opened(source, num, depth, fds.pop())
    if magic == MAGIC and kind == GONE:
        return Closed(_GONE.unpack(data)[2])
    raise MalformedMessage(f"a primary's message of kind {kind}")


def make_token() -> int:
    """A token that nobody has taken yet."""
    return os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def take(token: int) -> bool:
    """Take the token; False where it has been taken."""
    try:
        os.eventfd_read(token)
    except BlockingIOError:
        return False
    return True


def make_count() -> int:
    """Where the follower counts the packets that it has applied."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def add(count: int, num: int) -> None:
    """So many more packets have been applied."""
    os.eventfd_write(count, num)


def added(count: int) -> int:
    """How many have been since this was asked last."""
    try:
        return os.eventfd_read(count)
    except BlockingIOError:
        return 0


class Handover:
    """Memory in which a state's large tensors go from the primary to a follower."""

    def __init__(self, room: Mapping[str, Tensor], fd: int | None = None) -> None:
        """Make it for tensors like those of `room`, touched already, or map what has come.

        Takes over `fd`. Raises `MalformedMessage` where that is of another size.
        """
        sizes = {name: 4 * tensor.numel() for name, tensor in room.items()}
        places, size = {}, 0
        for name, num_bytes in sizes.items():
            places[name] = size
            size += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        size = max(size, mmap.PAGESIZE)
        self.fd = create_memory("downpour-handover", size) if fd is None else fd
        try:
            if fd is not None:
                check_memory(fd, size)
            memory = mmap.mmap(self.fd, size)
        except BaseException:
            self.close()
            raise
        self.tensors = {
            name: floats(memory, places[name], tensor.numel()).view(tensor.shape)
            for name, tensor in room.items()
        }
        if fd is None:
            for tensor in self.tensors.values():
                tensor.zero_()

    def close(self) -> None:
        """Close the descriptor; the memory goes with its last mapping."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def write_rest(blocks: Iterable[memoryview]) -> int:
    """A descriptor of memory with these bytes in it."""
    fd = os.memfd_create("downpour-handover-rest", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb", closefd=False) as file:
        for block in blocks:
            file.write(block)
    return fd


def read_rest(fd: int, partition: Partition, large: Mapping[str, Tensor]) -> Snapshot:
    """The state that was handed over; takes over `fd`."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        found = snapshot.parse(file.read(), f"the state of partition {partition.index}")
    found.check(partition)
    return Snapshot(partition=partition, meta=found.meta, tensors={**found.tensors, **large})

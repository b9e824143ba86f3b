"""What a primary and its follower say to each other, over a unix socket on one machine.

A follower connects as replicas do, with the run's key (`FOLLOW`). The primary hands it the state in
shared memory, and a token (`JOINED`). From then on it sends every packet of pushes that it takes
(`PUSHES`), and before them the memory of the mailboxes that they are in (`MAILBOXES`, `GONE`). So
gradients do not travel: both read them where the replica left them. The follower counts the packets
that it has applied in an eventfd, and says nothing on the socket: Linux before 6.2 throws away what
a process has not read yet when it sends to one that is just dying.

The token is an eventfd that holds one count. Only one of the two can take it, alive or not, which
the kernel guarantees. Whoever has it is the one that answers from then on.
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
    """Return the follower's first message."""
    sizes = (partition.index, partition.total_parameters, partition.total_features)
    return _FOLLOW.pack(MAGIC, FOLLOW, key, *sizes)


def is_follow(data: bytes) -> bool:
    """Whether a connection's first message is a follower's."""
    return data.startswith(MAGIC)


def check_follow(data: bytes, key: bytes, partition: Partition) -> None:
    """Make sure that a follower with this first message may follow `partition`.

    Raises:
        NotAuthenticated: It has another key.
        MalformedMessage: It says something else, or means another partition.
    """
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
    """Return the answer to `follow`.

    It comes with four descriptors: large tensors, everything else, token, count of packets.
    """
    return _KIND.pack(MAGIC, JOINED)


def is_joined(data: bytes) -> bool:
    """Whether this is the answer to `follow`."""
    return data == joined()


def mailboxes(source: int, num_mailboxes: int, depth: int) -> bytes:
    """Return the message that comes with the descriptor of a connection's mailboxes."""
    return _MAILBOXES.pack(MAGIC, MAILBOXES, source, num_mailboxes, depth)


def gone(source: int) -> bytes:
    """Return the message that a connection is gone."""
    return _GONE.pack(MAGIC, GONE, source)


def pushes(source: int, version: int, packet: bytes) -> bytes:
    """Return the message that hands a packet of pushes on; `version` is the primary's before it."""
    return _PUSHES.pack(MAGIC, PUSHES, source, version) + packet


def receive(peer: socket.socket) -> Opened | Closed | Pushes | None:
    """Return the primary's next message; None if none has come.

    Raises:
        ConnectionLost: The primary is gone, and its last message was returned.
        MalformedMessage: It says what no primary does.
    """
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
    """Return a token that nobody has taken yet."""
    return os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def take(token: int) -> bool:
    """Take the token; returns False if it was taken before."""
    try:
        os.eventfd_read(token)
    except BlockingIOError:
        return False
    return True


def make_count() -> int:
    """Return a counter for the packets that the follower has applied."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def add(count: int, num: int) -> None:
    """Count `num` more packets."""
    os.eventfd_write(count, num)


def added(count: int) -> int:
    """Return how many were counted since this was called last."""
    try:
        return os.eventfd_read(count)
    except BlockingIOError:
        return 0


class Handover:
    """Memory in which a state's large tensors go from the primary to a follower."""

    def __init__(self, room: Mapping[str, Tensor], fd: int | None = None) -> None:
        """Make the memory, touched already, or map what has come.

        Args:
            room: Tensors of the shapes of a state's large ones, all float32.
            fd: What has come; it is taken over. None makes the memory.

        Raises:
            MalformedMessage: `fd` is of another size or kind.
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
    """Return a descriptor of memory that holds these bytes."""
    fd = os.memfd_create("downpour-handover-rest", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb", closefd=False) as file:
        for block in blocks:
            file.write(block)
    return fd


def read_rest(fd: int, partition: Partition, large: Mapping[str, Tensor]) -> Snapshot:
    """Return the state that was handed over; takes over `fd`.

    Raises:
        BadSnapshot: It is damaged, or of another partition.
    """
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        found = snapshot.parse(file.read(), f"the state of partition {partition.index}")
    found.check(partition)
    return Snapshot(partition=partition, meta=found.meta, tensors={**found.tensors, **large})

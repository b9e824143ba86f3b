"""The co-located connection: a unix socket as doorbell beside shared memory.

A SEQPACKET socket in Linux's abstract namespace keeps message boundaries, has no file to leave
behind, and tells either side at once when the other dies. The first message of a connection
(`Hello`, with the mailboxes' memfd) has to bear the run's key, from a process of the same user.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from downpour.paramserver.errors import (
    BadConfiguration,
    ConnectionLost,
    DeadlineExceeded,
    MalformedMessage,
    NotAuthenticated,
    NotColocated,
    ServerError,
)
from downpour.paramserver.messages import (
    KEY_BYTES,
    MAX_BATCHES,
    MAX_MAILBOXES,
    Answer,
    Hello,
    PermitRequest,
    Push,
    Welcome,
    decode,
    decode_all,
    encode,
    encode_all,
)
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.transport import replication
from downpour.paramserver.transport.acceptor import Acceptor
from downpour.paramserver.transport.link import Pull, Weights
from downpour.paramserver.transport.memory import (
    PAUSE_S,
    SPINS,
    Mailboxes,
    MailboxViews,
    PublishedWeights,
    WeightsReader,
    supported,
)

MAX_MESSAGE = 8192
USUAL_PUSH, LARGEST_PUSH = 64, 4160
"""More than the bytes of a push with one mini-batch, and of one with the most there may be."""
_PEER_CREDENTIALS = struct.Struct("3i")
_SEND_BUFFER_BYTES = 1 << 18


def machine() -> str:
    """Names the machine (the kernel and network namespace) that this process runs on."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


def is_ours(peer: socket.socket) -> bool:
    """Whether the other side is a process of this user."""
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return bool(_PEER_CREDENTIALS.unpack(raw)[1] == os.geteuid())


def _receive_with_fds(peer: socket.socket) -> tuple[bytes, list[int]]:
    # A child that is started now must not inherit what comes.
    data, fds, _, _ = socket.recv_fds(peer, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
    return data, fds


@dataclass(frozen=True, kw_only=True)
class NetworkAddress:
    """Where a partition is reached from other machines."""

    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a partition is reached. Plain data, which travels through Ray."""

    partition: Partition
    machine: str
    address: str
    """Name in the abstract socket namespace of `machine`."""
    network: NetworkAddress | None = None
    """None where the partition does not listen on a network."""


class Listener(Acceptor):
    """The partition's listening socket."""

    def __init__(self) -> None:
        """Listen under a random name."""
        if not supported():
            raise NotColocated("shared memory needs Linux memfds on x86-64, which are not here")
        self.address = f"downpour-{secrets.token_hex(16)}"
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listening.bind(b"\0" + self.address.encode())
        super().__init__(listening)

    def accept(self) -> socket.socket | None:
        """See `Acceptor`; a connection by a process of this user. Else, `NotAuthenticated`."""
        peer = super().accept()
        if peer is None:
            return None
        if not is_ours(peer):
            peer.close()
            raise NotAuthenticated("a connection by another user")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        return peer


class ServerSide:
    """One accepted connection as the partition sees it."""

    def __init__(self, peer: socket.socket, since_s: float) -> None:
        """Not yet greeted."""
        self.socket = peer
        self.since_s = since_s
        self.views: MailboxViews | None = None
        self.mailboxes_fd = -1
        """Of the memory behind `views`."""
        self.greeted = False
        self.follows = False
        """It is no replica's, but of a process that wants to follow this partition."""
        self.depth = 0

    def greet(self, partition: Partition, published: PublishedWeights, key: bytes) -> bool:
        """Take the `Hello`. False where it has not come yet; raises where it is no good."""
        try:
            data, fds = _receive_with_fds(self.socket)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionLost(str(error)) from None
        try:
            if not data:
                raise ConnectionLost("the peer left before it said hello")
            if replication.is_follow(data):
                replication.check_follow(data, key, partition)
                self.greeted = self.follows = True
                return True
            hello = decode(data)
            if not isinstance(hello, Hello):
                raise MalformedMessage(f"{type(hello).__name__} came before hello")
            if not hmac.compare_digest(hello.key, key):
                raise NotAuthenticated("hello with a key that is not this run's")
            shape = (hello.total_parameters, hello.total_features)
            if shape != (partition.total_parameters, partition.total_features):
                raise MalformedMessage(f"hello for a model of {shape} parameters and features")
            num, depth = hello.num_mailboxes, hello.depth
            if not fds or not depth:
                raise MalformedMessage("hello without the memory of mailboxes")
            if num > MAX_MAILBOXES or depth > MAX_BATCHES:
                raise MalformedMessage(f"hello with {num} mailboxes of depth {depth}")
            self.views = MailboxViews(os.dup(fds[0]), partition, num, depth)
            self.mailboxes_fd = fds.pop()
            self.depth = depth
        finally:
            for fd in fds:
                os.close(fd)
        welcome = Welcome(
            num_parameters=partition.num_parameters,
            num_features=partition.num_features,
            num_slots=published.num_slots,
        )
        try:
            socket.send_fds(self.socket, [encode(welcome)], [published.fd])
        except OSError as error:
            raise ConnectionLost(str(error)) from None
        self.greeted = True
        return True

    @property
    def pinned(self) -> int:
        """The slot of the weights that the peer is reading; -1 for none."""
        return -1 if self.views is None else self.views.pinned

    def receive(self) -> bytes | None:
        """The next message's bytes, or None where none waits; `ConnectionLost` at the end."""
        try:
            data = self.socket.recv(MAX_MESSAGE)
        except BlockingIOError:
            return None
        except OSError as error:
            raise ConnectionLost(str(error)) from None
        if not data:
            raise ConnectionLost("the peer closed the connection")
        return data

    def answer(self, answers: Sequence[Answer]) -> None:
        """Send the answers to a packet.

        A peer too slow to take them is given up, so that none can hold us up.
        """
        try:
            self.socket.send(encode_all(answers))
        except BlockingIOError:
            raise DeadlineExceeded("the peer has left its answers unread") from None
        except OSError as error:
            raise ConnectionLost(f"an answer could not be sent: {error}") from None

    def close(self) -> None:
        """Close the socket, and let go of the mailboxes."""
        self.socket.close()
        self.views = None
        if self.mailboxes_fd >= 0:
            os.close(self.mailboxes_fd)
            self.mailboxes_fd = -1


class Connection:
    """A process of replicas' connection to one partition on the same machine. A `Link`."""

    events = select.POLLIN

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        key: bytes,
        mailboxes: Mailboxes,
        deadline_s: float = 30,
        bell_every: int = 1,
    ) -> None:
        """Connect, say hello and map the published weights, all before `deadline_s` from now.

        The doorbell rings for `bell_every` pushes at a time, or at a `flush`.
        """
        if len(key) != KEY_BYTES:
            raise BadConfiguration(f"the run's key has {len(key)} bytes: give {KEY_BYTES}")
        if endpoint.machine != machine():
            raise NotColocated(
                f"partition {endpoint.partition.index} is on another machine, out of reach of "
                "shared memory"
            )
        self.partition = partition = endpoint.partition
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(deadline_s)
        hello = Hello(
            key=key,
            total_parameters=partition.total_parameters,
            total_features=partition.total_features,
            num_mailboxes=mailboxes.num,
            depth=mailboxes.depth,
        )
        try:
            self.socket.connect(b"\0" + endpoint.address.encode())
            if not is_ours(self.socket):  # the name is free to all once the partition is gone
                raise NotAuthenticated(f"partition {partition.index} is another user's now")
            socket.send_fds(self.socket, [encode(hello)], [mailboxes.fd])
            self.reader = self._welcome(mailboxes.pins[partition.index])
        except TimeoutError:
            self.socket.close()
            raise DeadlineExceeded(
                f"partition {partition.index} has not welcomed us for {deadline_s} s"
            ) from None
        except OSError as error:
            self.socket.close()
            raise ConnectionLost(f"partition {partition.index}: {error}") from None
        except ServerError:
            self.socket.close()
            raise
        self._deadline_s = deadline_s
        self._bell_every = bell_every
        self._outbox: list[Push | PermitRequest] = []
        self._outbox_bytes = 0
        self.socket.setblocking(False)
        self._hung_up = select.poll()
        self._hung_up.register(self.socket, 0)  # for a hang-up one need not ask
        self.inbox: list[Answer] = []
        self.moved = 0

    def _welcome(self, pin: npt.NDArray[np.int64]) -> WeightsReader:
        data, fds = _receive_with_fds(self.socket)
        try:
            if not data:
                raise NotAuthenticated(
                    f"partition {self.partition.index} closed the connection at hello: another "
                    "run's key, or another model"
                )
            welcome = decode(data)
            expected = (self.partition.num_parameters, self.partition.num_features)
            if not isinstance(welcome, Welcome) or not fds:
                raise MalformedMessage("hello was not answered with a welcome")
            if (welcome.num_parameters, welcome.num_features) != expected:
                raise MalformedMessage("the partition that answered is not the one asked for")
            return WeightsReader(fds.pop(), *expected, welcome.num_slots, pin)
        finally:
            for fd in fds:
                os.close(fd)

    def fileno(self) -> int:
        """For `select`: readable when answers wait."""
        return self.socket.fileno()

    def push(self, push: Push) -> None:
        """Note a push, and ring the doorbell if it is time to. See `flush`."""
        self._put(push, LARGEST_PUSH if len(push.batches) > 1 else USUAL_PUSH)

    def ask(self, mailbox: int) -> None:
        """Note that a permit is wanted, and ring the doorbell if it is time to. See `flush`."""
        self._put(PermitRequest(mailbox=mailbox), USUAL_PUSH)

    def _put(self, message: Push | PermitRequest, num_bytes: int) -> None:
        if self._outbox_bytes + num_bytes > MAX_MESSAGE:
            self.flush()
        self._outbox.append(message)
        self._outbox_bytes += num_bytes
        if len(self._outbox) >= self._bell_every:
            self.flush()

    def flush(self) -> None:
        """Ring the doorbell. Waits, until the deadline, only while the socket's buffer is full."""
        if not self._outbox:
            return
        data = encode_all(self._outbox)
        self._outbox.clear()
        self._outbox_bytes = 0
        give_up_s = time.monotonic() + self._deadline_s
        while True:
            try:
                self.socket.send(data)
                return
            except BlockingIOError:
                left_s = give_up_s - time.monotonic()
                if left_s <= 0 or not select.select([], [self.socket], [], left_s)[1]:
                    raise DeadlineExceeded(
                        f"partition {self.partition.index} has not read for {self._deadline_s} s"
                    ) from None
            except OSError as error:
                raise ConnectionLost(f"partition {self.partition.index}: {error}") from None

    @property
    def torn(self) -> int:
        """Copies of weights that were thrown away because they were written meanwhile."""
        return self.reader.torn

    def start_pull(self, pull: Pull, weights: Weights, statistics: Weights | None) -> None:
        """Copy the weights [n] and statistics [2, f], which ends this part of `pull` at once."""
        pull.versions[self.partition.index] = self.reader.read(weights, statistics, self._pause)

    def _pause(self, tries: int) -> None:
        """The weights are being written: let the partition finish, if it is still there."""
        if tries < SPINS:
            os.sched_yield()
        elif self._hung_up.poll(1000 * PAUSE_S):
            raise ConnectionLost(f"partition {self.partition.index} died over an update")

    def service(self) -> None:
        """Take in every answer that has come; `ConnectionLost` where the partition is gone."""
        while True:
            try:
                data = self.socket.recv(MAX_MESSAGE)
            except BlockingIOError:
                return
            except OSError as error:
                raise ConnectionLost(f"partition {self.partition.index}: {error}") from None
            if not data:
                raise ConnectionLost(f"partition {self.partition.index} closed the connection")
            for message in decode_all(data):
                if not isinstance(message, Answer):
                    raise MalformedMessage(f"{type(message).__name__} in place of an answer")
                self.inbox.append(message)

    def interrupt(self) -> None:
        """Cut the connection under the feet of the thread that uses it; called by another."""
        with contextlib.suppress(OSError):  # it is closed already
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

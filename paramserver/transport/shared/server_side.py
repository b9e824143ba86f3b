"""The partition's side of a connection on the same machine.

A SEQPACKET socket in Linux's abstract namespace keeps message boundaries, has no file to leave
behind, and tells either side at once when the other dies. The first message of a connection
(`Hello`, with the mailboxes' memfd) has to bear the run's key, from a process of the same user.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import struct
from collections.abc import Sequence

from downpour.paramserver.codec import decode, encode, encode_all
from downpour.paramserver.errors import (
    ConnectionLost,
    DeadlineExceeded,
    MalformedMessage,
    NotAuthenticated,
    NotColocated,
)
from downpour.paramserver.messages import (
    MAX_BATCHES,
    MAX_MAILBOXES,
    MAX_MESSAGE,
    Answer,
    Hello,
    Welcome,
)
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.transport.acceptor import Acceptor
from downpour.paramserver.transport.shared import replication
from downpour.paramserver.transport.shared.mailboxes import MailboxViews
from downpour.paramserver.transport.shared.memory import supported
from downpour.paramserver.transport.shared.published import PublishedWeights

_PEER_CREDENTIALS = struct.Struct("3i")
_SEND_BUFFER_BYTES = 1 << 18


def is_ours(peer: socket.socket) -> bool:
    """Whether the other side is a process of this user."""
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return bool(_PEER_CREDENTIALS.unpack(raw)[1] == os.geteuid())


def receive_with_fds(peer: socket.socket) -> tuple[bytes, list[int]]:
    """Return the next message, and the descriptors that came with it."""
    # A child that is started now must not inherit what comes.
    data, fds, _, _ = socket.recv_fds(peer, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
    return data, fds


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
        """See `Acceptor`.

        Raises:
            ConnectionLost: The connection went again, or there is no descriptor left for it.
            NotAuthenticated: It is by another user.
        """
        peer = super().accept()
        if peer is None:
            return None
        if not is_ours(peer):
            peer.close()
            raise NotAuthenticated("a connection by another user")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        return peer


class SharedSide:
    """One accepted connection as the partition sees it."""

    def __init__(self, peer: socket.socket, since_s: float) -> None:
        """The handshake is still to come."""
        self.socket = peer
        self.since_s = since_s
        self.views: MailboxViews | None = None
        self.mailboxes_fd = -1
        """Descriptor of the memory behind `views`."""
        self.is_ready = False
        self.follows = False
        """Whether the peer wants to follow this partition, and is not a process of replicas."""
        self.depth = 0

    def handshake(self, partition: Partition, published: PublishedWeights, key: bytes) -> bool:
        """Take the `Hello`, and answer it.

        Returns:
            False if it has not come yet.

        Raises:
            ConnectionLost: The peer is gone.
            NotAuthenticated: The peer has another key.
            MalformedMessage: It says something else, or what does not fit this partition.
        """
        try:
            data, fds = receive_with_fds(self.socket)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionLost(str(error)) from None
        try:
            if not data:
                raise ConnectionLost("the peer left before it said hello")
            if replication.is_follow(data):
                replication.check_follow(data, key, partition)
                self.is_ready = self.follows = True
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
            num_buffers=published.num_buffers,
        )
        try:
            socket.send_fds(self.socket, [encode(welcome)], [published.fd])
        except OSError as error:
            raise ConnectionLost(str(error)) from None
        self.is_ready = True
        return True

    @property
    def pinned(self) -> int:
        """The buffer of the weights that the peer is reading; -1 for none."""
        return -1 if self.views is None else self.views.pinned

    def receive(self) -> bytes | None:
        """Return the next message's bytes; None if none has come.

        Raises:
            ConnectionLost: The peer has closed the connection.
        """
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
        """Send the answers to a packet. Never waits.

        Raises:
            DeadlineExceeded: The peer has left earlier answers unread, and is to be given up.
            ConnectionLost: The peer is gone.
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

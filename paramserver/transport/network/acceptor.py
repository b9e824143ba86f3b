"""The partition's way of letting clients in: it listens on the network and does the handshakes."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass

from downpour.paramserver.errors import (
    BadConfiguration,
    ConnectionLost,
    MalformedMessage,
    ServerError,
)
from downpour.paramserver.messages import (
    Introduction,
)
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.transport.acceptor import Acceptor
from downpour.paramserver.transport.endpoint import NetworkAddress
from downpour.paramserver.transport.network import security
from downpour.paramserver.transport.network.channel import (
    Channel,
    PlainChannel,
    SealedChannel,
    prepare,
)
from downpour.paramserver.transport.network.handshake import HandshakeResult, handshake_as_partition
from downpour.paramserver.transport.network.pipe import Pipe, PlainPipe, TlsPipe
from downpour.paramserver.transport.network.security import Credentials

HANDSHAKE_DEADLINE_S = 10.0
MAX_HANDSHAKES = 128
"""Connections that a partition lets be in the middle of their handshake."""
MAX_HANDSHAKE_BYTES = 1 << 16
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NetworkListen:
    """Where and how a partition listens on the network."""

    host: str = "127.0.0.1"
    """Address to bind."""
    advertise: str | None = None
    """Address that clients are told; none for `host`."""
    credentials: Credentials | None = None
    """The partitions'; without them nothing is encrypted."""


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A connection whose handshake is done."""

    channel: Channel
    introduction: Introduction


class _PendingHandshake:
    """A connection in the middle of its handshake."""

    def __init__(
        self,
        peer: socket.socket,
        pipe: Pipe,
        handshake: Generator[None, None, HandshakeResult],
        since_s: float,
    ) -> None:
        self.peer = peer
        self.since_s = since_s
        self.result: HandshakeResult | None = None
        self.out = b""
        self._pipe = pipe
        self._handshake = handshake
        self._num_bytes = 0
        self._reply()  # without TLS the first word is ours

    def advance(self) -> bool:
        """Go on as far as goes without waiting; returns whether the handshake is done."""
        while True:
            self.send()
            if self.out:
                return False
            if self.result is not None:
                return True
            try:
                data = self.peer.recv(1 << 14)
            except BlockingIOError:
                return False
            if not data:
                raise ConnectionLost("the peer left in the middle of its handshake")
            self._num_bytes += len(data)
            if self._num_bytes > MAX_HANDSHAKE_BYTES:
                raise MalformedMessage(f"a handshake of more than {MAX_HANDSHAKE_BYTES} bytes")
            self._pipe.feed(data)
            self._reply()

    def _reply(self) -> None:
        try:
            next(self._handshake)
        except StopIteration as done:
            self.result = done.value
        finally:
            self.out += self._pipe.take()  # an alert, too

    def send(self) -> None:
        """Send what is to be sent, as far as goes without waiting."""
        with contextlib.suppress(BlockingIOError):
            while self.out:
                self.out = self.out[self.peer.send(self.out) :]


class NetworkAcceptor:
    """Listens on the network and does the handshakes, on a thread of its own.

    So a handshake costs the serving thread nothing, and a peer that is slow, silent or a stranger
    costs a file descriptor until the deadline.
    """

    def __init__(
        self,
        listen: NetworkListen,
        *,
        partition: Partition,
        key: bytes,
        accepted: Callable[[Accepted], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind.

        Args:
            listen: Where.
            partition: The partition that is served.
            key: The run's key.
            accepted: Gets each connection whose handshake is done; called on this object's thread.
            clock: Seconds, monotonic.

        Raises:
            BadConfiguration: The address is not this machine's.
        """
        self._partition = partition
        self._key = key
        self._accepted = accepted
        self._clock = clock
        credentials = listen.credentials
        self._tls = None if credentials is None else security.partition_tls(credentials)
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.bind((listen.host, 0))
            self._acceptor = Acceptor(listening)
        except OSError as error:
            listening.close()
            raise BadConfiguration(
                f"partition {partition.index} cannot listen on {listen.host}: {error.strerror}; "
                "give --listen an address of its machine, or auto"
            ) from None
        port = listening.getsockname()[1]
        self.address = NetworkAddress(host=listen.advertise or listen.host, port=port)
        self.dropped: Counter[str] = Counter()
        """Connections that did not get past the handshake, by reason."""
        self._pending: dict[int, _PendingHandshake] = {}
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(
            target=self._run, name=f"acceptor-{partition.index}", daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, deadline_s: float = 10.0) -> None:
        """Stop, and drop the handshakes under way. To be called once."""
        self._stopping = True
        if self._thread.ident is None:
            self._end()
        else:
            os.eventfd_write(self._wake, 1)
            self._thread.join(deadline_s)
        if not self._thread.is_alive():
            os.close(self._wake)

    def _run(self) -> None:
        try:
            with contextlib.closing(select.epoll()) as epoll:
                epoll.register(self._acceptor.socket.fileno(), select.EPOLLIN)
                epoll.register(self._wake, select.EPOLLIN)
                while not self._stopping:
                    for fd, _ in epoll.poll(0.2 if self._pending else 60.0):
                        if fd == self._acceptor.socket.fileno():
                            self._accept(epoll)
                        elif fd in self._pending:
                            self._attend(epoll, fd)
                    late = self._clock() - HANDSHAKE_DEADLINE_S
                    for fd in [f for f, g in self._pending.items() if g.since_s < late]:
                        self._drop(fd, "no hello")
        except Exception:
            log.exception("partition %d stopped listening", self._partition.index)
        finally:
            self._end()

    def _end(self) -> None:
        self._acceptor.close()
        for fd in list(self._pending):
            self._drop(fd, None)

    def _accept(self, epoll: select.epoll) -> None:
        while True:
            try:
                peer = self._acceptor.accept()
            except ServerError as error:
                self.dropped[type(error).__name__] += 1
                return
            if peer is None:
                return
            if len(self._pending) >= MAX_HANDSHAKES:
                self.dropped["too many handshakes"] += 1
                peer.close()
                continue
            pipe: Pipe = PlainPipe() if self._tls is None else TlsPipe(self._tls, is_server=True)
            handshake = handshake_as_partition(pipe, self._key, self._partition)
            fd = peer.fileno()
            self._pending[fd] = _PendingHandshake(peer, pipe, handshake, self._clock())
            epoll.register(fd, select.EPOLLIN)
            self._attend(epoll, fd)

    def _attend(self, epoll: select.epoll, fd: int) -> None:
        """Go on with a handshake; whatever goes wrong costs that connection alone."""
        pending = self._pending[fd]
        try:
            over = pending.advance()
            if not over:
                epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if pending.out else 0))
        except (ServerError, OSError) as error:
            reason = type(error).__name__ if isinstance(error, ServerError) else "ConnectionLost"
            log.warning("partition %d refused a connection: %s", self._partition.index, str(error))
            with contextlib.suppress(OSError):
                pending.send()  # TLS tells why
            self._drop(fd, reason)
            return
        if over and pending.result is not None:
            epoll.unregister(fd)
            del self._pending[fd]
            self._let_in(pending.peer, pending.result)

    def _let_in(self, peer: socket.socket, result: HandshakeResult) -> None:
        channel: Channel = PlainChannel(peer)
        if self._tls is not None:
            keys = result.keys
            channel = SealedChannel(peer, seal=keys.to_client, open_=keys.to_partition)
        try:
            prepare(peer)
        except OSError:
            self.dropped["ConnectionLost"] += 1
            peer.close()
            return
        self._accepted(Accepted(channel=channel, introduction=result.introduction))

    def _drop(self, fd: int, reason: str | None) -> None:
        if reason is not None:
            self.dropped[reason] += 1
        self._pending.pop(fd).peer.close()


class NoNetwork:
    """In place of a `NetworkAcceptor`: the partition does not listen on a network."""

    address = None

    def __init__(self) -> None:
        """Nothing is bound."""
        self.dropped: Counter[str] = Counter()
        """Nobody comes, so nobody is dropped."""

    def start(self) -> None:
        """Do nothing."""

    def stop(self, deadline_s: float = 10.0) -> None:
        """Do nothing."""

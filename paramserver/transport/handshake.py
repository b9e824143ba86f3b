"""How two sides of a network connection come to trust each other, before anything else.

    client                                   partition
                    TLS 1.3, both with a certificate of this run (unless not encrypted)
                    <- Challenge(nonce)
    Introduction(nonce', proof) ->
                    <- Admission(proof')

A proof is an HMAC with the run's key over both nonces and what the message says: it shows the key
without sending it, and is of no use on another connection. Encrypted, the nonces are known to the
two sides alone, and the keys of the stream that follows come from them. Not encrypted, the proofs
keep strangers out, but not one who sits on the path.

What is said is a generator over a `Pipe`, so that the client may wait for each word and the
partition (`NetworkAcceptor`) for none.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import select
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Protocol

from downpour.paramserver.errors import (
    BadConfiguration,
    ConnectionLost,
    DeadlineExceeded,
    MalformedMessage,
    NotAuthenticated,
    ServerError,
)
from downpour.paramserver.messages import (
    MAX_BATCHES,
    MAX_MAILBOXES,
    NONCE_BYTES,
    PROOF_BYTES,
    Admission,
    Challenge,
    Introduction,
    Message,
    decode,
    encode,
)
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.transport import security
from downpour.paramserver.transport.acceptor import Acceptor
from downpour.paramserver.transport.channel import Channel, PlainChannel, SealedChannel, prepare
from downpour.paramserver.transport.local import NetworkAddress
from downpour.paramserver.transport.security import Credentials, TrafficKeys

GREETING_DEADLINE_S = 10.0
MAX_GUESTS = 128
"""Connections that a partition lets be in the middle of their greeting."""
MAX_GREETING_BYTES = 1 << 16
_MAX_WORD = 512
_LENGTH = struct.Struct("<H")
log = logging.getLogger(__name__)


class Pipe(Protocol):
    """A stream without a socket: bytes that came are fed to it, bytes to be sent taken off it."""

    come: bytearray
    """What the peer has said, and nobody has read."""

    def feed(self, data: bytes) -> None:
        """Bytes have come off the socket."""

    def take(self) -> bytes:
        """Bytes to put on the socket."""

    def say(self, data: bytes) -> None:
        """Send this to the peer."""

    def begin(self) -> Generator[None, None, None]:
        """Whatever comes before the first word; yields when it needs to be fed."""


class PlainPipe:
    """Bytes as they are."""

    def __init__(self) -> None:
        self.come = bytearray()
        self._out = bytearray()

    def feed(self, data: bytes) -> None:
        """See `Pipe`."""
        self.come += data

    def take(self) -> bytes:
        """See `Pipe`."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def say(self, data: bytes) -> None:
        """See `Pipe`."""
        self._out += data

    def begin(self) -> Generator[None, None, None]:
        """Nothing."""
        yield from ()


class TlsPipe:
    """TLS. Whatever is wrong with the peer's is `NotAuthenticated`."""

    def __init__(self, context: ssl.SSLContext, *, is_server: bool) -> None:
        self.come = bytearray()
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = security.wrap(context, self._in, self._out, is_server=is_server)
        self._begun = False

    def feed(self, data: bytes) -> None:
        """See `Pipe`."""
        self._in.write(data)
        if self._begun:
            self._open()

    def _open(self) -> None:
        with _as_not_authenticated(), contextlib.suppress(ssl.SSLWantReadError):
            while data := self._tls.read(1 << 14):
                self.come += data
            raise ConnectionLost("the peer closed the connection")

    def take(self) -> bytes:
        """See `Pipe`."""
        return self._out.read()

    def say(self, data: bytes) -> None:
        """See `Pipe`."""
        self._tls.write(data)

    def begin(self) -> Generator[None, None, None]:
        """The handshake."""
        with _as_not_authenticated():
            while True:
                try:
                    self._tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    yield
        self._begun = True
        self._open()


@contextlib.contextmanager
def _as_not_authenticated() -> Generator[None, None, None]:
    try:
        yield
    except ssl.SSLWantReadError:
        raise
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", None) or error.reason or type(error).__name__
        raise NotAuthenticated(f"TLS: {reason}") from None


def _say(pipe: Pipe, message: Message) -> None:
    data = encode(message)
    pipe.say(_LENGTH.pack(len(data)) + data)


def _hear(pipe: Pipe) -> Generator[None, None, Message]:
    while len(pipe.come) < _LENGTH.size:
        yield
    (length,) = _LENGTH.unpack_from(pipe.come)
    if not 0 < length <= _MAX_WORD:
        raise MalformedMessage(f"a word of {length} bytes in a greeting")
    while len(pipe.come) < _LENGTH.size + length:
        yield
    data = bytes(pipe.come[_LENGTH.size : _LENGTH.size + length])
    del pipe.come[: _LENGTH.size + length]
    return decode(data)


def _nothing_more(pipe: Pipe) -> None:
    if pipe.come:
        raise MalformedMessage("more than a greeting")


@dataclass(frozen=True, kw_only=True)
class Greeted:
    """What a greeting came to."""

    introduction: Introduction
    keys: TrafficKeys = field(repr=False)


def greet_as_partition(
    pipe: Pipe, key: bytes, partition: Partition
) -> Generator[None, None, Greeted]:
    """The partition's part."""
    yield from pipe.begin()
    nonce = secrets.token_bytes(NONCE_BYTES)
    _say(pipe, Challenge(nonce=nonce))
    introduction = yield from _hear(pipe)
    if not isinstance(introduction, Introduction):
        raise MalformedMessage(f"{type(introduction).__name__} in place of an introduction")
    proof = security.introduction_proof(key, nonce, introduction)
    if not hmac.compare_digest(introduction.proof, proof):
        raise NotAuthenticated("an introduction without the run's key")
    _nothing_more(pipe)
    shape = (introduction.total_parameters, introduction.total_features)
    if shape != (partition.total_parameters, partition.total_features):
        raise MalformedMessage(f"an introduction for a model of {shape} parameters and features")
    if introduction.partition != partition.index:
        raise MalformedMessage(f"an introduction to partition {introduction.partition}")
    num, depth = introduction.num_mailboxes, introduction.depth
    if num > MAX_MAILBOXES or depth > MAX_BATCHES or bool(num) != bool(depth):
        raise MalformedMessage(f"an introduction with {num} mailboxes of depth {depth}")
    admission = Admission(
        proof=bytes(PROOF_BYTES),
        num_parameters=partition.num_parameters,
        num_features=partition.num_features,
    )
    proof = security.admission_proof(key, nonce, introduction, admission)
    _say(pipe, replace(admission, proof=proof))
    keys = security.traffic_keys(key, nonce, introduction.nonce)
    return Greeted(introduction=introduction, keys=keys)


def greet_as_client(
    pipe: Pipe, key: bytes, partition: Partition, introduction: Introduction
) -> Generator[None, None, Greeted]:
    """The client's part; nonce and proof of `introduction` are filled in here."""
    yield from pipe.begin()
    challenge = yield from _hear(pipe)
    if not isinstance(challenge, Challenge):
        raise MalformedMessage(f"{type(challenge).__name__} in place of a challenge")
    introduction = replace(introduction, nonce=secrets.token_bytes(NONCE_BYTES))
    proof = security.introduction_proof(key, challenge.nonce, introduction)
    introduction = replace(introduction, proof=proof)
    _say(pipe, introduction)
    admission = yield from _hear(pipe)
    if not isinstance(admission, Admission):
        raise MalformedMessage(f"{type(admission).__name__} in place of an admission")
    proof = security.admission_proof(key, challenge.nonce, introduction, admission)
    if not hmac.compare_digest(admission.proof, proof):
        raise NotAuthenticated(f"partition {partition.index} does not have the run's key")
    _nothing_more(pipe)
    if (admission.num_parameters, admission.num_features) != (
        partition.num_parameters,
        partition.num_features,
    ):
        raise MalformedMessage("the partition that answered is not the one asked for")
    keys = security.traffic_keys(key, challenge.nonce, introduction.nonce)
    return Greeted(introduction=introduction, keys=keys)


def connect(
    address: NetworkAddress,
    *,
    partition: Partition,
    key: bytes,
    credentials: Credentials | None,
    introduction: Introduction,
    deadline_s: float,
) -> Channel:
    """Connect to a partition and greet it, all before `deadline_s` from now.

    Without `credentials` the connection is not encrypted. Raises `ConnectionLost`,
    `NotAuthenticated`, `MalformedMessage` or `DeadlineExceeded`.
    """
    who, give_up_s = f"partition {partition.index}", time.monotonic() + deadline_s
    pipe: Pipe = PlainPipe()
    if credentials is not None:
        pipe = TlsPipe(security.client_tls(credentials), is_server=False)
    peer = None
    try:
        peer = socket.create_connection((address.host, address.port), timeout=deadline_s)
        prepare(peer)
        greeting = greet_as_client(pipe, key, partition, introduction)
        greeted = _converse(peer, pipe, greeting, give_up_s, who)
        peer.setblocking(False)
    except TimeoutError:
        _close(peer)
        raise DeadlineExceeded(f"{who} has not welcomed us for {deadline_s} s") from None
    except OSError as error:
        _close(peer)
        raise ConnectionLost(f"{who}: {error}") from None
    except ServerError:
        _close(peer)
        raise
    if credentials is None:
        return PlainChannel(peer)
    return SealedChannel(peer, seal=greeted.keys.to_partition, open_=greeted.keys.to_client)


def _close(peer: socket.socket | None) -> None:
    if peer is not None:
        peer.close()


def _converse(
    peer: socket.socket,
    pipe: Pipe,
    greeting: Generator[None, None, Greeted],
    give_up_s: float,
    who: str,
) -> Greeted:
    while True:
        peer.settimeout(max(1e-3, give_up_s - time.monotonic()))
        try:
            next(greeting)
        except StopIteration as done:
            greeted: Greeted = done.value
            return greeted
        finally:
            peer.sendall(pipe.take())  # an alert, too
        data = peer.recv(1 << 14)
        if not data:
            raise NotAuthenticated(
                f"{who} closed the connection at the greeting: another run's key or certificate, "
                "another model, or encryption on one side only"
            )
        pipe.feed(data)


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
    """A connection whose peer has been greeted."""

    channel: Channel
    introduction: Introduction


class _Pending:
    """A connection in the middle of its greeting."""

    def __init__(
        self,
        peer: socket.socket,
        pipe: Pipe,
        greeting: Generator[None, None, Greeted],
        since_s: float,
    ) -> None:
        self.peer = peer
        self.since_s = since_s
        self.greeted: Greeted | None = None
        self.out = b""
        self._pipe = pipe
        self._greeting = greeting
        self._num_bytes = 0
        self._reply()  # without TLS the first word is ours

    def advance(self) -> bool:
        """Go as far as it goes without waiting; true once the greeting is over."""
        while True:
            self.send()
            if self.out:
                return False
            if self.greeted is not None:
                return True
            try:
                data = self.peer.recv(1 << 14)
            except BlockingIOError:
                return False
            if not data:
                raise ConnectionLost("the peer left in the middle of its greeting")
            self._num_bytes += len(data)
            if self._num_bytes > MAX_GREETING_BYTES:
                raise MalformedMessage(f"a greeting of more than {MAX_GREETING_BYTES} bytes")
            self._pipe.feed(data)
            self._reply()

    def _reply(self) -> None:
        try:
            next(self._greeting)
        except StopIteration as done:
            self.greeted = done.value
        finally:
            self.out += self._pipe.take()  # an alert, too

    def send(self) -> None:
        """Send what is to be sent, as far as it goes."""
        with contextlib.suppress(BlockingIOError):
            while self.out:
                self.out = self.out[self.peer.send(self.out) :]


class NetworkAcceptor:
    """Listens on the network and greets whoever comes, on a thread of its own.

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
        """Bind. `accepted` is called on this thread, and owns what it is given."""
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
        """Connections that did not get past the greeting, by reason."""
        self._pending: dict[int, _Pending] = {}
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(
            target=self._run, name=f"acceptor-{partition.index}", daemon=True
        )

    def start(self) -> None:
        """Start listening in earnest."""
        self._thread.start()

    def stop(self, deadline_s: float = 10.0) -> None:
        """Stop, and turn away whoever is being greeted. To be called once."""
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
                    late = self._clock() - GREETING_DEADLINE_S
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
            if len(self._pending) >= MAX_GUESTS:
                self.dropped["too many greetings"] += 1
                peer.close()
                continue
            pipe: Pipe = PlainPipe() if self._tls is None else TlsPipe(self._tls, is_server=True)
            greeting = greet_as_partition(pipe, self._key, self._partition)
            fd = peer.fileno()
            self._pending[fd] = _Pending(peer, pipe, greeting, self._clock())
            epoll.register(fd, select.EPOLLIN)
            self._attend(epoll, fd)

    def _attend(self, epoll: select.epoll, fd: int) -> None:
        """Go on with a guest's greeting; whatever goes wrong costs that guest alone."""
        guest = self._pending[fd]
        try:
            over = guest.advance()
            if not over:
                epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if guest.out else 0))
        except (ServerError, OSError) as error:
            reason = type(error).__name__ if isinstance(error, ServerError) else "ConnectionLost"
            log.warning("partition %d refused a connection: %s", self._partition.index, str(error))
            with contextlib.suppress(OSError):
                guest.send()  # TLS tells why
            self._drop(fd, reason)
            return
        if over and guest.greeted is not None:
            epoll.unregister(fd)
            del self._pending[fd]
            self._let_in(guest.peer, guest.greeted)

    def _let_in(self, peer: socket.socket, greeted: Greeted) -> None:
        channel: Channel = PlainChannel(peer)
        if self._tls is not None:
            keys = greeted.keys
            channel = SealedChannel(peer, seal=keys.to_client, open_=keys.to_partition)
        try:
            prepare(peer)
        except OSError:
            self.dropped["ConnectionLost"] += 1
            peer.close()
            return
        self._accepted(Accepted(channel=channel, introduction=greeted.introduction))

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

"""The client's way into a partition on another machine: connect, and wait for the handshake."""

from __future__ import annotations

import socket
import time
from collections.abc import Generator

from downpour.paramserver.errors import (
    ConnectionLost,
    DeadlineExceeded,
    NotAuthenticated,
    ServerError,
)
from downpour.paramserver.messages import (
    Introduction,
)
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.transport.endpoint import NetworkAddress
from downpour.paramserver.transport.network import security
from downpour.paramserver.transport.network.channel import (
    Channel,
    PlainChannel,
    SealedChannel,
    prepare,
)
from downpour.paramserver.transport.network.handshake import HandshakeResult, handshake_as_client
from downpour.paramserver.transport.network.pipe import Pipe, PlainPipe, TlsPipe
from downpour.paramserver.transport.network.security import Credentials


def connect(
    address: NetworkAddress,
    *,
    partition: Partition,
    key: bytes,
    credentials: Credentials | None,
    introduction: Introduction,
    deadline_s: float,
) -> Channel:
    """Connect to a partition and do the handshake, all before `deadline_s` from now.

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
        handshake = handshake_as_client(pipe, key, partition, introduction)
        result = _drive(peer, pipe, handshake, give_up_s, who)
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
    return SealedChannel(peer, seal=result.keys.to_partition, open_=result.keys.to_client)


def _close(peer: socket.socket | None) -> None:
    if peer is not None:
        peer.close()


def _drive(
    peer: socket.socket,
    pipe: Pipe,
    handshake: Generator[None, None, HandshakeResult],
    give_up_s: float,
    who: str,
) -> HandshakeResult:
    while True:
        peer.settimeout(max(1e-3, give_up_s - time.monotonic()))
        try:
            next(handshake)
        except StopIteration as done:
            result: HandshakeResult = done.value
            return result
        finally:
            peer.sendall(pipe.take())  # an alert, too
        data = peer.recv(1 << 14)
        if not data:
            raise NotAuthenticated(
                f"{who} closed the connection at the handshake: another run's key or certificate, "
                "another model, or encryption on one side only"
            )
        pipe.feed(data)

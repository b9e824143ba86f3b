"""Partitions reached over the network, on loopback."""

import contextlib
import dataclasses
import gc
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from downpour.paramserver.access import Access
from downpour.paramserver.client import ParameterClient
from downpour.paramserver.codec import encode
from downpour.paramserver.errors import ConnectionLost
from downpour.paramserver.messages import (
    NONCE_BYTES,
    PROOF_BYTES,
    Answer,
    Follow,
    Introduction,
    Outcome,
    PullRequest,
    Weights,
    WireDtype,
)
from downpour.paramserver.transport.endpoint import NetworkAddress
from downpour.paramserver.transport.network.acceptor import NetworkListen
from downpour.paramserver.transport.network.channel import Channel
from downpour.paramserver.transport.network.connect import connect
from downpour.paramserver.transport.network.frames import frame
from downpour.paramserver.transport.network.security import RunCredentials, issue
from tests.helpers.served_partitions import (
    DEADLINE_S,
    KEY,
    Bystander,
    Cluster,
    F,
    P,
    a_push,
    by_deadline,
    push,
    send,
    settle,
)

torch.set_num_threads(1)


RUN = issue()


class Networked(Cluster):
    """The same partitions, reached over the network."""

    def __init__(self, *arguments: Any, keys: RunCredentials | None = RUN, **options: Any) -> None:
        self.keys = keys
        listen = NetworkListen(credentials=keys.partitions if keys else None)
        super().__init__(*arguments, network=listen, **options)

    def access(self, **options: Any) -> Access:
        credentials = self.keys.clients if self.keys else None
        return Access(**{"transport": "network", "credentials": credentials} | options)

    def client(self, **options: Any) -> ParameterClient:
        client = super().client(**{"access": self.access()} | options)
        if "access" not in options:
            assert client.num_networked == len(self.servers)
        return client

    @property
    def address(self) -> NetworkAddress:
        address = self.servers[0].endpoint.network
        assert address is not None
        return address

    def socket(self) -> socket.socket:
        """A bare connection to the first partition, for saying what no client would."""
        peer = socket.create_connection((self.address.host, self.address.port), DEADLINE_S)
        self._closing.callback(peer.close)
        return peer

    def channel(self, **changes: Any) -> Channel:
        """A connection to the first partition that has been greeted, and now may lie."""
        part = self.parts[0]
        about = Introduction(
            proof=bytes(PROOF_BYTES),
            nonce=bytes(NONCE_BYTES),
            partition=0,
            total_parameters=part.total_parameters,
            total_features=part.total_features,
            num_mailboxes=2,
            depth=1,
            wire=WireDtype.FLOAT32,
        )
        channel = connect(
            self.address,
            partition=part,
            key=KEY,
            credentials=self.keys.clients if self.keys else None,
            introduction=dataclasses.replace(about, **changes),
            deadline_s=DEADLINE_S,
        )
        self._closing.callback(channel.socket.close)
        return channel


def pushed_and_settled(client: ParameterClient, batch: int) -> None:
    send(client, batch)
    settle(client)


def versions_and_weights(client: ParameterClient) -> tuple[list[int], np.ndarray[Any, Any]]:
    return [-1] * client.num_partitions, np.zeros(client.num_parameters, np.float32)


@contextlib.contextmanager
def unharmed(cluster: Networked, reason: str, num: int = 1) -> Iterator[None]:
    """What is done inside is counted once under `reason`, and hurts nobody."""
    bystander = Bystander(cluster)
    before = cluster.weights()
    counted = cluster.dropped().get(reason, 0)
    yield
    by_deadline(lambda: cluster.dropped().get(reason, 0) == counted + num)
    assert torch.equal(cluster.weights(), before)
    assert push(bystander.client, 60) is Outcome.APPLIED
    assert push(cluster.client(num_mailboxes=1), 61) is Outcome.APPLIED


def hung_up_on(peer: socket.socket) -> bool:
    """Waits until the partition has closed; whatever it said before is skipped."""
    peer.settimeout(DEADLINE_S)
    try:
        while peer.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


def say(channel: Channel, data: bytes) -> None:
    """Send it all, unless the partition has hung up by then."""
    views = deque([memoryview(data)])
    channel.socket.settimeout(DEADLINE_S)
    with contextlib.suppress(ConnectionLost):
        while not channel.write(views):
            select.select([], [channel.socket], [], DEADLINE_S)


def num_open() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def prefix(message_bytes: int, payload_bytes: int) -> bytes:
    return struct.pack("<IQ", message_bytes, payload_bytes)


def bytes_of(*views: memoryview) -> bytes:
    return b"".join(views)


PAYLOAD = 4 * P + 12 * F


LIES = {
    "nothing as a message": prefix(0, 0),
    "a message too long": prefix(8193, 0),
    "a message far too long": prefix(2**32 - 1, 0),
    "a payload far too long": prefix(len(encode(a_push(1))), 2**64 - 1) + encode(a_push(1)),
    "a payload too short": prefix(len(encode(a_push(1))), PAYLOAD - 1) + encode(a_push(1)),
    "a pull with a payload": prefix(6, 4) + encode(PullRequest(statistics=True)),
    "a flag of two": prefix(6, 0) + encode(PullRequest(statistics=True))[:-1] + b"\2",
    "no message": prefix(40, 0) + b"x" * 40,
    "an answer": bytes_of(*frame(Answer(mailbox=0, outcome=Outcome.APPLIED, version=1))),
    "weights": bytes_of(*frame(Weights(version=1, statistics=False))),
    "a mailbox that there is not": prefix(len(encode(a_push(1, 2))), PAYLOAD)
    + encode(a_push(1, 2)),
    "more mini-batches than it may": prefix(len(encode(a_push(1, batches=(1, 2)))), PAYLOAD)
    + encode(a_push(1, batches=(1, 2))),
    "a push by another wire": prefix(len(encode(a_push(1))), PAYLOAD)
    + encode(a_push(1, wire=WireDtype.INT8)),
    "a push by no wire": prefix(len(encode(a_push(1))), PAYLOAD)
    + encode(a_push(1)).replace(b"\1\1\0\0\0\1\0\0\0", b"\x09\1\0\0\0\1\0\0\0"),
    "a follower that pushes": bytes_of(*frame(Follow(generation=1))),
    "more pulls than mailboxes": 4 * bytes_of(*frame(PullRequest(statistics=False))),
}

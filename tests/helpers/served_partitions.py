"""Partitions served over real sockets and shared memory, in one process, and their peers."""

import contextlib
import fcntl
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from downpour.paramserver.client import ParameterClient, PushResult
from downpour.paramserver.codec import decode, encode
from downpour.paramserver.errors import ConnectionLost
from downpour.paramserver.messages import KEY_BYTES, Hello, Message, Outcome, Push, Welcome
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import SGD
from downpour.paramserver.server.server import PartitionServer
from downpour.paramserver.transport.endpoint import Endpoint
from downpour.paramserver.transport.shared.mailboxes import Mailboxes

torch.set_num_threads(1)


KEY = b"k" * KEY_BYTES


DEADLINE_S = 20.0


P, F, Q = 96, 6, 4096


# With this rate and gradients of small integers, every weight is exact in float32, whatever the
# order in which they are applied.
EXACT = UpdateConfig(
    rule=SGD(), schedule=Schedule(learning_rate=0.5), batches_per_epoch=Q, epoch_examples=32 * Q
)


def by_deadline(condition: Callable[[], bool]) -> None:
    """Wait for a condition on a server, which is asked over and over and so is not idle."""
    give_up_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < give_up_s, "the deadline passed"


def has_connections(server: PartitionServer, num: int) -> bool:
    return server.call(lambda _: server.num_connections) == num


class Cluster:
    """Some partitions of one model, each served by a thread, and whoever connects to them."""

    def __init__(
        self,
        num_partitions: int = 1,
        *,
        weights: Tensor | None = None,
        num_features: int = F,
        num_decayed: int = 0,
        config: UpdateConfig = EXACT,
        **options: Any,
    ) -> None:
        weights = torch.zeros(P) if weights is None else weights
        self.parts = split(
            num_parameters=len(weights),
            num_features=num_features,
            num_decayed=num_decayed,
            num_partitions=num_partitions,
        )
        self.servers = [
            PartitionServer(
                partition=part,
                config=config,
                key=KEY,
                weights=weights[part.start : part.stop],
                **options,
            ).start()
            for part in self.parts
        ]
        self._closing = contextlib.ExitStack()

    @property
    def endpoints(self) -> list[Endpoint]:
        return [server.endpoint for server in self.servers]

    def client(self, **options: Any) -> ParameterClient:
        client = ParameterClient(self.endpoints, key=KEY, deadline_s=DEADLINE_S, **options)
        self._closing.callback(client.close)
        return client

    def peer(self) -> "Peer":
        peer = Peer(self.servers[0].endpoint)
        self._closing.callback(peer.socket.close)
        return peer

    def weights(self) -> Tensor:
        found = [s.call(lambda state: state.current.weights.clone()) for s in self.servers]
        return torch.cat(found)

    def versions(self) -> list[int]:
        return [s.call(lambda state: state.version) for s in self.servers]

    def dropped(self) -> dict[str, int]:
        return self.servers[0].dropped()

    def close(self) -> None:
        """Check every partition's invariants, and stop."""
        self._closing.close()
        for server in self.servers:
            assert server.failure is None
            with contextlib.suppress(ConnectionLost):  # a test stopped it
                server.call(lambda state: state.check())
            server.stop()


def memfd(size: int, *, sealed: bool = True) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


GOOD_HELLO = Hello(key=KEY, total_parameters=P, total_features=F, num_mailboxes=2, depth=1)


class Peer:
    """A bare socket to a partition, for saying what no client would."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(b"\0" + endpoint.address.encode())

    def say(self, message: Message | bytes, fds: Sequence[int] = ()) -> None:
        data = message if isinstance(message, bytes) else encode(message)
        with contextlib.suppress(ConnectionError):  # it may have hung up on us already
            socket.send_fds(self.socket, [data], fds)

    def greet(self) -> "Peer":
        boxes = Mailboxes(P, F, GOOD_HELLO.num_mailboxes, GOOD_HELLO.depth)
        self.say(GOOD_HELLO, [boxes.fd])
        boxes.close()
        assert isinstance(decode(self.socket.recv(8192)), Welcome)
        return self

    @property
    def hung_up_on(self) -> bool:
        """Waits for the next message, which is none where the partition has closed."""
        try:
            return not self.socket.recv(8192)
        except ConnectionError:
            return True


def a_push(batch: int, mailbox: int = 0, **changes: Any) -> Push:
    push = Push(
        mailbox=mailbox,
        replica=0,
        epoch=0,
        batches=(batch,),
        examples=32,
        version=0,
        loss=1.0,
        gradient_norm=1.0,
    )
    return replace(push, **changes)


def gradient_of(batch: int, num: int = P) -> Tensor:
    return (torch.arange(num) * (batch + 1)).remainder(5).float() - 2


def leave(client: ParameterClient, mailbox: int, batch: int) -> None:
    """Leave a mini-batch's gradient and moments in a mailbox."""
    client.mailboxes.gradients[mailbox].copy_(gradient_of(batch, client.num_parameters))
    client.mailboxes.moments[mailbox].copy_(torch.tensor([32.0, 1.0, 2.0])[:, None])


def send(client: ParameterClient, batch: int, mailbox: int = 0, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "mailbox": mailbox,
        "replica": 0,
        "epoch": 0,
        "batches": (batch,),
        "examples": 32,
        "versions": [0] * client.num_partitions,
        "loss": 1.0,
        "gradient_norm": float(gradient_of(batch, client.num_parameters).norm()),
    }
    client.push(**arguments | changes)


def settle(client: ParameterClient, mailbox: int = 0) -> tuple[Outcome, ...]:
    """Wait for what became of the push from a mailbox."""
    settled: list[PushResult] = []
    while client.in_flight(mailbox):
        settled += client.wait()
    (found,) = (s for s in settled if s.mailbox == mailbox)
    return found.outcomes


def push(client: ParameterClient, batch: int, mailbox: int = 0, **changes: Any) -> Outcome:
    """Push a mini-batch's gradient and wait; every partition must say the same."""
    leave(client, mailbox, batch)
    send(client, batch, mailbox, **changes)
    (outcome,) = set(settle(client, mailbox))
    return outcome


class Bystander:
    """A client that must notice nothing of what goes on beside it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.client = cluster.client(num_mailboxes=1)
        self.batch = 100
        assert push(self.client, self.batch) is Outcome.APPLIED
        self.before = cluster.weights(), cluster.versions()
        self.dropped = sum(cluster.dropped().values())

    def check(self, num_dropped: int = 1) -> None:
        by_deadline(lambda: has_connections(self.cluster.servers[0], 1))
        weights, versions = self.before
        assert torch.equal(self.cluster.weights(), weights)
        assert self.cluster.versions() == versions
        assert sum(self.cluster.dropped().values()) == self.dropped + num_dropped
        self.batch += 1
        assert push(self.client, self.batch) is Outcome.APPLIED


@contextlib.contextmanager
def held(server: PartitionServer) -> Iterator[None]:
    """The server does nothing else meanwhile."""
    began, gate = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        began.set()
        gate.wait(DEADLINE_S)

    holder = threading.Thread(target=server.call, args=(hold,))
    holder.start()
    assert began.wait(DEADLINE_S)
    yield
    gate.set()
    holder.join(DEADLINE_S)


def num_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))

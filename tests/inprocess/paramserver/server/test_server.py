"""Real servers and clients over real sockets and shared memory, in one process.

The faults: peers that lie, stall, flood or die, and a server that dies. Each must cost the peer its
connection, be counted, and leave the weights and everybody else alone.
"""

import contextlib
import fcntl
import functools
import gc
import hashlib
import os
import pickle
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.fs
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from downpour.models.flat import FlatModel
from downpour.models.mlp import MnistNet
from downpour.paramserver import actor
from downpour.paramserver.client import ParameterClient, Settled
from downpour.paramserver.errors import (
    BadConfiguration,
    BadSnapshot,
    ConnectionLost,
    DeadlineExceeded,
    MalformedMessage,
    NotAuthenticated,
    NotColocated,
)
from downpour.paramserver.messages import (
    KEY_BYTES,
    MAX_BATCHES,
    MAX_MAILBOXES,
    Answer,
    Hello,
    Message,
    Outcome,
    Push,
    Welcome,
    decode,
    encode,
)
from downpour.paramserver.partition import snapshot
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.snapshot import Snapshot
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import SGD, Adagrad, Momentum, Nesterov, Regulariser, Rule
from downpour.paramserver.server.connections import HANDSHAKE_DEADLINE_S
from downpour.paramserver.server.server import PUSHES_A_TURN, PartitionServer
from downpour.paramserver.spec import PartitionSpec, PartitionStart, Restore
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


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with contextlib.closing(Cluster()) as cluster:
        yield cluster


@pytest.fixture
def two() -> Iterator[Cluster]:
    with contextlib.closing(Cluster(2)) as cluster:
        yield cluster


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
    settled: list[Settled] = []
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


def test_a_bell_rings_for_several_pushes_or_when_it_is_waited_for(two: Cluster) -> None:
    client = two.client(num_mailboxes=8, depth=1, bell_every=3)
    for batch in range(5):
        leave(client, batch, batch)
        send(client, batch, mailbox=batch)
        # The partitions' threads answer `call` between two packets, in the order of arrival.
        assert max(two.versions()) <= batch // 3 * 3 + (3 if batch % 3 == 2 else 0)
    settled: list[Settled] = []
    while len(settled) < 3:
        settled += client.collect(DEADLINE_S)
    assert two.versions() == [3, 3], "two are kept back until somebody waits"
    while len(settled) < 5:
        settled += client.wait()
    assert two.versions() == [5, 5]
    assert sorted(s.mailbox for s in settled) == [0, 1, 2, 3, 4]
    assert {o for s in settled for o in s.outcomes} == {Outcome.APPLIED}


# --- What it is for -----------------------------------------------------------------------------

Optimizer = Callable[..., torch.optim.Optimizer]


@pytest.mark.parametrize(
    ("rule", "rate", "optimizer", "options"),
    [
        (SGD(), 0.1, torch.optim.SGD, {}),
        (Momentum(momentum=0.9), 0.02, torch.optim.SGD, {"momentum": 0.9}),
        (Nesterov(momentum=0.9), 0.02, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (Adagrad(), 0.01, torch.optim.Adagrad, {}),
    ],
)
def test_one_replica_with_one_step_in_flight_is_torch_optim(
    rule: Rule, rate: float, optimizer: Optimizer, options: dict[str, Any]
) -> None:
    steps, batch_size, decay = 300, 20, 1e-3
    generator = torch.Generator().manual_seed(11)
    images = (torch.rand(steps * batch_size // 10, 784, generator=generator) > 0.8).float()
    labels = (images[:, :392].sum(1) - images[:, 392:].sum(1)).add(50).div(10).long().clamp(0, 9)
    draws = torch.randint(len(images), (steps, batch_size), generator=generator)

    flat = FlatModel(MnistNet(batch_norm=True, seed=3))
    layout = flat.layout
    cluster = Cluster(
        3,
        weights=flat.weights,
        num_features=layout.num_features,
        num_decayed=layout.decayed,
        config=UpdateConfig(
            rule=rule,
            regulariser=Regulariser(weight_decay=decay),
            schedule=Schedule(learning_rate=rate),
            batches_per_epoch=steps,
            epoch_examples=steps * batch_size,
        ),
    )
    reference = MnistNet(batch_norm=True, seed=3)
    by_name = dict(reference.named_parameters())
    groups = [
        {"params": [by_name[e.name] for e in layout.entries if e.decays], "weight_decay": decay},
        {"params": [by_name[e.name] for e in layout.entries if not e.decays]},
    ]
    theirs = optimizer(groups, lr=rate, **options)

    with contextlib.closing(cluster):
        client = cluster.client(num_mailboxes=1)
        weights, versions = torch.empty(layout.num_parameters), [0] * 3
        flat.bind(weights, client.mailboxes.gradients[0], client.mailboxes.moments[0][0])
        seen, losses = [], []
        for step, draw in enumerate(draws):
            x, y = images[draw], labels[draw]
            theirs.zero_grad()
            expected = functional.cross_entropy(reference(x), y)
            expected.backward()  # type: ignore[no-untyped-call]
            theirs.step()

            client.pull(weights.numpy(), versions)
            assert versions == [step] * 3
            flat.zero_gradient()
            loss = functional.cross_entropy(flat.module(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            seen.append(flat.moments[1:].clone())
            losses.append(loss.item())
            send(
                client,
                step,
                versions=versions,
                examples=batch_size,
                loss=losses[-1],
                gradient_norm=float(client.mailboxes.gradients[0].norm()),
            )
            assert settle(client) == (Outcome.APPLIED,) * 3

        assert losses[-1] < losses[0] / 2, "nothing was learnt, so nothing was shown"
        statistics = torch.empty(2, layout.num_features)
        client.pull_statistics(weights.numpy(), statistics.numpy(), versions)
        for entry in layout.entries:
            ours = weights[entry.start : entry.stop].view(entry.shape)
            theirs_ = by_name[entry.name].detach()
            torch.testing.assert_close(ours, theirs_, rtol=1e-5, atol=1e-5)
        average = seen[0].clone()  # the moving averages, in the plainest of ways
        for n, moments in enumerate(seen):
            average += (moments - average) * max(0.01, 1 / (n + 1))
        torch.testing.assert_close(statistics, average, rtol=1e-4, atol=1e-5)


def test_several_clients_at_once_count_each_mini_batch_once(two: Cluster) -> None:
    # Each pushes all the mini-batches, in an order of its own, from several mailboxes.
    num, workers = 60, 3
    outcomes: list[list[Outcome]] = [[] for _ in range(workers)]
    clients = [two.client(num_mailboxes=4) for _ in range(workers)]

    def work(me: int) -> None:
        client = clients[me]
        order = random.Random(me).sample(range(num), num)
        for start in range(0, num, 4):
            unit = list(enumerate(order[start : start + 4]))
            for mailbox, batch in unit:
                leave(client, mailbox, batch)
                send(client, batch, mailbox)
            waiting = len(unit)
            while waiting:
                for settled in client.wait():
                    outcomes[me] += settled.outcomes
                    waiting -= 1

    threads = [threading.Thread(target=work, args=(me,)) for me in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    total = sum((gradient_of(batch) for batch in range(num)), torch.zeros(P))
    assert torch.equal(two.weights(), -0.5 * total)
    assert two.versions() == [num, num]
    every = [outcome for of_one in outcomes for outcome in of_one]
    assert every.count(Outcome.APPLIED) == 2 * num
    assert every.count(Outcome.DUPLICATE) == 2 * num * (workers - 1)


def test_a_second_push_of_a_mini_batch_is_ignored(two: Cluster) -> None:
    client, other = two.client(num_mailboxes=1), two.client(num_mailboxes=1)
    assert push(client, 7) is Outcome.APPLIED
    before = two.weights()
    assert push(client, 7) is Outcome.DUPLICATE
    assert push(other, 7) is Outcome.DUPLICATE
    assert torch.equal(two.weights(), before)
    assert two.versions() == [1, 1]


def test_a_partition_may_hold_what_another_lost(two: Cluster) -> None:
    # The second partition comes back from a snapshot without the last mini-batch.
    client = two.client(num_mailboxes=1)
    push(client, 0)
    meta, tensors = two.servers[1].call(lambda state: state.dump())
    assert push(client, 1) is Outcome.APPLIED
    two.servers[1].stop()
    two.servers[1] = PartitionServer(
        partition=two.parts[1],
        config=EXACT,
        key=KEY,
        restore=Snapshot(partition=two.parts[1], meta=meta, tensors=tensors),
    ).start()
    client = two.client(num_mailboxes=1)
    versions, weights = [0, 0], np.empty(P, np.float32)
    client.pull(weights, versions)
    assert versions == [2, 1]
    leave(client, 0, 1)
    send(client, 1, versions=versions)
    assert settle(client) == (Outcome.DUPLICATE, Outcome.APPLIED)
    assert torch.equal(two.weights(), -0.5 * (gradient_of(0) + gradient_of(1)))


def test_what_is_refused_is_said_so_by_all(two: Cluster) -> None:
    client = two.client(num_mailboxes=1)
    assert push(client, 0, loss=float("nan")) is Outcome.REFUSED_LOSS
    assert push(client, 1, gradient_norm=float("inf")) is Outcome.REFUSED_GRADIENT
    assert push(client, 2, versions=[1, 1]) is Outcome.REFUSED_UNKNOWN
    assert push(client, Q) is Outcome.REFUSED_UNKNOWN
    assert two.versions() == [0, 0]
    assert push(client, 2) is Outcome.APPLIED, "the connection is as good as before"


def test_a_push_of_several_mini_batches(cluster: Cluster) -> None:
    client = cluster.client(num_mailboxes=1, depth=3)
    assert push(client, 0, batches=(4, 5, 6), examples=96) is Outcome.APPLIED
    assert push(client, 0, batches=(6, 7)) is Outcome.REFUSED_MIXED
    assert cluster.servers[0].call(lambda state: state.ledger.examples) == 96


def test_pulls_are_of_the_latest_version_with_its_statistics(two: Cluster) -> None:
    client, evaluator = two.client(num_mailboxes=1), two.client()
    weights, statistics = np.empty(P, np.float32), np.empty((2, F), np.float32)
    versions = [-1, -1]
    evaluator.pull_statistics(weights, statistics, versions)
    assert versions == [0, 0]
    assert not weights.any()
    assert statistics.tolist() == [[0.0] * F, [1.0] * F]
    push(client, 3)
    evaluator.pull_statistics(weights, statistics, versions)
    assert versions == [1, 1]
    assert np.array_equal(weights, -0.5 * gradient_of(3).numpy())
    assert statistics.tolist() == [[1.0] * F, [2.0] * F]
    assert evaluator.torn == 0


def test_a_partition_that_dies_over_an_update_leaves_no_reader_waiting(cluster: Cluster) -> None:
    client, server = cluster.client(), cluster.servers[0]
    server._versions.published._in_place = True  # as of large weights
    server.call(lambda _: server._versions.published.begin())  # void from here on
    weights, versions = np.empty(P, np.float32), [-1]
    with ThreadPoolExecutor() as pool:
        pull = pool.submit(client.pull, weights, versions)
        by_deadline(
            lambda: (
                server._connections.sides
                and all(s.pinned == 0 for s in server._connections.sides.values())
            )
        )
        assert not pull.done()
        server.stop()
        with pytest.raises(ConnectionLost, match="died over an update"):
            pull.result(DEADLINE_S)


def test_as_many_mailboxes_as_there_may_be_without_reading_an_answer(cluster: Cluster) -> None:
    client = cluster.client(num_mailboxes=MAX_MAILBOXES)
    for mailbox in range(MAX_MAILBOXES):
        leave(client, mailbox, mailbox)
        send(client, mailbox, mailbox)
    by_deadline(lambda: cluster.versions() == [MAX_MAILBOXES])
    settled: list[Settled] = []
    while len(settled) < MAX_MAILBOXES:
        settled += client.wait()
    assert {s.mailbox for s in settled} == set(range(MAX_MAILBOXES))
    assert {s.outcomes for s in settled} == {(Outcome.APPLIED,)}
    assert cluster.dropped() == {}


# --- Who may come in ----------------------------------------------------------------------------


def test_another_runs_key(cluster: Cluster) -> None:
    with pytest.raises(NotAuthenticated, match="key"):
        ParameterClient(cluster.endpoints, key=b"x" * KEY_BYTES)
    assert cluster.dropped() == {"NotAuthenticated": 1}


@pytest.mark.parametrize("key", [b"", KEY[:-1], KEY + b"\0"])
def test_a_key_of_another_length(cluster: Cluster, key: bytes) -> None:
    for make in (
        lambda: ParameterClient(cluster.endpoints, key=key),
        lambda: PartitionServer(partition=cluster.parts[0], config=EXACT, key=key),
    ):
        with pytest.raises(BadConfiguration, match=f"{len(key)} bytes"):
            make()


def test_another_model(cluster: Cluster) -> None:
    for change in ({"total_parameters": P + 16}, {"total_features": F + 1}):
        other = replace(cluster.parts[0], **change)
        endpoint = replace(cluster.servers[0].endpoint, partition=other)
        with pytest.raises(NotAuthenticated, match="another model"):
            ParameterClient([endpoint], key=KEY)
    assert cluster.dropped() == {"MalformedMessage": 2}


def test_another_partition_of_the_same_model(two: Cluster) -> None:
    parts = [replace(two.parts[0], stop=two.parts[0].stop - 16), two.parts[1]]
    swapped = [replace(s.endpoint, partition=p) for s, p in zip(two.servers, parts, strict=True)]
    with pytest.raises(MalformedMessage, match="not the one asked for"):
        ParameterClient(swapped, key=KEY)


def test_another_machine(cluster: Cluster) -> None:
    with pytest.raises(NotColocated):
        ParameterClient([replace(cluster.servers[0].endpoint, machine="far")], key=KEY)


def test_a_partition_too_few_or_out_of_order(two: Cluster) -> None:
    first, second = two.endpoints
    for endpoints in ([], [first], [second, first], [first, first]):
        with pytest.raises(BadConfiguration, match="give"):
            ParameterClient(endpoints, key=KEY)


@pytest.mark.parametrize(
    "options",
    [{"num_mailboxes": MAX_MAILBOXES + 1}, {"num_mailboxes": -1}, {"depth": 0}, {"depth": 9999}],
)
def test_mailboxes_beyond_bounds(cluster: Cluster, options: dict[str, int]) -> None:
    with pytest.raises(BadConfiguration, match="give at most"):
        cluster.client(**options)


def test_weights_of_another_length_are_not_spread_out() -> None:
    (part,) = split(num_parameters=P, num_features=F, num_decayed=0, num_partitions=1)
    for shape in ((1,), (), (P + 1,), (1, P)):
        with pytest.raises(BadConfiguration, match="weights of shape"):
            PartitionServer(partition=part, config=EXACT, key=KEY, weights=torch.zeros(shape))


def test_nobody_listens_any_more(cluster: Cluster) -> None:
    cluster.servers[0].stop()
    with pytest.raises(ConnectionLost):
        cluster.client()


def test_a_peer_that_never_says_hello_is_dropped() -> None:
    now = [0.0]
    with contextlib.closing(Cluster(clock=lambda: now[0])) as cluster:
        client, server = cluster.client(num_mailboxes=1), cluster.servers[0]
        peer = cluster.peer()
        by_deadline(lambda: has_connections(server, 2))
        now[0] += HANDSHAKE_DEADLINE_S - 1
        server.call(lambda _: None)
        server.call(lambda _: None)  # the first turn is over, in which it could have been dropped
        assert server.num_connections == 2
        now[0] += 2
        by_deadline(lambda: has_connections(server, 1))
        assert peer.hung_up_on
        assert cluster.dropped() == {"no hello": 1}
        assert push(client, 0) is Outcome.APPLIED, "whoever did say hello may be silent"


# --- Peers that lie -----------------------------------------------------------------------------


def size_of_mailboxes() -> int:
    boxes = Mailboxes(P, F, GOOD_HELLO.num_mailboxes, GOOD_HELLO.depth)
    with contextlib.closing(boxes):
        return os.fstat(boxes.fd).st_size


def fitting(num: int, depth: int) -> tuple[Hello, int]:
    """A hello for so many mailboxes, with memory of just the size that they take."""
    boxes = Mailboxes(P, F, num, depth)
    return replace(GOOD_HELLO, num_mailboxes=num, depth=depth), boxes.fd


def random_bytes(length: int) -> bytes:
    return random.Random(length).randbytes(length)


HELLO = encode(GOOD_HELLO)
BEFORE_HELLO: dict[str, bytes] = {
    "random": random_bytes(64),
    "one byte": b"D",
    "oversized": random_bytes(60_000),
    "oversized, a hello at first": HELLO + b"\0" * 20_000,
    "truncated": HELLO[:-1],
    "longer": HELLO + b"\0",
    "push": encode(a_push(0)),
    "answer": encode(Answer(mailbox=0, outcome=Outcome.APPLIED, version=9)),
    "welcome": encode(Welcome(num_parameters=P, num_features=F, num_buffers=4)),
    "wrong key": encode(replace(GOOD_HELLO, key=b"x" * KEY_BYTES, num_mailboxes=0, depth=0)),
    "wrong model": encode(replace(GOOD_HELLO, total_parameters=1, num_mailboxes=0, depth=0)),
    "mailboxes without memory": HELLO,
}
AFTER_HELLO: dict[str, bytes] = {
    "random": random_bytes(65),
    "oversized": random_bytes(50_000),
    "oversized, a push at first": encode(a_push(0)) + b"\0" * 20_000,
    "truncated": encode(a_push(0))[:-1],
    "longer": encode(a_push(0)) + b"\0",
    "hello again": HELLO,
    "answer": encode(Answer(mailbox=0, outcome=Outcome.APPLIED, version=9)),
    "welcome": encode(Welcome(num_parameters=P, num_features=F, num_buffers=4)),
    "no such mailbox": encode(a_push(0, mailbox=2)),
    "a mailbox far away": encode(a_push(0, mailbox=2**32 - 1)),
    "deeper than the mailbox": encode(a_push(0, batches=(0, 1))),
    "very deep": encode(a_push(0, batches=tuple(range(MAX_BATCHES)))),
    "the same mini-batch twice": encode(a_push(0, batches=(3, 3))),
}
MEMORY: dict[str, Callable[[], tuple[Hello, int]]] = {
    "could be shrunk": lambda: (GOOD_HELLO, memfd(size_of_mailboxes(), sealed=False)),
    "too short": lambda: (GOOD_HELLO, memfd(size_of_mailboxes() - 1)),
    "too long": lambda: (GOOD_HELLO, memfd(size_of_mailboxes() + 1)),
    "empty": lambda: (GOOD_HELLO, memfd(0)),
    "a file": lambda: (GOOD_HELLO, os.open("/proc/self/exe", os.O_RDONLY)),
    "a device": lambda: (GOOD_HELLO, os.open(os.devnull, os.O_RDONLY)),
    "for no mailbox": lambda: (replace(GOOD_HELLO, num_mailboxes=0), memfd(size_of_mailboxes())),
    "for no mailbox, empty": lambda: (replace(GOOD_HELLO, num_mailboxes=0), memfd(0)),
    "of no depth": lambda: (replace(GOOD_HELLO, depth=0), memfd(size_of_mailboxes())),
    # Memory that fits, so that nothing but the bounds is in the way.
    "one mailbox too many": lambda: fitting(MAX_MAILBOXES + 1, 1),
    "one too deep": lambda: fitting(1, MAX_BATCHES + 1),
    "far too many": lambda: (replace(GOOD_HELLO, num_mailboxes=2**32 - 1), memfd(2**40)),
    "far too deep": lambda: (replace(GOOD_HELLO, depth=2**32 - 1), memfd(2**40)),
    "beyond any address": lambda: (
        replace(GOOD_HELLO, num_mailboxes=MAX_MAILBOXES, depth=MAX_BATCHES),
        memfd(4096),
    ),
}


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


@pytest.fixture
def bystander(cluster: Cluster) -> Bystander:
    return Bystander(cluster)


@pytest.mark.parametrize("what", BEFORE_HELLO)
def test_bad_messages_in_place_of_hello(cluster: Cluster, bystander: Bystander, what: str) -> None:
    peer = cluster.peer()
    peer.say(BEFORE_HELLO[what])
    assert peer.hung_up_on
    bystander.check()


@pytest.mark.parametrize("what", AFTER_HELLO)
def test_bad_messages_after_hello(cluster: Cluster, bystander: Bystander, what: str) -> None:
    peer = cluster.peer().greet()
    peer.say(AFTER_HELLO[what])
    assert peer.hung_up_on
    bystander.check()


@pytest.mark.parametrize("what", MEMORY)
def test_bad_memory_with_hello(cluster: Cluster, bystander: Bystander, what: str) -> None:
    hello, fd = MEMORY[what]()
    peer = cluster.peer()
    peer.say(hello, [fd])
    os.close(fd)
    assert peer.hung_up_on
    bystander.check()


def test_more_descriptors_than_one(cluster: Cluster, bystander: Bystander) -> None:
    before = num_descriptors()
    fds = [memfd(size_of_mailboxes()) for _ in range(5)]
    peer = cluster.peer()
    peer.say(GOOD_HELLO, fds)
    assert isinstance(decode(peer.socket.recv(8192)), Welcome)
    peer.say(a_push(0), fds)  # where none belong
    assert isinstance(decode(peer.socket.recv(8192)), Answer)
    peer.socket.close()
    for fd in fds:
        os.close(fd)
    by_deadline(lambda: has_connections(cluster.servers[0], 1))
    by_deadline(lambda: num_descriptors() == before)


def test_a_gradient_that_is_not_finite_under_a_header_that_is(two: Cluster) -> None:
    client = two.client(num_mailboxes=1)
    leave(client, 0, 0)
    client.mailboxes.gradients[0][-1] = torch.nan  # in the second partition only
    send(client, 0)
    assert settle(client) == (Outcome.APPLIED, Outcome.REFUSED_GRADIENT)
    assert two.versions() == [1, 0]
    assert two.servers[1].call(lambda state: dict(state.ledger.refusals)) == {0: 1}


def test_fuzz(cluster: Cluster, bystander: Bystander) -> None:
    # Random bytes and damaged messages, before hello and after. None of it may reach the weights:
    # what is a push all the same is of a version yet to come, whichever bit is flipped.
    chosen, version = random.Random(1), 3 << 40
    good = [
        HELLO,
        encode(a_push(0, version=version)),
        encode(a_push(5, version=version, mailbox=1)),
    ]
    for attempt in range(150):
        peer = cluster.peer()
        if attempt % 2:
            peer.greet()
        for _ in range(3):
            data = bytearray(chosen.choice(good))
            match chosen.randrange(3):
                case 0:
                    data = bytearray(chosen.randbytes(chosen.randrange(1, 200)))
                case 1:
                    del data[chosen.randrange(1, len(data)) :]
                case _:
                    data[chosen.randrange(len(data) - 20)] ^= 1 << chosen.randrange(8)
            peer.say(bytes(data))
        peer.socket.close()
    by_deadline(lambda: has_connections(cluster.servers[0], 1))
    dropped = cluster.dropped()
    assert dropped["MalformedMessage"] > 50
    assert set(dropped) <= {"MalformedMessage", "NotAuthenticated"}
    bystander.check(num_dropped=sum(dropped.values()))


# --- Peers that stall, flood or die -------------------------------------------------------------


def test_a_peer_that_reads_no_answers_is_dropped(cluster: Cluster, bystander: Bystander) -> None:
    peer = cluster.peer().greet()
    # The same mini-batch over and over, which leaves the weights alone.
    repeat = encode(a_push(bystander.batch))
    with contextlib.suppress(ConnectionError):
        for _ in range(20_000):
            peer.socket.send(repeat)
    by_deadline(lambda: has_connections(cluster.servers[0], 1))
    assert cluster.dropped() == {"DeadlineExceeded": 1}
    bystander.check()


def test_a_peer_that_floods_does_not_keep_others_out(cluster: Cluster) -> None:
    bystander, stop = Bystander(cluster), threading.Event()
    peer = cluster.peer().greet()

    def flood() -> None:
        while not stop.is_set():
            peer.socket.send(encode(a_push(100)))
            peer.socket.recv(8192)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for batch in range(200, 230):
            assert push(bystander.client, batch) is Outcome.APPLIED
    finally:
        stop.set()
        thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_connections_take_turns(cluster: Cluster) -> None:
    # One has many pushes queued when another's arrives: it is answered after a turn, not after all.
    busy, late = cluster.peer().greet(), cluster.peer().greet()
    with held(cluster.servers[0]):
        for batch in range(4 * PUSHES_A_TURN):
            busy.say(a_push(batch))
        late.say(a_push(4 * PUSHES_A_TURN))
    answer = decode(late.socket.recv(8192))
    assert isinstance(answer, Answer)
    assert answer.outcome is Outcome.APPLIED
    assert answer.version <= PUSHES_A_TURN + 1
    by_deadline(lambda: cluster.versions() == [4 * PUSHES_A_TURN + 1])


def test_a_client_that_closes_with_pushes_in_flight(cluster: Cluster, bystander: Bystander) -> None:
    client = cluster.client(num_mailboxes=3)
    by_deadline(lambda: has_connections(cluster.servers[0], 2))
    for mailbox in range(3):
        leave(client, mailbox, mailbox)
        send(client, mailbox, mailbox)
    client.close()
    by_deadline(lambda: has_connections(cluster.servers[0], 1))
    # What was sent may have been applied, each once or not at all, but whole.
    flags = cluster.servers[0].call(lambda state: state.ledger.applied.flags(0))
    total = gradient_of(bystander.batch) + sum(
        (gradient_of(b) for b in range(3) if flags[b]), torch.zeros(P)
    )
    assert torch.equal(cluster.weights(), -0.5 * total)
    assert cluster.dropped() == {}, "to leave is no offence"
    assert push(bystander.client, 50) is Outcome.APPLIED


VICTIM = """
import itertools, pickle, sys
import torch
from paramserver.client import ParameterClient
endpoints, key, num = pickle.load(sys.stdin.buffer)
client = ParameterClient(endpoints, key=key, num_mailboxes=2)
for batch in itertools.count():
    mailbox = batch % 2
    while client.in_flight(mailbox):
        client.wait()
    pattern = (torch.arange(num) * (batch % num_batches + 1)).remainder(5).float() - 2
    client.mailboxes.gradients[mailbox].copy_(pattern)
    client.mailboxes.moments[mailbox].copy_(torch.tensor([32.0, 1.0, 2.0])[:, None])
    client.push(
        mailbox=mailbox, replica=1, epoch=1 + batch // num_batches,
        batches=(batch % num_batches,), examples=32, versions=[0] * len(endpoints), loss=1.0,
        gradient_norm=float(pattern.norm()),
    )
    if batch == 20:
        print("under way", flush=True)
"""


def look(state: PartitionState) -> tuple[dict[int, npt.NDArray[np.uint8]], int, Tensor]:
    epochs = (*state.ledger.applied.complete_epochs, *state.ledger.applied.open_epochs)
    flags = {epoch: state.ledger.applied.flags(epoch) for epoch in epochs}
    return flags, state.version, state.current.weights.clone()


def test_a_client_that_is_killed_in_the_middle(two: Cluster) -> None:
    bystander = two.client(num_mailboxes=1)
    script = f"num_batches = {Q}\n" + VICTIM
    root = Path(__file__).parents[4]
    victim = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    )
    with victim:
        assert victim.stdin is not None
        assert victim.stdout is not None
        pickle.dump((two.endpoints, KEY, P), victim.stdin)
        victim.stdin.close()
        assert victim.stdout.readline() == b"under way\n"
        for batch in range(30):  # side by side
            assert push(bystander, batch) is Outcome.APPLIED
        victim.send_signal(signal.SIGKILL)
        victim.wait(DEADLINE_S)
    for server in two.servers:
        by_deadline(functools.partial(has_connections, server, 1))
        flags, version, weights = server.call(look)
        assert flags[0].sum() == 30
        assert flags[1].sum() >= 20
        assert version == sum(f.sum() for f in flags.values())
        # Each of its gradients is there once, and whole, or not at all.
        batches = [int(b) for f in flags.values() for b in np.flatnonzero(f)]
        total = sum((gradient_of(b) for b in batches), torch.zeros(P))
        assert torch.equal(weights, -0.5 * total[server.partition.start : server.partition.stop])
        assert server.dropped() == {}
    assert push(bystander, 30) is Outcome.APPLIED


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_descriptor_left_for_another_connection(cluster: Cluster, bystander: Bystander) -> None:
    peers = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
    address = b"\0" + cluster.servers[0].endpoint.address.encode()
    with contextlib.ExitStack() as closing:
        for peer in peers:
            closing.callback(peer.close)
            peer.settimeout(DEADLINE_S)
        with no_descriptor_left():
            for peer in peers:
                peer.connect(address)
                with contextlib.suppress(ConnectionError):
                    assert peer.recv(1) == b"", "turned away, not left waiting"
            assert push(bystander.client, 900) is Outcome.APPLIED
    assert cluster.dropped() == {"ConnectionLost": 3}
    assert push(cluster.client(num_mailboxes=1), 901) is Outcome.APPLIED


# --- Servers that stop, stall or fail -----------------------------------------------------------


def test_the_death_of_a_partition_is_seen_at_once(two: Cluster) -> None:
    waiting, pushing, pulling = (two.client(num_mailboxes=1) for _ in range(3))
    push(waiting, 0)
    two.servers[1].stop()
    with pytest.raises(ConnectionLost, match="partition 1"):
        waiting.wait()
    leave(pushing, 0, 1)
    with pytest.raises(ConnectionLost, match="partition 1"):
        send(pushing, 1)
    # What it published stays readable, as the memory goes with its last reader.
    weights, versions = np.empty(P, np.float32), [0, 0]
    pulling.pull(weights, versions)
    assert versions[1] == 1
    start = two.parts[1].start
    assert np.array_equal(weights[start:], -0.5 * gradient_of(0)[start:].numpy())


def test_no_answer_by_the_deadline(cluster: Cluster) -> None:
    client = ParameterClient(cluster.endpoints, key=KEY, num_mailboxes=1, deadline_s=0.01)
    with contextlib.closing(client), pytest.raises(DeadlineExceeded):
        client.wait()


def test_a_partition_that_is_busy_answers_nobody_and_then_everybody(cluster: Cluster) -> None:
    server = cluster.servers[0]
    client = cluster.client(num_mailboxes=1)
    with held(server):
        with pytest.raises(DeadlineExceeded, match="partition 0"):
            server.call(lambda state: state.version, deadline_s=0.01)
        with pytest.raises(DeadlineExceeded, match="not welcomed"):
            ParameterClient(cluster.endpoints, key=KEY, deadline_s=0.01)
        with pytest.raises(DeadlineExceeded, match="not stopped"):
            server.stop(deadline_s=0.01)
    with pytest.raises(ConnectionLost):
        client.wait()


def test_calls_bring_results_and_errors_back(cluster: Cluster) -> None:
    server = cluster.servers[0]
    assert server.call(lambda state: state.version) == 0
    for error in (KeyError("mine"), TimeoutError("mine")):
        with pytest.raises(type(error), match="mine"):
            server.call(lambda _: raise_(error))  # noqa: B023
    assert server.call(lambda _: threading.current_thread().name) == "partition-0"


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


def raise_(error: BaseException) -> None:
    raise error


class Gone(BaseException):
    """What not even `call` takes for the caller's own error."""


def test_calls_that_wait_when_the_server_ends_are_told(cluster: Cluster) -> None:
    server, gate, inside = cluster.servers[0], threading.Event(), threading.Event()
    found: list[BaseException] = []

    def last(_: object) -> None:
        inside.set()
        gate.wait(DEADLINE_S)
        raise Gone

    def call(function: Callable[[Any], object]) -> None:
        try:
            server.call(function)
        except Gone as error:
            found.append(error)

    callers = [
        threading.Thread(target=call, args=(f,)) for f in (last, lambda state: state.check())
    ]
    callers[0].start()
    assert inside.wait(DEADLINE_S)
    callers[1].start()
    by_deadline(lambda: not server._inbox._commands.empty())
    gate.set()
    for caller in callers:
        caller.join(DEADLINE_S)
        assert not caller.is_alive()
    assert found == [server.failure, server.failure]
    with pytest.raises(Gone):
        server.call(lambda state: state.version)
    server._failure = None  # asked for


def test_calls_after_stop_do_not_wait_for_a_deadline(cluster: Cluster) -> None:
    server = cluster.servers[0]
    server.stop()
    with pytest.raises(ConnectionLost, match="stopped"):
        server.call(lambda state: state.version)
    server.stop()


def test_a_defect_in_the_server_ends_it_loudly(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster()
    client, server = cluster.client(num_mailboxes=1), cluster.servers[0]

    def spoil(state: Any) -> None:
        state.apply_all = lambda *_: raise_(RuntimeError("a defect"))

    server.call(spoil)
    leave(client, 0, 0)
    send(client, 0)
    with pytest.raises(ConnectionLost):
        settle(client)
    by_deadline(lambda: not server._thread.is_alive())
    assert str(server.failure) == "a defect"
    with pytest.raises(RuntimeError, match="a defect"):
        server.call(lambda state: state.version)
    assert "stopped serving" in caplog.text
    client.close()
    server.stop()


def test_an_answer_that_nobody_awaits_is_malformed(cluster: Cluster) -> None:
    client, server = cluster.client(num_mailboxes=1), cluster.servers[0]

    def lie(_: object) -> None:
        (side,) = server._connections.sides.values()
        side.answer([Answer(mailbox=0, outcome=Outcome.APPLIED, version=1)])

    server.call(lie)
    with pytest.raises(MalformedMessage, match="awaits none"):
        client.wait()


# --- Nothing left behind ------------------------------------------------------------------------


def num_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_no_descriptor_is_left_open() -> None:
    def everything() -> None:
        cluster = Cluster(2)
        client = cluster.client(num_mailboxes=2)
        assert push(client, 0) is Outcome.APPLIED
        cluster.client()
        with pytest.raises(NotAuthenticated):
            ParameterClient(cluster.endpoints, key=b"x" * KEY_BYTES, num_mailboxes=2)
        for make in MEMORY.values():
            hello, fd = make()
            peer = cluster.peer()
            peer.say(hello, [fd])
            os.close(fd)
            assert peer.hung_up_on
        cluster.peer()  # silent
        cluster.close()
        PartitionServer(partition=cluster.parts[0], config=EXACT, key=KEY).stop()  # never started
        with pytest.raises(BadSnapshot):
            PartitionServer(
                partition=cluster.parts[0],
                config=EXACT,
                key=KEY,
                restore=Snapshot(partition=cluster.parts[0], meta={}, tensors={}),
            )

    everything()  # what is opened once and for all
    before = num_descriptors()
    for _ in range(3):
        everything()
    assert num_descriptors() == before


def test_a_client_that_comes_and_goes_costs_the_partition_nothing(cluster: Cluster) -> None:
    cluster.client(num_mailboxes=1)
    before = num_descriptors()
    for batch in range(5):
        client = ParameterClient(cluster.endpoints, key=KEY, num_mailboxes=3)
        assert push(client, batch) is Outcome.APPLIED
        client.close()
        del client
    by_deadline(lambda: num_descriptors() == before)


# --- The actor, as a plain class ----------------------------------------------------------------


def test_the_actor_serves_reports_snapshots_and_comes_back(tmp_path: Path) -> None:
    (part,) = split(num_parameters=P, num_features=F, num_decayed=0, num_partitions=1)
    spec = PartitionSpec(partition=part, update=EXACT)
    first = actor.PartitionActor(spec, PartitionStart(key=KEY, origin=np.zeros(P, np.float32)))
    assert repr(first) == "Partition 1 of 1"
    client = ParameterClient([first.endpoint()], key=KEY, num_mailboxes=1)
    assert push(client, 0, replica=4) is Outcome.APPLIED
    assert push(client, 1, replica=4, loss=float("nan")) is Outcome.REFUSED_LOSS
    assert push(client, 0, replica=4) is Outcome.DUPLICATE
    report = first.report()
    assert (report.version, report.examples, report.rate) == (1, 32, 0.5)
    assert (report.batches_applied, report.refused) == (1, 1)
    assert (report.duplicates, report.malformed) == (1, 0)
    assert (report.staleness, report.refusals) == ({4: [1]}, {4: 1})
    assert (report.connections, report.connections_closed) == (1, {})
    assert first.flags([0, 7])[0][:3].tolist() == [1, 2, 0]
    file = first.snapshot(tmp_path.as_uri())
    path = tmp_path / file.name
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
    client.close()
    first.stop()

    origin = Restore(uri=path.as_uri(), sha256=file.sha256)
    second = actor.PartitionActor(spec, PartitionStart(key=KEY, origin=origin))
    client = ParameterClient([second.endpoint()], key=KEY, num_mailboxes=1)
    assert push(client, 0) is Outcome.DUPLICATE
    weights, versions = np.empty(P, np.float32), [0]
    client.pull(weights, versions)
    assert versions == [1]
    assert np.array_equal(weights, -0.5 * gradient_of(0).numpy())
    client.close()
    second.stop()
    origin = Restore(uri=path.as_uri(), sha256="0" * 64)
    with pytest.raises(BadSnapshot, match="checksum"):
        actor.PartitionActor(spec, PartitionStart(key=KEY, origin=origin))
    assert snapshot.read(pyarrow.fs.LocalFileSystem(), str(path)).partition == part

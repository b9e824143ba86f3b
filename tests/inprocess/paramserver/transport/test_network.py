"""The transport between machines, on loopback: what works over shared memory works over it.

The faults: strangers of every kind before the greeting, liars after it, peers that stall. Each must
cost the peer its connection, be counted, and leave the weights and everybody else alone.
"""

import contextlib
import dataclasses
import gc
import logging
import os
import random
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from downpour.paramserver.access import Access
from downpour.paramserver.client import ParameterClient, Settled
from downpour.paramserver.errors import (
    ConnectionLost,
    DeadlineExceeded,
    MalformedMessage,
    NotAuthenticated,
    ServerError,
)
from downpour.paramserver.messages import (
    KEY_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    Answer,
    Introduction,
    Outcome,
    PullRequest,
    Weights,
    WireDtype,
    encode,
)
from downpour.paramserver.rules.update import Momentum
from downpour.paramserver.server.connections import HANDSHAKE_DEADLINE_S, STALL_DEADLINE_S
from downpour.paramserver.transport.endpoint import NetworkAddress
from downpour.paramserver.transport.link import Pull
from downpour.paramserver.transport.network import client as network_client
from downpour.paramserver.transport.network.acceptor import (
    MAX_HANDSHAKES,
    NetworkAcceptor,
    NetworkListen,
)
from downpour.paramserver.transport.network.channel import (
    BLOCK_BYTES,
    Channel,
    PlainChannel,
    SealedChannel,
)
from downpour.paramserver.transport.network.connect import connect
from downpour.paramserver.transport.network.frames import as_bytes, frame
from downpour.paramserver.transport.network.handshake import handshake_as_partition
from downpour.paramserver.transport.network.pipe import PlainPipe
from downpour.paramserver.transport.network.security import (
    Credentials,
    RunCredentials,
    client_tls,
    issue,
)
from downpour.paramserver.transport.network.server_side import NetworkSide
from downpour.paramserver.transport.shared.published import NUM_BUFFERS
from tests.helpers import tiny
from tests.helpers.runs import Run
from tests.helpers.thread_backend import ThreadBackend
from tests.inprocess.paramserver.server import test_server as served
from tests.inprocess.paramserver.server.test_server import (
    DEADLINE_S,
    KEY,
    Bystander,
    Cluster,
    F,
    P,
    a_push,
    by_deadline,
    gradient_of,
    has_connections,
    held,
    leave,
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


@pytest.fixture(params=["encrypted", "plain"])
def keys(request: pytest.FixtureRequest) -> RunCredentials | None:
    return RUN if request.param == "encrypted" else None


@pytest.fixture
def one(keys: RunCredentials | None) -> Iterator[Networked]:
    with contextlib.closing(Networked(keys=keys)) as cluster:
        yield cluster


@pytest.fixture
def two(keys: RunCredentials | None) -> Iterator[Networked]:
    with contextlib.closing(Networked(2, keys=keys)) as cluster:
        yield cluster


@pytest.fixture(params=["inline", "thread"])
def driven(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who moves the client's bytes, whatever their number."""
    monkeypatch.setattr(network_client, "THREAD_BYTES", 0 if request.param == "thread" else 1 << 62)
    return str(request.param)


# --- What works over shared memory --------------------------------------------------------------


def test_one_replica_with_one_step_in_flight_is_torch_optim(
    keys: RunCredentials | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "Cluster", lambda *a, **o: Networked(*a, keys=keys, **o))
    served.test_one_replica_with_one_step_in_flight_is_torch_optim(
        Momentum(momentum=0.9), 0.02, torch.optim.SGD, {"momentum": 0.9}
    )


@pytest.mark.parametrize(
    "test",
    [
        served.test_several_clients_at_once_count_each_mini_batch_once,
        served.test_a_second_push_of_a_mini_batch_is_ignored,
        served.test_what_is_refused_is_said_so_by_all,
        served.test_pulls_are_of_the_latest_version_with_its_statistics,
        served.test_a_gradient_that_is_not_finite_under_a_header_that_is,
    ],
)
def test_two_partitions(two: Networked, driven: str, test: Callable[[Cluster], None]) -> None:
    test(two)


@pytest.mark.parametrize(
    "test",
    [
        served.test_a_push_of_several_mini_batches,
        served.test_as_many_mailboxes_as_there_may_be_without_reading_an_answer,
        served.test_a_client_that_comes_and_goes_costs_the_partition_nothing,
    ],
)
def test_one_partition(one: Networked, driven: str, test: Callable[[Cluster], None]) -> None:
    test(one)


def test_the_death_of_a_partition_is_seen_by_whoever_waits(two: Networked, driven: str) -> None:
    waiting, pushing, pulling = (two.client(num_mailboxes=1) for _ in range(3))
    push(waiting, 0)
    two.servers[1].stop()
    with pytest.raises(ConnectionLost, match="partition 1"):
        waiting.wait()
    versions, weights = versions_and_weights(pulling)
    with pytest.raises(ConnectionLost, match="partition 1"):
        pulling.pull(weights, versions)
    leave(pushing, 0, 1)
    with pytest.raises(ConnectionLost, match="partition 1"):  # TCP may take the push and lose it
        pushed_and_settled(pushing, 1)


def pushed_and_settled(client: ParameterClient, batch: int) -> None:
    send(client, batch)
    settle(client)


def test_a_client_that_closes_with_pushes_in_flight(one: Networked, driven: str) -> None:
    served.test_a_client_that_closes_with_pushes_in_flight(one, Bystander(one))


# --- Whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


def over_the_network(config: Any, **network: Any) -> Any:
    changed = dataclasses.replace(config.server.network, **{"transport": "network"} | network)
    return dataclasses.replace(config, server=dataclasses.replace(config.server, network=changed))


@pytest.mark.parametrize(
    "network",
    [{}, {"encrypt": False}, {"wire_dtype": "bfloat16"}],
    ids=["encrypted", "plain", "bfloat16"],
)
def test_every_mini_batch_is_applied_exactly_once(
    tmp_path: Path, data: str, network: dict[str, Any]
) -> None:
    killed: list[int] = []

    def kill_one(backend: ThreadBackend, replica: int, lease: Any) -> None:
        if lease.id == 7:
            backend.kill_process(replica % 2)
            killed.append(lease.id)

    run = Run(tmp_path / "run", over_the_network(tiny.config(data), **network))
    outcome = run.go(kill_one)
    assert killed == [7]
    run.assert_exactly_once(outcome)
    assert outcome.evaluation is not None
    assert outcome.evaluation.score.accuracy > 0.5


def test_some_partitions_on_this_machine_and_some_on_another(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run", over_the_network(tiny.config(data)))
    run.backend.access = dataclasses.replace(run.backend.access, transport="auto")
    here = run.backend._endpoints

    def endpoints() -> list[Any]:
        found = here()
        found[1] = dataclasses.replace(found[1], machine="another")
        return found

    monkeypatch.setattr(run.backend, "_endpoints", endpoints)
    networked: list[int] = []

    def look(backend: ThreadBackend, replica: int, lease: Any) -> None:
        networked.extend(a._client.num_networked for a in backend.actors if a and a._client)

    run.assert_exactly_once(run.go(look))
    assert set(networked) == {1}


@pytest.mark.parametrize("transport", ["auto", "network"])
def test_a_slot_that_is_alone_pulls_what_it_has_pushed(
    tmp_path: Path, data: str, transport: str
) -> None:
    config = tiny.config(data, replicas=1, concurrent_steps=1, epochs=1, partitions=2)
    run = Run(tmp_path / "run", over_the_network(config, transport=transport))
    outcome = run.go()
    for report in outcome.reports:
        assert report.staleness == {0: [run.plan.num_batches]}, "no step was ever stale"


# --- Pulls in two halves ------------------------------------------------------------------------


def versions_and_weights(client: ParameterClient) -> tuple[list[int], np.ndarray[Any, Any]]:
    return [-1] * client.num_partitions, np.zeros(client.num_parameters, np.float32)


def test_a_pull_does_not_wait_until_it_is_finished(two: Networked, driven: str) -> None:
    client = two.client(num_mailboxes=1)
    versions, weights = versions_and_weights(client)
    with held(two.servers[1]):
        leave(client, 0, 3)
        send(client, 3)
        pull = client.start_pull(weights, versions)
        assert pull.waiting == 2
        assert client.in_flight(0)
    client.finish(pull)
    assert versions == [1, 1], "a pull sees the pushes that were sent before it"
    assert np.array_equal(weights, -0.5 * gradient_of(3).numpy())
    assert client.in_flight(0), "the answer is still to be collected"
    assert settle(client) == (Outcome.APPLIED,) * 2


def test_several_pulls_at_a_time_arrive_where_they_belong(two: Networked, driven: str) -> None:
    client = two.client(num_mailboxes=4)
    wanted = [versions_and_weights(client) for _ in range(4)]
    pulls: list[Pull] = []
    for mailbox, (versions, weights) in enumerate(wanted):
        leave(client, mailbox, mailbox)
        send(client, mailbox, mailbox)
        pulls.append(client.start_pull(weights, versions))
    totals = [sum((gradient_of(b) for b in range(v)), torch.zeros(P)) for v in range(5)]
    for mailbox, (versions, weights) in enumerate(wanted):
        client.finish(pulls[mailbox])
        for part, version in zip(two.parts, versions, strict=True):
            assert version > mailbox, "a pull sees the pushes that were sent before it"
            own = slice(part.start, part.stop)
            assert np.array_equal(weights[own], -0.5 * totals[version][own].numpy())
    settled: list[Settled] = []
    while len(settled) < 4:
        settled += client.wait()
    assert {s.outcomes for s in settled} == {(Outcome.APPLIED,) * 2}


@pytest.fixture
def large(keys: RunCredentials | None) -> Iterator[Networked]:
    weights = torch.zeros(3_000_000)
    with contextlib.closing(
        Networked(keys=keys, weights=weights, num_features=0, config=served.EXACT)
    ) as cluster:
        yield cluster


@pytest.mark.parametrize("num_slow", [1, NUM_BUFFERS])
def test_weights_that_are_overtaken_while_they_are_sent_arrive_whole(
    large: Networked, monkeypatch: pytest.MonkeyPatch, num_slow: int
) -> None:
    monkeypatch.setattr(network_client, "THREAD_BYTES", 1 << 62)
    fast = large.client(access=Access(), num_mailboxes=1)

    def push_one(batch: int) -> None:
        fast.mailboxes.gradients[0].fill_(1.0)
        send(fast, batch)
        assert settle(fast) == (Outcome.APPLIED,)

    def pinned() -> set[int]:
        sides = large.servers[0]._connections.sides.values()
        return {s.pinned for s in sides if isinstance(s, NetworkSide) and s.sending}

    pulls = []
    for i in range(num_slow):
        slow = large.client()
        slow._connections[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        versions, weights = versions_and_weights(slow)
        pulls.append((slow, slow.start_pull(weights, versions), versions, weights))
        by_deadline(lambda: large.servers[0].call(lambda _: len(pinned()) == len(pulls)))
        push_one(i)
    # Where every slot is being sent from, one of those is taken and the rest of it set aside.
    expected = {0} if num_slow == 1 else {-1, *range(1, NUM_BUFFERS)}
    assert large.servers[0].call(lambda _: pinned()) == expected
    push_one(num_slow)
    for i, (slow, pull, versions, weights) in enumerate(pulls):
        slow.finish(pull)
        assert versions == [i]
        assert (weights == -0.5 * i).all(), "all of it is of that version"
        slow.pull(weights, versions)
        assert versions == [num_slow + 1]
        assert (weights == -0.5 * versions[0]).all()


def test_pulls_from_a_server_that_is_being_pushed_to(large: Networked, driven: str) -> None:
    puller, pusher = large.client(), large.client(num_mailboxes=2)
    for gradient in pusher.mailboxes.gradients:
        gradient.fill_(1.0)
    versions, weights = versions_and_weights(puller)
    seen = []
    for batch in range(12):
        mailbox = batch % 2
        if pusher.in_flight(mailbox):
            settle(pusher, mailbox)
        pusher.mailboxes.gradients[mailbox].fill_(1.0)
        send(pusher, batch, mailbox)
        puller.pull(weights, versions)
        assert (weights == -0.5 * versions[0]).all()
        seen += versions
    assert seen == sorted(seen)
    assert len(set(seen)) > 3


# --- Sixteen bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_with_error_feedback_the_sum_is_that_of_the_gradients(
    two: Networked, driven: str, wire: str
) -> None:
    client = two.client(access=two.access(wire_dtype=wire), num_mailboxes=3)
    generator = torch.Generator().manual_seed(5)
    total, plain = torch.zeros(P, dtype=torch.float64), torch.zeros(P)
    for step in range(60):
        mailbox, batch = step % 3, step - (step % 7 == 6)  # now and then one that has been applied
        gradient = client.mailboxes.gradients[mailbox]
        gradient.copy_(torch.randn(P, generator=generator))
        is_refused = step % 11 == 5
        send(
            client,
            batch,
            mailbox,
            gradient_norm=float("nan") if is_refused else float(gradient.norm()),
        )
        outcome = settle(client, mailbox)
        if outcome == (Outcome.APPLIED,) * 2:
            total += gradient.double()
            plain += gradient.to(getattr(torch, wire))
        else:
            assert outcome[0] in (Outcome.DUPLICATE, Outcome.REFUSED_GRADIENT)
    applied = -2.0 * two.weights().double()  # plain SGD at a rate of a half
    residuals = [c._encoder.residual for c in client._connections]  # type: ignore[attr-defined]
    residual = torch.cat(residuals).double()
    assert (applied + residual - total).abs().max() < 1e-4
    assert residual.abs().max() < 0.02
    assert (applied - total).abs().max() < (plain - total).abs().max()


# --- Strangers ----------------------------------------------------------------------------------


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


def client_context(credentials: Credentials | None) -> ssl.SSLContext:
    if credentials is not None:
        return client_tls(credentials)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.mark.parametrize("words", ["random", "http", "truncated"])
def test_a_stranger_at_the_door(one: Networked, words: str) -> None:
    data = {
        "random": random.Random(3).randbytes(4096),
        "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "truncated": b"\x16\x03\x01" if one.keys else b"\x40",
    }[words]
    reason = "NotAuthenticated" if one.keys else "MalformedMessage"
    with unharmed(one, "ConnectionLost" if words == "truncated" else reason):
        peer = one.socket()
        peer.sendall(data)
        if words == "truncated":
            peer.shutdown(socket.SHUT_WR)
        assert hung_up_on(peer)


@pytest.mark.parametrize("who", ["without a certificate", "of another run", "as a partition"])
def test_tls_with_the_wrong_certificate(who: str) -> None:
    credentials = {
        "without a certificate": None,
        "of another run": issue().clients,
        "as a partition": dataclasses.replace(RUN.partitions),
    }[who]
    context = client_context(credentials)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.closing(Networked()) as one, unharmed(one, "NotAuthenticated"):
        peer = context.wrap_socket(one.socket())
        # With TLS 1.3 a client believes that it is in until it hears otherwise.
        with contextlib.closing(peer), contextlib.suppress(ssl.SSLError, ConnectionError):
            while peer.recv(100):
                pass


def test_another_runs_key(one: Networked, driven: str) -> None:
    with unharmed(one, "NotAuthenticated"), pytest.raises(NotAuthenticated, match="another run"):
        ParameterClient(one.endpoints, key=b"x" * KEY_BYTES, access=one.access())


def test_another_runs_partition() -> None:
    with contextlib.closing(Networked(keys=issue())) as one:
        access = Access(transport="network", credentials=RUN.clients)
        with pytest.raises(NotAuthenticated, match="TLS"):
            ParameterClient(one.endpoints, key=KEY, access=access)
        by_deadline(lambda: one.dropped() == {"NotAuthenticated": 1})


def test_a_client_that_encrypts_and_a_partition_that_does_not() -> None:
    with contextlib.closing(Networked(keys=None)) as one:
        access = Access(transport="network", credentials=RUN.clients)
        with pytest.raises((NotAuthenticated, ConnectionLost)):
            ParameterClient(one.endpoints, key=KEY, access=access)
        by_deadline(lambda: sum(one.dropped().values()) == 1)


def test_those_who_never_finish_their_greeting_are_dropped_in_time(
    keys: RunCredentials | None,
) -> None:
    now = [0.0]
    with contextlib.closing(Networked(keys=keys, clock=lambda: now[0])) as one:
        client = one.client(num_mailboxes=1)
        silent, half = one.socket(), one.socket()
        half.sendall(b"\x16\x03\x01\x02" if keys else b"\x40")
        acceptor = one.servers[0]._network
        assert isinstance(acceptor, NetworkAcceptor)
        by_deadline(lambda: len(acceptor._pending) == 2)
        now[0] += HANDSHAKE_DEADLINE_S + 1
        assert hung_up_on(silent)
        assert hung_up_on(half)
        by_deadline(lambda: one.dropped() == {"no hello": 2})
        assert push(client, 1) is Outcome.APPLIED


def test_no_more_than_so_many_are_greeted_at_a_time() -> None:
    with contextlib.closing(Networked()) as one, unharmed(one, "too many handshakes"):
        peers = [one.socket() for _ in range(MAX_HANDSHAKES + 1)]
        assert hung_up_on(peers[-1])
        for peer in peers:
            peer.close()


def test_nobody_listens_on_a_network_unless_told_to() -> None:
    with contextlib.closing(Cluster()) as cluster:
        assert cluster.servers[0].endpoint.network is None
        assert cluster.servers[0]._network.address is None
    with contextlib.closing(Networked()) as one:
        assert one.address.host == "127.0.0.1"


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ServerError, match=r"cannot listen on 203\.0\.113\.9.*--listen"):
        served.PartitionServer(
            partition=served.split(
                num_parameters=P, num_features=F, num_decayed=0, num_partitions=1
            )[0],
            config=served.EXACT,
            key=KEY,
            network=NetworkListen(host="203.0.113.9"),
        )


# --- Liars --------------------------------------------------------------------------------------


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
    "more pulls than mailboxes": 4 * bytes_of(*frame(PullRequest(statistics=False))),
}


def say(channel: Channel, data: bytes) -> None:
    """Send it all, unless the partition has hung up by then."""
    views = deque([memoryview(data)])
    channel.socket.settimeout(DEADLINE_S)
    with contextlib.suppress(ConnectionLost):
        while not channel.write(views):
            select.select([], [channel.socket], [], DEADLINE_S)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_after_the_greeting(one: Networked, lie: str) -> None:
    with unharmed(one, "MalformedMessage"):
        channel = one.channel()
        say(channel, LIES[lie])
        assert hung_up_on(channel.socket)


def test_a_push_that_breaks_off_is_not_applied(one: Networked) -> None:
    with unharmed(one, "nothing", num=0):
        channel = one.channel()
        half = encode(a_push(1))
        say(channel, prefix(len(half), PAYLOAD) + half + bytes(PAYLOAD // 2))
        channel.socket.close()
    assert one.servers[0].call(lambda state: state.ledger.applied.flags(0)[1]) == 0


def test_a_push_that_stops_halfway_is_given_up_in_time(keys: RunCredentials | None) -> None:
    now = [0.0]
    with contextlib.closing(Networked(keys=keys, clock=lambda: now[0])) as one:
        idle, channel = one.client(num_mailboxes=1), one.channel()
        half = encode(a_push(1))
        say(channel, prefix(len(half), PAYLOAD) + half + bytes(8))
        by_deadline(lambda: has_connections(one.servers[0], 2))
        by_deadline(
            lambda: one.servers[0].call(
                lambda _: any(s._reader.midway for s in one.servers[0]._connections.sides.values())  # type: ignore[union-attr]
            )
        )

        def is_given_up() -> bool:
            now[0] += STALL_DEADLINE_S / 10
            return one.servers[0].call(lambda _: one.dropped()) == {"stalled": 1}

        by_deadline(is_given_up)
        assert hung_up_on(channel.socket)
        assert push(idle, 1) is Outcome.APPLIED, "to say nothing between two frames is no offence"


def sealed_blocks(cluster: Networked) -> tuple[SealedChannel, bytes]:
    """A greeted channel, and the bytes of a good push, sealed for it and not sent."""
    channel = cluster.channel()
    assert isinstance(channel, SealedChannel)
    half = encode(a_push(1))
    channel._seal_blocks(deque([memoryview(prefix(len(half), PAYLOAD) + half + bytes(PAYLOAD))]))
    return channel, bytes(channel._out[channel._out_start : channel._out_stop])


@pytest.mark.parametrize("how", ["altered", "twice", "of another connection", "too long", "empty"])
def test_a_broken_seal(how: str) -> None:
    with contextlib.closing(Networked()) as one, unharmed(one, "MalformedMessage"):
        channel, data = sealed_blocks(one)
        if how == "altered":
            data = data[:50] + bytes([data[50] ^ 1]) + data[51:]
        elif how == "twice":
            channel.socket.sendall(data)  # a push like any other, of a gradient of zeros
            by_deadline(lambda: one.servers[0].call(lambda s: s.ledger.applied.flags(0)[1]) == 1)
        elif how == "of another connection":
            data = sealed_blocks(one)[1]
        else:
            length = BLOCK_BYTES + 1 if how == "too long" else 0
            data = struct.pack("<I", length) + data[4:]
        with contextlib.suppress(ConnectionError):
            channel.socket.sendall(data)
        assert hung_up_on(channel.socket)


def test_fuzz(one: Networked) -> None:
    bystander, generator = Bystander(one), random.Random(11)
    good = bytes_of(
        *frame(a_push(1, epoch=7), [memoryview(bytes(PAYLOAD))]),
        *frame(PullRequest(statistics=True)),
    )
    tries = 60
    for _ in range(tries):
        data = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data) // 4)] = generator.randrange(256)
        channel = one.channel()
        say(channel, bytes(data[: generator.randint(1, len(data))]))
        channel.socket.close()
    by_deadline(lambda: has_connections(one.servers[0], 1))
    assert set(one.dropped()) <= {"MalformedMessage", "ConnectionLost"}
    assert push(bystander.client, 60) is Outcome.APPLIED
    one.servers[0].call(lambda state: state.check())


class Impostor:
    """Listens as a partition would, and says what it is told to after a good greeting."""

    def __init__(self, data: bytes) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._data = data
        self.address = NetworkAddress(host="127.0.0.1", port=self._listening.getsockname()[1])
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        part = served.split(num_parameters=P, num_features=F, num_decayed=0, num_partitions=1)[0]
        pipe = PlainPipe()
        talk = handshake_as_partition(pipe, KEY, part)
        with self._listening, self._listening.accept()[0] as peer:
            peer.settimeout(DEADLINE_S)
            with contextlib.suppress(StopIteration):
                while True:
                    next(talk)
                    peer.sendall(pipe.take())
                    pipe.feed(peer.recv(4096))
            peer.sendall(pipe.take())
            peer.recv(4096)
            peer.sendall(self._data)
            hung_up_on(peer)

    def join(self) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


@pytest.mark.parametrize(
    "data",
    [
        bytes_of(*frame(Weights(version=1, statistics=False), [memoryview(bytes(4 * P + 4))])),
        bytes_of(*frame(Weights(version=1, statistics=True), [memoryview(bytes(4 * P))])),
        bytes_of(*frame(a_push(1), [memoryview(bytes(4 * P))])),
        prefix(2**32 - 1, 2**64 - 1),
        random.Random(5).randbytes(300),
    ],
)
def test_a_client_believes_no_partition_blindly(driven: str, data: bytes) -> None:
    impostor = Impostor(data)
    with contextlib.closing(Cluster()) as cluster:
        endpoint = dataclasses.replace(cluster.endpoints[0], network=impostor.address)
        access = Access(transport="network")
        client = ParameterClient([endpoint], key=KEY, access=access, deadline_s=DEADLINE_S)
        versions, weights = versions_and_weights(client)
        with contextlib.closing(client), pytest.raises(MalformedMessage):
            client.pull(weights, versions)
        impostor.join()


def test_nothing_comes_by_the_deadline(one: Networked, driven: str) -> None:
    client = one.client(num_mailboxes=1)
    client._deadline_s = 0.05
    versions, weights = versions_and_weights(client)
    with held(one.servers[0]), pytest.raises(DeadlineExceeded, match="no partition has answered"):
        client.pull(weights, versions)


# --- Nothing is left, nothing is shown ----------------------------------------------------------


def num_open() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def test_no_thread_and_no_descriptor_is_left(driven: str, keys: RunCredentials | None) -> None:
    def come_and_go() -> None:
        with contextlib.closing(Networked(2, keys=keys)) as cluster:
            client = cluster.client(num_mailboxes=2)
            push(client, 1)
            cluster.client().close()
            peer = cluster.socket()
            peer.sendall(b"x" * 2000)
            assert hung_up_on(peer)
            lost = cluster.client(num_mailboxes=1)
            lost._connections[0].socket.shutdown(socket.SHUT_RDWR)
            with pytest.raises(ConnectionLost):
                push(lost, 2)

    come_and_go()
    files, threads = num_open()
    for _ in range(3):
        come_and_go()
    files_now, threads_now = num_open()
    assert files_now <= files
    assert threads_now <= threads  # fewer where an earlier test's thread has ended meanwhile


def test_keys_are_in_no_log(keys: RunCredentials | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with contextlib.closing(Networked(keys=keys)) as one:
        push(one.client(num_mailboxes=1), 1)
        with pytest.raises(NotAuthenticated):
            ParameterClient(one.endpoints, key=b"x" * KEY_BYTES, access=one.access())
        for lie in ("an answer", "no message"):
            channel = one.channel()
            say(channel, LIES[lie])
            assert hung_up_on(channel.socket)
        by_deadline(lambda: sum(one.dropped().values()) == 3)
        shown = caplog.text + repr(one.servers[0]) + repr(one.endpoints) + repr(one.access())
    assert "refused a connection" in caplog.text
    assert "closed a connection" in caplog.text
    for secret in (KEY, b"x" * KEY_BYTES):
        assert secret.decode() not in shown
        assert secret.hex() not in shown
    assert "PRIVATE KEY" not in shown


def test_the_channel_is_a_stream_whatever_the_cuts(keys: RunCredentials | None) -> None:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    a, b = bytes(32), bytes(range(32))
    left: Channel = SealedChannel(ends[0], seal=a, open_=b) if keys else PlainChannel(ends[0])
    right: Channel = SealedChannel(ends[1], seal=b, open_=a) if keys else PlainChannel(ends[1])
    generator = random.Random(1)
    sizes = [generator.choice([1, 7, 4000, BLOCK_BYTES, BLOCK_BYTES + 1]) for _ in range(30)]
    data = generator.randbytes(sum(sizes))
    views, at = deque[memoryview](), 0
    for size in sizes:
        views.append(memoryview(data)[at : at + size])
        at += size
    come = bytearray(len(data))
    at, give_up_s = 0, time.monotonic() + DEADLINE_S
    while at < len(data):
        assert time.monotonic() < give_up_s
        left.write(views)
        right.allow(generator.choice([1000, 1 << 20]))
        size = min(generator.choice([1, 100, 70_000, 1 << 20]), len(data) - at)
        at += right.read_into(memoryview(come)[at : at + size])
    assert bytes(come) == data
    assert left.moved == right.moved
    ends[0].close()
    right.allow(1)
    with pytest.raises(ConnectionLost):
        right.read_into(memoryview(come))
    ends[1].close()


def test_gradients_are_sent_from_the_mailboxes_own_memory(one: Networked) -> None:
    client = one.client(num_mailboxes=1)
    link = client._connections[0]
    (view,) = link._encoder.slices(0, finite=True)  # type: ignore[attr-defined]
    assert view == as_bytes(client.mailboxes.gradients[0])
    client.mailboxes.gradients[0].fill_(3.0)
    assert bytes(view[:4]) == struct.pack("<f", 3.0)

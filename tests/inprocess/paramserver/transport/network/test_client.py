"""The client over the network: it does what works over shared memory, and pulls in two halves."""

import contextlib
import dataclasses
import functools
import random
import socket
import struct
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from downpour.paramserver.access import Access
from downpour.paramserver.client import ParameterClient, PushResult
from downpour.paramserver.errors import (
    ConnectionLost,
    DeadlineExceeded,
    MalformedMessage,
)
from downpour.paramserver.messages import (
    Outcome,
    RoundedWeights,
    Weights,
)
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.rules.update import Momentum
from downpour.paramserver.transport.endpoint import NetworkAddress
from downpour.paramserver.transport.link import Pull
from downpour.paramserver.transport.network.frames import as_bytes, frame
from downpour.paramserver.transport.network.handshake import handshake_as_partition
from downpour.paramserver.transport.network.pipe import PlainPipe
from downpour.paramserver.transport.network.security import (
    RunCredentials,
)
from downpour.paramserver.transport.wire.gradients import Bits, place_of, rounded
from downpour.paramserver.transport.wire.weights import most_bytes, on_grid
from tests.helpers import server_promises
from tests.helpers.networked import (
    Networked,
    bytes_of,
    hung_up_on,
    num_open,
    prefix,
    pushed_and_settled,
    versions_and_weights,
)
from tests.helpers.served_partitions import (
    DEADLINE_S,
    KEY,
    Bystander,
    Cluster,
    F,
    P,
    a_push,
    gradient_of,
    held,
    leave,
    push,
    send,
    settle,
)

torch.set_num_threads(1)


def test_one_replica_with_one_step_in_flight_is_torch_optim(
    keys: RunCredentials | None,
) -> None:
    server_promises.one_replica_with_one_step_in_flight_is_torch_optim(
        functools.partial(Networked, keys=keys),
        *(Momentum(momentum=0.9), 0.02, torch.optim.SGD, {"momentum": 0.9}),
    )


@pytest.mark.parametrize(
    "promise",
    [
        server_promises.several_clients_at_once_count_each_mini_batch_once,
        server_promises.a_second_push_of_a_mini_batch_is_ignored,
        server_promises.what_is_refused_is_said_so_by_all,
        server_promises.pulls_are_of_the_latest_version_with_its_statistics,
        server_promises.a_gradient_that_is_not_finite_under_a_header_that_is,
    ],
)
def test_two_partitions(two: Networked, driven: str, promise: Callable[[Cluster], None]) -> None:
    promise(two)


@pytest.mark.parametrize(
    "promise",
    [
        server_promises.a_push_of_several_mini_batches,
        server_promises.as_many_mailboxes_as_there_may_be_without_reading_an_answer,
        server_promises.a_client_that_comes_and_goes_costs_the_partition_nothing,
    ],
)
def test_one_partition(one: Networked, driven: str, promise: Callable[[Cluster], None]) -> None:
    promise(one)


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


def test_a_client_that_closes_with_pushes_in_flight(one: Networked, driven: str) -> None:
    server_promises.a_client_that_closes_with_pushes_in_flight(one, Bystander(one))


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
    settled: list[PushResult] = []
    while len(settled) < 4:
        settled += client.wait()
    assert {s.outcomes for s in settled} == {(Outcome.APPLIED,) * 2}


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_with_error_feedback_the_sum_is_that_of_the_gradients(
    two: Networked, driven: str, wire: str
) -> None:
    client = two.client(access=two.access(wire=wire), num_mailboxes=3)
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


@pytest.mark.parametrize(("wire", "bits"), [("int8", 8), ("int4", 4)])
def test_both_ways_are_rounded_and_an_evaluator_sees_the_weights(
    two: Networked, driven: str, wire: str, bits: Bits
) -> None:
    client = two.client(access=two.access(wire=wire), num_mailboxes=2)
    generator, expected = torch.Generator().manual_seed(6), torch.zeros(P)
    for step in range(40):
        mailbox, batch = step % 2, step - (step % 5 == 4)  # now and then one that has been applied
        gradient = client.mailboxes.gradients[mailbox]
        gradient.copy_(torch.randn(P, generator=generator))
        norm = float("nan") if step % 7 == 6 else float(gradient.norm())
        send(client, batch, mailbox, gradient_norm=norm)
        outcome = settle(client, mailbox)
        if outcome == (Outcome.APPLIED,) * 2:
            for part in two.parts:
                place = place_of(0, batch, part.index)
                expected[part.start : part.stop] -= 0.5 * rounded(
                    gradient[part.trained], place, bits
                )
        else:
            assert outcome[0] in (Outcome.DUPLICATE, Outcome.REFUSED_GRADIENT)
        assert torch.equal(two.weights(), expected)
        versions, weights = versions_and_weights(client)
        client.pull(weights, versions)
        on_grids = [on_grid(expected[part.start : part.stop]) for part in two.parts]
        assert torch.equal(torch.from_numpy(weights), torch.cat(on_grids))
        assert versions == two.versions()
    evaluator = two.client(access=two.access(wire=wire))
    versions, weights = versions_and_weights(evaluator)
    statistics = np.zeros((2, F), np.float32)
    evaluator.pull_statistics(weights, statistics, versions)
    assert torch.equal(torch.from_numpy(weights), expected)
    of_client = np.ones((2, F), np.float32)
    client.pull_statistics(weights, of_client, versions)
    assert np.array_equal(of_client, statistics)


class Impostor:
    """Listens as a partition would, and says what it is told to after a good handshake."""

    def __init__(self, data: bytes) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._data = data
        self.address = NetworkAddress(host="127.0.0.1", port=self._listening.getsockname()[1])
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        part = split(num_parameters=P, num_features=F, num_decayed=0, num_partitions=1)[0]
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
        bytes_of(*frame(RoundedWeights(version=1, statistics=False, num_bytes=0))),
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


@pytest.mark.parametrize(
    "data",
    [
        bytes_of(*frame(Weights(version=1, statistics=False), [memoryview(bytes(4 * P))])),
        bytes_of(
            *frame(
                RoundedWeights(version=1, statistics=False, num_bytes=most_bytes(P) + 1),
                [memoryview(bytes(most_bytes(P) + 1))],
            )
        ),
        bytes_of(*frame(RoundedWeights(version=1, statistics=False, num_bytes=0))),
        bytes_of(
            *frame(
                RoundedWeights(version=1, statistics=False, num_bytes=5),
                [memoryview(b"\3\0\0\0\0")],
            )
        ),
    ],
    ids=["float32", "too long", "nothing", "garbage"],
)
def test_a_client_of_rounded_weights_believes_none_blindly(driven: str, data: bytes) -> None:
    impostor = Impostor(data)
    with contextlib.closing(Cluster()) as cluster:
        endpoint = dataclasses.replace(cluster.endpoints[0], network=impostor.address)
        client = ParameterClient(
            [endpoint],
            key=KEY,
            access=Access(transport="network", wire="int8"),
            num_mailboxes=1,
            deadline_s=DEADLINE_S,
        )
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


def test_gradients_are_sent_from_the_mailboxes_own_memory(one: Networked) -> None:
    client = one.client(num_mailboxes=1)
    link = client._connections[0]
    (view,) = link._encoder.slices(a_push(0))  # type: ignore[attr-defined]
    assert view == as_bytes(client.mailboxes.gradients[0])
    client.mailboxes.gradients[0].fill_(3.0)
    assert bytes(view[:4]) == struct.pack("<f", 3.0)

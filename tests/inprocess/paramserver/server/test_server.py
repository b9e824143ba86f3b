"""A server's promises over shared memory; servers that stop, stall or fail; nothing left behind."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from downpour.paramserver.client import ParameterClient
from downpour.paramserver.errors import (
    BadConfiguration,
    ConnectionLost,
    DeadlineExceeded,
)
from downpour.paramserver.messages import (
    Outcome,
)
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.snapshot import Snapshot
from downpour.paramserver.rules.update import SGD, Adagrad, Momentum, Nesterov, Rule
from downpour.paramserver.server.server import PartitionServer
from tests.helpers import server_promises
from tests.helpers.served_partitions import (
    DEADLINE_S,
    EXACT,
    KEY,
    Bystander,
    Cluster,
    F,
    P,
    by_deadline,
    gradient_of,
    held,
    leave,
    push,
    send,
    settle,
)

torch.set_num_threads(1)


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
    rule: Rule, rate: float, optimizer: server_promises.Optimizer, options: dict[str, Any]
) -> None:
    server_promises.one_replica_with_one_step_in_flight_is_torch_optim(
        Cluster, rule, rate, optimizer, options
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
def test_two_partitions(two: Cluster, promise: Callable[[Cluster], None]) -> None:
    promise(two)


@pytest.mark.parametrize(
    "promise",
    [
        server_promises.a_push_of_several_mini_batches,
        server_promises.as_many_mailboxes_as_there_may_be_without_reading_an_answer,
        server_promises.a_client_that_comes_and_goes_costs_the_partition_nothing,
    ],
)
def test_one_partition(cluster: Cluster, promise: Callable[[Cluster], None]) -> None:
    promise(cluster)


def test_a_client_that_closes_with_pushes_in_flight(cluster: Cluster, bystander: Bystander) -> None:
    server_promises.a_client_that_closes_with_pushes_in_flight(cluster, bystander)


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


def test_weights_of_another_length_are_not_spread_out() -> None:
    (part,) = split(num_parameters=P, num_features=F, num_decayed=0, num_partitions=1)
    for shape in ((1,), (), (P + 1,), (1, P)):
        with pytest.raises(BadConfiguration, match="weights of shape"):
            PartitionServer(partition=part, config=EXACT, key=KEY, weights=torch.zeros(shape))


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

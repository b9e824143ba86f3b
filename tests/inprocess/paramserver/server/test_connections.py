"""Who may connect, and connections that stall, flood or die.

Each must cost the peer its connection, be counted, and leave the weights and everybody else alone.
"""

import contextlib
import functools
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from downpour.paramserver.client import ParameterClient
from downpour.paramserver.codec import decode, encode
from downpour.paramserver.errors import (
    BadConfiguration,
    ConnectionLost,
    MalformedMessage,
    NotAuthenticated,
    NotColocated,
)
from downpour.paramserver.messages import KEY_BYTES, Answer, Outcome
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.server.connections import HANDSHAKE_DEADLINE_S
from downpour.paramserver.server.server import PUSHES_A_TURN, PartitionServer
from tests.helpers.served_partitions import (
    DEADLINE_S,
    EXACT,
    KEY,
    Bystander,
    Cluster,
    F,
    P,
    Q,
    a_push,
    by_deadline,
    gradient_of,
    has_connections,
    held,
    push,
)

torch.set_num_threads(1)


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


VICTIM = """
import itertools, pickle, sys
import torch
from downpour.paramserver.client import ParameterClient
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

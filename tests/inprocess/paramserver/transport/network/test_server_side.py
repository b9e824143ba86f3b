"""Weights that are overtaken on their way, and clients that lie after the handshake or stall.

A liar must lose its connection, be counted, and leave the weights and everybody else alone.
"""

import contextlib
import random
import socket

import pytest
import torch

from downpour.paramserver.access import Access
from downpour.paramserver.codec import encode
from downpour.paramserver.messages import Outcome, PullRequest
from downpour.paramserver.server.connections import STALL_DEADLINE_S
from downpour.paramserver.transport.network import client as network_client
from downpour.paramserver.transport.network.frames import frame
from downpour.paramserver.transport.network.security import RunCredentials
from downpour.paramserver.transport.network.server_side import NetworkSide
from downpour.paramserver.transport.shared.published import NUM_BUFFERS
from tests.helpers.networked import (
    LIES,
    PAYLOAD,
    Networked,
    bytes_of,
    hung_up_on,
    prefix,
    say,
    unharmed,
    versions_and_weights,
)
from tests.helpers.served_partitions import (
    Bystander,
    a_push,
    by_deadline,
    has_connections,
    push,
    send,
    settle,
)

torch.set_num_threads(1)


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


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_after_the_handshake(one: Networked, lie: str) -> None:
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

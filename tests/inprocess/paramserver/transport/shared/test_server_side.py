"""Peers on the same machine that lie, in messages and in memory.

Each must cost the peer its connection, be counted, and leave the weights and everybody else alone.
"""

import contextlib
import os
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from downpour.paramserver.client import ParameterClient
from downpour.paramserver.codec import decode, encode
from downpour.paramserver.errors import BadSnapshot, NotAuthenticated
from downpour.paramserver.messages import (
    KEY_BYTES,
    MAX_BATCHES,
    MAX_MAILBOXES,
    Answer,
    Hello,
    Outcome,
    Welcome,
)
from downpour.paramserver.partition.snapshot import Snapshot
from downpour.paramserver.server.server import PartitionServer
from downpour.paramserver.transport.shared.mailboxes import Mailboxes
from tests.helpers.served_partitions import (
    EXACT,
    GOOD_HELLO,
    KEY,
    Bystander,
    Cluster,
    F,
    P,
    a_push,
    by_deadline,
    has_connections,
    memfd,
    num_descriptors,
    push,
)

torch.set_num_threads(1)


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

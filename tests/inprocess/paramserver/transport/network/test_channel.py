"""Channels: broken seals, and streams whatever the cuts."""

import contextlib
import random
import socket
import struct
import time
from collections import Counter, deque

import pytest
import torch

from downpour.paramserver.codec import encode
from downpour.paramserver.errors import ConnectionLost
from downpour.paramserver.transport.network import channel as channels
from downpour.paramserver.transport.network.channel import (
    BLOCK_BYTES,
    Channel,
    PlainChannel,
    SealedChannel,
    unanswered_s,
)
from downpour.paramserver.transport.network.security import RunCredentials
from tests.helpers.networked import PAYLOAD, Networked, hung_up_on, prefix, unharmed
from tests.helpers.remote_pairs import be_deaf
from tests.helpers.served_partitions import DEADLINE_S, a_push, by_deadline

torch.set_num_threads(1)


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


def test_no_key_seals_more_blocks_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "REKEY_BLOCKS", 3)
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    first = bytes(32)
    left = SealedChannel(ends[0], seal=first, open_=bytes(range(32)))
    right = SealedChannel(ends[1], seal=bytes(range(32)), open_=first)
    keys = []
    for number in range(20):
        keys.append(left._seal_key)
        data = number.to_bytes(4, "little")
        for one, other in ((left, right), (right, left)):
            assert one.write(deque([memoryview(data)]))
            come = bytearray(4)
            other.allow(1000)
            assert other.read_into(memoryview(come)) == 4
            assert come == data
    assert max(Counter(keys).values()) == 3
    assert len(set(keys)) == 7
    assert right._open_key == left._seal_key != left._open_key == right._seal_key
    ends[0].close()
    ends[1].close()


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


def test_a_machine_that_acknowledges_nothing_is_told_from_a_process_that_reads_nothing() -> None:
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ours = stack.enter_context(socket.create_connection(listening.getsockname()))
        theirs = stack.enter_context(listening.accept()[0])
        ours.sendall(b"nobody reads this")
        by_deadline(lambda: unanswered_s(ours) == 0.0)
        be_deaf(theirs)
        ours.sendall(b"and nobody hears this")
        by_deadline(lambda: unanswered_s(ours) > 0.2)
        assert unanswered_s(theirs) == 0.0
    assert unanswered_s(ours) == 0.0

"""What a primary and a follower on another machine say: there and back, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour.paramserver import codec
from downpour.paramserver.errors import MalformedMessage
from downpour.paramserver.messages import PullRequest, Push
from downpour.paramserver.transport.network.replication import (
    MAX_REST_BYTES,
    Beat,
    Level,
    LinkMessage,
    Received,
    State,
    TakenOver,
    decode,
    encode,
)

PUSH = Push(
    mailbox=1,
    replica=2,
    epoch=3,
    batches=(4, 5),
    examples=64,
    version=6,
    loss=0.5,
    gradient_norm=2.0,
)
ALL: tuple[LinkMessage, ...] = (
    State(rest_bytes=MAX_REST_BYTES),
    Level(),
    Beat(applied=2**64 - 1, version=0),
    Received(pushes=3, joined=True),
    Received(pushes=0, joined=False),
    TakenOver(),
    PUSH,
)


@pytest.mark.parametrize("message", ALL, ids=str)
def test_every_message_comes_back_as_it_went(message: LinkMessage) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("message", ALL, ids=str)
def test_a_message_that_is_cut_or_longer_is_none(message: LinkMessage) -> None:
    data = encode(message)
    for wrong in (*(data[:end] for end in range(len(data))), data + b"\0"):
        with pytest.raises(MalformedMessage):
            decode(wrong)


@pytest.mark.parametrize(
    "data",
    [
        codec.encode(PullRequest(statistics=True)),
        encode(State(rest_bytes=MAX_REST_BYTES + 1)),
        encode(Received(pushes=1, joined=True))[:-1] + b"\2",
        b"DPRN\6",
        b"DPRN\0",
    ],
)
def test_what_neither_of_the_two_says_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(data)


@given(st.binary(max_size=64))
def test_any_other_bytes_are_malformed_and_never_another_error(data: bytes) -> None:
    for wrong in (data, b"DPRN" + data):
        try:
            message = decode(wrong)
        except MalformedMessage:
            continue
        assert encode(message) == wrong

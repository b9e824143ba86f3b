"""Messages as bytes: there and back, and any others are `MalformedMessage`, no other error."""

import math
import struct
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from downpour.paramserver.codec import decode, decode_all, encode, encode_all
from downpour.paramserver.errors import MalformedMessage
from downpour.paramserver.messages import (
    KEY_BYTES,
    MAX_BATCHES,
    NONCE_BYTES,
    PROOF_BYTES,
    Admission,
    Answer,
    Challenge,
    Follow,
    Hello,
    Introduction,
    Message,
    Outcome,
    PermitRequest,
    PullRequest,
    Push,
    Weights,
    Welcome,
    WireDtype,
)

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)

hellos = st.builds(
    Hello,
    key=st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES),
    total_parameters=U64,
    total_features=U64,
    num_mailboxes=U32,
    depth=U32,
)
welcomes = st.builds(Welcome, num_parameters=U64, num_features=U64, num_buffers=U32)
pushes = st.builds(
    Push,
    mailbox=U32,
    replica=U32,
    epoch=U32,
    batches=st.lists(U32, min_size=1, max_size=9, unique=True).map(tuple),
    examples=U32,
    version=U64,
    loss=st.floats(allow_nan=False),
    gradient_norm=st.floats(allow_nan=False),
)
answers = st.builds(Answer, mailbox=U32, outcome=st.sampled_from(Outcome), version=U64)
pull_requests = st.builds(PullRequest, statistics=st.booleans())
follows = st.builds(Follow, generation=U32)
permit_requests = st.builds(PermitRequest, mailbox=U32)
weights = st.builds(Weights, version=U64, statistics=st.booleans())
nonces = st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES)
proofs = st.binary(min_size=PROOF_BYTES, max_size=PROOF_BYTES)
challenges = st.builds(Challenge, nonce=nonces)
introductions = st.builds(
    Introduction,
    proof=proofs,
    nonce=nonces,
    partition=U32,
    total_parameters=U64,
    total_features=U64,
    num_mailboxes=U32,
    depth=U32,
    wire=st.sampled_from(WireDtype),
)
admissions = st.builds(Admission, proof=proofs, num_parameters=U64, num_features=U64)
messages = st.one_of(
    hellos,
    welcomes,
    pushes,
    answers,
    pull_requests,
    permit_requests,
    follows,
    weights,
    challenges,
    introductions,
    admissions,
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
EXAMPLES: list[Message] = [
    PUSH,
    Answer(mailbox=1, outcome=Outcome.APPLIED, version=7),
    Hello(key=b"k" * KEY_BYTES, total_parameters=100, total_features=5, num_mailboxes=2, depth=1),
    Welcome(num_parameters=100, num_features=5, num_buffers=4),
    PullRequest(statistics=True),
    PermitRequest(mailbox=7),
    Weights(version=3, statistics=False),
    Follow(generation=7),
    Challenge(nonce=b"n" * NONCE_BYTES),
    Introduction(
        proof=b"p" * PROOF_BYTES,
        nonce=b"n" * NONCE_BYTES,
        partition=1,
        total_parameters=100,
        total_features=5,
        num_mailboxes=2,
        depth=1,
        wire=WireDtype.BFLOAT16,
    ),
    Admission(proof=b"p" * PROOF_BYTES, num_parameters=50, num_features=2),
]


@given(messages)
def test_there_and_back(message: Message) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, 5e-324])
def test_losses_and_norms_of_any_size_travel(value: float) -> None:
    # A diverging loss is what has to arrive, so that it can be refused by name.
    found = decode(encode(replace(PUSH, loss=value, gradient_norm=value)))
    assert isinstance(found, Push)
    assert repr((found.loss, found.gradient_norm)) == repr((value, value))


def test_the_longest_push_travels() -> None:
    push = replace(PUSH, batches=tuple(range(MAX_BATCHES)))
    assert decode(encode(push)) == push


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_no_part_of_a_message_is_one_nor_one_with_more_behind(message: Message) -> None:
    data = encode(message)
    for length in range(len(data)):
        with pytest.raises(MalformedMessage):
            decode(data[:length])
    for tail in (b"\0", b"\0\0\0\0", data):
        with pytest.raises(MalformedMessage):
            decode(data + tail)


several = st.lists(st.one_of(pushes, answers, permit_requests), min_size=1, max_size=6)


@given(several)
def test_a_packet_of_several(found: list[Push | Answer | PermitRequest]) -> None:
    packet = encode_all(found)
    assert decode_all(packet) == found
    if len(found) == 1:
        assert packet == encode(found[0])
    for damaged in (packet[:-1], packet + b"\0", packet[:3], b""):
        with pytest.raises(MalformedMessage):
            decode_all(damaged)


def decode_strictly(data: bytes) -> Message | None:
    """The message, which must be what these very bytes say, or None where it is malformed."""
    try:
        message = decode(data)
    except MalformedMessage:
        return None
    floats = (message.loss, message.gradient_norm) if isinstance(message, Push) else ()
    assert any(math.isnan(f) for f in floats) or encode(message) == data
    return message


@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    assert decode_strictly(data) is None


@given(st.sampled_from([*range(11), 255]), st.binary(max_size=120))
def test_random_bytes_behind_a_good_start(kind: int, data: bytes) -> None:
    decode_strictly(b"DPR1" + bytes([kind]) + data)


@given(messages, st.data())
def test_flipped_bits(message: Message, data: st.DataObject) -> None:
    damaged = bytearray(encode(message))
    bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    found = decode_strictly(bytes(damaged))
    assert found != message


@pytest.mark.parametrize("count", [0, MAX_BATCHES + 1, 2**32 - 1])
def test_a_push_that_names_none_or_too_many(count: int) -> None:
    head = bytearray(encode(PUSH)[: -4 * len(PUSH.batches)])
    head[-4:] = struct.pack("<I", count)
    for body in (b"", b"\0" * 4 * min(count, MAX_BATCHES + 1)):
        with pytest.raises(MalformedMessage, match=f"names {count} mini-batches"):
            decode(bytes(head) + body)


def test_a_push_that_names_a_mini_batch_twice() -> None:
    with pytest.raises(MalformedMessage, match="twice"):
        decode(encode(replace(PUSH, batches=(4, 5, 4))))


@given(st.integers(0, 255))
def test_an_outcome_that_there_is_not(outcome: int) -> None:
    assume(outcome not in {o.value for o in Outcome})
    data = bytearray(encode(Answer(mailbox=0, outcome=Outcome.APPLIED, version=0)))
    data[9] = outcome
    with pytest.raises(MalformedMessage):
        decode(bytes(data))

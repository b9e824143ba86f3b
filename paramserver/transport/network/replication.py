"""What a primary and its follower on another machine say to each other, over a channel.

A follower connects as a client does, and says `Follow`. The primary sends it the state (`State`),
and from then on every push that it takes: a `Push` with its gradient, as it came, and its moments.
`Level` says that the primary from now on waits for the follower. The follower says how many pushes
it has (`Received`), and at the end that it is the partition (`TakenOver`). Both say something a few
times a second, so that either notices if the other falls silent.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from downpour.paramserver import codec
from downpour.paramserver.errors import MalformedMessage
from downpour.paramserver.messages import Push
from downpour.paramserver.transport.network.frames import head_of

MAGIC = b"DPRN"
BEAT_S = 0.1
"""How often each side says something, at the least."""
MAX_REST_BYTES = 1 << 30
"""Of a state, without its large tensors."""
_KIND = struct.Struct("<4sB")
_STATE = struct.Struct("<4sBQ")
_BEAT = struct.Struct("<4sBQQ")
_RECEIVED = struct.Struct("<4sBQ?")
_STATE_KIND, _LEVEL_KIND, _BEAT_KIND, _RECEIVED_KIND, _TAKEN_OVER_KIND = range(1, 6)


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Heads a payload: the state as a snapshot without its large tensors, and then those."""

    rest_bytes: int
    """Of the first part."""


@dataclass(frozen=True, slots=True)
class Level:
    """What the follower has not received is from now on neither published nor answered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """The primary is there."""

    applied: int
    """Of the pushes that it has sent on this connection, those that it has applied itself."""
    version: int
    """Its version after them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """The follower is there."""

    pushes: int
    """All of these that it has received whole, on this connection."""
    joined: bool
    """Whether it has taken the state in."""


@dataclass(frozen=True, slots=True)
class TakenOver:
    """The follower is the partition by now. It says no more."""


LinkMessage = State | Level | Beat | Received | TakenOver | Push


def head(message: LinkMessage, payload_bytes: int = 0) -> memoryview:
    """Return a message's frame up to its payload, which has to follow."""
    return head_of(encode(message), payload_bytes)


def encode(message: LinkMessage) -> bytes:
    """Return the message's bytes."""
    match message:
        case Push():
            return codec.encode(message)
        case Received():
            return _RECEIVED.pack(MAGIC, _RECEIVED_KIND, message.pushes, message.joined)
        case Beat():
            return _BEAT.pack(MAGIC, _BEAT_KIND, message.applied, message.version)
        case State():
            return _STATE.pack(MAGIC, _STATE_KIND, message.rest_bytes)
        case Level():
            return _KIND.pack(MAGIC, _LEVEL_KIND)
        case TakenOver():
            return _KIND.pack(MAGIC, _TAKEN_OVER_KIND)


def decode(data: bytes) -> LinkMessage:
    """Return the message that these bytes are.

    Raises:
        MalformedMessage: They are none.
    """
    if data.startswith(codec.MAGIC):
        message = codec.decode(data)
        if isinstance(message, Push):
            return message
        raise MalformedMessage(f"{type(message).__name__} between a primary and its follower")
    try:
        magic, kind = _KIND.unpack_from(data)
        if magic == MAGIC and kind in _DECODERS:
            return _DECODERS[kind](data)
    except struct.error as error:
        raise MalformedMessage(f"a message of {len(data)} bytes: {error}") from None
    raise MalformedMessage("bytes that neither a primary nor its follower says")


def _decode_state(data: bytes) -> State:
    (rest_bytes,) = _STATE.unpack(data)[2:]
    if rest_bytes > MAX_REST_BYTES:
        raise MalformedMessage(f"a state with {rest_bytes} bytes besides its large tensors")
    return State(rest_bytes=rest_bytes)


def _decode_beat(data: bytes) -> Beat:
    applied, version = _BEAT.unpack(data)[2:]
    return Beat(applied=applied, version=version)


def _decode_received(data: bytes) -> Received:
    pushes, joined = _RECEIVED.unpack(data)[2:]
    if data[-1] not in (0, 1):
        raise MalformedMessage(f"a flag that is {data[-1]}")
    return Received(pushes=pushes, joined=joined)


def _decode_level(data: bytes) -> Level:
    _KIND.unpack(data)
    return Level()


def _decode_taken_over(data: bytes) -> TakenOver:
    _KIND.unpack(data)
    return TakenOver()


_DECODERS: dict[int, Callable[[bytes], LinkMessage]] = {
    _STATE_KIND: _decode_state,
    _LEVEL_KIND: _decode_level,
    _BEAT_KIND: _decode_beat,
    _RECEIVED_KIND: _decode_received,
    _TAKEN_OVER_KIND: _decode_taken_over,
}

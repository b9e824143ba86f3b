"""The bytes of messages: `encode` and `decode`, and packets of several.

Everything is fixed-width little-endian behind a 4-byte magic and a kind. Nothing is unpickled,
and every length is checked before it is used: `decode` raises `MalformedMessage` for any other
bytes.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence

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
    RoundedWeights,
    Weights,
    Welcome,
    WireDtype,
)

MAGIC = b"DPR1"


class Kind(enum.IntEnum):
    """The first byte after the magic."""

    HELLO = 1
    WELCOME = 2
    PUSH = 3
    ANSWER = 4
    PULL_REQUEST = 5
    WEIGHTS = 6
    CHALLENGE = 7
    INTRODUCTION = 8
    ADMISSION = 9
    PERMIT_REQUEST = 10
    FOLLOW = 11
    ROUNDED_WEIGHTS = 12


_PREFIX = struct.Struct("<4sB")
_HELLO = struct.Struct(f"<4sB{KEY_BYTES}sQQII")
_WELCOME = struct.Struct("<4sBQQI")
_PUSH = struct.Struct("<4sBIIIIQddBI")
_COUNT = struct.Struct("<I")  # the last of a push's head
_ANSWER = struct.Struct("<4sBIBQ")
_PULL_REQUEST = struct.Struct("<4sB?")
_PERMIT_REQUEST = struct.Struct("<4sBI")
_WEIGHTS = struct.Struct("<4sBQ?")
_ROUNDED_WEIGHTS = struct.Struct("<4sBQQ?")
_FOLLOW = struct.Struct("<4sBI")
_CHALLENGE = struct.Struct(f"<4sB{NONCE_BYTES}s")
_INTRODUCTION = struct.Struct(f"<4sB{PROOF_BYTES}s{NONCE_BYTES}sIQQIIB")
_ADMISSION = struct.Struct(f"<4sB{PROOF_BYTES}sQQ")
_WIRES = {int(wire): wire for wire in WireDtype}  # the enum's own look-up is slow
_INDICES = [struct.Struct(f"<{n}I") for n in range(MAX_BATCHES + 1)]


def encode(message: Message) -> bytes:
    """Return the message's bytes."""
    match message:
        case Push():
            head = _PUSH.pack(
                MAGIC,
                Kind.PUSH,
                message.mailbox,
                message.replica,
                message.epoch,
                message.examples,
                message.version,
                message.loss,
                message.gradient_norm,
                message.wire,
                len(message.batches),
            )
            return head + _INDICES[len(message.batches)].pack(*message.batches)
        case Answer():
            return _ANSWER.pack(
                MAGIC, Kind.ANSWER, message.mailbox, message.outcome, message.version
            )
        case Hello():
            return _HELLO.pack(
                MAGIC,
                Kind.HELLO,
                message.key,
                message.total_parameters,
                message.total_features,
                message.num_mailboxes,
                message.depth,
            )
        case Welcome():
            return _WELCOME.pack(
                MAGIC,
                Kind.WELCOME,
                message.num_parameters,
                message.num_features,
                message.num_buffers,
            )
        case PullRequest():
            return _PULL_REQUEST.pack(MAGIC, Kind.PULL_REQUEST, message.statistics)
        case PermitRequest():
            return _PERMIT_REQUEST.pack(MAGIC, Kind.PERMIT_REQUEST, message.mailbox)
        case Weights():
            return _WEIGHTS.pack(MAGIC, Kind.WEIGHTS, message.version, message.statistics)
        case RoundedWeights():
            return _ROUNDED_WEIGHTS.pack(
                MAGIC,
                Kind.ROUNDED_WEIGHTS,
                message.version,
                message.num_bytes,
                message.statistics,
            )
        case Follow():
            return _FOLLOW.pack(MAGIC, Kind.FOLLOW, message.generation)
        case Challenge():
            return _CHALLENGE.pack(MAGIC, Kind.CHALLENGE, message.nonce)
        case Introduction():
            return _INTRODUCTION.pack(
                MAGIC,
                Kind.INTRODUCTION,
                message.proof,
                message.nonce,
                message.partition,
                message.total_parameters,
                message.total_features,
                message.num_mailboxes,
                message.depth,
                message.wire,
            )
        case Admission():
            return _ADMISSION.pack(
                MAGIC,
                Kind.ADMISSION,
                message.proof,
                message.num_parameters,
                message.num_features,
            )


def decode(data: bytes) -> Message:
    """Return the message that these bytes are.

    Raises:
        MalformedMessage: They are none.
    """
    try:
        magic, kind = _PREFIX.unpack_from(data)
        if magic != MAGIC:
            raise MalformedMessage("bytes that do not start as a message does")
        if kind == Kind.PUSH:
            return _decode_push(data)
        if kind == Kind.ANSWER:
            _, _, mailbox, outcome, version = _ANSWER.unpack(data)
            return Answer(mailbox=mailbox, outcome=Outcome(outcome), version=version)
        if kind == Kind.HELLO:
            _, _, key, parameters, features, mailboxes, depth = _HELLO.unpack(data)
            return Hello(
                key=key,
                total_parameters=parameters,
                total_features=features,
                num_mailboxes=mailboxes,
                depth=depth,
            )
        if kind == Kind.WELCOME:
            _, _, parameters, features, buffers = _WELCOME.unpack(data)
            return Welcome(num_parameters=parameters, num_features=features, num_buffers=buffers)
        if kind == Kind.PERMIT_REQUEST:
            return PermitRequest(mailbox=_PERMIT_REQUEST.unpack(data)[2])
        if kind in _BETWEEN_MACHINES:
            return _BETWEEN_MACHINES[kind](data)
    except (struct.error, ValueError) as error:
        raise MalformedMessage(f"a message of {len(data)} bytes: {error}") from None
    raise MalformedMessage(f"a message of unknown kind {kind}")


def encode_all(messages: Sequence[Push | PermitRequest] | Sequence[Answer]) -> bytes:
    """Return several messages as one packet."""
    return b"".join([encode(message) for message in messages])


def decode_all(packet: bytes) -> list[Message]:
    """Return all messages of a packet; several may be pushes, permit requests or answers.

    Raises:
        MalformedMessage: The bytes are no packet.
    """
    messages, at = [], 0
    while True:
        stop = at + _length(packet, at)
        if stop >= len(packet):
            messages.append(decode(packet[at:] if at else packet))
            return messages
        messages.append(decode(packet[at:stop]))
        at = stop


def _length(packet: bytes, at: int) -> int:
    """How long the message that begins there says that it is; at least 1."""
    kind = packet[at + len(MAGIC)] if at + len(MAGIC) < len(packet) else 0
    if kind == Kind.ANSWER:
        return _ANSWER.size
    if kind == Kind.PUSH and at + _PUSH.size <= len(packet):
        return _PUSH.size + 4 * int(_COUNT.unpack_from(packet, at + _PUSH.size - _COUNT.size)[0])
    if kind == Kind.PERMIT_REQUEST:
        return _PERMIT_REQUEST.size
    return len(packet)


def _decode_push(data: bytes) -> Push:
    fields = _PUSH.unpack_from(data)
    _, _, mailbox, replica, epoch, examples, version, loss, norm, wire, count = fields
    if not 1 <= count <= MAX_BATCHES:
        raise MalformedMessage(f"a push that names {count} mini-batches")
    if len(data) != _PUSH.size + 4 * count:
        raise MalformedMessage(f"a push of {len(data)} bytes that names {count} mini-batches")
    batches = _INDICES[count].unpack_from(data, _PUSH.size)
    if count > 1 and len(set(batches)) != count:
        raise MalformedMessage("a push that names a mini-batch twice")
    return Push(
        mailbox=mailbox,
        replica=replica,
        epoch=epoch,
        batches=batches,
        examples=examples,
        version=version,
        loss=loss,
        gradient_norm=norm,
        wire=_WIRES[wire] if wire in _WIRES else WireDtype(wire),
    )


def _flag(value: int) -> bool:
    if value not in (0, 1):
        raise MalformedMessage(f"a flag that is {value}")
    return bool(value)


def _decode_pull_request(data: bytes) -> PullRequest:
    _PULL_REQUEST.unpack(data)
    return PullRequest(statistics=_flag(data[-1]))


def _decode_weights(data: bytes) -> Weights:
    _, _, version, _ = _WEIGHTS.unpack(data)
    return Weights(version=version, statistics=_flag(data[-1]))


def _decode_rounded_weights(data: bytes) -> RoundedWeights:
    _, _, version, num_bytes, _ = _ROUNDED_WEIGHTS.unpack(data)
    return RoundedWeights(version=version, num_bytes=num_bytes, statistics=_flag(data[-1]))


def _decode_follow(data: bytes) -> Follow:
    return Follow(generation=_FOLLOW.unpack(data)[2])


def _decode_challenge(data: bytes) -> Challenge:
    return Challenge(nonce=_CHALLENGE.unpack(data)[2])


def _decode_introduction(data: bytes) -> Introduction:
    fields = _INTRODUCTION.unpack(data)
    _, _, proof, nonce, partition, parameters, features, mailboxes, depth, wire = fields
    return Introduction(
        proof=proof,
        nonce=nonce,
        partition=partition,
        total_parameters=parameters,
        total_features=features,
        num_mailboxes=mailboxes,
        depth=depth,
        wire=WireDtype(wire),
    )


def _decode_admission(data: bytes) -> Admission:
    _, _, proof, parameters, features = _ADMISSION.unpack(data)
    return Admission(proof=proof, num_parameters=parameters, num_features=features)


_BETWEEN_MACHINES: dict[int, Callable[[bytes], Message]] = {
    Kind.PULL_REQUEST: _decode_pull_request,
    Kind.WEIGHTS: _decode_weights,
    Kind.ROUNDED_WEIGHTS: _decode_rounded_weights,
    Kind.FOLLOW: _decode_follow,
    Kind.CHALLENGE: _decode_challenge,
    Kind.INTRODUCTION: _decode_introduction,
    Kind.ADMISSION: _decode_admission,
}

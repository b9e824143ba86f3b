"""The messages between replicas and partitions: small frozen dataclasses, and their bytes.

Everything is fixed-width little-endian behind a 4-byte magic, a version and a kind. Nothing is
unpickled, and every length is checked before it is used: `decode` raises `MalformedMessage` for
any other bytes. Gradients and weights are not in here; they travel beside these, in shared memory
or, between machines, as the payload that follows a message.

On one machine a connection begins with `Hello` and `Welcome`. Between machines it begins with
`Challenge`, `Introduction` and `Admission`, and weights are asked for by `PullRequest`.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from downpour.paramserver.errors import MalformedMessage

MAGIC = b"DPR1"
KEY_BYTES = 32
MAX_MAILBOXES = 256
"""Mailboxes of one connection. So many answers always fit into a socket's buffer (of 208 KiB, the
kernel's default), so a partition need never wait for a client that is slow to take them."""
MAX_MESSAGE = 8192
"""Bytes of the longest message or packet of messages."""
MAX_BATCHES = 1024
"""Mini-batches that one push may name."""
NONCE_BYTES = PROOF_BYTES = 32


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


class WireDtype(enum.IntEnum):
    """How gradients travel between machines. Weights and moments always do as float32."""

    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3


class Outcome(enum.IntEnum):
    """What became of a push on one partition."""

    APPLIED = 1
    DUPLICATE = 2
    """The partition holds all of the push's mini-batches already."""
    REFUSED_LOSS = 3
    """The loss is not finite; settled as refused."""
    REFUSED_GRADIENT = 4
    """The gradient or the moments are not finite, or enormous; settled as refused."""
    REFUSED_MIXED = 5
    """Some of the push's mini-batches are held and some are not; nothing was changed."""
    REFUSED_UNKNOWN = 6
    """A mini-batch, mailbox or version that does not exist; nothing was changed."""
    REFUSED_STALE = 7
    """Dropped by the staleness policy: to be computed again; nothing was changed."""
    REFUSED_QUARANTINE = 8
    """From a replica that is quarantined: to be computed by another; nothing was changed."""
    PERMITTED = 9
    """Of no push: the step that asked for a permit may begin (`PermitRequest`)."""

    @property
    def settled(self) -> bool:
        """Whether the partition has settled the mini-batches: it will never take them again."""
        return self not in _UNSETTLED


_UNSETTLED = (
    Outcome.REFUSED_MIXED,
    Outcome.REFUSED_UNKNOWN,
    Outcome.REFUSED_STALE,
    Outcome.REFUSED_QUARANTINE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """First message of a connection; the memory of the mailboxes and pins comes with it."""

    key: bytes = field(repr=False)
    """The run's key, `KEY_BYTES` long."""
    total_parameters: int
    total_features: int
    num_mailboxes: int
    """Mailboxes in the memory that comes along; 0 for a client that only pulls."""
    depth: int
    """Sets of moments a mailbox holds (`n_push`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome:
    """The partition's answer to `Hello`; its published weights' memory comes with it."""

    num_parameters: int
    num_features: int
    num_buffers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """A gradient is in a mailbox: of which mini-batches, and computed on which version."""

    mailbox: int
    replica: int
    epoch: int
    batches: tuple[int, ...]
    """Indices of the mini-batches whose gradients were added up (`n_push` of them)."""
    examples: int
    version: int
    """Version of this partition that the gradient was computed on."""
    loss: float
    """Mean loss over the examples."""
    gradient_norm: float
    """Euclidean norm of the whole gradient, over all partitions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of the push from a mailbox, which is free again."""

    mailbox: int
    outcome: Outcome
    version: int
    """The partition's version after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PullRequest:
    """Asks for the weights as they are when everything queued before them has been sent."""

    statistics: bool
    """Whether the BN statistics are wanted, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PermitRequest:
    """Asks whether the step that will push from a mailbox may begin, if steps begin by permit.

    The answer, `PERMITTED`, comes once it may. It has to come before the weights are pulled.
    """

    mailbox: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Heads a payload: the partition's weights, then its statistics if they were asked for."""

    version: int
    statistics: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Challenge:
    """The partition's first message between machines."""

    nonce: bytes = field(repr=False)
    """Fresh for each connection, so that no answer to it can be used twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Introduction:
    """The client's answer to `Challenge`."""

    proof: bytes = field(repr=False)
    """That it has the run's key: HMAC-SHA256 over both nonces and all that follows here."""
    nonce: bytes = field(repr=False)
    """The client's own."""
    partition: int
    """Index of the partition that it means to reach."""
    total_parameters: int
    total_features: int
    num_mailboxes: int
    """Pushes that it may have in flight; 0 for a client that only pulls."""
    depth: int
    """The most mini-batches in a push (`n_push`); 0 for a client that only pulls."""
    wire: WireDtype
    """How its gradients travel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """The partition's answer to `Introduction`."""

    proof: bytes = field(repr=False)
    """That the partition has the run's key, too."""
    num_parameters: int
    num_features: int


_PREFIX = struct.Struct("<4sB")
_HELLO = struct.Struct(f"<4sB{KEY_BYTES}sQQII")
_WELCOME = struct.Struct("<4sBQQI")
_PUSH = struct.Struct("<4sBIIIIQddI")
_COUNT = struct.Struct("<I")  # the last of a push's head
_ANSWER = struct.Struct("<4sBIBQ")
_PULL_REQUEST = struct.Struct("<4sB?")
_PERMIT_REQUEST = struct.Struct("<4sBI")
_WEIGHTS = struct.Struct("<4sBQ?")
_CHALLENGE = struct.Struct(f"<4sB{NONCE_BYTES}s")
_INTRODUCTION = struct.Struct(f"<4sB{PROOF_BYTES}s{NONCE_BYTES}sIQQIIB")
_ADMISSION = struct.Struct(f"<4sB{PROOF_BYTES}sQQ")
_INDICES = [struct.Struct(f"<{n}I") for n in range(MAX_BATCHES + 1)]

Message = (
    Hello
    | Welcome
    | Push
    | Answer
    | PullRequest
    | PermitRequest
    | Weights
    | Challenge
    | Introduction
    | Admission
)


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
    _, _, mailbox, replica, epoch, examples, version, loss, norm, count = _PUSH.unpack_from(data)
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
    Kind.CHALLENGE: _decode_challenge,
    Kind.INTRODUCTION: _decode_introduction,
    Kind.ADMISSION: _decode_admission,
}

"""What replicas and partitions say to each other: small frozen dataclasses, and their bytes.

Everything is fixed-width little-endian behind a 4-byte magic, a version and a kind. Nothing is
unpickled, and every length is checked before it is used: `decode` raises `MalformedMessage` for
any other bytes. Gradients and weights are not in here; they travel beside these, in shared memory.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from paramserver.errors import MalformedMessage

MAGIC = b"DPR1"
KEY_BYTES = 32
MAX_MAILBOXES = 256
"""Mailboxes of one connection. So many answers always fit into a socket's buffer (of 208 KiB, the
kernel's default), so a partition need never wait for a client that is slow to take them."""
MAX_BATCHES = 1024
"""Mini-batches that one push may name."""


class Kind(enum.IntEnum):
    """The first byte after the magic."""

    HELLO = 1
    WELCOME = 2
    PUSH = 3
    ANSWER = 4


class Outcome(enum.IntEnum):
    """What became of a push on one partition."""

    APPLIED = 1
    DUPLICATE = 2
    """The partition holds all of the push's mini-batches already."""
    REFUSED_LOSS = 3
    """The loss is not finite; settled as refused."""
    REFUSED_GRADIENT = 4
    """The gradient or the moments are not finite; settled as refused."""
    REFUSED_MIXED = 5
    """Some of the push's mini-batches are held and some are not; nothing was changed."""
    REFUSED_UNKNOWN = 6
    """A mini-batch, mailbox or version that does not exist; nothing was changed."""
    REFUSED_STALE = 7
    """Dropped by the staleness policy: to be computed again; nothing was changed."""

    @property
    def settled(self) -> bool:
        """Whether the partition has now taken note of the mini-batches for good."""
        return self not in _UNSETTLED


_UNSETTLED = (Outcome.REFUSED_MIXED, Outcome.REFUSED_UNKNOWN, Outcome.REFUSED_STALE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """First message of a connection; the mailboxes' memory comes with it unless there are none."""

    key: bytes
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
    num_slots: int


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


_PREFIX = struct.Struct("<4sB")
_HELLO = struct.Struct(f"<4sB{KEY_BYTES}sQQII")
_WELCOME = struct.Struct("<4sBQQI")
_PUSH = struct.Struct("<4sBIIIIQddI")
_ANSWER = struct.Struct("<4sBIBQ")
_INDICES = [struct.Struct(f"<{n}I") for n in range(MAX_BATCHES + 1)]

Message = Hello | Welcome | Push | Answer


def encode(message: Message) -> bytes:
    """The message's bytes."""
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
                message.num_slots,
            )


def decode(data: bytes) -> Message:
    """The message that these bytes are, or `MalformedMessage`."""
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
            _, _, parameters, features, slots = _WELCOME.unpack(data)
            return Welcome(num_parameters=parameters, num_features=features, num_slots=slots)
    except (struct.error, ValueError) as error:
        raise MalformedMessage(f"a message of {len(data)} bytes: {error}") from None
    raise MalformedMessage(f"a message of unknown kind {kind}")


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

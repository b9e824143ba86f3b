"""The messages between replicas and partitions: small frozen dataclasses.

Gradients and weights are not in here; they travel beside these, in shared memory or, between
machines, as the payload that follows a message. Not here: a message's bytes (`codec`).

On one machine a connection begins with `Hello` and `Welcome`. Between machines it begins with
`Challenge`, `Introduction` and `Admission`, and weights are asked for by `PullRequest`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

KEY_BYTES = 32
MAX_MAILBOXES = 256
"""Mailboxes of one connection. So many answers always fit into a socket's buffer (of 208 KiB, the
kernel's default), so a partition need never wait for a client that is slow to take them."""
MAX_MESSAGE = 8192
"""Bytes of the longest message or packet of messages."""
MAX_BATCHES = 1024
"""Mini-batches that one push may name."""
NONCE_BYTES = PROOF_BYTES = 32


class WireDtype(enum.IntEnum):
    """How gradients travel between machines. BN's moments and statistics always do as float32."""

    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    INT8 = 4
    """Gradients in 8 bits; weights travel in fewer bits, too (`transport.wire`)."""
    INT4 = 5
    """As `INT8`, with gradients in 4 bits."""

    @property
    def rounds_weights(self) -> bool:
        """Whether weights travel on a grid, and not as float32."""
        return self in (WireDtype.INT8, WireDtype.INT4)


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
    wire: WireDtype = WireDtype.FLOAT32
    """How the gradient, and the weights that it was computed on, came to where they were wanted;
    `FLOAT32` on one machine."""


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
class RoundedWeights:
    """As `Weights`, but the weights are what `transport.wire.weights` makes of them."""

    version: int
    statistics: bool
    num_bytes: int
    """Of the weights."""


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
    """How its gradients travel, and the weights that it pulls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """The partition's answer to `Introduction`."""

    proof: bytes = field(repr=False)
    """That the partition has the run's key, too."""
    num_parameters: int
    num_features: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Follow:
    """Between machines: who connects is no process of replicas, and wants to follow the partition.

    What the two say from then on is `transport.network.replication`'s.
    """

    generation: int
    """Counts the partition's followers: of two, the later one replaces the other."""


Message = (
    Hello
    | Welcome
    | Push
    | Answer
    | PullRequest
    | PermitRequest
    | Weights
    | RoundedWeights
    | Follow
    | Challenge
    | Introduction
    | Admission
)

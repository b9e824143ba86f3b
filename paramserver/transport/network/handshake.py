"""How two sides of a network connection come to trust each other, before anything else.

    client                                   partition
                    TLS 1.3, both with a certificate of this run (unless not encrypted)
                    <- Challenge(nonce)
    Introduction(nonce', proof) ->
                    <- Admission(proof')

A proof is an HMAC with the run's key over both nonces and what the message says: it shows the key
without sending it, and is of no use on another connection. Encrypted, the nonces are known to the
two sides alone, and the keys of the stream that follows come from them. Not encrypted, the proofs
keep strangers out, but not one who sits on the path.

Each side's part is a generator over a `Pipe`, so that the client may wait for each message
(`connect`) and the partition for none (`acceptor`).
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Generator
from dataclasses import dataclass, field, replace

from downpour.paramserver.codec import decode, encode
from downpour.paramserver.errors import MalformedMessage, NotAuthenticated
from downpour.paramserver.messages import (
    MAX_BATCHES,
    MAX_MAILBOXES,
    NONCE_BYTES,
    PROOF_BYTES,
    Admission,
    Challenge,
    Introduction,
    Message,
)
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.transport.network import security
from downpour.paramserver.transport.network.pipe import Pipe
from downpour.paramserver.transport.network.security import TrafficKeys

MAX_HANDSHAKE_MESSAGE = 512
_LENGTH = struct.Struct("<H")


def _send(pipe: Pipe, message: Message) -> None:
    data = encode(message)
    pipe.send(_LENGTH.pack(len(data)) + data)


def _receive(pipe: Pipe) -> Generator[None, None, Message]:
    while len(pipe.come) < _LENGTH.size:
        yield
    (length,) = _LENGTH.unpack_from(pipe.come)
    if not 0 < length <= MAX_HANDSHAKE_MESSAGE:
        raise MalformedMessage(f"a word of {length} bytes in a handshake")
    while len(pipe.come) < _LENGTH.size + length:
        yield
    data = bytes(pipe.come[_LENGTH.size : _LENGTH.size + length])
    del pipe.come[: _LENGTH.size + length]
    return decode(data)


def _expect_nothing_more(pipe: Pipe) -> None:
    if pipe.come:
        raise MalformedMessage("more than a handshake")


@dataclass(frozen=True, kw_only=True)
class HandshakeResult:
    """What a handshake comes to."""

    introduction: Introduction
    keys: TrafficKeys = field(repr=False)


def handshake_as_partition(
    pipe: Pipe, key: bytes, partition: Partition
) -> Generator[None, None, HandshakeResult]:
    """The partition's part; yields when it needs to hear from the client.

    Raises:
        NotAuthenticated: The client has no certificate of this run, or another key.
        MalformedMessage: It says something else, or means another partition or model.
    """
    yield from pipe.begin()
    nonce = secrets.token_bytes(NONCE_BYTES)
    _send(pipe, Challenge(nonce=nonce))
    introduction = yield from _receive(pipe)
    if not isinstance(introduction, Introduction):
        raise MalformedMessage(f"{type(introduction).__name__} in place of an introduction")
    proof = security.introduction_proof(key, nonce, introduction)
    if not hmac.compare_digest(introduction.proof, proof):
        raise NotAuthenticated("an introduction without the run's key")
    _expect_nothing_more(pipe)
    shape = (introduction.total_parameters, introduction.total_features)
    if shape != (partition.total_parameters, partition.total_features):
        raise MalformedMessage(f"an introduction for a model of {shape} parameters and features")
    if introduction.partition != partition.index:
        raise MalformedMessage(f"an introduction to partition {introduction.partition}")
    num, depth = introduction.num_mailboxes, introduction.depth
    if num > MAX_MAILBOXES or depth > MAX_BATCHES or bool(num) != bool(depth):
        raise MalformedMessage(f"an introduction with {num} mailboxes of depth {depth}")
    admission = Admission(
        proof=bytes(PROOF_BYTES),
        num_parameters=partition.num_parameters,
        num_features=partition.num_features,
    )
    proof = security.admission_proof(key, nonce, introduction, admission)
    _send(pipe, replace(admission, proof=proof))
    keys = security.traffic_keys(key, nonce, introduction.nonce)
    return HandshakeResult(introduction=introduction, keys=keys)


def handshake_as_client(
    pipe: Pipe, key: bytes, partition: Partition, introduction: Introduction
) -> Generator[None, None, HandshakeResult]:
    """The client's part; yields when it needs to hear from the partition.

    Args:
        pipe: The stream.
        key: The run's key.
        partition: The one that is meant.
        introduction: What to say; nonce and proof are filled in here.

    Raises:
        NotAuthenticated: The partition has no certificate of this run, or another key.
        MalformedMessage: It says something else, or is another partition.
    """
    yield from pipe.begin()
    challenge = yield from _receive(pipe)
    if not isinstance(challenge, Challenge):
        raise MalformedMessage(f"{type(challenge).__name__} in place of a challenge")
    introduction = replace(introduction, nonce=secrets.token_bytes(NONCE_BYTES))
    proof = security.introduction_proof(key, challenge.nonce, introduction)
    introduction = replace(introduction, proof=proof)
    _send(pipe, introduction)
    admission = yield from _receive(pipe)
    if not isinstance(admission, Admission):
        raise MalformedMessage(f"{type(admission).__name__} in place of an admission")
    proof = security.admission_proof(key, challenge.nonce, introduction, admission)
    if not hmac.compare_digest(admission.proof, proof):
        raise NotAuthenticated(f"partition {partition.index} does not have the run's key")
    _expect_nothing_more(pipe)
    if (admission.num_parameters, admission.num_features) != (
        partition.num_parameters,
        partition.num_features,
    ):
        raise MalformedMessage("the partition that answered is not the one asked for")
    keys = security.traffic_keys(key, challenge.nonce, introduction.nonce)
    return HandshakeResult(introduction=introduction, keys=keys)

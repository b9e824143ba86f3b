"""The handshake, both sides in turns, without a socket."""

import contextlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from downpour.paramserver.access import Access
from downpour.paramserver.errors import (
    MalformedMessage,
    NotAuthenticated,
    ServerError,
)
from downpour.paramserver.messages import NONCE_BYTES, PROOF_BYTES, Hello, Introduction, WireDtype
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.transport.network import security
from downpour.paramserver.transport.network.acceptor import NetworkListen
from downpour.paramserver.transport.network.handshake import (
    HandshakeResult,
    handshake_as_client,
    handshake_as_partition,
)
from downpour.paramserver.transport.network.pipe import Pipe, PlainPipe, TlsPipe
from downpour.paramserver.transport.network.security import (
    RunCredentials,
    client_tls,
    issue,
    partition_tls,
)

torch.set_num_threads(1)


(PARTITION,) = split(num_parameters=64, num_features=3, num_decayed=0, num_partitions=1)


KEY = b"k" * 32


HELLO = Introduction(
    proof=bytes(PROOF_BYTES),
    nonce=bytes(NONCE_BYTES),
    partition=0,
    total_parameters=64,
    total_features=3,
    num_mailboxes=2,
    depth=1,
    wire=WireDtype.FLOAT32,
)


@pytest.fixture(scope="module")
def run() -> RunCredentials:
    return issue()


def converse(
    pipes: tuple[Pipe, Pipe],
    introduction: Introduction = HELLO,
    keys: tuple[bytes, bytes] = (KEY, KEY),
) -> list[HandshakeResult]:
    """Both sides of a handshake, in turns, until both are through; raises what either raises."""
    talks = [
        handshake_as_client(pipes[0], keys[0], PARTITION, introduction),
        handshake_as_partition(pipes[1], keys[1], PARTITION),
    ]
    done: dict[int, HandshakeResult] = {}
    for _ in range(20):
        for me in (0, 1):
            if me not in done:
                try:
                    next(talks[me])
                except StopIteration as end:
                    done[me] = end.value
            if said := pipes[me].take():
                pipes[1 - me].feed(said)
        if len(done) == 2:
            return [done[0], done[1]]
    raise AssertionError("the handshake does not end")


def tls(ours: security.Credentials, theirs: security.Credentials) -> tuple[Pipe, Pipe]:
    return (
        TlsPipe(client_tls(ours), is_server=False),
        TlsPipe(partition_tls(theirs), is_server=True),
    )


def test_a_handshake_gives_both_sides_the_same_fresh_keys(run: RunCredentials) -> None:
    seen = set()
    for pipes in ((PlainPipe(), PlainPipe()), tls(run.clients, run.partitions)):
        client, partition = converse(pipes)
        assert client.keys == partition.keys
        assert client.introduction == partition.introduction
        seen |= {client.keys.to_client, client.keys.to_partition}
    assert len(seen) == 4


def test_another_key_is_refused_on_either_side(run: RunCredentials) -> None:
    for pipes in ((PlainPipe(), PlainPipe()), tls(run.clients, run.partitions)):
        with pytest.raises(NotAuthenticated, match="introduction without the run's key"):
            converse(pipes, keys=(b"x" * 32, KEY))


@pytest.mark.parametrize("who", ["stranger", "client as partition", "partition as client"])
def test_a_certificate_for_something_else_is_refused(run: RunCredentials, who: str) -> None:
    ours, theirs = {
        "stranger": (issue().clients, run.partitions),
        "client as partition": (run.clients, run.clients),
        "partition as client": (run.partitions, run.partitions),
    }[who]
    with pytest.raises(NotAuthenticated, match="TLS"):
        converse(tls(ours, theirs))


@pytest.mark.parametrize(
    "changes",
    [
        {"total_parameters": 65},
        {"total_features": 4},
        {"partition": 1},
        {"num_mailboxes": 257},
        {"num_mailboxes": 0},
        {"depth": 1025},
        {"depth": 0},
    ],
)
def test_an_introduction_that_does_not_fit(changes: dict[str, int]) -> None:
    with pytest.raises(MalformedMessage):
        converse((PlainPipe(), PlainPipe()), replace(HELLO, **changes))  # type: ignore[arg-type]


@given(st.binary(min_size=1, max_size=700))
def test_random_bytes_in_place_of_a_handshake(data: bytes) -> None:
    pipe = PlainPipe()
    talk = handshake_as_partition(pipe, KEY, PARTITION)
    next(talk)
    pipe.feed(data)
    with contextlib.suppress(ServerError):
        assert next(talk) is None, "it waits for more"


def test_a_recorded_introduction_is_of_no_use_a_second_time() -> None:
    record = []

    class Recorder(PlainPipe):
        def take(self) -> bytes:
            record.append(data := super().take())
            return data

    converse((Recorder(), PlainPipe()))
    pipe = PlainPipe()
    talk = handshake_as_partition(pipe, KEY, PARTITION)
    next(talk)
    pipe.feed(b"".join(record))
    with pytest.raises(NotAuthenticated):
        next(talk)


def test_secrets_are_not_shown(run: RunCredentials) -> None:
    greeted = converse((PlainPipe(), PlainPipe()))[0]
    nonce = greeted.introduction.nonce
    shown = repr(
        [
            run,
            run.clients,
            greeted,
            greeted.keys,
            Access(credentials=run.clients),
            NetworkListen(credentials=run.partitions),
            Hello(key=KEY, total_parameters=1, total_features=0, num_mailboxes=0, depth=1),
        ]
    )
    for secret in (KEY, nonce, greeted.keys.to_client, greeted.keys.to_partition):
        assert repr(secret)[2:-1] not in shown
    assert "PRIVATE KEY" not in shown
    assert "CERTIFICATE" not in shown

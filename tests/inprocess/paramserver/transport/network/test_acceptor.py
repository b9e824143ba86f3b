"""Strangers of every kind before the handshake is done, and that nobody listens unless told to."""

import contextlib
import dataclasses
import logging
import random
import socket
import ssl

import pytest
import torch

from downpour.paramserver.access import Access
from downpour.paramserver.client import ParameterClient
from downpour.paramserver.errors import (
    ConnectionLost,
    NotAuthenticated,
    ServerError,
)
from downpour.paramserver.messages import (
    KEY_BYTES,
    Outcome,
)
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.server.connections import HANDSHAKE_DEADLINE_S
from downpour.paramserver.server.server import PartitionServer
from downpour.paramserver.transport.network.acceptor import (
    MAX_HANDSHAKES,
    NetworkAcceptor,
    NetworkListen,
)
from downpour.paramserver.transport.network.security import (
    Credentials,
    RunCredentials,
    client_tls,
    issue,
)
from tests.helpers.networked import (
    LIES,
    RUN,
    Networked,
    hung_up_on,
    say,
    unharmed,
)
from tests.helpers.served_partitions import EXACT, KEY, Cluster, F, P, by_deadline, push

torch.set_num_threads(1)


def client_context(credentials: Credentials | None) -> ssl.SSLContext:
    if credentials is not None:
        return client_tls(credentials)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.mark.parametrize("words", ["random", "http", "truncated"])
def test_a_stranger_at_the_door(one: Networked, words: str) -> None:
    data = {
        "random": random.Random(3).randbytes(4096),
        "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "truncated": b"\x16\x03\x01" if one.keys else b"\x40",
    }[words]
    reason = "NotAuthenticated" if one.keys else "MalformedMessage"
    with unharmed(one, "ConnectionLost" if words == "truncated" else reason):
        peer = one.socket()
        peer.sendall(data)
        if words == "truncated":
            peer.shutdown(socket.SHUT_WR)
        assert hung_up_on(peer)


@pytest.mark.parametrize("who", ["without a certificate", "of another run", "as a partition"])
def test_tls_with_the_wrong_certificate(who: str) -> None:
    credentials = {
        "without a certificate": None,
        "of another run": issue().clients,
        "as a partition": dataclasses.replace(RUN.partitions),
    }[who]
    context = client_context(credentials)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.closing(Networked()) as one, unharmed(one, "NotAuthenticated"):
        peer = context.wrap_socket(one.socket())
        # With TLS 1.3 a client believes that it is in until it hears otherwise.
        with contextlib.closing(peer), contextlib.suppress(ssl.SSLError, ConnectionError):
            while peer.recv(100):
                pass


def test_another_runs_key(one: Networked, driven: str) -> None:
    with unharmed(one, "NotAuthenticated"), pytest.raises(NotAuthenticated, match="another run"):
        ParameterClient(one.endpoints, key=b"x" * KEY_BYTES, access=one.access())


def test_another_runs_partition() -> None:
    with contextlib.closing(Networked(keys=issue())) as one:
        access = Access(transport="network", credentials=RUN.clients)
        with pytest.raises(NotAuthenticated, match="TLS"):
            ParameterClient(one.endpoints, key=KEY, access=access)
        by_deadline(lambda: one.dropped() == {"NotAuthenticated": 1})


def test_a_client_that_encrypts_and_a_partition_that_does_not() -> None:
    with contextlib.closing(Networked(keys=None)) as one:
        access = Access(transport="network", credentials=RUN.clients)
        with pytest.raises((NotAuthenticated, ConnectionLost)):
            ParameterClient(one.endpoints, key=KEY, access=access)
        by_deadline(lambda: sum(one.dropped().values()) == 1)


def test_those_who_never_finish_their_handshake_are_dropped_in_time(
    keys: RunCredentials | None,
) -> None:
    now = [0.0]
    with contextlib.closing(Networked(keys=keys, clock=lambda: now[0])) as one:
        client = one.client(num_mailboxes=1)
        silent, half = one.socket(), one.socket()
        half.sendall(b"\x16\x03\x01\x02" if keys else b"\x40")
        acceptor = one.servers[0]._network
        assert isinstance(acceptor, NetworkAcceptor)
        by_deadline(lambda: len(acceptor._pending) == 2)
        now[0] += HANDSHAKE_DEADLINE_S + 1
        assert hung_up_on(silent)
        assert hung_up_on(half)
        by_deadline(lambda: one.dropped() == {"no hello": 2})
        assert push(client, 1) is Outcome.APPLIED


def test_no_more_than_so_many_handshakes_at_a_time() -> None:
    with contextlib.closing(Networked()) as one, unharmed(one, "too many handshakes"):
        peers = [one.socket() for _ in range(MAX_HANDSHAKES + 1)]
        assert hung_up_on(peers[-1])
        for peer in peers:
            peer.close()


def test_nobody_listens_on_a_network_unless_told_to() -> None:
    with contextlib.closing(Cluster()) as cluster:
        assert cluster.servers[0].endpoint.network is None
        assert cluster.servers[0]._network.address is None
    with contextlib.closing(Networked()) as one:
        assert one.address.host == "127.0.0.1"


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ServerError, match=r"cannot listen on 203\.0\.113\.9.*--listen"):
        PartitionServer(
            partition=split(num_parameters=P, num_features=F, num_decayed=0, num_partitions=1)[0],
            config=EXACT,
            key=KEY,
            network=NetworkListen(host="203.0.113.9"),
        )


def test_keys_are_in_no_log(keys: RunCredentials | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with contextlib.closing(Networked(keys=keys)) as one:
        push(one.client(num_mailboxes=1), 1)
        with pytest.raises(NotAuthenticated):
            ParameterClient(one.endpoints, key=b"x" * KEY_BYTES, access=one.access())
        for lie in ("an answer", "no message"):
            channel = one.channel()
            say(channel, LIES[lie])
            assert hung_up_on(channel.socket)
        by_deadline(lambda: sum(one.dropped().values()) == 3)
        shown = caplog.text + repr(one.servers[0]) + repr(one.endpoints) + repr(one.access())
    assert "refused a connection" in caplog.text
    assert "closed a connection" in caplog.text
    for secret in (KEY, b"x" * KEY_BYTES):
        assert secret.decode() not in shown
        assert secret.hex() not in shown
    assert "PRIVATE KEY" not in shown

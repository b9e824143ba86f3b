"""What somebody who has no key or token is told, port by port, and which ports there are."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import os
import socket
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

import grpc

QUESTIONS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",  # control plane
    "/ray.rpc.NodeManagerService/GetSystemConfig",  # a node's raylet
    "/ray.rpc.ObjectManagerService/Pull",  # the same one's object store
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",  # every actor and driver
    "/ray.rpc.ReporterService/HealthCheck",  # a node's agent
    "/ray.rpc.RayletDriver/ClusterInfo",  # the head, to clients from afar
    "/ray.serve.ASGIService/HandleRequest",  # a replica of Serve
)
ORDERS = ("/api/jobs/", "/api/job_agent/jobs/", "/get_or_create_runtime_env")
"""Where Ray takes what it is to run, over HTTP."""
_LISTENING = "0A"


def asked_without_token(address: str) -> str:
    """What a port says to somebody who asks each of Ray's services something without a token.

    `let in`, or `UNAUTHENTICATED` where it is one of them; else what the last of them came to.
    """
    words = []
    with grpc.insecure_channel(address) as channel:
        for question in QUESTIONS:
            try:
                channel.unary_unary(question)(b"", timeout=10)
                return "let in"
            except grpc.RpcError as error:
                words.append(str(error.code().name))
            if words[-1] in ("UNAUTHENTICATED", "UNAVAILABLE"):  # the latter is no gRPC at all
                break
    return words[-1]


def ordered_without_token(address: str, port: int) -> list[int]:
    """HTTP statuses for orders without a token; empty where nobody speaks HTTP."""
    found = []
    for path in ORDERS:
        connection = http.client.HTTPConnection(address, port, timeout=10)
        with (
            contextlib.closing(connection),
            contextlib.suppress(OSError, http.client.HTTPException),
        ):
            connection.request("POST", path, body=b'{"entrypoint": "id"}')
            found.append(connection.getresponse().status)
    return found


def kind_of_refusal(address: str, port: int) -> Literal["grpc", "http", "ours"]:
    """Which kind of port has refused a stranger; an assertion error where one has not.

    `ours` is a partition's: neither gRPC nor HTTP, and hangs up.
    """
    word = asked_without_token(f"{address}:{port}")
    if word != "UNAVAILABLE":
        assert word == "UNAUTHENTICATED", f"{address}:{port}: {word}"
        return "grpc"
    if statuses := ordered_without_token(address, port):
        assert set(statuses) <= {401, 404, 405}, f"{address}:{port}: {statuses}"
        return "http"
    assert refuses(address, port), f"{address}:{port} answers"
    return "ours"


def refuses(address: str, port: int) -> bool:
    """Whether a stranger who talks to a port of ours is hung up on without a useful word."""
    for word in (b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04N.", os.urandom(512), b""):
        with socket.create_connection((address, port), timeout=15) as stranger:
            answer = b""
            with contextlib.suppress(ConnectionError, TimeoutError):
                stranger.sendall(word)
                if not word:
                    stranger.shutdown(socket.SHUT_WR)
                while piece := stranger.recv(4096):
                    answer += piece
            if len(answer) > 64:  # an alert of TLS is 7 bytes
                return False
    return True


def listening(pids: Collection[int]) -> dict[tuple[str, int], int]:
    """Which of these processes listen, by address and port; with the process that does."""
    owners = {inode: pid for pid in pids for inode in _sockets(pid)}
    found = {}
    for table, words in (("/proc/net/tcp", 1), ("/proc/net/tcp6", 4)):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and fields[9] in owners:
                place, _, port = fields[1].partition(":")
                raw = b"".join(bytes.fromhex(place[8 * i : 8 * i + 8])[::-1] for i in range(words))
                found[str(ipaddress.ip_address(raw)), int(port, 16)] = owners[fields[9]]
    return found


def beyond_loopback(address: str) -> bool:
    """Whether other machines can reach what listens there."""
    ip = ipaddress.ip_address(address)
    mapped = getattr(ip, "ipv4_mapped", None)
    return not (mapped or ip).is_loopback


def _sockets(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(entry)
                if target.startswith("socket:["):
                    yield target[8:-1]

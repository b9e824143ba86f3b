"""Claim: push + pull costs at most 2x a memcpy, or of large slices 2x a raw echo if encrypted.

One client pushes a gradient and pulls the weights, over and over, against a partition in another
process that applies momentum SGD. Beside it, in turns: a memcpy of the same bytes, once for the
gradient and once for the weights; and an echo of the same bytes over raw TCP on loopback, into
fixed buffers on both sides. A second echo seals what it sends and opens what it gets, block by
block with the same cipher, and does nothing else: what is left to be had once the bytes are to be
kept from others. A third takes what has come and then waits for a poll, as whoever serves many
peers has to. Over the network push + pull is also timed without the update, by pushing a mini-batch
that has been applied: that is the transport alone, as the echo is. What the update adds to that and
the sealed echo are together the *floor* of a small slice, which is moved by one thread.

All are timed in turns, so that each finds its memory as the others leave it, which is out of the
caches, and every process asleep. Then each is timed once more, one round trip after the other
without the others in between: its throughput.

    python -m downpour.benchmarks.push_pull [--json] [--repeat N] [--only SIZE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import secrets
import select
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection as Wire
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from rich.console import Console

from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, machine, median, show
from downpour.paramserver.access import Access
from downpour.paramserver.client import ParameterClient
from downpour.paramserver.messages import KEY_BYTES, Outcome
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import Momentum
from downpour.paramserver.server.server import PartitionServer
from downpour.paramserver.transport.endpoint import Endpoint
from downpour.paramserver.transport.network.acceptor import NetworkListen
from downpour.paramserver.transport.network.channel import BLOCK_BYTES, TAG_BYTES
from downpour.paramserver.transport.network.security import Credentials, issue

SIZES = {"0.4": 400_000, "4": 4_000_000, "45": 45_000_000}
"""Megabytes of weights -> bytes."""
ROUND_TRIPS = {"0.4": 100, "4": 20, "45": 5}
"""How many make up one round."""
DEADLINE_S = 60.0
BATCHES = 1 << 20

MEMCPY, SHARED = "memcpy", "shared"
ECHO, SEALED, POLLED = ECHOES = ("echo", "sealed-echo", "polled-echo")
_IN_TURNS = {
    MEMCPY: "memcpy of the same bytes",
    SHARED: "push + pull, shared memory, momentum SGD",
    ECHO: "raw TCP echo of the same bytes",
    SEALED: "the same, sealed and opened",
    POLLED: "the same as a server and its client wait: non-blocking, polled",
    "encrypted": "push + pull, network, momentum SGD",
    "encrypted-alone": "push + pull, network, without the update",
    "plain": "push + pull, network not encrypted, momentum SGD",
    "plain-alone": "push + pull, network not encrypted, without the update",
}
AGAIN = "-again"
TITLES = _IN_TURNS | {f"{n}{AGAIN}": f"{t}, one after the other" for n, t in _IN_TURNS.items()}
"""What is timed -> what that is, in the order in which it runs."""


class _Sealed:
    """Sends and receives a fixed number of bytes, sealed block by block, and does nothing else."""

    def __init__(self, peer: socket.socket, num_bytes: int) -> None:
        cipher = AESGCM(bytes(32))  # what the key is makes no difference to the time
        self._seal, self._open = cipher.encrypt_into, cipher.decrypt_into
        self._peer = peer
        self._blocks = [
            slice(start, min(start + BLOCK_BYTES, num_bytes))
            for start in range(0, num_bytes, BLOCK_BYTES)
        ]
        self._stage = memoryview(bytearray(BLOCK_BYTES + TAG_BYTES))

    def send(self, data: memoryview) -> None:
        for number, block in enumerate(self._blocks):
            sealed = self._stage[: block.stop - block.start + TAG_BYTES]
            self._seal(number.to_bytes(12, "little"), data[block], None, sealed)
            self._peer.sendall(sealed)

    def receive(self, into: memoryview) -> None:
        for number, block in enumerate(self._blocks):
            sealed = self._stage[: block.stop - block.start + TAG_BYTES]
            _fill(self._peer, sealed)
            self._open(number.to_bytes(12, "little"), sealed, None, into[block])


class _Polled:
    """Sends and receives on a non-blocking socket, and waits for it as for one of many."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._readable, self._writable = select.epoll(), select.epoll()
        self._readable.register(peer, select.EPOLLIN)
        self._writable.register(peer, select.EPOLLOUT)

    def send(self, data: memoryview) -> None:
        while len(data):
            try:
                data = data[self._peer.send(data) :]
            except BlockingIOError:
                self._writable.poll(DEADLINE_S)

    def receive(self, into: memoryview) -> None:
        while len(into):
            try:
                num = self._peer.recv_into(into)
            except BlockingIOError:
                self._readable.poll(DEADLINE_S)
                continue
            if not num:
                raise EOFError
            into = into[num:]


class _Plain:
    """Sends and receives on a socket of its own, and waits in the kernel."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer

    def send(self, data: memoryview) -> None:
        self._peer.sendall(data)

    def receive(self, into: memoryview) -> None:
        _fill(self._peer, into)


def _end_of(kind: str, peer: socket.socket, num_bytes: int) -> _Plain | _Sealed | _Polled:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setblocking(kind != POLLED)
    if kind == SEALED:
        return _Sealed(peer, num_bytes)
    return _Polled(peer) if kind == POLLED else _Plain(peer)


def _echo(wire: Wire, num_bytes: int, kind: str) -> None:
    """A child: echoes `num_bytes` at a time."""
    buffer = memoryview(bytearray(num_bytes))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        wire.send(listening.getsockname()[1])
        peer, _ = listening.accept()
        end = _end_of(kind, peer, num_bytes)
        with peer, contextlib.suppress(EOFError, ConnectionError):
            while True:
                end.receive(buffer)
                end.send(buffer)


def _fill(peer: socket.socket, buffer: memoryview) -> None:
    while len(buffer):
        num = peer.recv_into(buffer)
        if not num:
            raise EOFError
        buffer = buffer[num:]


def _serve(wire: Wire, num_parameters: int, key: bytes, credentials: Credentials | None) -> None:
    """A child: serves one partition until it is told to stop."""
    (partition,) = split(
        num_parameters=num_parameters, num_features=0, num_decayed=0, num_partitions=1
    )
    server = PartitionServer(
        partition=partition,
        config=UpdateConfig(
            rule=Momentum(momentum=0.9),
            schedule=Schedule(learning_rate=1e-6),
            batches_per_epoch=BATCHES,
            epoch_examples=BATCHES,
        ),
        key=key,
        weights=torch.zeros(num_parameters),
        network=NetworkListen(credentials=credentials),
    ).start()
    wire.send(server.endpoint)
    with contextlib.suppress(EOFError):
        wire.recv()
    server.stop()


class _Children:
    """Processes to talk to; a context manager that ends them."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._spawn = multiprocessing.get_context("spawn")

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, function: Callable[..., None], *arguments: Any) -> Any:
        """Start one; gives the first thing that it sends."""
        ours, theirs = self._spawn.Pipe()
        process = self._spawn.Process(target=function, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        self._stack.callback(_end, process, ours)
        if not ours.poll(DEADLINE_S):
            raise TimeoutError(f"{function.__name__} has not started for {DEADLINE_S:.0f} s")
        return ours.recv()

    def closing(self, thing: Any) -> Any:
        """Close it, too, before the processes end."""
        return self._stack.enter_context(contextlib.closing(thing))


def _end(process: Any, ours: Wire) -> None:
    ours.close()
    process.join(DEADLINE_S)
    if process.exitcode is None:
        process.kill()


class _RoundTrip:
    """Push + pull over one connection."""

    def __init__(
        self, endpoint: Endpoint, key: bytes, access: Access, *, epoch: int, update: bool
    ) -> None:
        self.client = ParameterClient(
            [endpoint], key=key, access=access, num_mailboxes=1, deadline_s=DEADLINE_S
        )
        self._norm = float(self.client.mailboxes.gradients[0].normal_().norm())
        self._weights = np.empty(self.client.num_parameters, np.float32)
        self._versions = [0]
        self._epoch, self._update = epoch, update
        self._batch = 0
        self._expected = (Outcome.APPLIED,)

    def __call__(self) -> None:
        client = self.client
        client.push(
            mailbox=0,
            replica=0,
            epoch=self._epoch,
            batches=(self._batch,),
            examples=1,
            versions=self._versions,
            loss=1.0,
            gradient_norm=self._norm,
        )
        shared = not client.num_networked
        pull = None if shared else client.start_pull(self._weights, self._versions)
        outcomes: tuple[Outcome, ...] = ()
        while client.in_flight(0):
            for settled in client.wait():
                outcomes = settled.outcomes
        if pull is None:
            client.pull(self._weights, self._versions)
        else:
            client.finish(pull)
        assert outcomes == self._expected, outcomes
        if self._update:
            self._batch += 1
        else:
            self._expected = (Outcome.DUPLICATE,)


def _memcpy(num_bytes: int) -> Callable[[], None]:
    gradient, weights = (np.random.default_rng(0).random(num_bytes // 4, np.float32) for _ in "ab")
    to_gradient, to_weights = np.empty_like(gradient), np.empty_like(weights)

    def copy() -> None:
        np.copyto(to_gradient, gradient)
        np.copyto(to_weights, weights)

    return copy


def _echoing(kind: str, peer: socket.socket, num_bytes: int) -> Callable[[], None]:
    end = _end_of(kind, peer, num_bytes)
    out, back = (memoryview(bytearray(num_bytes)) for _ in "ab")
    out[:] = secrets.token_bytes(num_bytes)

    def echo() -> None:
        end.send(out)
        end.receive(back)

    return echo


def _candidates(children: _Children, num_bytes: int) -> dict[str, Callable[[], None]]:
    key, keys = secrets.token_bytes(KEY_BYTES), issue()
    found = {MEMCPY: _memcpy(num_bytes)}
    for kind in ECHOES:
        port = children.start(_echo, num_bytes, kind)
        peer = children.closing(socket.create_connection(("127.0.0.1", port), DEADLINE_S))
        found[kind] = _echoing(kind, peer, num_bytes)

    def round_trip(endpoint: Endpoint, access: Access, epoch: int, update: bool) -> _RoundTrip:
        trip = _RoundTrip(endpoint, key, access, epoch=epoch, update=update)
        children.closing(trip.client)
        return trip

    for name, theirs, ours in (
        ("encrypted", keys.partitions, keys.clients),
        ("plain", None, None),
    ):
        endpoint = children.start(_serve, num_bytes // 4, key, theirs)
        access = Access(transport="network", credentials=ours)
        if SHARED not in found:
            found[SHARED] = round_trip(endpoint, Access(transport="shared"), 0, True)
        found[name] = round_trip(endpoint, access, 1, True)
        found[f"{name}-alone"] = round_trip(endpoint, access, 2, False)
    return found


def measure(size: str, repeat: int, round_trips: int) -> list[dict[str, list[float]]]:
    """Seconds of each round trip, by what it is and by round; all in turns."""
    rounds: list[dict[str, list[float]]] = []
    torch.set_num_threads(1)
    with _Children() as children:
        candidates = _candidates(children, SIZES[size])
        for once in candidates.values():
            for _ in range(3):
                once()
        for _ in range(repeat):
            found: dict[str, list[float]] = {name: [] for name in TITLES}
            for _ in range(round_trips):
                for name, once in candidates.items():
                    found[name].append(_seconds(once))
            for name, once in candidates.items():
                found[f"{name}{AGAIN}"] = [_seconds(once) for _ in range(round_trips)]
            rounds.append(found)
    return rounds


def _seconds(once: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    once()
    return time.perf_counter() - began_s


def run(settings: Settings, say: Say) -> Report:
    """Measure every size."""
    unknown = set(settings.only) - set(SIZES)
    if unknown:
        raise BadSettings(f"there is no size {min(unknown)!r}: give some of {', '.join(SIZES)}")
    sizes = [s for s in SIZES if not settings.only or s in settings.only]
    raw: dict[str, list[dict[str, list[float]]]] = {}
    for size in sizes:
        say(f"push-pull: {size} MB")
        raw[size] = measure(size, settings.repeat, 3 if settings.quick else ROUND_TRIPS[size])
    result: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for size in sizes:
        ms = {
            name: 1000 * median([s for found in raw[size] for s in found[name]]) for name in TITLES
        }
        floor, share = floor_ms(ms), ms[ECHO] / floor_ms(ms)
        result[size] = {
            "ms": ms,
            "ratio": {n: _ratio(ms, n) for n in TITLES},
            "floor": {"ms": floor, "ratio": share},
        }
        rows += [(f"{size} MB: {TITLES[n]}", f"{ms[n]:.3f}", _shown(ms, n)) for n in TITLES]
        rows += [(f"{size} MB: sealed echo and update", f"{floor:.3f}", f"{share:.2f} of the echo")]
    return Report(
        name="push-pull",
        title="push a gradient and pull the weights, one at a time",
        columns=("", "ms", "compared"),
        rows=tuple(rows),
        notes=(
            f"medians of {settings.repeat} round(s), all in turns; on one machine as a multiple of "
            "the memcpy's time, over the network as a share of the echo's speed.",
        ),
        configuration={"sizes": {s: SIZES[s] for s in sizes}, "partitions": 1, "rule": "momentum"},
        result=result,
        rounds=[{size: raw[size][i] for size in sizes} for i in range(settings.repeat)],
    )


def floor_ms(ms: Mapping[str, float]) -> float:
    """What encrypted push + pull of a small slice takes at the least: sealed echo and update.

    Args:
        ms: Milliseconds by what was timed in turns.
    """
    return ms[SEALED] + ms["encrypted"] - ms["encrypted-alone"]


def _ratio(ms: dict[str, float], name: str) -> float:
    suffix = AGAIN if name.endswith(AGAIN) else ""
    if name.startswith((MEMCPY, SHARED)):
        return ms[name] / ms[f"{MEMCPY}{suffix}"]
    return ms[f"{ECHO}{suffix}"] / ms[name]


def _shown(ms: dict[str, float], name: str) -> str:
    ratio = _ratio(ms, name)
    return (
        f"{ratio:.2f} x memcpy" if name.startswith((MEMCPY, SHARED)) else f"{ratio:.2f} of the echo"
    )


def main(argv: Sequence[str]) -> int:
    """Measure, and print a table or, with `--json`, raw numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m downpour.benchmarks.push_pull", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print raw numbers as JSON")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--quick", action="store_true", help="only show that it works")
    parser.add_argument("--only", action="append", default=[], choices=SIZES, metavar="SIZE")
    given = parser.parse_args(argv)
    settings = Settings(repeat=given.repeat, quick=given.quick, only=tuple(given.only))
    about = machine()
    report = run(settings, lambda _: None)
    if given.json:
        print(json.dumps({"machine": about, **dataclasses.asdict(report)}))
    else:
        show(report, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The client's side of a connection between machines.

Gradients are sent from the mailbox's own memory, and weights received where they are wanted. Only
the kernel and the seal copy. If a partition's slice is large, the connection has a thread of its
own, so that the slice travels while the next step computes. A small slice fits into the kernel's
buffers, which do the same for less; then the calling thread does everything.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from downpour.paramserver.codec import decode
from downpour.paramserver.errors import BadConfiguration, ConnectionLost, MalformedMessage
from downpour.paramserver.messages import (
    KEY_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    Answer,
    Introduction,
    Message,
    Outcome,
    PermitRequest,
    PullRequest,
    Push,
    RoundedWeights,
    Weights,
    WireDtype,
)
from downpour.paramserver.transport.endpoint import Endpoint
from downpour.paramserver.transport.link import FloatArray, Pull
from downpour.paramserver.transport.network.channel import SLICE_BYTES, Channel
from downpour.paramserver.transport.network.compress import encoder, room_for
from downpour.paramserver.transport.network.connect import connect
from downpour.paramserver.transport.network.frames import (
    FrameReader,
    Outbox,
    as_bytes,
    head,
    memory_of,
)
from downpour.paramserver.transport.network.security import Credentials
from downpour.paramserver.transport.shared.mailboxes import Mailboxes
from downpour.paramserver.transport.wire.weights import WeightsReceiver, most_bytes

THREAD_BYTES = 1 << 19
"""Slices of the weights of this size and more get a thread."""
CLOSE_DEADLINE_S = 10.0
_LOOK_EVERY_MS = 60_000
_NOT_LOST = (Outcome.APPLIED, Outcome.PERMITTED)
T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class _Wanted:
    """A partition's part of a pull."""

    pull: Pull
    weights: FloatArray
    statistics: FloatArray | None
    staged: FloatArray | None
    """Statistics as they come, contiguous; `statistics` need not be."""
    version: int = 0

    def places(self, weights: memoryview) -> list[memoryview]:
        """Where the payload goes, if weights are received into `weights`."""
        return [weights] if self.staged is None else [weights, memory_of(self.staged)]


class _Rounded:
    """Where weights come that are not float32 yet."""

    def __init__(self, size: int) -> None:
        self._receiver = WeightsReceiver(size)
        self._came = np.empty(most_bytes(size), np.uint8)
        self._num_bytes = 0

    def room(self, num_bytes: int) -> memoryview:
        if not 0 < num_bytes <= len(self._came):
            raise MalformedMessage(f"weights of {num_bytes} bytes")
        self._num_bytes = num_bytes
        return memory_of(self._came[:num_bytes])

    def take(self, weights: FloatArray) -> None:
        self._receiver.decode(self._came[: self._num_bytes], torch.from_numpy(weights))


class _Pump:
    """Frames out, frames in. Used by one thread, whichever that is."""

    def __init__(self, channel: Channel, rounded: _Rounded | None) -> None:
        self.channel = channel
        self.outbox = Outbox(channel)
        self._rounded = rounded
        """None if weights come as float32."""
        self._reader = FrameReader(channel, self._destinations, decode)
        self._wanted: deque[_Wanted] = deque()
        # If there are two threads, the other one takes from these: both ends of a deque are atomic.
        self.answers: deque[Answer] = deque()
        self.arrived: deque[_Wanted] = deque()

    def put(self, views: Sequence[memoryview], wanted: _Wanted | None) -> None:
        if wanted is not None:
            self._wanted.append(wanted)
        self.outbox.put(views)

    def step(self) -> bool:
        """Send a slice and receive a slice, as far as goes without waiting; false for nothing."""
        moved = self.channel.moved
        self.outbox.flush()
        self.channel.allow(SLICE_BYTES)
        while (message := self._reader.next()) is not None:
            self._sort(message)
        return self.channel.moved != moved

    def send(self) -> None:
        """Send as much as goes without waiting."""
        moved = -1
        while not self.outbox.empty and self.channel.moved != moved:
            moved = self.channel.moved
            self.outbox.flush()

    def _sort(self, message: Message) -> None:
        if isinstance(message, Answer):
            self.answers.append(message)
        else:
            assert isinstance(message, Weights | RoundedWeights)
            wanted = self._wanted.popleft()
            if self._rounded is not None:
                self._rounded.take(wanted.weights)
            wanted.version = message.version
            self.arrived.append(wanted)

    def _destinations(self, message: Message) -> Sequence[memoryview]:
        if isinstance(message, Answer):
            return ()
        kind = Weights if self._rounded is None else RoundedWeights
        if isinstance(message, kind) and self._wanted:
            wanted = self._wanted[0]
            if message.statistics == (wanted.statistics is not None):
                if isinstance(message, RoundedWeights):
                    assert self._rounded is not None
                    return wanted.places(self._rounded.room(message.num_bytes))
                return wanted.places(memory_of(wanted.weights))
        raise MalformedMessage(f"{type(message).__name__} in place of an answer")


class _Worker:
    """A thread that owns a pump. What it is to send is put to it; what has come it tells of."""

    def __init__(self, pump: _Pump, name: str) -> None:
        self._pump = pump
        self._orders: deque[tuple[Sequence[memoryview], _Wanted | None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.done = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when something has come, or the thread has failed."""
        self._failure: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, views: Sequence[memoryview], wanted: _Wanted | None) -> None:
        if self._closing:  # the descriptor may be another's by now
            raise ConnectionLost("we have closed the connection")
        self._orders.append((views, wanted))
        os.eventfd_write(self._wake, 1)

    def check(self) -> None:
        """Raise what ended the thread, if anything did."""
        if self._failure is not None:
            raise self._failure

    def look(self) -> None:
        """Note that what has come is going to be looked at."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.done)
        self.check()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._failure = error
            os.eventfd_write(self.done, 1)

    def _work(self) -> None:
        pump, peer = self._pump, self._pump.channel.socket
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while not self._closing:
            while self._orders:
                pump.put(*self._orders.popleft())
            moved = pump.step()
            if pump.answers or pump.arrived:
                os.eventfd_write(self.done, 1)
            if moved:
                continue
            poll.register(peer, select.POLLIN | (0 if pump.outbox.empty else select.POLLOUT))
            poll.poll(_LOOK_EVERY_MS)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)

    def close(self) -> None:
        """End the thread. Does nothing the second time."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(CLOSE_DEADLINE_S)
        if not self._thread.is_alive():
            os.close(self._wake)
            os.close(self.done)


class NetworkConnection:
    """A process's connection to one partition on another machine. Implements `Link`."""

    torn = 0

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        key: bytes,
        credentials: Credentials | None,
        mailboxes: Mailboxes,
        wire: WireDtype = WireDtype.FLOAT32,
        deadline_s: float = 30.0,
    ) -> None:
        """Connect and do the handshake.

        Args:
            endpoint: The partition's.
            key: The run's key.
            credentials: The clients'; without them nothing is encrypted.
            mailboxes: The process's.
            wire: How gradients travel, and weights for them. A client that only pulls gets
                weights as float32.
            deadline_s: Until when the partition has to have answered.

        Raises:
            BadConfiguration: The key is of another length.
            ConnectionLost, DeadlineExceeded: The partition is gone, or silent.
            NotAuthenticated, MalformedMessage: It is of another run, or another one.
        """
        if len(key) != KEY_BYTES:
            raise BadConfiguration(f"the run's key has {len(key)} bytes: give {KEY_BYTES}")
        assert endpoint.network is not None
        self.partition = partition = endpoint.partition
        self.choice = ""
        """What was chosen for the measured link, and why; empty if nothing was."""
        self.inbox: list[Answer] = []
        low, high = partition.feature_start, partition.feature_stop
        gradients = [g[partition.trained] for g in mailboxes.gradients]
        self._wire = wire if mailboxes.num else WireDtype.FLOAT32
        self._encoder = encoder(gradients, self._wire, partition.index)
        self._moments = [m[:, :, low:high] for m in mailboxes.moments]
        self._sent_moments = [torch.empty(m.shape) for m in self._moments]
        self._sent_bytes = [as_bytes(m) for m in self._sent_moments]
        self._gradient_bytes = room_for(self._wire, partition.num_trained).nbytes
        self._set_bytes = 12 * partition.num_features
        channel = connect(
            endpoint.network,
            partition=partition,
            key=key,
            credentials=credentials,
            introduction=Introduction(
                proof=bytes(PROOF_BYTES),
                nonce=bytes(NONCE_BYTES),
                partition=partition.index,
                total_parameters=partition.total_parameters,
                total_features=partition.total_features,
                num_mailboxes=mailboxes.num,
                depth=mailboxes.depth if mailboxes.num else 0,
                wire=self._wire,
            ),
            deadline_s=deadline_s,
        )
        self.socket: socket.socket = channel.socket
        rounds = self._wire.rounds_weights
        self._pump = _Pump(channel, _Rounded(partition.num_parameters) if rounds else None)
        self._worker: _Worker | None = None
        if 4 * partition.num_parameters >= THREAD_BYTES:
            self._worker = _Worker(self._pump, f"network-{partition.index}")

    def fileno(self) -> int:
        """For `poll`."""
        return self._worker.done if self._worker else self.socket.fileno()

    @property
    def events(self) -> int:
        """What to `poll` for."""
        if self._worker or self._pump.outbox.empty:
            return select.POLLIN
        return select.POLLIN | select.POLLOUT

    @property
    def moved(self) -> int:
        """Bytes to and fro."""
        return self._pump.channel.moved

    def push(self, push: Push) -> None:
        """Send off the gradient and moments that are in the push's mailbox."""
        if self._wire is not WireDtype.FLOAT32:
            push = replace(push, wire=self._wire)
        mailbox, count = push.mailbox, len(push.batches)
        moments_bytes = count * self._set_bytes
        if moments_bytes:  # those of the partition's features do not lie together
            self._sent_moments[mailbox][:count].copy_(self._moments[mailbox][:count])
        self._put([head(push, self._gradient_bytes + moments_bytes)])
        # If they are rounded, each slice is sent as soon as it is.
        for view in self._encoder.slices(push):
            if len(view):  # nothing is trained here, if not
                self._put([view])
        if moments_bytes:
            self._put([self._sent_bytes[mailbox][:moments_bytes]])
        self._go()

    def ask(self, mailbox: int) -> None:
        """Ask for a permit for the step that will push from there."""
        self._put([head(PermitRequest(mailbox=mailbox), 0)])
        self._go()

    def flush(self) -> None:
        """Nothing is kept back."""

    def start_pull(self, pull: Pull, weights: FloatArray, statistics: FloatArray | None) -> None:
        """Ask for weights, float32 [n], and statistics, float32 [2, f]; see `Link`."""
        wanted = _Wanted(pull=pull, weights=weights, statistics=statistics, staged=None)
        if statistics is not None and statistics.size:
            wanted.staged = np.empty(statistics.shape, np.float32)
        pull.waiting += 1
        self._put([head(PullRequest(statistics=statistics is not None), 0)], wanted)
        self._go()

    def _put(self, views: Sequence[memoryview], wanted: _Wanted | None = None) -> None:
        if self._worker:
            self._worker.put(views, wanted)
        else:
            self._pump.put(views, wanted)

    def _go(self) -> None:
        # Nothing is received here: what came would not wake a `poll` any more.
        try:
            if self._worker:
                self._worker.check()
            else:
                self._pump.send()
        except ConnectionLost as error:
            raise self._named(error) from None

    def service(self) -> None:
        """Take in answers and weights that have come."""
        try:
            if self._worker:
                self._worker.look()
            else:
                while self._pump.step():
                    pass
        except ConnectionLost as error:
            raise self._named(error) from None
        for wanted in _taken(self._pump.arrived):
            if wanted.staged is not None and wanted.statistics is not None:
                np.copyto(wanted.statistics, wanted.staged)
            wanted.pull.versions[self.partition.index] = wanted.version
            wanted.pull.waiting -= 1
        for answer in _taken(self._pump.answers):
            if answer.outcome not in _NOT_LOST and answer.mailbox < len(self._moments):
                self._encoder.restore(answer.mailbox)
            self.inbox.append(answer)

    def _named(self, error: ConnectionLost) -> ConnectionLost:
        return ConnectionLost.of(self.partition.index, error)

    def interrupt(self) -> None:
        """Cut the connection while another thread uses it."""
        with contextlib.suppress(OSError):  # it is closed already
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, and end the thread."""
        if self._worker:
            self._worker.close()
        self.socket.close()


def _taken(items: deque[T]) -> Iterator[T]:
    while items:
        yield items.popleft()

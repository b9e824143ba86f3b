"""The partition's side of a connection between machines, once the handshake is done.

A push is a frame whose payload is the partition's slice of the gradient and of the moments; a
`PullRequest` is answered by the weights. Nothing here waits: a connection is read as far as bytes
have come and written as far as the kernel takes them, some megabytes at a time, so that a large
push does not keep the others waiting.

Weights are sent from the buffer that they were published in, which is pinned meanwhile. If the
writer has to take that buffer before they have gone, the rest is set aside first (`detach`). Both
happen on the serving thread, so a client gets one version, whole.
"""

from __future__ import annotations

import torch

from downpour.paramserver.codec import decode
from downpour.paramserver.errors import DeadlineExceeded, MalformedMessage
from downpour.paramserver.messages import (
    MAX_MAILBOXES,
    Answer,
    Follow,
    Message,
    PermitRequest,
    PullRequest,
    Push,
    RoundedWeights,
    Weights,
)
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.vectors import Version
from downpour.paramserver.transport.network.acceptor import Accepted
from downpour.paramserver.transport.network.channel import SLICE_BYTES
from downpour.paramserver.transport.network.compress import room_for
from downpour.paramserver.transport.network.frames import (
    FrameReader,
    Outbox,
    as_bytes,
    frame,
    memory_of,
)
from downpour.paramserver.transport.wire.weights import WeightsSender

_MAX_QUEUED = 2 * MAX_MAILBOXES
UNPINNED = -1


class NetworkSide:
    """One connection as the partition sees it."""

    def __init__(self, accepted: Accepted, partition: Partition, now_s: float) -> None:
        """Make room for one push; nothing is allocated for a peer after this."""
        about = accepted.introduction
        self.socket = accepted.channel.socket
        self.num_mailboxes, self.depth = about.num_mailboxes, about.depth
        self.channel = accepted.channel
        """The stream; it goes on with a follower, if the peer is one."""
        size = partition.num_trained if about.num_mailboxes else 0
        self._wire = about.wire
        self.came = room_for(about.wire, size)
        """The gradient of the push that `next` gave last, as it travelled."""
        self._came_bytes = as_bytes(self.came)
        self._sender: WeightsSender | None = None
        if about.wire.rounds_weights and about.num_mailboxes:
            self._sender = WeightsSender(partition.num_parameters)
        self.moments = torch.empty(about.depth, 3, partition.num_features)
        """Of the push that `next` gave last, float32 [depth, 3, F]."""
        self._moments_bytes = as_bytes(self.moments)
        self._set_bytes = 12 * partition.num_features
        self._reader = FrameReader(self.channel, self._destinations, decode)
        self._outbox = Outbox(self.channel)
        self.follow: Follow | None = None
        """Once the peer has said that it wants to follow: it is no process of replicas."""
        self.pulls: list[PullRequest] = []
        """Pulls that are to be answered, in order."""
        self.asks: list[int] = []
        """Mailboxes for which permits have been asked for; the server takes them out."""
        self.pinned = UNPINNED
        """Buffer whose weights are being sent; -1 for none, or ones that were set aside."""
        self.sending = False
        """Whether weights are being sent."""
        self._aside = bytearray()
        self._moved, self._moved_s = 0, now_s
        self.watches_writable = False
        """Whether the server waits for the socket to become writable; the server's own note."""

    def allow(self) -> None:
        """Let `next` take a slice off the socket."""
        self.channel.allow(SLICE_BYTES)

    def next(self) -> Push | None:
        """Return the next push that has come whole; None if there is none, or it is others' turn.

        Raises:
            ConnectionLost: The peer is gone.
            MalformedMessage: It says what it may not.
        """
        while (message := self._reader.next()) is not None:
            if isinstance(message, Push):
                return message
            if isinstance(message, PullRequest):
                self.pulls.append(message)
            elif isinstance(message, Follow):
                self.follow = message
                return None
            else:
                assert isinstance(message, PermitRequest)
                self.asks.append(message.mailbox)
        return None

    def _destinations(self, message: Message) -> list[memoryview]:
        if isinstance(message, Push):
            count = len(message.batches)
            if message.mailbox >= self.num_mailboxes or count > self.depth:
                raise MalformedMessage(
                    f"a push of {count} mini-batches from mailbox {message.mailbox}"
                )
            if message.wire is not self._wire:
                raise MalformedMessage(
                    f"a push as {message.wire.name} on a connection of {self._wire.name}"
                )
            return [self._came_bytes, self._moments_bytes[: count * self._set_bytes]]
        if isinstance(message, PullRequest):
            if len(self.pulls) >= max(1, self.num_mailboxes):
                raise MalformedMessage("more pulls than mailboxes")
            return []
        if isinstance(message, PermitRequest):
            if message.mailbox >= self.num_mailboxes or len(self.asks) >= self.num_mailboxes:
                raise MalformedMessage(f"a permit for mailbox {message.mailbox}")
            return []
        if isinstance(message, Follow):
            if self.num_mailboxes:
                raise MalformedMessage("a process of replicas that wants to follow")
            return []
        raise MalformedMessage(f"{type(message).__name__} in place of a push")

    def answer(self, answer: Answer) -> None:
        """Queue an answer.

        Raises:
            DeadlineExceeded: The peer leaves too many unread, and is to be given up.
        """
        if len(self._outbox.views) > _MAX_QUEUED:
            raise DeadlineExceeded("the peer has left its answers unread")
        self._outbox.put(frame(answer))

    def send_weights(
        self, buffer: int, version: int, latest: Version, views: tuple[memoryview, memoryview]
    ) -> None:
        """Queue what answers the oldest pull.

        Args:
            buffer: Where the latest version lies.
            version: Its number.
            latest: Its weights and statistics.
            views: The memory of both.
        """
        assert not self.sending
        wanted, self.sending = self.pulls.pop(0).statistics, True
        if self._sender is None:
            payload = views if wanted else views[:1]
            self._outbox.put(frame(Weights(version=version, statistics=wanted), payload))
            self.pinned = buffer
            return
        data = self._sender.encode(latest.weights)
        message = RoundedWeights(version=version, statistics=wanted, num_bytes=len(data))
        # Nothing of the buffer is read after this.
        own = [memory_of(data), as_bytes(latest.statistics.clone())]
        self._outbox.put(frame(message, own if wanted else own[:1]))

    def detach(self, buffer: int) -> None:
        """Set aside what is still to be sent of `buffer`, which is about to be written."""
        if self.pinned != buffer:
            return
        views = self._outbox.views
        num_bytes = sum(map(len, views))
        if len(self._aside) < num_bytes:
            self._aside = bytearray(num_bytes)
        aside, at = memoryview(self._aside), 0
        for view in views:
            aside[at : at + len(view)] = view
            at += len(view)
        views.clear()
        if num_bytes:
            views.append(aside[:num_bytes])
        self.pinned = UNPINNED

    def flush(self) -> bool:
        """Send as much as goes without waiting; returns whether everything has gone."""
        if self._outbox.flush():
            self.pinned, self.sending = UNPINNED, False
            return True
        return False

    def stalled_since(self, now_s: float) -> float:
        """Return since when nothing has moved although something should have."""
        idle = self._outbox.empty and not self._reader.midway
        if idle or self.channel.moved != self._moved:
            self._moved, self._moved_s = self.channel.moved, now_s
        return self._moved_s

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

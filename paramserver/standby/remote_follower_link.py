"""The primary's end of the connection to a follower on another machine.

Gradients travel, and what lies in a socket's buffer is lost with its machine. So every push is sent
to the follower before it is applied, and is applied, published and answered once the follower says
that it has all of it. Many pushes are on their way at a time.

While the follower takes the state in, the primary waits for nothing: it applies at once and sends
copies. It goes *level* when the follower has almost all, or when too much would have to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from downpour.paramserver.errors import (
    DeadlineExceeded,
    Fenced,
    MalformedMessage,
)
from downpour.paramserver.messages import Push
from downpour.paramserver.partition import snapshot
from downpour.paramserver.partition.snapshot import Snapshot
from downpour.paramserver.partition.vectors import Arrival
from downpour.paramserver.standby.follower_link import FIRST_DEADLINE_S
from downpour.paramserver.transport.network.channel import SLICE_BYTES, Channel
from downpour.paramserver.transport.network.frames import FrameReader, Outbox, as_bytes
from downpour.paramserver.transport.network.replication import (
    BEAT_S,
    Beat,
    Level,
    LinkMessage,
    Received,
    State,
    TakenOver,
    decode,
    head,
)

NEARLY_LEVEL = 16
"""Pushes that the follower may lack when the primary begins to wait for it."""
BACKLOG_BYTES = 1 << 27
"""Of copies that are kept for a follower that the primary does not wait for; beyond, it does."""


class RemoteFollowerLink:
    """What the primary has sent to its follower on another machine, and what that has received.

    Every method that sends or reads raises `ServerError` if the follower is lost.
    """

    def __init__(
        self,
        channel: Channel,
        generation: int,
        *,
        clock: Callable[[], float],
        deadline_s: float,
    ) -> None:
        """Takes over `channel`, whose other side has said that it wants to follow."""
        self.generation = generation
        self._channel = channel
        self._outbox = Outbox(channel)
        self._reader: FrameReader[LinkMessage] = FrameReader(channel, _no_payload, decode)
        self._clock, self._deadline_s = clock, deadline_s
        self._heard_s = self._beat_s = clock()
        self.sent = self.received = self.applied = 0
        """Pushes sent, received whole by the follower, and applied here."""
        self._joined = False
        self._unsent_bytes = self._push_bytes = 0
        self.is_level = False
        """Whether what the follower has not received has to wait."""

    def fileno(self) -> int:
        """For `epoll`: readable when the follower says something, or is gone."""
        return self._channel.socket.fileno()

    @property
    def all_sent(self) -> bool:
        """Whether nothing waits until the socket is writable."""
        return self._outbox.empty

    @property
    def is_far_behind(self) -> bool:
        """Whether the follower lacks more than is kept for it, if pushes do not wait."""
        return (self.sent - self.received) * self._push_bytes > BACKLOG_BYTES

    def hand_over(self, state: Snapshot, large: Sequence[str]) -> None:
        """Queue the state; its tensors are read until all of it has gone.

        Args:
            state: A copy of the partition's.
            large: Names of the tensors that the follower has room for, by their sizes.
        """
        rest = {n: t for n, t in state.tensors.items() if n not in large}
        small = Snapshot(partition=state.partition, meta=state.meta, tensors=rest)
        data = memoryview(b"".join(snapshot.blocks(small)))
        payload = [data, *(as_bytes(state.tensors[name]) for name in sorted(large))]
        message = State(rest_bytes=len(data))
        self._outbox.put([head(message, sum(map(len, payload))), *filter(len, payload)])

    def forward(self, arrivals: Sequence[Arrival]) -> None:
        """Send pushes, none of which is applied before `received` says that they have come.

        Gradients go on as they came, so both sides make the same of them. If pushes are applied
        earlier, because this is not level, they have to be copies.
        """
        for push, gradient, moments in arrivals:
            payload = _payload(push, gradient, moments)
            num_bytes = sum(map(len, payload))
            self._outbox.put([head(push, num_bytes), *filter(len, payload)])
            self._push_bytes = num_bytes
            self._unsent_bytes += num_bytes
            self.sent += 1
        self.flush()

    def flush(self) -> None:
        """Send as much as goes without waiting."""
        if self._outbox.flush():
            self._unsent_bytes = 0

    def hear(self) -> None:
        """Take in what the follower has said.

        Raises:
            ConnectionLost: The follower is gone.
            MalformedMessage: It says what no follower does.
            Fenced: It is the partition by now.
        """
        self._channel.allow(SLICE_BYTES)
        while (message := self._reader.next()) is not None:
            if isinstance(message, TakenOver):
                raise Fenced("its follower has become the partition")
            assert isinstance(message, Received)
            if not self.received <= message.pushes <= self.sent:
                raise MalformedMessage(f"{message.pushes} pushes received of {self.sent}")
            self.received, self._heard_s = message.pushes, self._clock()
            self._joined |= message.joined

    def may_go_level(self) -> bool:
        """Whether the primary is to begin to wait for the follower, and has not begun."""
        if self.is_level:
            return False
        caught_up = self._joined and self.sent - self.received <= NEARLY_LEVEL
        return caught_up or self._unsent_bytes > BACKLOG_BYTES

    def go_level(self) -> None:
        """Begin: what the follower lacks is from now on neither published nor answered."""
        self.is_level = True
        self._outbox.put([head(Level())])
        self.flush()

    def check(self, version: int) -> None:
        """Say something if it is time for it, and look whether the follower is silent.

        Args:
            version: The partition's, after `applied` pushes of this connection.

        Raises:
            DeadlineExceeded: It is.
            ConnectionLost: It is gone.
        """
        now_s = self._clock()
        limit_s = self._deadline_s if self._joined else max(FIRST_DEADLINE_S, self._deadline_s)
        if now_s - self._heard_s > limit_s:
            raise DeadlineExceeded(f"it has said nothing for {limit_s:g} s")
        if now_s - self._beat_s >= BEAT_S:
            self._beat_s = now_s
            self._outbox.put([head(Beat(applied=self.applied, version=version))])
            self.flush()

    def close(self) -> None:
        """Close the connection."""
        self._channel.socket.close()


def copied(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Return them with copies of their gradients and moments."""
    return [(push, gradient.clone(), moments.clone()) for push, gradient, moments in arrivals]


def _payload(push: Push, gradient: Tensor, moments: Tensor) -> list[memoryview]:
    return [as_bytes(gradient), as_bytes(moments[: len(push.batches)].contiguous())]


def _no_payload(message: LinkMessage) -> Sequence[memoryview]:
    if isinstance(message, Received | TakenOver):
        return ()
    raise MalformedMessage(f"{type(message).__name__} by a follower")

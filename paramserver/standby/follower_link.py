"""The primary's end of the connection to its follower.

Every packet of pushes goes to the follower before the first of its updates is published. Replicas
are answered once the follower has applied the packet, too. So the follower has everything that
replicas have seen or been told, or has it in the buffer of its socket, which outlives us.

A follower that is gone, or has not applied a packet for `FOLLOWER_DEADLINE_S`, is given up. The
primary first takes the token, without which no follower becomes the partition. If the token is
gone, the follower is the partition, and we must not answer any more (`Fenced`).
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from downpour.paramserver.errors import (
    ConnectionLost,
    DeadlineExceeded,
    Fenced,
    MalformedMessage,
    ServerError,
)
from downpour.paramserver.messages import Answer
from downpour.paramserver.partition import snapshot
from downpour.paramserver.partition.snapshot import Snapshot
from downpour.paramserver.transport.shared import replication
from downpour.paramserver.transport.shared.replication import Handover

FOLLOWER_DEADLINE_S = 2.0
"""How long a packet may wait for its follower, and with it replicas for the answer."""
FIRST_DEADLINE_S = 10.0
"""The same for its first packet: before that it copies the whole state."""

log = logging.getLogger(__name__)
Peer = TypeVar("Peer")


class _Owed(NamedTuple, Generic[Peer]):
    """Answers that wait for the follower."""

    packet: int
    since_s: float
    peer: Peer
    answers: Sequence[Answer]


class FollowerLink(Generic[Peer]):
    """What the primary has sent to its follower, and the answers that wait until it is applied.

    `Peer` is whom answers go to. Every method that sends, `due` and `check` raise `ServerError` if
    the follower is lost; the caller then calls `give_up`.
    """

    def __init__(
        self, peer: socket.socket, *, clock: Callable[[], float], deadline_s: float
    ) -> None:
        """Takes over `peer`, which has said that it wants to follow."""
        self.socket = peer
        self._clock, self._deadline_s = clock, deadline_s
        self._token = replication.make_token()
        self.count = replication.make_count()
        """Descriptor, readable when packets have been applied."""
        self._sent = self._applied = 0
        """Packets sent, and packets that the follower has applied."""
        self._owed: deque[_Owed[Peer]] = deque()

    def fileno(self) -> int:
        """For `epoll`: readable when the follower is gone."""
        return self.socket.fileno()

    def hand_over(self, state: Snapshot, memory: Handover) -> None:
        """Send the state; its large tensors lie in `memory`.

        Raises:
            ServerError: The follower is lost.
        """
        rest = {n: t for n, t in state.tensors.items() if n not in memory.tensors}
        small = Snapshot(partition=state.partition, meta=state.meta, tensors=rest)
        fd = replication.write_rest(snapshot.blocks(small))
        try:
            self._send(replication.joined(), [memory.fd, fd, self._token, self.count])
        finally:
            os.close(fd)

    def open(self, source: MailboxSource) -> None:
        """Hand on the memory of a connection's mailboxes. Raises as `hand_over` does."""
        about = replication.mailboxes(source.number, source.num_mailboxes, source.depth)
        self._send(about, [source.fd])

    def close_source(self, source: int) -> None:
        """Tell the follower that a connection is gone. Raises as `hand_over` does."""
        self._send(replication.gone(source))

    def forward(self, source: int, version: int, packet: bytes) -> None:
        """Send a packet of pushes, none of them applied yet. Raises as `hand_over` does."""
        self._send(replication.pushes(source, version, packet))
        self._sent += 1

    @property
    def is_level(self) -> bool:
        """Whether the follower has applied all that it was sent."""
        return self._applied == self._sent

    def owe(self, peer: Peer, answers: Sequence[Answer]) -> None:
        """Keep answers until everything that was sent until now is applied."""
        self._owed.append(_Owed(self._sent, self._clock(), peer, answers))

    def due(self) -> list[tuple[Peer, Sequence[Answer]]]:
        """Take in what the follower has applied, and return the answers that wait no longer.

        Raises:
            ConnectionLost: The follower is gone.
            MalformedMessage: It says what no follower does.
        """
        self._applied += replication.added(self.count)
        try:
            if not self.socket.recv(replication.MAX_PACKET):
                raise ConnectionLost("it closed the connection")
            raise MalformedMessage("it says what no follower does")
        except BlockingIOError:
            pass
        except OSError as error:
            raise ConnectionLost(str(error)) from None
        found = []
        while self._owed and self._owed[0].packet <= self._applied:
            owed = self._owed.popleft()
            found.append((owed.peer, owed.answers))
        return found

    def check(self) -> None:
        """Look whether the follower is late.

        Raises:
            DeadlineExceeded: It is.
        """
        limit_s = self._deadline_s if self._applied else max(FIRST_DEADLINE_S, self._deadline_s)
        if self._owed and self._clock() - self._owed[0].since_s > limit_s:
            raise self._late()

    def give_up(self) -> list[tuple[Peer, Sequence[Answer]]]:
        """Go on without the follower.

        Returns:
            All answers that were waiting for it.

        Raises:
            Fenced: The follower is the partition by now.
        """
        alone = replication.take(self._token)
        self.close()
        if not alone:
            raise Fenced("its follower has become the partition")
        owed = [(o.peer, o.answers) for o in self._owed]
        self._owed.clear()
        return owed

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()
        for fd in (self._token, self.count):
            if fd >= 0:
                os.close(fd)
        self._token = self.count = -1

    def _send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send; waits, until the deadline, only while the socket's buffer is full."""
        give_up_s = self._clock() + self._deadline_s
        while True:
            try:
                if fds:
                    socket.send_fds(self.socket, [data], fds)
                else:
                    self.socket.send(data)
                return
            except BlockingIOError:
                poll = select.poll()
                poll.register(self.socket, select.POLLOUT)
                if not poll.poll(1000 * max(0.0, give_up_s - self._clock())):
                    raise self._late() from None
            except OSError as error:
                raise ConnectionLost(str(error)) from None

    def _late(self) -> ServerError:
        return DeadlineExceeded("it has applied nothing for too long")


@dataclass(frozen=True, kw_only=True, slots=True)
class MailboxSource:
    """The connection of a process of replicas, as its follower has to know it."""

    number: int
    num_mailboxes: int
    depth: int
    fd: int
    """Descriptor of the mailboxes' memory."""

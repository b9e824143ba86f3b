"""The primary's end of the connection to its follower.

Every packet of pushes goes to the follower before the first of its updates is published, and what
became of it is answered once the follower has applied it too. So whatever replicas have seen or
been told, the follower has, or has it in the buffer of its socket, which outlives us.

A follower that is gone, or that has not applied a packet for `FOLLOWER_DEADLINE_S`, is given up:
the primary takes the token first, without which no follower becomes the partition. Where the token
is gone, the follower has become it: we must not answer any more (`Fenced`).
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

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
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.transport import replication
from downpour.paramserver.transport.replication import Handover

FOLLOWER_DEADLINE_S = 2.0
"""How long a packet may wait for its follower, and with it replicas for the answer."""
FIRST_DEADLINE_S = 10.0
"""The same, until it has applied a first one: it copies the whole state before."""

log = logging.getLogger(__name__)
Peer = TypeVar("Peer")


class _Owed(NamedTuple, Generic[Peer]):
    """Answers that wait for the follower."""

    packet: int
    since_s: float
    peer: Peer
    answers: Sequence[Answer]


class FollowerLink(Generic[Peer]):
    """What the primary has sent to its follower, and what it owes to others until that is applied.

    `Peer` is whom answers go to. What sends, `due` and `check` raise `ServerError` where the
    follower is lost: then `give_up`.
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
        """Packets sent, and of these applied."""
        self._owed: deque[_Owed[Peer]] = deque()

    def fileno(self) -> int:
        """For `epoll`: readable when the follower is gone."""
        return self.socket.fileno()

    def hand_over(self, state: Snapshot, memory: Handover) -> None:
        """Send the state; its large tensors lie in `memory`."""
        rest = {n: t for n, t in state.tensors.items() if n not in memory.tensors}
        small = Snapshot(partition=state.partition, meta=state.meta, tensors=rest)
        fd = replication.write_rest(snapshot.blocks(small))
        try:
            self._send(replication.joined(), [memory.fd, fd, self._token, self.count])
        finally:
            os.close(fd)

    def open(self, source: Source) -> None:
        """Hand on the memory of a connection's mailboxes."""
        about = replication.mailboxes(source.number, source.num_mailboxes, source.depth)
        self._send(about, [source.fd])

    def close_source(self, source: int) -> None:
        """A connection is gone."""
        self._send(replication.gone(source))

    def forward(self, source: int, version: int, packet: bytes) -> None:
        """Send a packet of pushes, of which none has been applied yet."""
        self._send(replication.pushes(source, version, packet))
        self._sent += 1

    @property
    def is_level(self) -> bool:
        """Whether the follower has applied all that it was sent."""
        return self._applied == self._sent

    def owe(self, peer: Peer, answers: Sequence[Answer]) -> None:
        """These are due once all that has been sent until now is applied."""
        self._owed.append(_Owed(self._sent, self._clock(), peer, answers))

    def due(self) -> list[tuple[Peer, Sequence[Answer]]]:
        """Take in what the follower has applied, and give the answers that wait no more."""
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
        """Raise `DeadlineExceeded` where the follower is late."""
        limit_s = self._deadline_s if self._applied else max(FIRST_DEADLINE_S, self._deadline_s)
        if self._owed and self._clock() - self._owed[0].since_s > limit_s:
            raise self._late()

    def give_up(self) -> list[tuple[Peer, Sequence[Answer]]]:
        """Go on without it: all that is owed. `Fenced` where it goes on without us."""
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
        """Waits, until the deadline, only while the socket's buffer is full."""
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
class Source:
    """A replica's connection, as the follower has to know it."""

    number: int
    num_mailboxes: int
    depth: int
    fd: int
    """Of the mailboxes' memory."""


class Lead(Generic[Peer]):
    """What a primary does for its follower, if it has one: used by the thread that serves."""

    def __init__(
        self,
        index: int,
        *,
        epoll: select.epoll,
        answer: Callable[[Peer, Sequence[Answer]], None],
        clock: Callable[[], float],
        deadline_s: float,
    ) -> None:
        """No follower yet. `answer` sends answers to a peer, and raises nothing."""
        self._index, self._epoll, self._send_answers = index, epoll, answer
        self._clock, self._deadline_s = clock, deadline_s
        self._link: FollowerLink[Peer] | None = None
        self._fenced: Fenced | None = None

    @property
    def has_follower(self) -> bool:
        """Whether there is one that has the state."""
        return self._link is not None

    def is_follower(self, fd: int) -> bool:
        """Whether that is a descriptor of the follower's."""
        return self._link is not None and fd in (self._link.fileno(), self._link.count)

    def receive(
        self, peer: socket.socket, room: Mapping[str, Tensor], join: Callable[[Handover], None]
    ) -> None:
        """`peer` wants to follow: make memory for the state, on another thread, and have it `join`.

        `room` has the shapes of its large tensors. Nobody waits while the memory is made.
        """

        def prepare() -> None:
            memory = None
            try:
                memory = Handover(room)
                join(memory)
            except (ServerError, OSError) as error:
                log.warning("partition %d takes no follower: %s", self._index, str(error))
                peer.close()
            finally:
                if memory is not None:
                    memory.close()

        name = f"follower-{self._index}"
        threading.Thread(target=prepare, name=name, daemon=True).start()

    def join(
        self,
        state: PartitionState,
        peer: socket.socket,
        memory: Handover,
        sources: Iterable[Source],
        **about: object,
    ) -> None:
        """Hand the state over; from now on `peer` gets every packet. Run between two pushes.

        `about` is what it is told besides.
        """
        if self._link is not None:
            self._leave("another one has come")
        link: FollowerLink[Peer] = FollowerLink(
            peer, clock=self._clock, deadline_s=self._deadline_s
        )
        meta, tensors = state.dump(memory.tensors)
        meta |= {"quarantined": sorted(state.ledger.quarantined), **about}
        try:
            link.hand_over(Snapshot(partition=state.partition, meta=meta, tensors=tensors), memory)
            for source in sources:
                link.open(source)
        except ServerError:
            link.close()
            raise
        self._link = link
        self._epoll.register(link, select.EPOLLIN)
        self._epoll.register(link.count, select.EPOLLIN)

    def opened(self, source: Source) -> None:
        """A replica's process has come."""
        self._with(lambda link: link.open(source))

    def closed(self, number: int) -> None:
        """A replica's process is gone."""
        self._with(lambda link: link.close_source(number))

    def forward(self, source: int, version: int, packet: bytes) -> None:
        """Before any push of it is applied, the follower is sent a packet."""
        if self._link is not None:
            self._with(lambda link: link.forward(source, version, packet))

    def answer(self, peer: Peer, answers: Sequence[Answer]) -> None:
        """Send answers, once the follower has all that it was sent until now."""
        if self._link is None or self._link.is_level:
            self._send_answers(peer, answers)
        else:
            self._link.owe(peer, answers)

    def hear(self) -> None:
        """The follower has said something: answer what it has applied."""
        self._with(lambda link: self._release(link.due()))

    def check(self) -> None:
        """Give a follower up that is late."""
        if self._link is not None:
            self._with(lambda link: link.check())

    def raise_if_fenced(self) -> None:
        """Raise `Fenced` where that was raised to somebody who does not end by it."""
        if self._fenced is not None:
            raise self._fenced

    def close(self) -> None:
        """Close the connection."""
        if self._link is not None:
            self._link.close()

    def _with(self, do: Callable[[FollowerLink[Peer]], None]) -> None:
        if self._link is not None:
            try:
                do(self._link)
            except ServerError as error:
                self._leave(str(error))

    def _leave(self, reason: str) -> None:
        """Go on without the follower. Raises `Fenced` where it is the partition by now."""
        link, self._link = self._link, None
        assert link is not None
        self._epoll.unregister(link)
        self._epoll.unregister(link.count)
        try:
            owed = link.give_up()
        except Fenced as error:
            self._fenced = error
            raise
        log.warning("partition %d goes on without its follower: %s", self._index, reason)
        self._release(owed)

    def _release(self, owed: Sequence[tuple[Peer, Sequence[Answer]]]) -> None:
        for peer, answers in owed:
            self._send_answers(peer, answers)

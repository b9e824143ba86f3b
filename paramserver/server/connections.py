"""Who is connected to a partition: coming, going, and being given up.

What becomes of what they send is `intake`'s, what they are answered `replies`'; how it travels is
`transport`'s.
"""

from __future__ import annotations

import math
import select
import socket
from collections import Counter
from collections.abc import Callable

from downpour.paramserver.errors import ConnectionLost, ServerError
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.transport.network.acceptor import Accepted
from downpour.paramserver.transport.network.server_side import NetworkSide
from downpour.paramserver.transport.shared.server_side import Listener, SharedSide

HANDSHAKE_DEADLINE_S = 10.0
STALL_DEADLINE_S = 60.0
"""How long a connection over the network may stay in the middle of a frame without a byte."""
SWEEP_EVERY_S = 0.5
MAX_CONNECTIONS = 4096

Sides = dict[int, SharedSide | NetworkSide]
"""Our sides of open connections, by descriptor."""


class Connections:
    """The open connections of one partition, as its serving thread sees them."""

    def __init__(
        self,
        partition: Partition,
        sides: Sides,
        *,
        epoll: select.epoll,
        clock: Callable[[], float],
        gone: Callable[[int], None],
    ) -> None:
        """`sides` has none yet; `gone` is told the descriptor of each that was closed."""
        self.sides = sides
        self.dropped: Counter[str] = Counter()
        """Connections that we closed, by reason."""
        self._partition = partition
        self._epoll = epoll
        self._clock = clock
        self._gone = gone
        self._next_sweep_s = -math.inf

    def accept(self, listener: Listener) -> None:
        """Take in all connections that wait on this machine; their handshake is still to come."""
        while True:
            try:
                peer = listener.accept()
            except ServerError as error:
                self.dropped[type(error).__name__] += 1
                return  # whoever waits behind it wakes us again
            if peer is None:
                return
            if self._has_room(peer):
                self._add(SharedSide(peer, self._clock()))

    def add_network(self, accepted: Accepted) -> None:
        """Take in a connection over the network whose handshake is done."""
        if self._has_room(accepted.channel.socket):
            self._add(NetworkSide(accepted, self._partition, self._clock()))

    def _has_room(self, peer: socket.socket) -> bool:
        if len(self.sides) < MAX_CONNECTIONS:
            return True
        self.dropped["too many connections"] += 1
        peer.close()
        return False

    def _add(self, side: SharedSide | NetworkSide) -> None:
        fd = side.socket.fileno()
        self.sides[fd] = side
        self._epoll.register(fd, select.EPOLLIN)

    def watch_writable(self, side: NetworkSide, watch: bool) -> None:
        """Have the serving thread woken when more can be sent, or no longer."""
        if side.watches_writable != watch:
            side.watches_writable = watch
            writable = select.EPOLLOUT if watch else 0
            self._epoll.modify(side.socket.fileno(), select.EPOLLIN | writable)

    def hand_over(self, fd: int) -> socket.socket:
        """Give a connection up to the caller."""
        self._epoll.unregister(fd)
        return self.sides.pop(fd).socket

    def drop_silent(self) -> None:
        """From time to time, drop those that are late with a handshake or stalled in a frame."""
        now_s = self._clock()
        if now_s < self._next_sweep_s:
            return
        self._next_sweep_s = now_s + SWEEP_EVERY_S
        late: list[tuple[int, str]] = []
        for fd, side in self.sides.items():
            if isinstance(side, NetworkSide):
                if side.stalled_since(now_s) < now_s - STALL_DEADLINE_S:
                    late.append((fd, "stalled"))
            elif not side.is_ready and side.since_s < now_s - HANDSHAKE_DEADLINE_S:
                late.append((fd, "no hello"))
        for fd, reason in late:
            self._drop(fd, reason)

    def failed(self, fd: int, error: Exception) -> None:
        """Drop a connection, because of what it sent or because it is gone."""
        self._drop(fd, None if isinstance(error, ConnectionLost) else type(error).__name__)

    def _drop(self, fd: int, reason: str | None) -> None:
        side = self.sides.pop(fd, None)
        if side is None:
            return
        if reason is not None:
            self.dropped[reason] += 1
        self._epoll.unregister(fd)
        side.close()
        self._gone(fd)

    def close(self) -> None:
        """Close all of them."""
        for side in self.sides.values():
            side.close()
        self.sides.clear()

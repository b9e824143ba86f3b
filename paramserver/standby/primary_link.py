"""The follower's end of the connection to its primary.

A follower applies what the primary sends, in the order in which it comes, through the same door
(`PartitionState.apply_all`). Updates are deterministic, so at each version it is the same to the
bit. When the controller says so, it takes the token, applies what is still in its socket's buffer,
and is the partition. The primary sent everything before it published or answered it, so it is
there.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from downpour.paramserver.codec import decode_all
from downpour.paramserver.errors import (
    ConnectionLost,
    DeadlineExceeded,
    Diverged,
    Fenced,
    MalformedMessage,
    NotAuthenticated,
    NotColocated,
)
from downpour.paramserver.messages import Push
from downpour.paramserver.partition.snapshot import Snapshot
from downpour.paramserver.transport.endpoint import Endpoint, machine
from downpour.paramserver.transport.shared import replication
from downpour.paramserver.transport.shared.mailboxes import MailboxViews
from downpour.paramserver.transport.shared.replication import Closed, Handover, Opened
from downpour.paramserver.transport.shared.server_side import is_ours

JOIN_DEADLINE_S = 30.0
PACKETS_A_TURN = 16
"""Packets to apply before the primary is told, if there are so many."""


class ForwardedPush(NamedTuple):
    """A push that the primary takes, with its gradient and moments."""

    push: Push
    gradient: Tensor
    moments: Tensor


class PrimaryLink:
    """A connection to the primary, from which pushes come."""

    packets_a_turn = PACKETS_A_TURN

    def __init__(self, endpoint: Endpoint, *, key: bytes, room: Mapping[str, Tensor]) -> None:
        """Join the partition at `endpoint`; `take_state` gives what to start from.

        Args:
            endpoint: The primary's.
            key: The run's key.
            room: Tensors of the shapes of a state's large ones.

        Raises:
            ConnectionLost: The primary is gone, or takes no follower.
            DeadlineExceeded: It has not handed its state over in time.
            NotColocated: It is on another machine.
            NotAuthenticated: It is another user's.
            MalformedMessage, BadSnapshot: What it handed over is no state of this partition.
        """
        self._partition = endpoint.partition
        if endpoint.machine != machine():
            raise NotColocated(
                f"partition {self._partition.index} is on another machine: a follower shares "
                "memory with it, start it there"
            )
        self._views: dict[int, MailboxViews] = {}
        self._taken = 0
        """Packets returned that the primary has not been told of."""
        self._token = self._count = -1
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(JOIN_DEADLINE_S)
        try:
            self.socket.connect(b"\0" + endpoint.address.encode())
            if not is_ours(self.socket):
                raise NotAuthenticated(f"partition {self._partition.index} is another user's now")
            self.socket.send(replication.follow(key, self._partition))
            self._state: Snapshot | None = self._join(room)
        except TimeoutError:
            self.close()
            raise DeadlineExceeded(
                f"partition {self._partition.index} has not handed its state over for "
                f"{JOIN_DEADLINE_S:.0f} s"
            ) from None
        except OSError as error:
            self.close()
            raise ConnectionLost(f"partition {self._partition.index}: {error}") from None
        except BaseException:
            self.close()
            raise
        self.socket.setblocking(False)

    def _join(self, room: Mapping[str, Tensor]) -> Snapshot:
        data, fds, _, _ = socket.recv_fds(
            self.socket, replication.MAX_PACKET, 4, socket.MSG_CMSG_CLOEXEC
        )
        try:
            if not data:
                raise ConnectionLost(f"partition {self._partition.index} takes no follower")
            if not replication.is_joined(data) or len(fds) != 4:
                raise MalformedMessage("a partition's state that is none")
            self._count, self._token = fds.pop(), fds.pop()
            rest = fds.pop()
            try:
                memory = Handover(room, fds.pop())
            except BaseException:
                os.close(rest)
                raise
            memory.close()
            return replication.read_rest(rest, self._partition, memory.tensors)
        finally:
            for fd in fds:
                os.close(fd)

    def take_state(self) -> Snapshot:
        """Return the state that was handed over; only once, as it is as large as the partition."""
        state, self._state = self._state, None
        assert state is not None
        return state

    def fileno(self) -> int:
        """For `epoll`: readable when pushes have come."""
        return self.socket.fileno()

    def packet(self, version: int) -> list[ForwardedPush] | None:
        """Return the pushes of the next packet; None if none has come.

        Args:
            version: Ours, with all that was returned before applied.

        Raises:
            ConnectionLost: The primary is gone, and everything that it sent was returned.
            MalformedMessage: It says what no primary does.
            Diverged: It was at another version before the packet.
        """
        while True:
            message = replication.receive(self.socket)
            if message is None:
                return None
            if isinstance(message, Opened):
                views = MailboxViews(
                    message.fd, self._partition, message.num_mailboxes, message.depth
                )
                self._views[message.source] = views
            elif isinstance(message, Closed):
                self._views.pop(message.source, None)
            else:
                self._taken += 1
                if message.version != version:
                    raise Diverged(
                        f"the primary is at version {message.version}, its follower at {version}"
                    )
                return list(self._find(self._views[message.source], message.packet))

    def _find(self, views: MailboxViews, packet: bytes) -> Iterator[ForwardedPush]:
        for push in decode_all(packet):
            assert isinstance(push, Push)  # the primary has looked
            box, count = push.mailbox, len(push.batches)
            yield ForwardedPush(push, views.gradients[box], views.moments[box][:count])

    def tell(self) -> None:
        """Say that all packets returned until now are applied. Never waits."""
        if self._taken:
            replication.add(self._count, self._taken)
            self._taken = 0

    def check(self) -> None:
        """Do nothing: the socket tells at once when the primary dies."""

    def take_over(self) -> None:
        """Be the one that answers from now on; only packets that are on their way still come.

        Raises:
            Fenced: The primary went on without us, and we may lack what it answered.
        """
        if not replication.take(self._token):
            raise Fenced("the primary went on without this follower, which lacks what came then")
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RD)  # what has been sent can still be read

    def close(self) -> None:
        """Close the connection, and let go of all mailboxes."""
        self.socket.close()
        self._views.clear()
        for fd in (self._token, self._count):
            if fd >= 0:
                os.close(fd)
        self._token = self._count = -1

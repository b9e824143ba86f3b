"""The part that a process plays for its partition: alone, primary of a follower, or follower.

A process starts alone or as a follower. Alone it becomes a primary when a follower joins, and is
alone again when the follower is lost. A follower that is promoted is alone. `Replication` has the
present role and makes these changes; all of it is used by the serving thread, except `receive`.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from downpour.paramserver.errors import ConnectionLost, Diverged, Fenced, ServerError
from downpour.paramserver.messages import Answer
from downpour.paramserver.partition.snapshot import Snapshot
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.vectors import Arrival
from downpour.paramserver.standby.follower_link import FollowerLink, MailboxSource
from downpour.paramserver.standby.primary_link import PACKETS_A_TURN, PrimaryLink
from downpour.paramserver.transport.poller import Poller
from downpour.paramserver.transport.shared.replication import Handover

log = logging.getLogger(__name__)
Peer = TypeVar("Peer")
Peer_contra = TypeVar("Peer_contra", contravariant=True)


class Role(Protocol[Peer_contra]):
    """What the serving thread does for a second process that has the same partition."""

    shares_gradients: bool
    """Whether the second process reads the same gradients, which must then not be overwritten."""
    has_follower: bool
    """Whether the second process has everything that is answered."""

    def forward(self, source: int, version: int, packet: bytes) -> None:
        """Hand on a packet of pushes, none of which has been applied yet.

        Raises:
            Fenced: The second process is the partition by now.
        """

    def answer(self, peer: Peer_contra, answers: Sequence[Answer]) -> None:
        """Send answers to a replica's process, as soon as the second process has those pushes."""

    def opened(self, source: MailboxSource) -> None:
        """Note that a replica's process has connected. Raises as `forward` does."""

    def closed(self, number: int) -> None:
        """Note that a replica's process is gone. Raises as `forward` does."""

    def check(self) -> None:
        """Look whether the second process is late. Raises as `forward` does."""

    def close(self) -> None:
        """Close the connection to the second process."""


class Alone(Generic[Peer]):
    """No second process."""

    shares_gradients = False
    has_follower = False

    def __init__(self, answer: Callable[[Peer, Sequence[Answer]], None]) -> None:
        """`answer` sends answers to a replica's process, and raises nothing."""
        self._answer = answer

    def forward(self, source: int, version: int, packet: bytes) -> None:
        """See `Role`."""

    def answer(self, peer: Peer, answers: Sequence[Answer]) -> None:
        """See `Role`."""
        self._answer(peer, answers)

    def opened(self, source: MailboxSource) -> None:
        """See `Role`."""

    def closed(self, number: int) -> None:
        """See `Role`."""

    def check(self) -> None:
        """See `Role`."""

    def close(self) -> None:
        """See `Role`."""


class Primary(Generic[Peer]):
    """A follower applies every push, too, and replicas are answered once it has."""

    shares_gradients = True
    has_follower = True

    def __init__(
        self,
        link: FollowerLink[Peer],
        answer: Callable[[Peer, Sequence[Answer]], None],
        lost: Callable[[str], None],
    ) -> None:
        """`lost` ends this role, for the reason that it is given."""
        self.link = link
        self._answer = answer
        self._lost = lost

    def forward(self, source: int, version: int, packet: bytes) -> None:
        """See `Role`."""
        try:
            self.link.forward(source, version, packet)
        except ServerError as error:
            self._lost(str(error))

    def answer(self, peer: Peer, answers: Sequence[Answer]) -> None:
        """See `Role`."""
        if self.link.is_level:
            self._answer(peer, answers)
        else:
            self.link.owe(peer, answers)

    def hear(self) -> None:
        """The follower has said something: answer what it has applied."""
        try:
            due = self.link.due()
        except ServerError as error:
            self._lost(str(error))
        else:
            self.release(due)

    def release(self, due: Sequence[tuple[Peer, Sequence[Answer]]]) -> None:
        """Send answers that have waited long enough."""
        for peer, answers in due:
            self._answer(peer, answers)

    def opened(self, source: MailboxSource) -> None:
        """See `Role`."""
        try:
            self.link.open(source)
        except ServerError as error:
            self._lost(str(error))

    def closed(self, number: int) -> None:
        """See `Role`."""
        try:
            self.link.close_source(number)
        except ServerError as error:
            self._lost(str(error))

    def check(self) -> None:
        """See `Role`."""
        try:
            self.link.check()
        except ServerError as error:
            self._lost(str(error))

    def close(self) -> None:
        """See `Role`."""
        self.link.close()


class Follower(Alone[Peer]):
    """Applies what a primary sends. Nobody else is connected until this is promoted."""

    shares_gradients = True

    def __init__(
        self,
        link: PrimaryLink,
        answer: Callable[[Peer, Sequence[Answer]], None],
        state: PartitionState,
        apply_all: Callable[[Sequence[Arrival]], object],
    ) -> None:
        """`apply_all` applies pushes to `state`, and publishes the new version."""
        super().__init__(answer)
        self.link = link
        self._state = state
        self._apply_all = apply_all

    def serve(self) -> bool:
        """Apply what has come from the primary.

        Returns:
            False once the primary is gone and all that it sent is applied.

        Raises:
            Diverged: The primary is at another version.
        """
        for _ in range(PACKETS_A_TURN):
            try:
                packet = self.link.packet()
            except ConnectionLost:
                return False
            if packet is None:
                break
            version, arrivals = packet
            if version != self._state.version:
                raise Diverged(
                    f"the primary is at version {version}, its follower at {self._state.version}"
                )
            self._apply_all(arrivals)
        self.link.tell()
        return True

    def take_over(self) -> None:
        """Apply all that the primary has published or answered, and close the connection.

        Raises:
            Fenced: The primary went on without us.
        """
        self.link.take_over()
        while self.serve():
            pass

    def close(self) -> None:
        """See `Role`."""
        self.link.close()


class Replication(Generic[Peer]):
    """The present role, and the changes from one to another."""

    def __init__(
        self,
        index: int,
        *,
        poller: Poller,
        answer: Callable[[Peer, Sequence[Answer]], None],
        clock: Callable[[], float],
        deadline_s: float,
    ) -> None:
        """Alone. `answer` sends answers to a replica's process, and raises nothing.

        Args:
            index: The partition's.
            poller: Where the serving thread waits.
            answer: Sends answers.
            clock: Seconds, monotonic.
            deadline_s: How long a follower may take to apply a push.
        """
        self.role: Role[Peer] = Alone(answer)
        self._index, self._poller, self._answer = index, poller, answer
        self._clock, self._deadline_s = clock, deadline_s
        self._fenced: Fenced | None = None

    def follow(
        self,
        link: PrimaryLink,
        state: PartitionState,
        apply_all: Callable[[Sequence[Arrival]], object],
    ) -> None:
        """Be the follower of the primary at the other end of `link`. See `Follower`."""
        follower: Follower[Peer] = Follower(link, self._answer, state, apply_all)

        def serve() -> None:
            if not follower.serve():
                self._poller.unwatch(link)

        self.role = follower
        self._poller.watch(link, serve)

    def promote(self) -> bool:
        """Stop following, with all that the primary has published or answered.

        Returns:
            False if this is no follower.

        Raises:
            Fenced: The primary went on without us.
        """
        follower = self.role
        if not isinstance(follower, Follower):
            return False
        follower.take_over()
        self._poller.unwatch(follower.link)
        follower.close()
        self.role = Alone(self._answer)
        return True

    def receive(
        self, peer: socket.socket, room: Mapping[str, Tensor], join: Callable[[Handover], None]
    ) -> None:
        """Let `peer` follow: make memory for the state on another thread, and have it `join`.

        Nobody waits while the memory is made.

        Args:
            peer: A connection whose other side has said that it wants to follow.
            room: Tensors of the shapes of a state's large ones.
            join: Has the serving thread call `Replication.join`.
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
        sources: Iterable[MailboxSource],
        **about: object,
    ) -> None:
        """Hand the state over; from now on `peer` gets every packet. Run between two pushes.

        Args:
            state: This partition's.
            peer: The follower's connection.
            memory: Where the state's large tensors go.
            sources: The connections of replicas' processes.
            **about: What the follower is told besides.

        Raises:
            ServerError: The follower is lost.
            Fenced: An earlier follower is the partition by now.
        """
        if isinstance(self.role, Primary):
            self._lose(self.role, "another one has come")
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
        primary = Primary(link, self._answer, lambda reason: self._lose(primary, reason))
        self.role = primary
        self._poller.watch(link, primary.hear)
        self._poller.watch(link.count, primary.hear)

    def _lose(self, primary: Primary[Peer], reason: str) -> None:
        """Go on without the follower. Raises `Fenced` if it is the partition by now."""
        link = primary.link
        self.role = Alone(self._answer)
        self._poller.unwatch(link)
        self._poller.unwatch(link.count)
        try:
            owed = link.give_up()
        except Fenced as error:
            self._fenced = error
            raise
        log.warning("partition %d goes on without its follower: %s", self._index, reason)
        primary.release(owed)

    def raise_if_fenced(self) -> None:
        """Raise `Fenced` again, if it was raised where it does not end the serving thread."""
        if self._fenced is not None:
            raise self._fenced

    def close(self) -> None:
        """Close the connection to the second process."""
        self.role.close()

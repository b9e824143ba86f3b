"""The present role of a process for its partition, and the changes from one role to another.

`Replication` makes these changes; all of it is used by the serving thread, except `receive` and
`receive_remote`.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic

from torch import Tensor

from downpour.paramserver.errors import Fenced, NotAuthenticated, ServerError
from downpour.paramserver.messages import Answer
from downpour.paramserver.partition.snapshot import Snapshot
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.vectors import Arrival
from downpour.paramserver.standby.follower_link import FollowerLink, MailboxSource
from downpour.paramserver.standby.primary_link import PrimaryLink
from downpour.paramserver.standby.remote_follower_link import RemoteFollowerLink
from downpour.paramserver.standby.remote_primary_link import RemotePrimaryLink
from downpour.paramserver.standby.remote_roles import RemotePrimary
from downpour.paramserver.standby.roles import Alone, Follower, Peer, Primary, Role
from downpour.paramserver.transport.network.channel import Channel
from downpour.paramserver.transport.poller import Poller
from downpour.paramserver.transport.shared.replication import Handover

log = logging.getLogger(__name__)


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
        waits: bool = True,
    ) -> None:
        """Alone. `answer` sends answers to a replica's process, and raises nothing.

        Args:
            index: The partition's.
            poller: Where the serving thread waits.
            answer: Sends answers.
            clock: Seconds, monotonic.
            deadline_s: How long a follower may take to apply a push.
            waits: Whether pushes wait for a follower on another machine, see `RemotePrimary`.
        """
        self.role: Role[Peer] = Alone(answer)
        self._index, self._poller, self._answer = index, poller, answer
        self._clock, self._deadline_s = clock, deadline_s
        self._waits = waits
        self._fenced: Fenced | None = None
        self._generation = 0
        """Of the latest follower on another machine."""

    def follow(
        self,
        link: PrimaryLink | RemotePrimaryLink,
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

    def receive_remote(
        self, room: Mapping[str, Tensor], join: Callable[[], None], refused: Callable[[], None]
    ) -> None:
        """Let a follower on another machine join: touch `room` on another thread, then `join`.

        Args:
            room: Memory for the state's large tensors.
            join: Has the serving thread call `join_remote`.
            refused: Called instead if that fails.
        """

        def prepare() -> None:
            try:
                for tensor in room.values():
                    tensor.zero_()
                join()
            except (ServerError, OSError) as error:
                log.warning("partition %d takes no follower: %s", self._index, str(error))
                refused()

        name = f"follower-{self._index}"
        threading.Thread(target=prepare, name=name, daemon=True).start()

    def join_remote(
        self,
        state: PartitionState,
        channel: Channel,
        generation: int,
        room: Mapping[str, Tensor],
        **about: object,
    ) -> None:
        """Hand the state over a network; from now on that follower gets every push.

        Run between two pushes.

        Args:
            state: This partition's.
            channel: The follower's connection.
            generation: The follower's. The controller lets a later one join only once it will not
                promote the earlier one any more.
            room: Where the state's large tensors are copied to.
            **about: What the follower is told besides.

        Raises:
            NotAuthenticated: A later follower has come before.
            ConnectionLost: The follower is lost.
        """
        if generation <= self._generation:
            raise NotAuthenticated(f"follower {generation} came after {self._generation}")
        if isinstance(self.role, RemotePrimary):
            self._go_alone(self.role, "another one has come")
        self._generation = generation
        link = RemoteFollowerLink(
            channel, generation, clock=self._clock, deadline_s=self._deadline_s
        )
        meta, tensors = state.dump(room)
        meta |= {"quarantined": sorted(state.ledger.quarantined), **about}
        link.hand_over(Snapshot(partition=state.partition, meta=meta, tensors=tensors), tuple(room))
        primary: RemotePrimary[Peer] = RemotePrimary(
            link,
            self._answer,
            state,
            self._poller,
            lambda why: self._go_alone(primary, why),
            waits=self._waits,
        )
        self.role = primary
        primary.begin()

    def _go_alone(self, primary: RemotePrimary[Peer], reason: str) -> None:
        """Go on without a remote follower, which is not going to be the partition."""
        self.role = Alone(self._answer)
        primary.close()
        log.warning("partition %d goes on without its follower: %s", self._index, reason)
        primary.release()

    @property
    def waits_for_word(self) -> int | None:
        """The follower whose loss keeps this primary from answering; see `let_alone`."""
        role = self.role
        return role.waits_for_word if isinstance(role, RemotePrimary) else None

    def let_alone(self, generation: int) -> None:
        """Go on without this follower: the controller will not promote it any more."""
        role = self.role
        if isinstance(role, RemotePrimary) and role.link.generation == generation:
            self._go_alone(role, role.lost or "the controller says so")

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

"""The part that a process plays for its partition: alone, primary of a follower, or follower.

A process starts alone or as a follower. Alone it becomes a primary when a follower joins, and is
alone again when the follower is lost. A follower that is promoted is alone. `role_changes` makes
these changes; the primary of a follower on another machine is in `remote_roles`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from downpour.paramserver.errors import ConnectionLost, ServerError
from downpour.paramserver.messages import Answer
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.vectors import Arrival
from downpour.paramserver.standby.follower_link import FollowerLink, MailboxSource
from downpour.paramserver.standby.primary_link import PrimaryLink
from downpour.paramserver.standby.remote_primary_link import RemotePrimaryLink
from downpour.paramserver.transport.network.replication import BEAT_S

IDLE_S = 1.0
"""How long the serving thread of most roles waits if nothing comes."""
Peer = TypeVar("Peer")
Peer_contra = TypeVar("Peer_contra", contravariant=True)


class Role(Protocol[Peer_contra]):
    """What the serving thread does for a second process that has the same partition."""

    shares_gradients: bool
    """Whether the second process reads the same gradients, which must then not be overwritten."""
    wait_s: float
    """How often `check` is to be called, at the least."""

    @property
    def has_follower(self) -> bool:
        """Whether the second process has everything that is answered."""

    @property
    def defers(self) -> bool:
        """Whether pushes are not applied until the second process has them (`defer`)."""

    def defer(self, arrivals: Sequence[Arrival], apply: Callable[[], None]) -> None:
        """Hand pushes on if `defers`, and call `apply` once the second process has them.

        Their gradients and moments must stay as they are until then.
        """

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
    defers = False
    wait_s = IDLE_S

    def __init__(self, answer: Callable[[Peer, Sequence[Answer]], None]) -> None:
        """`answer` sends answers to a replica's process, and raises nothing."""
        self._answer = answer

    def defer(self, arrivals: Sequence[Arrival], apply: Callable[[], None]) -> None:
        """See `Role`."""
        apply()

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


class Primary(Alone[Peer]):
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
        super().__init__(answer)
        self.link = link
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
        link: PrimaryLink | RemotePrimaryLink,
        answer: Callable[[Peer, Sequence[Answer]], None],
        state: PartitionState,
        apply_all: Callable[[Sequence[Arrival]], object],
    ) -> None:
        """`apply_all` applies pushes to `state`, and publishes the new version."""
        super().__init__(answer)
        self.link = link
        self._state = state
        self._apply_all = apply_all
        if isinstance(link, RemotePrimaryLink):
            self.wait_s = BEAT_S

    def serve(self) -> bool:
        """Apply what has come from the primary.

        Returns:
            False once the primary is gone and all that it sent is applied.

        Raises:
            Diverged: The primary is, or was, at another version.
        """
        for _ in range(self.link.packets_a_turn):
            try:
                arrivals = self.link.packet(self._state.version)
            except ConnectionLost:
                return False
            if arrivals is None:
                break
            self._apply_all(arrivals)
        self.link.tell()
        return True

    def check(self) -> None:
        """See `Role`."""
        self.link.check()

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

"""The part of a primary whose follower is on another machine. The other roles are in `roles`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

from downpour.paramserver.errors import ServerError
from downpour.paramserver.messages import Answer
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.vectors import Arrival
from downpour.paramserver.standby.remote_follower_link import RemoteFollowerLink, copied
from downpour.paramserver.standby.roles import Alone, Peer
from downpour.paramserver.transport.network.replication import BEAT_S
from downpour.paramserver.transport.poller import Poller

log = logging.getLogger(__name__)


class RemotePrimary(Alone[Peer]):
    """A follower on another machine has every push before it is applied, published or answered.

    If that follower is lost, pushes wait until the controller has said that it will not promote it.
    """

    wait_s = BEAT_S

    def __init__(
        self,
        link: RemoteFollowerLink,
        answer: Callable[[Peer, Sequence[Answer]], None],
        state: PartitionState,
        poller: Poller,
        alone: Callable[[str], None],
        *,
        waits: bool = True,
    ) -> None:
        """Nothing is sent yet.

        Args:
            link: To the follower.
            answer: Sends answers to a replica's process, and raises nothing.
            state: The partition's.
            poller: Where the serving thread waits.
            alone: Ends this role, for the reason that it is given.
            waits: Whether a push waits until the follower has it. If not, it waits only once the
                follower is lost, or far behind.
        """
        super().__init__(answer)
        self._waits = waits
        self.link = link
        self.lost: str | None = None
        """Why the follower is lost, once it is."""
        self._state, self._poller, self._alone = state, poller, alone
        self._held: deque[tuple[int, int, Callable[[], None]]] = deque()
        """(number of the last push, pushes, what applies them), in order."""
        self._ended = False

    @property
    def defers(self) -> bool:  # type: ignore[override]
        """See `Role`."""
        return True

    @property
    def has_follower(self) -> bool:  # type: ignore[override]
        """See `Role`."""
        return self.link.is_level and self.lost is None

    @property
    def waits_for_word(self) -> int | None:
        """The generation of the follower whose loss keeps this primary from answering."""
        return None if self.lost is None else self.link.generation

    def begin(self) -> None:
        """Begin to send, and to listen to the follower."""
        self._poller.watch(self.link, self.hear)
        self._try(self.link.flush)

    def defer(self, arrivals: Sequence[Arrival], apply: Callable[[], None]) -> None:
        """See `Role`."""
        link = self.link
        waits = self._waits or self._held or self._ended or link.is_far_behind
        if link.is_level and waits:
            if not self._ended:
                self._try(lambda: link.forward(arrivals))
            self._held.append((link.sent, len(arrivals), apply))
            return
        copies = copied(arrivals)
        if self._try(lambda: link.forward(copies)):
            link.applied += len(arrivals)
        apply()

    def hear(self) -> None:
        """The follower has said something, or can be sent more: apply what it has.

        Raises:
            Fenced: It is the partition by now.
        """
        link = self.link
        # What it had said before it was lost still holds.
        self._try(link.flush)
        if not self._ended:
            self._try(link.hear)
        while self._held and self._held[0][0] <= link.received:
            _, count, apply = self._held.popleft()
            link.applied += count
            apply()
        if not self._ended and link.may_go_level():
            self._try(link.go_level)

    def check(self) -> None:
        """See `Role`."""
        if not self._ended:
            self._try(lambda: self.link.check(self._state.version))

    def release(self) -> None:
        """Apply all that waits, in order."""
        while self._held:
            self._held.popleft()[-1]()

    def close(self) -> None:
        """See `Role`."""
        if not self._ended:
            self._ended = True
            self._poller.unwatch(self.link)
            self.link.close()

    def _try(self, work: Callable[[], object]) -> bool:
        """Do something with the link; False if the follower is lost, by that or before."""
        try:
            work()
        except ServerError as error:
            self.close()
            if self.link.is_level:
                self.lost = self.lost or str(error)
                log.warning("a follower is lost (%s): pushes wait for the controller", self.lost)
            else:
                self._alone(str(error))
            return False
        self._poller.watch_writable(self.link, not self.link.all_sent)
        return True

"""A process's way to the parameter server: every partition at once.

One client serves all replicas of a process. It owns the mailboxes, keeps a connection to each
partition (over shared memory or the network, as `access` chooses), and knows which mailboxes wait
for answers from whom. One thread uses it.

A pull is begun and finished apart, so that weights travel while other steps compute. Over shared
memory the first half makes the whole copy at once.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from dataclasses import dataclass

from downpour.paramserver.access import Access, connect
from downpour.paramserver.errors import BadConfiguration, DeadlineExceeded, MalformedMessage
from downpour.paramserver.messages import MAX_BATCHES, MAX_MAILBOXES, Outcome, Push
from downpour.paramserver.transport.endpoint import Endpoint
from downpour.paramserver.transport.link import FloatArray, Link, Pull
from downpour.paramserver.transport.network.client import NetworkConnection
from downpour.paramserver.transport.patience import Patience
from downpour.paramserver.transport.shared.client import SharedConnection
from downpour.paramserver.transport.shared.mailboxes import Mailboxes

DEFAULT_ACCESS = Access()


@dataclass(frozen=True, kw_only=True, slots=True)
class PushResult:
    """Every partition has answered the push from a mailbox, which is free again."""

    mailbox: int
    outcomes: tuple[Outcome, ...]
    """What became of it, by partition."""


class ParameterClient:
    """Pulls weights from, and pushes gradients to, all partitions."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        key: bytes,
        access: Access = DEFAULT_ACCESS,
        num_mailboxes: int = 0,
        depth: int = 1,
        deadline_s: float = 30.0,
        bell_every: int = 1,
    ) -> None:
        """Connect to every partition.

        After a `ConnectionLost` from any method the client is of no use: close it and make another.

        Args:
            endpoints: Of all partitions of the model, in order of their index.
            key: The run's key.
            access: Which way to take.
            num_mailboxes: Pushes that may be in flight; 0 for a client that only pulls.
            depth: Sets of moments that a mailbox holds (`n_push`).
            deadline_s: How long to wait for a partition.
            bell_every: Pushes after which a partition on this machine is woken. It is woken earlier
                if an answer is waited for. A process with many steps in flight need not wake it for
                every push.

        Raises:
            BadConfiguration: The endpoints are not those of all partitions, or a number is out of
                its range.
            ServerError: A partition is out of reach, or does not let us in.
        """
        if not endpoints:
            raise BadConfiguration("no partition to connect to: give at least one endpoint")
        indices = [endpoint.partition.index for endpoint in endpoints]
        if indices != list(range(endpoints[0].partition.num_partitions)):
            raise BadConfiguration(
                f"endpoints of partitions {indices} of {endpoints[0].partition.num_partitions}: "
                "give one of each, in order"
            )
        if not 0 <= num_mailboxes <= MAX_MAILBOXES or not 1 <= depth <= MAX_BATCHES:
            raise BadConfiguration(
                f"{num_mailboxes} mailboxes of depth {depth}: give at most {MAX_MAILBOXES} to a "
                f"client, and a depth from 1 to {MAX_BATCHES}"
            )
        whole = endpoints[0].partition
        self.num_parameters = whole.total_parameters
        self.num_features = whole.total_features
        self.mailboxes = Mailboxes(
            self.num_parameters, self.num_features, num_mailboxes, depth, whole.num_partitions
        )
        self._deadline_s = deadline_s
        self._connections: list[Link] = []
        self._patience = Patience()
        self._poll = select.poll()
        self._network_poll = select.poll()
        self._network: dict[int, Link] = {}
        self._events: dict[int, int] = {}
        self._ahead: set[int] = set()
        """Connections with answers that came while something else was waited for."""
        try:
            for endpoint in endpoints:
                connection = connect(
                    endpoint,
                    key=key,
                    access=access,
                    mailboxes=self.mailboxes,
                    deadline_s=deadline_s,
                    bell_every=bell_every,
                )
                self._connections.append(connection)
                self._poll.register(connection.fileno(), connection.events)
                if not isinstance(connection, SharedConnection):
                    self._network[connection.fileno()] = connection
                    self._network_poll.register(connection.fileno(), connection.events)
        except BaseException:
            self.close()
            raise
        finally:
            self.mailboxes.close()
        self._waiting: list[int] = [0] * num_mailboxes
        self._outcomes: list[list[Outcome]] = [[] for _ in range(num_mailboxes)]
        self._asking: dict[int, int] = {}
        """Partition whose permit is waited for, by mailbox."""
        self._by_fd = {c.fileno(): (i, c) for i, c in enumerate(self._connections)}

    @property
    def num_partitions(self) -> int:
        """How many partitions there are."""
        return len(self._connections)

    @property
    def num_networked(self) -> int:
        """How many of them are reached over the network."""
        return len(self._network)

    @property
    def choices(self) -> str:
        """What `--wire auto` has chosen for the links that it measured; empty for none."""
        return "; ".join(
            f"partition {c.partition.index} by {c.choice}"
            for c in self._connections
            if isinstance(c, NetworkConnection) and c.choice
        )

    @property
    def torn(self) -> int:
        """Copies of weights that were thrown away because the writer overtook them."""
        return sum(c.torn for c in self._connections)

    def start_pull(
        self, weights: FloatArray, versions: list[int], statistics: FloatArray | None = None
    ) -> Pull:
        """Ask for the latest weights, and the BN statistics that belong to them.

        Until `finish` has returned, none of the three may be read or written.

        Args:
            weights: Where they go, float32 [P].
            versions: Where each partition's version goes.
            statistics: Where they go, float32 [2, F]; None if they are not wanted.

        Raises:
            ConnectionLost: A partition is gone.
        """
        pull = Pull(versions)
        for connection in self._connections:
            part = connection.partition
            connection.start_pull(
                pull,
                weights[part.start : part.stop],
                None
                if statistics is None
                else statistics[:, part.feature_start : part.feature_stop],
            )
        if self._network:
            self._watch()
        return pull

    def finish(self, pull: Pull) -> None:
        """Wait for the rest of a pull.

        Raises:
            ConnectionLost: A partition is gone.
            DeadlineExceeded: Nothing comes any more.
        """
        while pull.waiting:
            for fd, _ in self._wait(self._network_poll):
                connection = self._network[fd]
                connection.service()
                if connection.inbox:
                    self._ahead.add(fd)
            self._watch()

    def pull(self, weights: FloatArray, versions: list[int]) -> None:
        """Get the latest weights, float32 [P], and each partition's version. Raises as `finish`."""
        self.finish(self.start_pull(weights, versions))

    def pull_statistics(
        self, weights: FloatArray, statistics: FloatArray, versions: list[int]
    ) -> None:
        """As `pull`, with the BN statistics, float32 [2, F], that belong to the weights."""
        self.finish(self.start_pull(weights, versions, statistics))

    def push(
        self,
        *,
        mailbox: int,
        replica: int,
        epoch: int,
        batches: tuple[int, ...],
        examples: int,
        versions: Sequence[int],
        loss: float,
        gradient_norm: float,
    ) -> None:
        """Tell every partition that a gradient is in `mailbox`, which must be free.

        See `messages.Push`; `versions` are the partitions' that it was computed on.

        Raises:
            ConnectionLost: A partition is gone.
            DeadlineExceeded: A partition has not read for too long.
        """
        assert not self._waiting[mailbox], f"mailbox {mailbox} has a push in flight"
        assert 0 < len(batches) <= self.mailboxes.depth
        self._waiting[mailbox] = len(self._connections)
        self._outcomes[mailbox] = [Outcome.REFUSED_UNKNOWN] * len(self._connections)
        for connection, version in zip(self._connections, versions, strict=True):
            connection.push(
                Push(
                    mailbox=mailbox,
                    replica=replica,
                    epoch=epoch,
                    batches=batches,
                    examples=examples,
                    version=version,
                    loss=loss,
                    gradient_norm=gradient_norm,
                )
            )
        if self._network:
            self._watch()

    def ask(self, mailbox: int) -> None:
        """Ask every partition for a permit for the step that will push from `mailbox`.

        It has to be there before the step's weights are pulled, if the staleness policy works by
        permits. The partitions are asked one after the other, so that no two steps can wait for
        each other. Raises as `push` does.
        """
        assert not self._waiting[mailbox], f"mailbox {mailbox} has a push in flight"
        assert mailbox not in self._asking
        self._asking[mailbox] = 0
        self._connections[0].ask(mailbox)
        if self._network:
            self._watch()

    def permitted(self, mailbox: int) -> bool:
        """Whether the step of `mailbox` waits for no permit."""
        return mailbox not in self._asking

    @property
    def num_asking(self) -> int:
        """Steps that wait for a permit."""
        return len(self._asking)

    def _permit(self, mailbox: int, index: int) -> None:
        """A partition has given its permit: ask the next one."""
        index += 1
        if index == len(self._connections):
            del self._asking[mailbox]
            return
        self._asking[mailbox] = index
        self._connections[index].ask(mailbox)
        self._connections[index].flush()

    def flush(self) -> None:
        """Send off pushes that were kept back until there are more. Raises as `push` does."""
        for connection in self._connections:
            connection.flush()

    def in_flight(self, mailbox: int) -> bool:
        """Whether answers for this mailbox are still to come."""
        return self._waiting[mailbox] > 0

    def collect(self, wait_s: float = 0.0) -> list[PushResult]:
        """Return the pushes that all partitions have answered by now.

        Args:
            wait_s: How long to wait for an answer.

        Raises:
            ConnectionLost: A partition is gone.
            MalformedMessage: A partition says what it may not.
        """
        if self._ahead:
            return self._settle([])
        return self._settle(self._poll.poll(wait_s * 1000))

    def wait(self) -> list[PushResult]:
        """Wait for something to come, and return the pushes that are answered with it, if any.

        Raises:
            ConnectionLost: A partition is gone.
            DeadlineExceeded: Nothing comes any more.
            MalformedMessage: A partition says what it may not.
        """
        self.flush()
        if self._ahead:
            return self._settle([])
        return self._settle(self._wait(self._poll))

    def _wait(self, poll: select.poll) -> list[tuple[int, int]]:
        while True:
            moved = sum(c.moved for c in self._network.values())
            ready = self._patience.wait(poll, self._deadline_s * 1000)
            if ready:
                return ready
            # A large push or pull tells of itself only when it is through.
            if sum(c.moved for c in self._network.values()) == moved:
                raise DeadlineExceeded(f"no partition has answered for {self._deadline_s} s")

    def _settle(self, ready: list[tuple[int, int]]) -> list[PushResult]:
        if self._ahead:
            ready = [*ready, *((fd, 0) for fd in self._ahead)]
            self._ahead.clear()
        settled: list[PushResult] = []
        for fd, _ in ready:
            index, connection = self._by_fd[fd]
            connection.service()
            for answer in connection.inbox:
                mailbox = answer.mailbox
                if mailbox >= len(self._waiting) or not self._waiting[mailbox]:
                    if answer.outcome is Outcome.PERMITTED and self._asking.get(mailbox) == index:
                        self._permit(mailbox, index)
                        continue
                    raise MalformedMessage(f"an answer for mailbox {mailbox}, which awaits none")
                self._outcomes[mailbox][index] = answer.outcome
                self._waiting[mailbox] -= 1
                if not self._waiting[mailbox]:
                    settled.append(
                        PushResult(mailbox=mailbox, outcomes=tuple(self._outcomes[mailbox]))
                    )
            connection.inbox.clear()
        if ready and self._network:
            self._watch()
        return settled

    def _watch(self) -> None:
        """Wait for sockets to become writable only while there is something to be written."""
        for fd, connection in self._network.items():
            events = connection.events
            if self._events.get(fd) != events:
                self._events[fd] = events
                self._poll.modify(fd, events)
                self._network_poll.modify(fd, events)

    def interrupt(self) -> None:
        """Cut every connection, so that a thread that waits for one gets `ConnectionLost`.

        This is the one method that another thread may call.
        """
        for connection in self._connections:
            connection.interrupt()

    def close(self) -> None:
        """Close every connection."""
        for connection in self._connections:
            connection.close()

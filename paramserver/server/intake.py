"""When a partition applies the pushes that come: at once, or by permits.

With permits a step asks before it pulls, and its push waits for its turn. Who may begin and whose
turn it is, is decided by `paramserver.admission`; here messages are turned into that, and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from downpour.paramserver.admission.bounded import BoundedPermits
from downpour.paramserver.admission.permits import Permit, Permits
from downpour.paramserver.admission.rounds import RoundPermits
from downpour.paramserver.codec import decode_all, encode
from downpour.paramserver.errors import MalformedMessage
from downpour.paramserver.messages import Answer, Outcome, PermitRequest, Push, WireDtype
from downpour.paramserver.partition.vectors import Arrival
from downpour.paramserver.rules.policy import StalenessPolicy
from downpour.paramserver.server.replies import Replies
from downpour.paramserver.server.versions import Versions
from downpour.paramserver.standby.role_changes import Replication
from downpour.paramserver.transport.network.server_side import NetworkSide
from downpour.paramserver.transport.shared.server_side import SharedSide


class Intake(Protocol):
    """Takes in what replicas send. Everything is called by the serving thread."""

    def take(self, side: SharedSide, data: bytes) -> None:
        """Take in a packet of a process on this machine.

        Raises:
            MalformedMessage: It is not what that process may send now.
        """

    def take_network(self, side: NetworkSide, push: Push, came: Tensor, moments: Tensor) -> None:
        """Take in a push that came over the network.

        Args:
            side: Where it came from.
            push: Its header.
            came: Its gradient as it travelled; free for the next push when this returns.
            moments: float32 [batches, 3, f]; likewise.

        Raises:
            MalformedMessage: That process may not push this now.
        """

    def ask(self, fd: int, mailboxes: Iterable[int]) -> None:
        """Note that permits are wanted for these mailboxes of connection `fd`.

        Raises:
            MalformedMessage: They may not be asked for now.
        """

    def advance(self) -> None:
        """Do whatever can be done now."""

    def leave(self, fd: int) -> None:
        """Forget a connection that is gone."""


class OpenIntake:
    """Applies every push as it comes."""

    def __init__(
        self, versions: Versions, replication: Replication[SharedSide], replies: Replies
    ) -> None:
        """Pushes go to `versions`, and to a follower by `replication`."""
        self._versions = versions
        self._ledger = versions.state.ledger
        self._replication = replication
        self._replies = replies

    def take(self, side: SharedSide, data: bytes) -> None:
        """See `Intake`."""
        arrivals: list[Arrival] = []
        for push in decode_all(data):
            if not isinstance(push, Push):
                raise MalformedMessage(f"{type(push).__name__} in place of a push")
            views, count, box = side.views, len(push.batches), push.mailbox
            if push.wire is not WireDtype.FLOAT32:
                raise MalformedMessage(f"a push as {push.wire.name} through shared memory")
            if views is None or box >= len(views.gradients) or count > side.depth:
                raise MalformedMessage(f"a push of {count} mini-batches from mailbox {box}")
            arrivals.append((push, views.gradients[box], views.moments[box][:count]))
        role = self._replication.role
        if role.defers:
            role.defer(arrivals, lambda: self._settle(side, arrivals))
            return
        role.forward(side.socket.fileno(), self._ledger.version, data)
        self._settle(side, arrivals)

    def _settle(self, side: SharedSide, arrivals: Sequence[Arrival]) -> None:
        versions, role = self._versions, self._replication.role
        # Readers wait for what is written over.
        at_once = 1 if versions.in_place else len(arrivals)
        answers: list[Answer] = []
        for first in range(0, len(arrivals), at_once):
            some = arrivals[first : first + at_once]
            answers += versions.apply_all(some, shared=role.shares_gradients)
        role.answer(side, answers)

    def take_network(self, side: NetworkSide, push: Push, came: Tensor, moments: Tensor) -> None:
        """See `Intake`."""
        role = self._replication.role
        if role.defers:
            # The connection's next push is received where this one lies.
            arrivals = [(push, came.clone(), moments.clone())]
            role.defer(arrivals, lambda: self._settle_network(side, arrivals))
            return
        arrival = (push, came, moments)
        side.answer(*self._versions.apply_all([arrival], shared=role.shares_gradients))

    def _settle_network(self, side: NetworkSide, arrivals: Sequence[Arrival]) -> None:
        answers = self._versions.apply_all(arrivals, shared=False)
        self._replies.answer_network(side, answers)

    def ask(self, fd: int, mailboxes: Iterable[int]) -> None:
        """See `Intake`."""
        raise MalformedMessage("a permit is asked for, and none is needed")

    def advance(self) -> None:
        """See `Intake`: nothing waits."""

    def leave(self, fd: int) -> None:
        """See `Intake`: nothing waits."""


class PendingPush(NamedTuple):
    """A push that waits for its turn."""

    push: Push
    gradient: Tensor
    """As it came; float32 [n] through shared memory."""
    moments: Tensor
    """float32 [batches, 3, f]"""


class PermitIntake:
    """Lets steps begin by permit, and applies each push when its turn comes."""

    def __init__(
        self,
        permits: Permits[PendingPush],
        versions: Versions,
        replication: Replication[SharedSide],
        replies: Replies,
    ) -> None:
        """`permits` decides. Pushes go to `versions`, and to a follower by `replication`."""
        self._permits = permits
        self._versions = versions
        self._ledger = versions.state.ledger
        self._replication = replication
        self._replies = replies
        self._deferred = False
        """Whether a push whose turn it was waits until a second process has it."""

    def take(self, side: SharedSide, data: bytes) -> None:
        """See `Intake`."""
        fd, views = side.socket.fileno(), side.views
        for message in decode_all(data):
            if not isinstance(message, Push | PermitRequest):
                raise MalformedMessage(f"{type(message).__name__} in place of a push")
            box = message.mailbox
            if views is None or box >= len(views.gradients):
                raise MalformedMessage(f"a {type(message).__name__} of mailbox {box}")
            if isinstance(message, PermitRequest):
                self._permits.ask((fd, box))
                continue
            count = len(message.batches)
            if message.wire is not WireDtype.FLOAT32:
                raise MalformedMessage(f"a push as {message.wire.name} through shared memory")
            if count > side.depth:
                raise MalformedMessage(f"a push of {count} mini-batches from mailbox {box}")
            pending = PendingPush(message, views.gradients[box], views.moments[box][:count])
            self._permits.push((fd, box), message.version, pending)

    def take_network(self, side: NetworkSide, push: Push, came: Tensor, moments: Tensor) -> None:
        """See `Intake`."""
        # The connection's next push is received where this one lies.
        pending = PendingPush(push, came.clone(), moments.clone())
        self._permits.push((side.socket.fileno(), push.mailbox), push.version, pending)

    def ask(self, fd: int, mailboxes: Iterable[int]) -> None:
        """See `Intake`."""
        for box in mailboxes:
            self._permits.ask((fd, box))

    def advance(self) -> None:
        """Apply every push whose turn it is, and give every permit that there is."""
        ledger, permits = self._ledger, self._permits
        answers: dict[int, list[Answer]] = {}
        while True:
            while (
                not self._deferred
                and (due := permits.next(ledger.version, ledger.weights_version)) is not None
            ):
                fd, box = due.key
                if isinstance(due, Permit):
                    answer = Answer(mailbox=box, outcome=Outcome.PERMITTED, version=ledger.version)
                elif self._replication.role.defers:
                    self._defer(fd, due.push)
                    continue
                else:
                    answer = self._apply(fd, due.push)
                answers.setdefault(fd, []).append(answer)
            if not answers:
                return
            fd, batch = answers.popitem()
            side = self._replies.connections.sides.get(fd)
            self._tell(side, batch)  # if the connection is gone, others may go on

    def _defer(self, fd: int, pending: PendingPush) -> None:
        """Apply a push once the second process has it. Whose turn is next depends on that."""
        self._deferred, side = True, self._replies.connections.sides.get(fd)

        def settle() -> None:
            self._deferred = False
            self._tell(side, self._versions.apply_all([pending], shared=False))

        self._replication.role.defer([pending], settle)

    def _apply(self, fd: int, pending: PendingPush) -> Answer:
        role = self._replication.role
        role.forward(fd, self._ledger.version, encode(pending.push))
        (answer,) = self._versions.apply_all([pending], shared=role.shares_gradients)
        return answer

    def _tell(self, side: SharedSide | NetworkSide | None, answers: Sequence[Answer]) -> None:
        if isinstance(side, SharedSide):
            self._replication.role.answer(side, answers)
        elif side is not None:
            self._replies.answer_network(side, answers)

    def leave(self, fd: int) -> None:
        """See `Intake`: its permits go to others."""
        self._permits.leave(fd)


def make_intake(
    policy: StalenessPolicy,
    versions: Versions,
    replication: Replication[SharedSide],
    replies: Replies,
) -> Intake:
    """Return the intake that a staleness policy needs."""
    match policy.staleness_policy:
        case "bounded":
            permits: Permits[PendingPush] = BoundedPermits(policy.staleness_bound)
        case "synchronous":
            permits = RoundPermits(policy.round_steps or policy.round_pushes or 1)
        case _:
            return OpenIntake(versions, replication, replies)
    return PermitIntake(permits, versions, replication, replies)

"""A partition on the virtual clock: the server's own decisions, with weights if it is to learn.

The server's `Ledger` decides what becomes of a push, and its `Permits` decide who may begin a step,
as on a real partition. The loop around them is modelled on `paramserver.server.server`: connections
that have sent something are served in turn, a packet at a time, and a packet is answered once all
of it has been taken.

A partition keeps a bare ledger, or (`arithmetic`) the server's whole state: then pushes carry their
gradients, and versions their weights.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from downpour.cluster.simulate.clock import Body, Clock, Processors, Thread
from downpour.cluster.simulate.inputs import Costs
from downpour.paramserver.admission.bounded import BoundedPermits
from downpour.paramserver.admission.permits import Permit, Permits
from downpour.paramserver.admission.rounds import RoundPermits
from downpour.paramserver.messages import Outcome, PermitRequest, Push
from downpour.paramserver.partition.ledger import Ledger, make_ledger
from downpour.paramserver.partition.staleness import Histogram, StalenessRecord
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.rules.update import updates_in_place
from downpour.paramserver.server.server import PUSHES_A_TURN

if TYPE_CHECKING:
    from torch import Tensor

Message = Push | PermitRequest


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CarriedPush(Push):
    """A push together with what lies in its mailbox, as far as one partition is concerned."""

    gradient: Tensor
    """float32 [n], which the partition may overwrite."""
    moments: Tensor
    """float32 [mini-batches, 3, f]."""


class PooledStaleness(StalenessRecord):
    """A record of staleness that does not tell replicas apart.

    A histogram for each of 10,000 replicas, with 50,000 steps in flight, would be gigabytes.
    """

    def add(self, replica: int, staleness: int) -> None:
        """Count one applied push."""
        super().add(0, staleness)


class PartitionKeeper(Protocol):
    """What a partition keeps: a ledger, and weights if it is to learn."""

    @property
    def ledger(self) -> Ledger:
        """What became of every push."""

    @property
    def weights(self) -> Tensor | None:
        """Those of `ledger.weights_version`, float32 [n]; nobody writes over them later."""

    def take(self, push: Push) -> Outcome:
        """Take in a push; return what became of it."""

    def dump(self) -> Any:
        """A copy of everything, which `load` takes."""

    def load(self, saved: Any) -> None:
        """Go on from what `dump` gave."""

    def check(self) -> None:
        """Assert the invariants."""


class BareLedger:
    """A ledger without weights."""

    weights: Tensor | None = None

    def __init__(self, config: UpdateConfig) -> None:
        """Version 0."""
        self.ledger = make_ledger(config, PooledStaleness())

    def take(self, push: Push) -> Outcome:
        """See `PartitionKeeper`."""
        return self.ledger.take(push)

    def dump(self) -> Any:
        """See `PartitionKeeper`."""
        return self.ledger.dump()

    def load(self, saved: Any) -> None:
        """See `PartitionKeeper`."""
        self.ledger.load(*saved)

    def check(self) -> None:
        """See `PartitionKeeper`."""
        self.ledger.check()


SendWeights = Callable[[list[int], int, "Tensor | None"], None]
"""Gets the versions that a pull is to fill in, the partition's version, and its weights."""


@dataclass(eq=False)
class Line:
    """A connection as the partition sees it."""

    number: int
    packets: deque[list[Message]]
    pulls: deque[list[int]]
    """Pulls asked for over the network, each with the versions that it is to fill in."""
    answer: Callable[[list[tuple[int, Outcome]]], None]
    """Sends the answers to a packet: mailbox and outcome."""
    send_weights: SendWeights
    """Sends weights of a version for a pull."""
    is_open: bool = True


class VirtualPartition:
    """One partition; it may die, and be started again."""

    def __init__(
        self,
        index: int,
        *,
        config: UpdateConfig,
        clock: Clock,
        processors: Processors,
        costs: Costs,
        rng: random.Random,
        num_partitions: int = 1,
        make_keeper: Callable[[], PartitionKeeper] | None = None,
    ) -> None:
        """It is up, at version 0; `num_partitions` share the model.

        `make_keeper` gives what it keeps at its start; a bare ledger by default.
        """
        self.index = index
        self._config = config
        self._clock = clock
        self._processors = processors
        self._costs = costs
        self._rng = rng
        share = round(costs.num_parameters / num_partitions)
        self._push_by_push = updates_in_place(share)
        """Whether each version of a packet can be pulled, as `paramserver.server.server` does it.
        """
        self._make_keeper = make_keeper or (lambda: BareLedger(config))
        self.keeper = self._make_keeper()
        self.seen = Histogram()
        """Staleness of what was applied since somebody last emptied this."""
        self.applied = 0
        """Updates so far, those that a death has taken back among them."""
        self._saved = self.keeper.dump()
        self.up = False
        self._count = 0
        self.start()

    def start(self) -> None:
        """Serve from the last checkpoint on."""
        self.keeper = self._make_keeper()
        self.keeper.load(self._saved)
        self.ledger = self.keeper.ledger
        self._publish()
        policy = self._config.policy
        self._permits: Permits[tuple[Line, Push]] | None = None
        if policy.staleness_policy == "bounded":
            self._permits = BoundedPermits(policy.staleness_bound)
        elif policy.staleness_policy == "synchronous":
            self._permits = RoundPermits(policy.round_steps or policy.round_pushes or 1)
        self._lines: dict[int, Line] = {}
        self._ready: dict[int, Line] = {}
        """Connections that have something, in the order in which they had it."""
        self._thread = Thread(self._processors, self._body())
        self.up = True

    def _publish(self) -> None:
        self.version = self.ledger.weights_version
        """The version that a pull would get now."""
        self.weights = self.keeper.weights
        """Its weights, float32 [n]; none without arithmetic."""

    def save(self) -> None:
        """Take a checkpoint. What the copy costs is not modelled."""
        self._saved = self.keeper.dump()

    def die(self) -> None:
        """Lose everything since the last checkpoint."""
        self.up = False
        self._thread.end()
        for line in self._lines.values():
            line.is_open = False

    def connect(
        self,
        answer: Callable[[list[tuple[int, Outcome]]], None],
        send_weights: SendWeights,
    ) -> Line:
        """A new connection."""
        self._count += 1
        line = Line(self._count, deque(), deque(), answer, send_weights)
        self._lines[line.number] = line
        return line

    def leave(self, line: Line) -> None:
        """A connection's other end is gone. What it had sent is still taken."""
        if line.is_open and self._permits is not None:
            self._permits.leave(line.number)
        line.is_open = False

    def come(
        self, line: Line, packet: list[Message] | None = None, pull: list[int] | None = None
    ) -> None:
        """Something has come in on a connection."""
        if not self.up or self._lines.get(line.number) is not line:
            return
        if packet is not None:
            line.packets.append(packet)
        if pull is not None:
            line.pulls.append(pull)
        self._ready.setdefault(line.number, line)
        self._thread.wake()

    def _body(self) -> Body:
        while True:
            if not self._ready:
                yield None
                continue
            ready, self._ready = list(self._ready.values()), {}
            for line in ready:
                for _ in range(PUSHES_A_TURN):
                    if not line.packets:
                        break
                    yield from self._take(line, line.packets.popleft())
                while line.pulls:
                    line.send_weights(line.pulls.popleft(), self.version, self.weights)
                if line.packets:
                    self._ready.setdefault(line.number, line)
            if self._permits is not None:
                yield from self._go_on(self._permits)

    def _take(self, line: Line, packet: list[Message]) -> Body:
        if self._costs.bell_s:
            yield self._costs.bell_s
        answers: list[tuple[int, Outcome]] = []
        for message in packet:
            if self._permits is None:
                assert isinstance(message, Push)
                yield self._costs.apply.draw(self._rng)
                answers.append((message.mailbox, self._apply(message)))
                if self._push_by_push:
                    self._publish()
            elif not line.is_open:
                continue
            elif isinstance(message, PermitRequest):
                self._permits.ask((line.number, message.mailbox))
            else:
                key = (line.number, message.mailbox)
                self._permits.push(key, message.version, (line, message))
        self._publish()
        if answers and line.is_open:
            line.answer(answers)

    def _apply(self, push: Push) -> Outcome:
        staleness = self.ledger.staleness_of(push)
        outcome = self.keeper.take(push)
        if outcome is Outcome.APPLIED:
            self.seen.add(staleness)
            self.applied += 1
        return outcome

    def _go_on(self, permits: Permits[tuple[Line, Push]]) -> Body:
        answers: dict[int, list[tuple[int, Outcome]]] = {}
        while (due := permits.next(self.ledger.version, self.version)) is not None:
            number, mailbox = due.key
            if isinstance(due, Permit):
                outcome = Outcome.PERMITTED
            else:
                yield self._costs.apply.draw(self._rng)
                outcome = self._apply(due.push[1])
                self._publish()
            answers.setdefault(number, []).append((mailbox, outcome))
        for number, told in answers.items():
            if self._lines[number].is_open:
                self._lines[number].answer(told)

"""A process of replicas on the virtual clock.

Which operation comes next is decided by `workers.replica.rotation`, as in a real process; here
operations cost virtual time and messages. Pushes are kept back until the doorbell is worth ringing,
or until an answer is waited for, as `paramserver.client` does it.
With a learner, a step's gradient is computed, too, on the weights that its pull has got.
`tests/pure/cluster/simulate/test_process.py` runs both through the same story and compares.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.simulate.clock import Body, Clock, Processors, Thread
from downpour.cluster.simulate.inputs import Costs
from downpour.cluster.simulate.partition import Message
from downpour.paramserver.messages import Outcome, PermitRequest, Push
from downpour.paramserver.transport.link import Pull
from downpour.shuffler.plan.keys import stream_key
from downpour.workers.replica import rotation
from downpour.workers.replica.pull_timer import PullTimer
from downpour.workers.replica.rotation import Op, PulledWeights, Rotation, Turn
from downpour.workers.spec import StepConfig

if TYPE_CHECKING:
    from torch import Tensor


class Way(Protocol):
    """A connection to one partition."""

    nearby: bool
    """Shared memory: a pull is a copy, made at once."""

    def version(self) -> int:
        """What a pull from nearby would get now."""

    def weights(self) -> Tensor | None:
        """The weights of that version, float32 [n]; none without arithmetic."""

    def send(self, packet: list[Message]) -> None:
        """Send a packet; pushes over the network take their gradients along."""

    def ask_weights(self, pulled: PulledWeights, process: VirtualProcess) -> None:
        """Ask for weights over the network; `process.pulled` is told of them.

        They are put into `pulled.holder`, a list with a place for each partition.
        """


class StepArithmetic(Protocol):
    """Computes the gradients of steps."""

    def begin_push(self) -> Any:
        """Room for what one push collects."""

    def step(
        self,
        found: Any,
        weights: Sequence[Tensor],
        epoch: int,
        batches: Sequence[int],
        index: int,
    ) -> None:
        """Compute one step, and add what comes of it to `found`.

        Args:
            found: of `begin_push`.
            weights: of each partition, float32 [n].
            epoch: of the mini-batches.
            batches: the mini-batches that the step takes.
            index: place of the first of them in the push.
        """

    def carry(self, found: Any, partition: int, push: Push) -> Push:
        """The push to one partition, with its part of what was found."""


@dataclass(kw_only=True, eq=False)
class VirtualTask(rotation.Task):
    """A window in progress."""

    replica: int
    lease: Lease
    unsettled: int = 0
    since_s: float | None = None


@dataclass
class Counts:
    """What all processes have done so far."""

    steps: int = 0
    pushes: int = 0
    push_s: float = 0.0
    """Seconds from a push to its last answer, summed up."""
    pull_s: float = 0.0
    """Seconds that steps waited for weights, summed up."""


@dataclass(eq=False)
class VirtualProcess:
    """Some of the run's replicas. It may be ended, and another made in its place."""

    replicas: tuple[int, ...]
    config: StepConfig
    clock: Clock
    processors: Processors
    costs: Costs
    width: int
    """Threads that a step computes on, side by side."""
    step_times: float
    """How many times longer its steps take than those of others."""
    rng: random.Random
    counts: Counts
    finished: Callable[[VirtualTask], None]
    """Is told when every mini-batch of a window has been answered."""
    batch_size: int
    learner: StepArithmetic | None = None
    """What computes gradients; none computes none."""
    ways: list[Way] = field(default_factory=list)

    def start(self, ways: Sequence[Way]) -> None:
        """Connect to every partition, and wait for windows."""
        self.ways = list(ways)
        nearby = all(way.nearby for way in ways)
        count = len(self.replicas)
        self.rotation: Rotation[VirtualTask] = Rotation(
            replicas=self.replicas,
            config=self.config,
            num_mailboxes=rotation.num_mailboxes(count, self.config, nearby),
        )
        self._bell_every = rotation.turns_together(count, self.config)
        self._measured = PullTimer()
        self._outbox: list[list[Message]] = [[] for _ in ways]
        self._found: dict[int, Any] = {}
        """What the learner has found so far for the push from a mailbox."""
        self._pushed_s: dict[int, float] = {}
        """When the push in a mailbox was made."""
        self._missing: dict[int, int] = {}
        """Answers that are still to come, by mailbox."""
        self._refused: set[int] = set()
        """Mailboxes whose push some partition did not settle."""
        self._asking: dict[int, int] = {}
        """Partition whose permit is waited for, by mailbox."""
        self._inbox: deque[tuple[int, int, Outcome]] = deque()
        self._thread = Thread(self.processors, self._body(), self.width)

    def assign(self, replica: int, lease: Lease) -> None:
        """Queue a window for one of the replicas."""
        task = VirtualTask(replica=replica, lease=lease, epoch=lease.epoch, batches=lease.batches)
        self.rotation.assign(replica, task)
        self._thread.wake()

    def end(self) -> None:
        """Do nothing any more."""
        self._thread.end()

    def answered(self, partition: int, answers: list[tuple[int, Outcome]]) -> None:
        """Answers have come."""
        self._inbox.extend((partition, mailbox, outcome) for mailbox, outcome in answers)
        self._thread.wake()

    def pulled(self, pull: Pull) -> None:
        """A partition's weights have come."""
        pull.waiting -= 1
        self._thread.wake()

    def _body(self) -> Body:
        turns = self.rotation
        for op in turns.run():
            turn = turns.turn
            if op is Op.COMPUTE:
                assert turn.task is not None
                if turn.task.since_s is None:
                    turn.task.since_s = self.clock.now_s
                steps = sum(self.costs.step.draw(self.rng) for _ in range(turn.count))
                yield steps * self.step_times
                if self.learner is not None:
                    self._learn(turn, self.learner)
                self.counts.steps += turn.count
            elif op is Op.PUSH:
                self._push(turn)
            elif op is Op.COLLECT:
                self._collect()
            elif op is Op.PULL:
                self._pull(turn)
            elif op is Op.AWAIT_WEIGHTS:
                yield from self._await_weights(turn)
            elif op is Op.ASK:
                assert turn.mailbox is not None
                self._asking[turn.mailbox] = 0
                self._put(0, PermitRequest(mailbox=turn.mailbox))
            elif op is Op.WAIT or op is Op.WAIT_LONG:
                yield from self._wait(op)
            elif op is Op.IDLE and not turns.has_work():
                yield None

    def _learn(self, turn: Turn[VirtualTask], learner: StepArithmetic) -> None:
        assert turn.task is not None
        assert turn.mailbox is not None
        assert turn.weights is not None
        if not turn.done:
            self._found[turn.mailbox] = learner.begin_push()
        batches = turn.batches[turn.done : turn.done + turn.count]
        found, weights = self._found[turn.mailbox], turn.weights.holder
        learner.step(found, weights, turn.task.epoch, batches, turn.done)

    def _wait(self, op: Op) -> Body:
        self._flush()
        while not self._inbox:
            yield None
            if op is Op.WAIT_LONG:
                break  # a real one looks round every 0.1 s
        self._collect()

    def _pull(self, turn: Turn[VirtualTask]) -> None:
        self.rotation.dropped.clear()
        assert turn.weights is not None
        pull = turn.weights.pull = Pull([0] * len(self.ways))
        weights = turn.weights.holder = [None] * len(self.ways)
        for index, way in enumerate(self.ways):
            if way.nearby:
                pull.versions[index] = way.version()
                if self.learner is not None:
                    weights[index] = way.weights()
            else:
                pull.waiting += 1
                way.ask_weights(turn.weights, self)
        if self.rotation.fresh and pull.waiting:
            self._measured.asked(self.clock.now_s, self.rotation.lead)

    def _await_weights(self, turn: Turn[VirtualTask]) -> Body:
        assert turn.weights is not None
        since_s = self.clock.now_s
        while turn.weights.pull.waiting:
            yield None
        self.counts.pull_s += self.clock.now_s - since_s
        if self.rotation.fresh:
            most = len(self.rotation.turns) - 1
            self.rotation.lead = self._measured.come(self.clock.now_s, most)

    def _push(self, turn: Turn[VirtualTask]) -> None:
        task, mailbox = turn.task, turn.mailbox
        assert task is not None
        assert mailbox is not None
        assert turn.weights is not None
        self._missing[mailbox] = len(self.ways)
        learner, found = self.learner, self._found.pop(mailbox, None)
        for index, version in enumerate(turn.weights.pull.versions):
            push = Push(
                mailbox=mailbox,
                replica=turn.replica,
                epoch=task.epoch,
                batches=turn.batches,
                examples=self.batch_size * len(turn.batches),
                version=version,
                loss=0.0,
                gradient_norm=0.0,
            )
            self._put(index, push if learner is None else learner.carry(found, index, push))
        self._pushed_s[mailbox] = self.clock.now_s

    def _put(self, index: int, message: Message) -> None:
        outbox = self._outbox[index]
        outbox.append(message)
        # Over the network a message leaves at once.
        if len(outbox) >= self._bell_every or not self.ways[index].nearby:
            self._ring(index)

    def _ring(self, index: int) -> None:
        if self._outbox[index]:
            packet, self._outbox[index] = self._outbox[index], []
            self.ways[index].send(packet)

    def _flush(self) -> None:
        for index in range(len(self.ways)):
            self._ring(index)

    def _collect(self) -> None:
        """Settle what has been answered by now."""
        while self._inbox:
            index, mailbox, outcome = self._inbox.popleft()
            if outcome is Outcome.PERMITTED:
                self._permit(mailbox, index + 1)
                continue
            if not outcome.settled:
                self._refused.add(mailbox)
            self._missing[mailbox] -= 1
            if not self._missing[mailbox]:
                self._settle(mailbox)

    def _permit(self, mailbox: int, index: int) -> None:
        if index == len(self.ways):
            del self._asking[mailbox]
            self.rotation.permitted(mailbox)
            return
        self._asking[mailbox] = index
        self._put(index, PermitRequest(mailbox=mailbox))
        self._ring(index)

    def _settle(self, mailbox: int) -> None:
        turn = self.rotation.answered(mailbox)
        task = turn.task
        assert task is not None
        self.counts.pushes += 1
        self.counts.push_s += self.clock.now_s - self._pushed_s.pop(mailbox)
        if mailbox in self._refused:
            self._refused.discard(mailbox)
            task.unsettled += len(turn.batches)
        self.rotation.clear(turn)
        if task.settled == len(task.batches):
            self.finished(task)


def speeds(count: int, spread: float, seed: int) -> list[float]:
    """How many times longer than the fastest's the steps of each of so many processes take.

    They are spread evenly from 1 to `spread` on a logarithmic scale, in an order that `seed`
    decides.
    """
    times = [spread ** (i / max(1, count - 1)) for i in range(count)]
    random.Random(stream_key(seed, "speeds")).shuffle(times)
    return times

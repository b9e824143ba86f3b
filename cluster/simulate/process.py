"""A process of replicas on the virtual clock: slots that take turns on one thread.

Modelled after `workers.replica.replicas.Replicas` and the client below it, branch by branch, with
the same constants: slots take turns, replica by replica within each round of slots; a slot
computes, pushes and pulls again; pushes are kept back until the doorbell is worth ringing, or until
an answer is waited for; mailboxes are free again when every partition has answered.
`tests/pure/cluster/simulate/test_process.py` runs both through the same story and compares.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from downpour.cluster.controller.lease_book import Lease
from downpour.cluster.simulate.clock import Body, Clock, Processors, Thread
from downpour.cluster.simulate.inputs import Costs
from downpour.cluster.simulate.partition import Message
from downpour.paramserver.messages import Outcome, PermitRequest, Push
from downpour.workers.replica.replicas import num_mailboxes, turns_together
from downpour.workers.spec import StepConfig

Waiting = Generator[float | None, None, bool]


class Way(Protocol):
    """A connection to one partition."""

    nearby: bool
    """Shared memory: a pull is a copy, made at once."""

    def version(self) -> int:
        """What a pull from nearby would get now."""

    def send(self, packet: list[Message]) -> None:
        """Send a packet; pushes over the network take their gradients along."""

    def ask_weights(self, fetched: Fetched, process: VirtualProcess) -> None:
        """Ask for weights over the network; `process.pulled` is told of them."""


@dataclass(eq=False)
class Task:
    """A window in progress."""

    replica: int
    lease: Lease
    next: int = 0
    settled: int = 0
    unsettled: int = 0
    since_s: float | None = None


@dataclass(eq=False)
class Fetched:
    """Weights that were pulled for some turns."""

    versions: list[int]
    turn: int
    """Turns that the process had taken when they were pulled."""
    users: int = 0
    waiting: int = 0
    """Partitions whose weights are still on their way."""


@dataclass(eq=False)
class Turn:
    """One slot in the rotation. Fields as in `workers.replica.replicas`."""

    replica: int
    mailbox: int | None = None
    in_flight: bool = False
    asked: bool = False
    fetched: Fetched | None = None
    since_fetch: int = 0
    task: Task | None = None
    batches: tuple[int, ...] = ()
    done: int = 0
    pushed_s: float = 0.0


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
    finished: Callable[[Task], None]
    """Is told when every mini-batch of a window has been answered."""
    batch_size: int
    ways: list[Way] = field(default_factory=list)

    def start(self, ways: Sequence[Way]) -> None:
        """Connect to every partition, and wait for windows."""
        self.ways = list(ways)
        self._turns = [
            Turn(replica) for _ in range(self.config.concurrent_steps) for replica in self.replicas
        ]
        nearby = all(way.nearby for way in ways)
        self._free = list(range(num_mailboxes(len(self._turns), self.config, nearby)))
        self._bell_every = turns_together(len(self._turns))
        self._together = 1 if self.config.by_permit else self._bell_every
        self._latest: Fetched | None = None
        self._taken = 0
        """Turns that had something to do, until now."""
        self._outbox: list[list[Message]] = [[] for _ in ways]
        self._queues: dict[int, deque[Task]] = {r: deque() for r in self.replicas}
        self._pushed: dict[int, Turn] = {}
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
        self._queues[replica].append(Task(replica, lease))
        self._thread.wake()

    def end(self) -> None:
        """Do nothing any more."""
        self._thread.end()

    def answered(self, partition: int, answers: list[tuple[int, Outcome]]) -> None:
        """Answers have come."""
        self._inbox.extend((partition, mailbox, outcome) for mailbox, outcome in answers)
        self._thread.wake()

    def pulled(self, fetched: Fetched) -> None:
        """A partition's weights have come."""
        fetched.waiting -= 1
        self._thread.wake()

    def _body(self) -> Body:
        by_permit = self.config.by_permit
        while True:
            worked = False
            for turn in self._turns:
                if turn.in_flight:
                    if by_permit:
                        continue
                    yield from self._await_answer(turn)
                worked |= yield from self._take(turn)
                self._collect()
            if worked:
                continue
            if self._pushed or self._asking:
                yield from self._wait()
            elif not any(self._queues.values()):
                yield None

    def _await_answer(self, turn: Turn) -> Body:
        while turn.in_flight:
            yield from self._wait()

    def _wait(self) -> Body:
        self._flush()
        while not self._inbox:
            yield None
            if self.config.by_permit:
                break  # a real one looks round every 0.1 s
        self._collect()

    def _take(self, turn: Turn) -> Waiting:
        if not turn.batches and not (yield from self._next_push(turn)):
            yield from self._let_go(turn)
            return False
        assert turn.mailbox is not None
        if turn.fetched is None:
            if self.config.by_permit and not self._permitted(turn):
                return False
            yield from self._fetch(turn)
        assert turn.fetched is not None
        since_s = self.clock.now_s
        yield from self._await_weights(turn.fetched)
        self.counts.pull_s += self.clock.now_s - since_s
        yield self.costs.step.draw(self.rng) * self.step_times
        self._taken += 1
        self.counts.steps += 1
        turn.done += 1
        turn.since_fetch += 1
        pushed = turn.done == len(turn.batches)
        if pushed:
            self._push(turn)
            if self.config.by_permit:
                yield from self._let_go(turn)
                turn.asked = False
            elif len(self._turns) == 1:
                yield from self._await_answer(turn)
        due = pushed if self.config.by_push else turn.since_fetch >= self.config.n_fetch
        if due and not self.config.by_permit:
            yield from self._fetch(turn)
        return True

    def _next_push(self, turn: Turn) -> Waiting:
        queue = self._queues[turn.replica]
        if not queue:
            return False
        while not self._free:
            yield from self._wait()
        turn.mailbox = self._free.pop()
        task, depth = queue[0], self.config.n_push
        if task.since_s is None:
            task.since_s = self.clock.now_s
        turn.task = task
        turn.batches = task.lease.batches[task.next : task.next + depth]
        turn.done = 0
        task.next += len(turn.batches)
        if task.next == len(task.lease.batches):
            queue.popleft()
        return True

    def _permitted(self, turn: Turn) -> bool:
        assert turn.mailbox is not None
        if not turn.asked:
            turn.asked = True
            self._asking[turn.mailbox] = 0
            self._put(0, PermitRequest(mailbox=turn.mailbox))
        return turn.mailbox not in self._asking

    def _fetch(self, turn: Turn) -> Body:
        yield from self._let_go(turn)
        latest = self._latest
        if latest is None or self._taken - latest.turn >= self._together:
            latest = self._latest = Fetched([0] * len(self.ways), self._taken)
            for index, way in enumerate(self.ways):
                if way.nearby:
                    latest.versions[index] = way.version()
                else:
                    latest.waiting += 1
                    way.ask_weights(latest, self)
        latest.users += 1
        turn.fetched = latest
        turn.since_fetch = 0

    def _let_go(self, turn: Turn) -> Body:
        fetched, turn.fetched = turn.fetched, None
        if fetched is None:
            return
        fetched.users -= 1
        if fetched.users:
            return
        if fetched is self._latest:
            self._latest = None
        yield from self._await_weights(fetched)

    def _await_weights(self, fetched: Fetched) -> Body:
        while fetched.waiting:
            yield None

    def _push(self, turn: Turn) -> None:
        task, mailbox = turn.task, turn.mailbox
        assert task is not None
        assert mailbox is not None
        self._missing[mailbox] = len(self.ways)
        assert turn.fetched is not None
        for index, version in enumerate(turn.fetched.versions):
            push = Push(
                mailbox=mailbox,
                replica=turn.replica,
                epoch=task.lease.epoch,
                batches=turn.batches,
                examples=self.batch_size * len(turn.batches),
                version=version,
                loss=0.0,
                gradient_norm=0.0,
            )
            self._put(index, push)
        turn.pushed_s = self.clock.now_s
        self._pushed[mailbox] = turn
        turn.in_flight = True

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
            return
        self._asking[mailbox] = index
        self._put(index, PermitRequest(mailbox=mailbox))
        self._ring(index)

    def _settle(self, mailbox: int) -> None:
        turn = self._pushed.pop(mailbox)
        task = turn.task
        assert task is not None
        self._free.append(mailbox)
        self.counts.pushes += 1
        self.counts.push_s += self.clock.now_s - turn.pushed_s
        task.settled += len(turn.batches)
        if mailbox in self._refused:
            self._refused.discard(mailbox)
            task.unsettled += len(turn.batches)
        turn.mailbox = None
        turn.in_flight = False
        turn.batches = ()
        turn.task = None
        if task.settled == len(task.lease.batches):
            self.finished(task)

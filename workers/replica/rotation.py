"""The rotation: in which order a process's concurrent steps compute, push and pull. Pure.

A process hosts one replica or more. This is the one writing of what its thread does next. It is a
generator of operations (`Op`); whoever drives it carries each out before it asks for the next:
`workers.replica.replicas` with weights, gradients and a parameter server, `cluster.simulate` on a
virtual clock. Neither weights nor clocks are known here.

There are two ways to take turns.

**Fresh weights** (`in_flight="auto"`). A turn pulls its weights when it begins to compute, and the
next turn begins once the server has answered this one's push. So of a process's steps only those
are in flight that its processor works on, and their weights are as old as one turn. A turn is up
to `together` mini-batches of one replica, in one push. If weights come over the network, the
process asks for them so many turns ahead (`lead`) as their way takes; so many pushes may be
unanswered while the next turn computes.

**All in flight** (`in_flight="all"`). Every replica has `concurrent_steps` turns that hold weights
at once, as on a cluster on which all steps really run at the same time. A turn computes on the
weights that were pulled at the end of its last turn, pushes, and pulls again; between its pull and
its push lie the turns of all others. Turns that follow on each other share a pull, up to
`BELL_EVERY` of them: the server gets their pushes in one go, too.

A turn that is alone in its process pulls once its push has been answered, in either way; so one
replica with one step in flight is ordinary SGD.

With permits (`by_permit`, staleness policies `bounded` and `synchronous`) a turn asks for one
before it pulls. It is passed over until it has it, and again until its push is answered; nothing
is waited for as long as another turn of the process could go on.

If a device computes, a step's result is read after the next steps have been begun (`ahead`).
Nothing is waited for before every step that was begun has been pushed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Generic, TypeVar

from downpour.paramserver.transport.link import Pull
from downpour.workers.spec import StepConfig

NEARBY_MAILBOXES = 12
BELL_EVERY = 4
"""Turns that share a pull, and pushes for which a partition next door is woken at a time."""


class Op(IntEnum):
    """What to do next. The turn in question is `Rotation.turn`."""

    PULL = 0
    """Begin to pull the latest weights into `turn.weights`."""
    AWAIT_WEIGHTS = 1
    """Wait until `turn.weights` has come."""
    COMPUTE = 2
    """Begin the turn's step on its next `turn.count` mini-batches."""
    READ = 3
    """Read the result of the turn's step, which may have to be waited for."""
    PUSH = 4
    """Push what is in the turn's mailbox."""
    ASK = 5
    """Ask for a permit for the turn's mailbox."""
    COLLECT = 6
    """Take in the answers that have come; wait for nothing."""
    WAIT = 7
    """Send off whatever is kept back, and wait until some answer has come."""
    WAIT_LONG = 8
    """The same, for another process's step: there is no deadline."""
    IDLE = 9
    """There is nothing to do before work is assigned."""


@dataclass(kw_only=True, eq=False)
class Task:
    """A window in progress."""

    epoch: int
    batches: tuple[int, ...]
    """Mini-batches, in the order in which they are to run."""
    next: int = 0
    """Place of the first that no turn has taken."""
    settled: int = 0
    """Mini-batches whose pushes have been answered by every partition."""


TaskT = TypeVar("TaskT", bound=Task)


@dataclass(eq=False)
class PulledWeights:
    """Weights that were pulled for some turns."""

    pull: Pull
    """Versions by partition, and how many partitions' weights are still on their way."""
    taken: int
    """Turns that the process had taken when they were pulled."""
    holder: Any
    """Where they are; the driver's business."""
    users: int = 0


@dataclass(eq=False)
class Turn(Generic[TaskT]):
    """One place in the rotation, and the push that it is working on."""

    replica: int
    mailbox: int | None = None
    in_flight: bool = False
    """Whether the push from `mailbox` has still to be answered."""
    begun: bool = False
    """Whether a step of it is begun and its result not read yet."""
    asked: bool = False
    """Whether a permit has been asked for, or is there."""
    since_fetch: int = 0
    weights: PulledWeights | None = None
    task: TaskT | None = None
    batches: tuple[int, ...] = ()
    """Mini-batches of the push."""
    first: int = 0
    """Place of the first of them in the task."""
    done: int = 0
    """How many of them have been computed."""
    count: int = 1
    """How many the step at hand takes."""


def num_turns(replicas: int, config: StepConfig) -> int:
    """Places in the rotation of a process with so many replicas."""
    if config.fresh:
        return replicas * max(1, config.concurrent_steps // config.together)
    return replicas * config.concurrent_steps


def turns_together(replicas: int, config: StepConfig) -> int:
    """How many turns share a pull and wake the server together.

    One, if these would be many of the process's steps in flight.
    """
    if config.fresh:
        return 1
    return BELL_EVERY if num_turns(replicas, config) >= 2 * BELL_EVERY else 1


def num_mailboxes(replicas: int, config: StepConfig, nearby: bool) -> int:
    """How many mailboxes a process with so many replicas needs.

    If the server is next door a push is answered within a few turns, and few mailboxes stay in
    the processor's cache. A push that travels, that adds up several steps, or that waits for
    others under bounded staleness keeps its own.
    """
    turns = num_turns(replicas, config)
    if config.n_push > 1 or config.by_permit or not nearby:
        return turns
    if config.fresh:
        # On a device one more turn is computed while another is pushed.
        return min(turns, 2 if config.device == "cpu" else 3)
    return min(turns, NEARBY_MAILBOXES)


@dataclass(kw_only=True, eq=False)
class Rotation(Generic[TaskT]):
    """The turns of one process. `run` says what is to be done; the other methods take in news."""

    replicas: Sequence[int]
    config: StepConfig
    num_mailboxes: int
    ahead: int = 0
    """Steps that may be begun before the result of one is read."""
    lead: int = 0
    """Fresh weights: turns by which weights are asked for ahead of their step. Set by the driver,
    from the way that it measures."""
    turn: Turn[TaskT] = field(init=False)
    """The turn that the last operation is about."""
    stopping: bool = field(default=False, init=False)
    """Set to end the generator at its next step."""

    def __post_init__(self) -> None:
        config, count = self.config, len(self.replicas)
        self.fresh = config.fresh
        self.depth = config.batches_per_push
        places = num_turns(count, config) // count
        self.turns: list[Turn[TaskT]] = [
            Turn(replica) for _ in range(places) for replica in self.replicas
        ]
        # A permit is for a version that is pulled after it was given.
        self._together = 1 if config.by_permit else turns_together(count, config)
        self._ahead = self.ahead if len(self.turns) > 1 else 0
        self.begun: deque[Turn[TaskT]] = deque()
        """Turns whose steps' results are still to be read, in their order."""
        self.pushed: dict[int, Turn[TaskT]] = {}
        """Whose push is in which mailbox."""
        self.asking: set[int] = set()
        """Mailboxes for which a permit has been asked for, and not been given."""
        self.queues: dict[int, deque[TaskT]] = {replica: deque() for replica in self.replicas}
        self.taken = 0
        """Mini-batches computed until now."""
        self.dropped: list[Any] = []
        """Holders of weights that nobody needs any more; the driver takes them from here."""
        self._free = list(range(self.num_mailboxes))
        self._latest: PulledWeights | None = None
        self.turn = self.turns[0]

    def assign(self, replica: int, task: TaskT) -> None:
        """Queue a window for one of the replicas."""
        self.queues[replica].append(task)

    def has_work(self) -> bool:
        """Whether any window waits."""
        return any(self.queues.values())

    def unfinished(self) -> list[TaskT]:
        """Every window that has been assigned and is not done."""
        tasks = {id(t.task): t.task for t in self.turns if t.task is not None}
        tasks |= {id(task): task for queue in self.queues.values() for task in queue}
        return list(tasks.values())

    def permitted(self, mailbox: int) -> None:
        """Every partition has given its permit for the step that pushes from there."""
        self.asking.discard(mailbox)

    def answered(self, mailbox: int) -> Turn[TaskT]:
        """Every partition has answered the push from a mailbox, which is free again.

        Returns the turn, whose `task` and `batches` are still those of the push; the caller ends
        with `clear`.
        """
        turn = self.pushed.pop(mailbox)
        self._free.append(mailbox)
        turn.in_flight = False
        assert turn.task is not None
        turn.task.settled += len(turn.batches)
        return turn

    def clear(self, turn: Turn[TaskT]) -> None:
        """A turn has nothing to do any more with the push that was answered."""
        turn.mailbox = turn.task = None
        turn.batches = ()

    def run(self) -> Iterator[Op]:
        """Yields what to do next, for ever; ends after `stopping` has been set."""
        by_permit, fresh = self.config.by_permit, self.fresh
        while not self.stopping:
            worked = False
            for turn in self.turns:
                if turn.begun:
                    yield from self._read(0)  # it may go on only then
                if turn.in_flight:
                    if by_permit:
                        continue  # it waits for others, maybe for some of this process
                    while turn.in_flight:  # the server is behind
                        yield Op.WAIT
                if not turn.batches:
                    if not self.queues[turn.replica]:
                        self._let_go(turn)  # they would be old by the time there is work
                        if self.dropped and self.dropped[-1].pull.waiting:
                            yield from self._await(turn, self.dropped[-1])
                        yield Op.COLLECT
                        continue
                    while not self._free:
                        yield from self._read(0)
                        yield Op.WAIT
                    self._next_push(turn)
                if fresh:
                    while len(self.pushed) > self.lead:
                        yield Op.WAIT
                if turn.weights is None:
                    if by_permit and not turn.asked:
                        turn.asked = True
                        assert turn.mailbox is not None
                        self.asking.add(turn.mailbox)
                        self.turn = turn
                        yield Op.ASK
                    if by_permit and turn.mailbox in self.asking:
                        yield Op.COLLECT
                        continue
                    if self._share(turn):
                        yield Op.PULL
                if turn.weights.pull.waiting:  # type: ignore[union-attr]
                    self.turn = turn
                    yield Op.AWAIT_WEIGHTS
                if fresh and self.lead:
                    yield from self._ask_ahead(turn)
                turn.count = len(turn.batches) if fresh else 1
                turn.begun = worked = True
                self.turn = turn
                yield Op.COMPUTE
                self.taken += turn.count
                self.begun.append(turn)
                if len(self.begun) > self._ahead:
                    yield from self._read(self._ahead)
                yield Op.COLLECT
                if self._ended():
                    return
            if worked:
                continue
            yield from self._read(0)
            if by_permit and (self.pushed or self.asking):
                yield Op.WAIT_LONG
            elif self.pushed:
                yield Op.WAIT
            else:
                yield Op.IDLE

    def _ended(self) -> bool:
        return self.stopping

    def _read(self, ahead: int) -> Iterator[Op]:
        """Read results until those of at most `ahead` steps are left, in their order."""
        while len(self.begun) > ahead:
            turn = self.turn = self.begun[0]
            yield Op.READ  # may wait, and fail
            self.begun.popleft()
            turn.begun = False
            turn.done += turn.count
            turn.since_fetch += turn.count
            pushed = turn.done == len(turn.batches)
            if pushed:
                assert turn.mailbox is not None
                self.pushed[turn.mailbox] = turn
                turn.in_flight = True
                yield Op.PUSH
                if self.fresh:
                    self._let_go(turn)
                    continue
                if self.config.by_permit:
                    self._let_go(turn)
                    turn.asked = False
                    continue
                if len(self.turns) == 1:
                    while turn.in_flight:
                        yield Op.WAIT
            due = pushed if self.config.by_push else turn.since_fetch >= self.config.n_fetch
            if due and not self.config.by_permit:
                self._let_go(turn)
                if self.dropped and self.dropped[-1].pull.waiting:
                    yield from self._await(turn, self.dropped[-1])
                if self._share(turn):
                    yield Op.PULL

    def _await(self, turn: Turn[TaskT], weights: PulledWeights) -> Iterator[Op]:
        """Wait for weights that nobody needs any more: the next pull would write over them."""
        before, turn.weights, self.turn = turn.weights, weights, turn
        yield Op.AWAIT_WEIGHTS
        turn.weights = before

    def _ask_ahead(self, turn: Turn[TaskT]) -> Iterator[Op]:
        """Ask for the weights of the turns that come after this one."""
        place = self.turns.index(turn)
        for further in range(1, self.lead + 1):
            other = self.turns[(place + further) % len(self.turns)]
            if other is turn:
                return
            if other.weights is None and (other.batches or self.queues[other.replica]):
                self._share(other)
                yield Op.PULL

    def _next_push(self, turn: Turn[TaskT]) -> None:
        queue = self.queues[turn.replica]
        task = turn.task = queue[0]
        turn.mailbox = self._free.pop()
        turn.first, turn.done = task.next, 0
        turn.batches = task.batches[task.next : task.next + self.depth]
        task.next += len(turn.batches)
        if task.next == len(task.batches):
            queue.popleft()

    def _share(self, turn: Turn[TaskT]) -> bool:
        """Give a turn weights: those that its neighbours have just got, or True for new ones."""
        self.turn = turn
        latest = self._latest
        new = self.fresh or latest is None or self.taken - latest.taken >= self._together
        if new:
            latest = PulledWeights(Pull([]), self.taken, None)
            if not self.fresh:
                self._latest = latest
        assert latest is not None
        latest.users += 1
        turn.weights = latest
        turn.since_fetch = 0
        return new

    def _let_go(self, turn: Turn[TaskT]) -> None:
        """A turn does not need its weights any more; the last one to say so drops them."""
        weights, turn.weights = turn.weights, None
        if weights is None:
            return
        weights.users -= 1
        if weights.users:
            return
        if weights is self._latest:
            self._latest = None
        self.dropped.append(weights)

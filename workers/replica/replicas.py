"""Model replicas and their concurrent steps, as one thread runs them.

A process hosts one replica or more. Every replica has `concurrent_steps` slots; the slots of all
of them take turns, slot by slot. A slot's turn is: compute the gradient on the weights that it
pulled at the end of its last turn, push it, pull again. So between a slot's pull and its push
come the turns of all others: its step is in flight all that time, and nothing but the processor
is ever waited for. Weights that come over the network are asked for at the end of a turn, and
waited for at the beginning of the next. Threads would run the same steps, at the price of handing
Python's lock round at every kernel.

Turns that follow on each other share a pull, up to `BELL_EVERY` of them: the server, too, gets
their pushes in one go, and until then would show them only what other processes have done. So
weights are copied, and travel, that much less often, and stay in the cache from turn to turn; a
step's weights are at most so many turns older.

Gradients are left in mailboxes. A slot takes one that is free when it begins to compute, the one
that was freed last: its memory is most likely still in the processor's cache, on both sides.

A slot that is alone in its process has no others' turns to fill the time with: it pulls once its
push is applied, so that one replica with one step in flight is ordinary SGD.

Where staleness is bounded (`by_permit`), a slot asks for a permit before it pulls. It is passed
over in the rotation until it has it, and again until its push is answered; nothing is waited for
while another slot of the process could go on.

Where a device computes, a step's result is read when the next step has been begun (`ahead`), so the
device goes on while this thread pushes and pulls. Nothing is waited for before every step that was
begun has been pushed.

Windows of mini-batches come in from other threads (`assign`), and their completion is told by a
future once every partition has answered every push.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from downpour.paramserver.client import ParameterClient, Settled
from downpour.paramserver.messages import Outcome
from downpour.paramserver.transport.link import Pull
from downpour.shuffler.delivery import Reading
from downpour.workers.replica.cpu_usage import Meter, Spent
from downpour.workers.spec import StepConfig
from downpour.workers.step.device_slot import DeviceSlot, Late
from downpour.workers.step.slot import Mailbox, Slot, StepResult

IDLE_WAIT_S = 1.0
PERMIT_WAIT_S = 0.1
NEARBY_MAILBOXES = 12
BELL_EVERY = 4
"""Turns that share a pull, and pushes for which a partition next door is woken at a time."""
AnySlot = Slot | DeviceSlot
log = logging.getLogger(__name__)


def num_mailboxes(slots: int, config: StepConfig, client_is_colocated: bool) -> int:
    """How many mailboxes a process with so many slots needs.

    Where the server is next door a push is answered within a few turns, and few mailboxes stay in
    the cache. A push that travels, or is being added up over several steps, holds on to its own,
    and so does one that waits for others where staleness is bounded.
    """
    if config.n_push > 1 or config.by_permit or not client_is_colocated:
        return slots
    return min(slots, NEARBY_MAILBOXES)


def turns_together(slots: int) -> int:
    """How many turns go together, in a process with so many slots.

    Where these would be many of its steps in flight, none do.
    """
    return BELL_EVERY if slots >= 2 * BELL_EVERY else 1


class ReplicaFailed(RuntimeError):
    """The thread that runs the steps came to an end by an error."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Mini-batches to train on."""

    epoch: int
    batches: tuple[int, ...]
    """Indices, in the order in which they are to run."""
    load: Callable[[int], tuple[Tensor, Tensor]]
    """Inputs and targets of the mini-batch at a place in that order; each is asked for once."""


@dataclass(frozen=True, kw_only=True)
class WindowReport:
    """What became of a window's mini-batches."""

    replica: int
    epoch: int
    num_batches: int
    num_examples: int
    mean_loss: float | None
    """Over mini-batches whose loss is finite; None where there is none."""
    refused: tuple[int, ...]
    """Mini-batches that some partition refused: their loss or gradient was not finite."""
    unsettled: tuple[int, ...]
    """Mini-batches that some partition did not take note of."""
    wall_s: float
    push_s: float = 0.0
    """Mean seconds from a push to the last partition's answer."""
    pull_s: float = 0.0
    """Mean seconds that a step waited for its weights."""
    readings: tuple[Reading, ...] = ()
    """What its rows cost the shufflers."""
    spent: Spent | None = None
    """What the process has spent until now."""
    skipped: Mapping[int, str] = field(default_factory=dict)
    """Rows whose image could not be decoded and that were left out, each with a line on why."""


@dataclass(kw_only=True)
class _Task:
    """A window in progress."""

    window: Window
    future: Future[WindowReport]
    next: int = 0
    settled: int = 0
    losses: float = 0.0
    examples: int = 0
    finite: int = 0
    refused: list[int] = field(default_factory=list)
    unsettled: list[int] = field(default_factory=list)
    started_s: float = 0.0
    push_s: float = 0.0
    pushes: int = 0
    pull_s: float = 0.0


class _Fetched:
    """Weights that were pulled for some turns, and the slot that has them."""

    def __init__(self, slot: AnySlot, num_partitions: int, turn: int) -> None:
        self.slot = slot
        self.turn = turn
        """Turns that the process had taken when they were pulled."""
        self.versions = [0] * num_partitions
        self.pull: Pull | None = None
        self.users = 0


class _Turn:
    """One concurrent step in the rotation, and the push that it is working on."""

    def __init__(self, replica: int) -> None:
        self.replica = replica
        self.mailbox: Mailbox | None = None
        self.in_flight = False
        """Whether the push from `mailbox` has still to be answered."""
        self.since_fetch = 0
        self.fetched: _Fetched | None = None
        self.begun = False
        """Whether a step of it is begun and its result not read yet."""
        self.asked = False
        """Whether a permit has been asked for, or is there (`by_permit`)."""
        self.task: _Task | None = None
        self.batches: tuple[int, ...] = ()
        self.first = 0
        self.done = 0
        self.examples = 0
        self.loss = 0.0
        self.pushed_s = 0.0


class Replicas:
    """The replicas of one process. `run` is the thread; `assign` may be called from any other."""

    def __init__(
        self,
        *,
        replicas: Sequence[int],
        config: StepConfig,
        client: ParameterClient,
        mailboxes: Sequence[Mailbox],
        make_slot: Callable[[], AnySlot],
        ahead: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`mailboxes` are the client's, at least as many as `num_mailboxes` says.

        A slot is made when one is wanted and none is free. `ahead` is how many steps may be begun
        before the result of one is read: where a device computes them, it has something to do while
        a step is pushed and weights are pulled.
        """
        self._config = config
        self._client = client
        self._clock = clock
        self._turns = [
            _Turn(replica) for _ in range(config.concurrent_steps) for replica in replicas
        ]
        self._make_slot = make_slot
        self._slots: list[AnySlot] = []
        """Those that nobody uses."""
        # A permit is for a version that is pulled after it was given.
        self._together = 1 if config.by_permit else turns_together(len(self._turns))
        self._ahead = ahead if len(self._turns) > 1 else 0
        self._begun: deque[tuple[_Turn, StepResult | Late, int]] = deque()
        """Steps whose results are still to be read, with their numbers of examples."""
        self._latest: _Fetched | None = None
        self._taken = 0
        """Turns that had something to do, until now."""
        self._free = list(mailboxes)
        self._pushed: dict[int, _Turn] = {}
        """Whose push is in which mailbox."""
        self._queues: dict[int, deque[_Task]] = {replica: deque() for replica in replicas}
        self._wake = threading.Condition()
        self._stopping = False
        self._failure: Exception | None = None
        self._meter = Meter()
        self.steps = dict.fromkeys(replicas, 0)
        """Steps computed so far, by replica."""

    def assign(self, replica: int, window: Window) -> Future[WindowReport]:
        """Queue a window for one of the replicas."""
        future: Future[WindowReport] = Future()
        with self._wake:
            if self._failure is not None:
                raise self._failure
            self._queues[replica].append(_Task(window=window, future=future))
            self._wake.notify()
        return future

    def stop(self) -> None:
        """Let `run` return, once the step in hand is done."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def run(self) -> None:
        """Run steps until `stop`; whatever ends them ends every window that was assigned."""
        failure: Exception = ReplicaFailed("the replicas were stopped")
        try:
            self._run()
        except Exception as error:
            log.exception("the replicas of this process have stopped")
            failure = error
        self._abandon()
        self._fail(failure)

    def _abandon(self) -> None:
        """Wait for steps that will not be pushed: their copies write to mailboxes."""
        for _, result, _ in self._begun:
            with contextlib.suppress(Exception):  # the device's, which the process does not survive
                _ = result.loss
        self._begun.clear()

    def _fail(self, error: Exception) -> None:
        with self._wake:
            self._failure = error
            tasks = {id(turn.task): turn.task for turn in self._turns if turn.task is not None}
            tasks |= {id(task): task for queue in self._queues.values() for task in queue}
        for task in tasks.values():
            if not task.future.done():
                task.future.set_exception(error)

    def _run(self) -> None:
        client = self._client
        while not self._stopping:
            worked = False
            for turn in self._turns:
                if turn.begun:
                    self._conclude(0)  # it may go on only then
                if turn.in_flight:
                    if self._config.by_permit:
                        continue  # it waits for others, maybe for some of this process
                    self._await_answer(turn)  # the server is behind
                worked |= self._take(turn)
                self._settle(client.collect())
            if worked:
                continue
            self._conclude(0)
            if self._config.by_permit and (self._pushed or client.num_asking):
                client.flush()
                # For another process's step, however long that takes: no deadline.
                self._settle(client.collect(PERMIT_WAIT_S))
                continue
            if self._pushed:
                self._settle(client.wait())
                continue
            with self._wake:
                self._wake.wait_for(self._has_work, IDLE_WAIT_S)

    def _await_answer(self, turn: _Turn) -> None:
        while turn.in_flight:
            self._settle(self._client.wait())

    def _has_work(self) -> bool:
        return self._stopping or any(self._queues.values())

    def _take(self, turn: _Turn) -> bool:
        """One turn of a slot: a step, and what it leads to. False where it has nothing to do."""
        if not turn.batches and not self._next_push(turn):
            self._let_go(turn)  # it would be old by the time there is work
            return False
        if turn.fetched is None:
            if self._config.by_permit and not self._permitted(turn):
                return False
            self._fetch(turn)
        task, mailbox, fetched = turn.task, turn.mailbox, turn.fetched
        assert task is not None
        assert mailbox is not None
        assert fetched is not None
        if fetched.pull is not None and fetched.pull.waiting:
            began_s = self._clock()
            self._client.finish(fetched.pull)
            task.pull_s += self._clock() - began_s
        window, place = task.window, turn.first + turn.done
        inputs, targets = window.load(place)
        result = fetched.slot.step(inputs, targets, mailbox, turn.done)
        self._taken += 1
        self.steps[turn.replica] += 1
        turn.begun = True
        self._begun.append((turn, result, len(targets)))
        self._conclude(self._ahead)
        return True

    def _conclude(self, ahead: int) -> None:
        """Read results until those of at most `ahead` steps are left, in their order."""
        while len(self._begun) > ahead:
            turn, result, num_examples = self._begun[0]
            loss, gradient_norm = result.loss, result.gradient_norm  # may wait, and fail
            self._begun.popleft()
            turn.begun = False
            self._stepped(turn, loss, gradient_norm, num_examples)

    def _stepped(self, turn: _Turn, loss: float, gradient_norm: float, num_examples: int) -> None:
        """What a step leads to: a push, once there are enough of them, and other weights."""
        assert turn.task is not None
        turn.done += 1
        turn.since_fetch += 1
        turn.examples += num_examples
        turn.loss += loss * num_examples
        turn.task.examples += num_examples
        by_permit, pushed = self._config.by_permit, turn.done == len(turn.batches)
        if pushed:
            self._push(turn, gradient_norm)
            if by_permit:
                self._let_go(turn)
                turn.asked = False
            elif len(self._turns) == 1:
                self._await_answer(turn)
        due = pushed if self._config.by_push else turn.since_fetch >= self._config.n_fetch
        if due and not by_permit:
            self._fetch(turn)

    def _permitted(self, turn: _Turn) -> bool:
        """Whether the step may begin; asks for it the first time."""
        assert turn.mailbox is not None
        if not turn.asked:
            turn.asked = True
            self._client.ask(turn.mailbox.index)
        return self._client.permitted(turn.mailbox.index)

    def _next_push(self, turn: _Turn) -> bool:
        queue = self._queues[turn.replica]
        if not queue:
            return False
        while not self._free:
            self._conclude(0)
            self._settle(self._client.wait())
        turn.mailbox = self._free.pop()
        task, depth = queue[0], self._config.n_push
        if not task.next:
            task.started_s = self._clock()
        turn.task, turn.first = task, task.next
        turn.batches = task.window.batches[task.next : task.next + depth]
        turn.done = turn.examples = 0
        turn.loss = 0.0
        task.next += len(turn.batches)
        if task.next == len(task.window.batches):
            queue.popleft()
        return True

    def _fetch(self, turn: _Turn) -> None:
        """Give a turn the latest weights, or those that its neighbours have just got."""
        self._let_go(turn)
        latest = self._latest
        if latest is None or self._taken - latest.turn >= self._together:
            slot = self._slots.pop() if self._slots else self._make_slot()
            latest = self._latest = _Fetched(slot, self._client.num_partitions, self._taken)
            latest.pull = self._client.start_pull(slot.weights, latest.versions)
        latest.users += 1
        turn.fetched = latest
        turn.since_fetch = 0

    def _let_go(self, turn: _Turn) -> None:
        """A turn does not need its weights any more; the last one to say so frees the slot."""
        fetched, turn.fetched = turn.fetched, None
        if fetched is None:
            return
        fetched.users -= 1
        if fetched.users:
            return
        if fetched is self._latest:
            self._latest = None
        if fetched.pull is not None and fetched.pull.waiting:
            self._client.finish(fetched.pull)  # the next pull would write to the same weights
        self._slots.append(fetched.slot)

    def _push(self, turn: _Turn, gradient_norm: float) -> None:
        task, mailbox = turn.task, turn.mailbox
        assert task is not None
        assert mailbox is not None
        assert turn.fetched is not None
        loss = turn.loss / turn.examples
        if loss - loss == 0:  # finite
            task.losses += loss * len(turn.batches)
            task.finite += len(turn.batches)
        self._client.push(
            mailbox=mailbox.index,
            replica=turn.replica,
            epoch=task.window.epoch,
            batches=turn.batches,
            examples=turn.examples,
            versions=turn.fetched.versions,
            loss=loss,
            gradient_norm=gradient_norm,
        )
        turn.pushed_s = self._clock()
        self._pushed[mailbox.index] = turn
        turn.in_flight = True

    def _settle(self, settled: list[Settled]) -> None:
        for push in settled:
            turn = self._pushed.pop(push.mailbox)
            task, mailbox = turn.task, turn.mailbox
            assert task is not None
            assert mailbox is not None
            self._free.append(mailbox)
            turn.mailbox = None
            turn.in_flight = False
            task.push_s += self._clock() - turn.pushed_s
            task.pushes += 1
            if any(not outcome.settled for outcome in push.outcomes):
                task.unsettled.extend(turn.batches)
            elif any(o in _REFUSED for o in push.outcomes):
                task.refused.extend(turn.batches)
            task.settled += len(turn.batches)
            turn.batches = ()
            turn.task = None
            if task.settled == len(task.window.batches):
                task.future.set_result(self._report(turn.replica, task))

    def _report(self, replica: int, task: _Task) -> WindowReport:
        window = task.window
        return WindowReport(
            replica=replica,
            epoch=window.epoch,
            num_batches=len(window.batches),
            num_examples=task.examples,
            mean_loss=task.losses / task.finite if task.finite else None,
            refused=tuple(sorted(task.refused)),
            unsettled=tuple(sorted(task.unsettled)),
            wall_s=self._clock() - task.started_s,
            push_s=task.push_s / max(1, task.pushes),
            pull_s=task.pull_s / len(window.batches),
            spent=self._meter.read(self._taken),
        )


_REFUSED = (Outcome.REFUSED_LOSS, Outcome.REFUSED_GRADIENT)

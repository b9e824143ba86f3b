"""Model replicas and their concurrent steps, as one thread runs them.

Which operation comes next is `rotation`'s; here each is carried out, on model copies, mailboxes
and the parameter server's client. Gradients are left in mailboxes. A push takes the mailbox that
was freed last: its memory is most likely still in the processor's cache, on both sides. Threads
would run the same steps, at the price of handing Python's lock round at every kernel.

Windows of mini-batches come in from other threads (`assign`). A future tells of a window's end once
every partition has answered every push.
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

from downpour.paramserver.client import ParameterClient, PushResult
from downpour.paramserver.messages import Outcome
from downpour.shuffler.delivery import Reading
from downpour.workers.replica.cpu_usage import Meter, Spent
from downpour.workers.replica.pull_timer import PullTimer
from downpour.workers.replica.rotation import Op, Rotation, Task, Turn
from downpour.workers.spec import StepConfig
from downpour.workers.step.device_context import PendingResult
from downpour.workers.step.device_model_copy import DeviceModelCopy
from downpour.workers.step.model_copy import Mailbox, ModelCopy, StepResult

IDLE_WAIT_S = 1.0
PERMIT_WAIT_S = 0.1
AnyModelCopy = ModelCopy | DeviceModelCopy
log = logging.getLogger(__name__)


class ReplicaFailed(RuntimeError):
    """The thread that runs the steps came to an end by an error."""


@dataclass(frozen=True, slots=True)
class Joined:
    """One mini-batch, or several of m examples each with their rows interleaved."""

    inputs: Tensor
    """float32 [m*k, ...]: example i of mini-batch j is row i*k + j."""
    targets: Tensor
    """[m*k, ...], likewise."""
    together: int = 1
    """k."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Mini-batches to train on."""

    epoch: int
    batches: tuple[int, ...]
    """Indices, in the order in which they are to run."""
    load: Callable[[int, int], Sequence[Joined]]
    """`load(place, count)`: the mini-batches at `count` places in that order, those of equal size
    joined; each is asked for once."""


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
    choices: str = ""
    """What `--wire auto` has chosen; in the first report of a process that is connected."""


@dataclass(kw_only=True, eq=False)
class _WindowTask(Task):
    """A window in progress, and what has come of it."""

    window: Window
    future: Future[WindowReport]
    losses: float = 0.0
    examples: int = 0
    finite: int = 0
    refused: list[int] = field(default_factory=list)
    unsettled: list[int] = field(default_factory=list)
    started_s: float = 0.0
    push_s: float = 0.0
    pushes: int = 0
    pull_s: float = 0.0


class _Push:
    """What a turn has found so far for the push that it works on."""

    __slots__ = ("examples", "loss", "norm", "pushed_s")

    def __init__(self) -> None:
        self.examples = 0
        self.loss = 0.0
        """Sum over the examples."""
        self.norm = 0.0
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
        make_copy: Callable[[], AnyModelCopy],
        ahead: int = 0,
        choices: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the rotation; nothing runs before `run`.

        Args:
            replicas: numbers of the replicas that this process hosts.
            config: how they run their steps.
            client: the way to the partitions.
            mailboxes: the client's, at least as many as `rotation.num_mailboxes` says.
            make_copy: makes a model copy, when one is wanted and none is free.
            ahead: steps that may be begun before the result of one is read. If a device computes
                them, it has something to do while a step is pushed and weights are pulled.
            choices: what the first report says that was chosen for the links to the partitions.
            clock: seconds.
        """
        self._client = client
        self._clock = clock
        self._mailboxes = mailboxes
        self._make_copy = make_copy
        self._copies: list[AnyModelCopy] = []
        """Those that nobody uses."""
        self._rotation: Rotation[_WindowTask] = Rotation(
            replicas=replicas, config=config, num_mailboxes=len(mailboxes), ahead=ahead
        )
        self._found = {id(turn): _Push() for turn in self._rotation.turns}
        self._results: deque[tuple[StepResult | PendingResult, int]] = deque()
        """Of the rotation's `begun`, with their numbers of examples."""
        self._pull_timer = PullTimer()
        self._wake = threading.Condition()
        self._failure: Exception | None = None
        self._choices = choices
        self._meter = Meter()
        self.steps = dict.fromkeys(replicas, 0)
        """Mini-batches computed so far, by replica."""

    def assign(self, replica: int, window: Window) -> Future[WindowReport]:
        """Queue a window for one of the replicas."""
        future: Future[WindowReport] = Future()
        task = _WindowTask(epoch=window.epoch, batches=window.batches, window=window, future=future)
        with self._wake:
            if self._failure is not None:
                raise self._failure
            self._rotation.assign(replica, task)
            self._wake.notify()
        return future

    def stop(self) -> None:
        """Let `run` return, once the step in hand is done."""
        with self._wake:
            self._rotation.stopping = True
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
        for result, _ in self._results:
            with contextlib.suppress(Exception):  # the device's, which the process does not survive
                _ = result.loss
        self._results.clear()

    def _fail(self, error: Exception) -> None:
        with self._wake:
            self._failure = error
            tasks = self._rotation.unfinished()
        for task in tasks:
            if not task.future.done():
                task.future.set_exception(error)

    def _run(self) -> None:
        rotation, client = self._rotation, self._client
        for op in rotation.run():
            turn = rotation.turn
            if op is Op.COMPUTE:
                self._compute(turn)
            elif op is Op.READ:
                self._read(turn)
            elif op is Op.PUSH:
                self._push(turn)
            elif op is Op.COLLECT:
                self._settle(client.collect())
            elif op is Op.PULL:
                self._pull(turn)
            elif op is Op.WAIT:
                self._settle(client.wait())
            elif op is Op.AWAIT_WEIGHTS:
                self._await_weights(turn)
            elif op is Op.ASK:
                assert turn.mailbox is not None
                client.ask(turn.mailbox)
                self._note_permits()
            elif op is Op.WAIT_LONG:
                client.flush()
                # For another process's step, however long that takes: no deadline.
                self._settle(client.collect(PERMIT_WAIT_S))
            else:
                self._reclaim()
                with self._wake:
                    self._wake.wait_for(self._has_work, IDLE_WAIT_S)

    def _has_work(self) -> bool:
        return self._rotation.stopping or self._rotation.has_work()

    def _compute(self, turn: Turn[_WindowTask]) -> None:
        task, found, weights = turn.task, self._found[id(turn)], turn.weights
        assert task is not None
        assert weights is not None
        assert turn.mailbox is not None
        if not turn.done:
            found.examples, found.loss = 0, 0.0
            if not turn.first:
                task.started_s = self._clock()
        mailbox, copy = self._mailboxes[turn.mailbox], weights.holder
        parts = task.window.load(turn.first + turn.done, turn.count)
        index, examples, losses = turn.done, 0, 0.0
        for part in parts:
            result = copy.step(part.inputs, part.targets, mailbox, index, part.together)
            index += part.together
            examples += len(part.targets)
            if len(parts) > 1:
                losses += result.loss * len(part.targets)
        if len(parts) > 1:
            result = StepResult(loss=losses / examples, gradient_norm=result.gradient_norm)
        self.steps[turn.replica] += turn.count
        self._results.append((result, examples))

    def _read(self, turn: Turn[_WindowTask]) -> None:
        result, examples = self._results[0]
        loss, norm = result.loss, result.gradient_norm  # may wait, and fail
        self._results.popleft()
        found = self._found[id(turn)]
        found.examples += examples
        found.loss += loss * examples
        found.norm = norm
        assert turn.task is not None
        turn.task.examples += examples

    def _push(self, turn: Turn[_WindowTask]) -> None:
        task, found, weights = turn.task, self._found[id(turn)], turn.weights
        assert task is not None
        assert turn.mailbox is not None
        assert weights is not None
        loss = found.loss / found.examples
        if loss - loss == 0:  # finite
            task.losses += loss * len(turn.batches)
            task.finite += len(turn.batches)
        self._client.push(
            mailbox=turn.mailbox,
            replica=turn.replica,
            epoch=task.epoch,
            batches=turn.batches,
            examples=found.examples,
            versions=weights.pull.versions,
            loss=loss,
            gradient_norm=found.norm,
        )
        found.pushed_s = self._clock()

    def _pull(self, turn: Turn[_WindowTask]) -> None:
        self._reclaim()
        weights = turn.weights
        assert weights is not None
        copy = self._copies.pop() if self._copies else self._make_copy()
        weights.holder = copy
        versions = [0] * self._client.num_partitions
        weights.pull = self._client.start_pull(copy.weights, versions)
        if self._rotation.fresh and weights.pull.waiting:
            self._pull_timer.asked(self._clock(), self._rotation.lead)

    def _reclaim(self) -> None:
        """Take back model copies whose weights nobody needs any more."""
        dropped = self._rotation.dropped
        while dropped:
            self._copies.append(dropped.pop().holder)

    def _await_weights(self, turn: Turn[_WindowTask]) -> None:
        weights = turn.weights
        assert weights is not None
        began_s = self._clock()
        self._client.finish(weights.pull)
        now_s = self._clock()
        if turn.task is not None:
            turn.task.pull_s += now_s - began_s
        if self._rotation.fresh:
            self._rotation.lead = self._pull_timer.come(now_s, len(self._rotation.turns) - 1)

    def _note_permits(self) -> None:
        for mailbox in [m for m in self._rotation.asking if self._client.permitted(m)]:
            self._rotation.permitted(mailbox)

    def _settle(self, settled: list[PushResult]) -> None:
        rotation = self._rotation
        for push in settled:
            turn = rotation.answered(push.mailbox)
            task = turn.task
            assert task is not None
            task.push_s += self._clock() - self._found[id(turn)].pushed_s
            task.pushes += 1
            if any(not outcome.settled for outcome in push.outcomes):
                task.unsettled.extend(turn.batches)
            elif any(o in _REFUSED for o in push.outcomes):
                task.refused.extend(turn.batches)
            rotation.clear(turn)
            if task.settled == len(task.batches):
                task.future.set_result(self._report(turn.replica, task))
        if rotation.asking:
            self._note_permits()

    def _report(self, replica: int, task: _WindowTask) -> WindowReport:
        window = task.window
        choices, self._choices = self._choices, ""
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
            spent=self._meter.read(self._rotation.taken),
            choices=choices,
        )


_REFUSED = (Outcome.REFUSED_LOSS, Outcome.REFUSED_GRADIENT)

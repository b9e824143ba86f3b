"""The controller: hands out windows, watches over the run, and keeps no truth of its own.

What has been trained on is what the partitions' applied sets say; the leases can be rebuilt from
them at any time, and are, when a process or a partition is lost and when a run is resumed. The
controller talks to the actors through a `Backend`, and to people through callbacks. What is done
about a loss is decided in `recovery`; here it is carried out.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

from cluster.backend import (
    Backend,
    Done,
    PartitionLost,
    ProcessLost,
    RunFailed,
    ShufflerLost,
    Ticket,
    WriteFailed,
)
from cluster.checkpoint import Checkpoint, CheckpointStore
from cluster.checkpointing import Checkpointer
from cluster.config import ReplicaConfig, RunConfig, active_replicas, next_evaluation_s
from cluster.display import Progress
from cluster.errors import one_line, user_message
from cluster.followers import Followers
from cluster.members import Outcome, Partition, Process
from cluster.observe import Leases, Sink
from cluster.ramp import RampGuard
from cluster.recovery import History, Loss, Part, decide, stragglers
from cluster.run_folder import BEST, MODEL, RunFolder
from cluster.settled import Flags, refused_by_any, settled_by_all, settled_once
from cluster.telemetry import Telemetry
from shuffler.lease import Lease, LeaseBook
from shuffler.plan import Plan

if TYPE_CHECKING:
    from paramserver.actor import PartitionReport
    from workers.replica import WindowReport

REPORT_EVERY_S = 1.0
RATE_WINDOWS = 3
"""A replica's rate is that of its last few windows."""
ASKED = "downpour stop"
"""The reason of a stop that was asked for through the run's folder."""
SPARES_AFTER_S = 5.0
"""A spare's start takes a second of a processor: not while those who are back get going."""
SILENT_AFTER_S = 60.0
"""A partition that has not answered for so long is taken for lost."""


class Controller:
    """Runs one training run on a backend."""

    def __init__(
        self,
        *,
        config: RunConfig,
        plan: Plan,
        backend: Backend,
        folder: RunFolder,
        store: CheckpointStore,
        show: Callable[[Progress], None],
        say: Callable[[str], None] = lambda _: None,
        sinks: Sequence[Sink] = (),
        resumed: Checkpoint | None = None,
        clock: Callable[[], float] = time.monotonic,
        began_s: float | None = None,
    ) -> None:
        """`resumed` is the checkpoint that the backend's partitions start from, if any;
        `began_s` is when the command began, by `clock`; `say` shows a line of news; `sinks` take
        figures.
        """
        self._config = config
        self._plan = plan
        self._backend = backend
        self._folder = folder
        self._store = store
        self._show = show
        self._clock = clock
        self._telemetry = Telemetry(
            config=config,
            plan=plan,
            folder=folder,
            clock=clock,
            began_s=clock() if began_s is None else began_s,
            elapsed_before_s=resumed.elapsed_s if resumed else 0.0,
            say=say,
            sinks=sinks,
        )
        self._checkpointer = Checkpointer(
            store,
            num_partitions=backend.num_partitions,
            keep_last=config.policy.keep_checkpoints,
            keep_best=config.policy.keep_best_checkpoints,
        )
        self._resumed = resumed
        self._processes = [Process(index=i, replicas=r) for i, r in enumerate(backend.processes)]
        self._process_of = {r: p for p in self._processes for r in p.replicas}
        self._partitions = [Partition(index=i) for i in range(backend.num_partitions)]
        self._history = History()
        self._holding: dict[int, int] = dict.fromkeys(self._process_of, 0)
        self._live: set[int] = set()
        self._doubt: dict[int, Lease] = {}
        """Leases whose holder is lost, until the partitions say what became of them."""
        self._reopening = False
        """A partition has gone back in time: what it lost is to be lent again."""
        self._census = self._probing = False
        self._tickets: dict[Ticket, Callable[[Done], None]] = {}
        self._stop_reason: str | None = None
        self._phase = "starting the replicas"
        self._evaluator_started = self._evaluator_ready = self._evaluator_runs = False
        self._all_replicas_at: float | None = None
        self._next_report_s = self._next_evaluation_s = clock()
        self._next_checkpoint_s = clock() + config.policy.checkpoint_every_s
        self._reports: dict[int, PartitionReport] = {}
        self._evaluating = False
        self._shortest_evaluation_s = math.inf
        self._book = LeaseBook(plan, config.policy.epochs, unit=config.replicas.steps.n_push)
        self._ramp = _guard(config, resumed)
        self._courses: dict[int, int] = {}
        """The ramp's course on which each window that is out was lent, by lease."""
        self._rates: dict[int, deque[float]] = {}
        """Mini-batches a second of the last windows, by replica."""
        self._told_slow: set[int] = set()
        self._spares_due_s: float | None = None
        """When spares are made for those that have been used."""
        self._followers = Followers(
            backend,
            wanted=config.server.hot_standby,
            submit=self._tickets.__setitem__,
            lost=self._on_follower_lost,
            tell=self._telemetry.event,
        )
        self._weak_since_s: float | None = None
        """When the first of those was lost that are not back yet."""

    def request_stop(self, reason: str) -> None:
        """Ask `run` to write a checkpoint and return. Safe to call from a signal handler."""
        self._stop_reason = reason

    def run(self) -> Outcome:
        """Train until every epoch is complete, or until asked to stop."""
        for partition in self._partitions:
            self._start_partition(partition, self._resumed)
        while not self._all_up and self._stop_reason is None:
            self._turn(1.0)
        if self._resumed is not None:
            self._rebuild()
        if self._all_up and self._stop_reason is None:
            for process in self._processes:
                self._start_process(process)
        while True:
            while not self._book.finished and self._stop_reason is None:
                self._grant()
                self._look_after()
                self._tell_of_strength()
                self._turn(0.25)
            outcome = self._wind_up()
            if outcome is not None:
                return outcome

    # What goes on all the time

    def _turn(self, timeout_s: float) -> None:
        for done in self._backend.wait(list(self._tickets), timeout_s):
            self._tickets.pop(done.ticket)(done)
        self._progress()

    def _look_after(self) -> None:
        now = self._clock()
        if now >= self._next_report_s:
            self._next_report_s = now + REPORT_EVERY_S
            self._ask_reports()
            wanted = self._folder.replicas_asked_for()
            if wanted is not None:
                self._scale(wanted)
            self._retire()
            self._look_for_stragglers()
            if self._stop_reason is None and self._folder.stop_requested():
                self.request_stop(ASKED)
        for partition in self._partitions:
            if partition.asked_s is not None and now - partition.asked_s > SILENT_AFTER_S:
                self._on_partition_lost(partition, "silent")
        if not self._all_up:
            return
        if self._spares_due_s is not None and now >= self._spares_due_s:
            self._spares_due_s = None
            self._backend.make_spares()
            self._followers.start_missing()
        self._mend()
        if self._evaluator_ready and now >= self._next_evaluation_s and not self._evaluating:
            self._evaluate(self._telemetry.best_accuracy, BEST)
        if now >= self._next_checkpoint_s and self._checkpointer.under_way is None:
            self._next_checkpoint_s = now + self._config.policy.checkpoint_every_s
            self._checkpoint()

    def _mend(self) -> None:
        """Bring back what has lost its connections, and lend again what was lost."""
        if not self._probing and self._cut_off():
            self._probing = True
            self._ask_all(self._backend.report, self._on_probed)
        if (self._doubt or self._reopening) and not self._census:
            self._census = True
            self._take_census()

    def _tell_of_strength(self) -> None:
        whole = self._all_up and not self._reopening
        if self._weak_since_s is None or not whole:
            return
        if all(p.ready for p in self._processes if p.wanted):
            took_s = self._clock() - self._weak_since_s
            self._weak_since_s = None
            self._spares_due_s = self._clock() + SPARES_AFTER_S
            self._telemetry.event(f"everybody is back after {took_s:.1f} s")

    # How many replicas there are

    def _scale(self, replicas: int) -> None:
        """Have so many replicas from now on: more processes, or processes that are let go."""
        before, self._telemetry.replicas_wanted = self._telemetry.replicas_wanted, replicas
        self._telemetry.event(f"from {before} replicas to {replicas}, as asked for")
        new = [r for r in range(replicas) if r not in self._process_of]
        # As many in a process as there are already, so that they take turns just as fast.
        size = max(len(p.replicas) for p in self._processes)
        for start in range(0, len(new), size):
            members = tuple(new[start : start + size])
            process = Process(index=self._backend.add_process(members), replicas=members)
            self._processes.append(process)
            self._process_of |= dict.fromkeys(members, process)
            self._holding |= dict.fromkeys(members, 0)
        for process in self._processes:
            process.wanted = any(r < replicas for r in process.replicas)

    def _retire(self) -> None:
        """End processes that are not wanted, once they have no windows left."""
        for process in self._processes:
            idle = not any(self._holding[r] for r in process.replicas)
            if process.ready and not process.wanted and idle:
                process.ready = process.runs = False
                self._backend.stop_process(process.index)
                self._telemetry.event(f"{process.name} is let go")

    def _look_for_stragglers(self) -> None:
        rates = {
            p.index: sum(statistics.fmean(self._rates[r]) for r in p.replicas if r in self._rates)
            for p in self._processes
            if p.ready and all(len(self._rates.get(r, ())) == RATE_WINDOWS for r in p.replicas)
        }
        config = self._config.replicas
        for index, detail in stragglers(rates, config.straggler_ratio).items():
            process = self._processes[index]
            if config.stragglers == "replace":
                self._on_process_lost(process, "slow", detail)
            elif index not in self._told_slow:
                self._told_slow.add(index)
                self._telemetry.event(f"{process.name} is slow: {detail}; --stragglers replace")

    def _quarantine(self, report: PartitionReport) -> None:
        for replica in set(report.quarantined) - self._telemetry.quarantined:
            self._telemetry.quarantined.add(replica)
            applied = sum(report.staleness.get(replica, []))
            self._telemetry.event(
                f"replica {replica} is quarantined: partition {report.index} refused "
                f"{report.refusals.get(replica, 0)} of its pushes (a loss or gradient that is not "
                f"finite, or enormous) and took {applied}, and hardly any of the others'"
            )
        if len(self._telemetry.quarantined) >= self._telemetry.replicas_wanted:
            self._stop_reason = self._stop_reason or (
                "every replica is quarantined, for losses or gradients that are not finite: lower "
                "--learning-rate, or give --quarantine-after none"
            )

    # Windows

    def _grant(self) -> None:
        if self._reopening:
            return
        wanted = dataclasses.replace(
            self._config.replicas, replicas=self._telemetry.replicas_wanted
        )
        active = self._active(wanted)
        sound = [r for r in range(wanted.replicas) if r not in self._telemetry.quarantined]
        for replica in sound[:active]:
            if not self._process_of[replica].ready:
                continue
            while self._holding[replica] < self._config.replicas.queued_windows:
                lease = self._book.grant(replica)
                if lease is None:
                    return
                self._holding[replica] += 1
                self._live.add(lease.id)
                if self._ramp is not None:
                    self._courses[lease.id] = self._ramp.course
                ticket = self._backend.run_window(replica, lease)
                self._tickets[ticket] = self._on_window(replica, lease)

    def _active(self, wanted: ReplicaConfig) -> int:
        """How many replicas are lent windows now."""
        epochs = self._book.progress * self._config.policy.epochs
        scheduled = active_replicas(wanted, epochs)
        if self._ramp is None:
            return scheduled
        course = self._ramp.decide(scheduled, wanted.replicas, epochs)
        if course.reason is not None:
            self._telemetry.event(course.reason)
        self._telemetry.held = self._ramp.held
        return course.replicas

    def _on_window(self, replica: int, lease: Lease) -> Callable[[Done], None]:
        process = self._process_of[replica]

        def handle(done: Done) -> None:
            if lease.id not in self._live:
                return  # the process was lost, and its windows have been dealt with
            if isinstance(done.error, ProcessLost):
                self._on_process_lost(process, "died")
                return
            if isinstance(done.error, PartitionLost):
                self._cut(process, done.error)
                return
            if done.error is not None and not isinstance(done.error, ShufflerLost):
                self._on_process_failed(process, done.error)
                return
            self._live.discard(lease.id)
            self._holding[replica] -= 1
            if done.error is not None:
                self._courses.pop(lease.id, None)
                self._book.give_back(lease.id)
                self._on_shuffler_lost()
            else:
                self._on_trained(replica, lease, done.value)

        return handle

    def _on_trained(self, replica: int, lease: Lease, report: WindowReport) -> None:
        self._telemetry.trained(report)
        if self._ramp is not None:
            # Mini-batches whose loss was not finite are not in the mean.
            mostly_refused = 2 * len(report.refused) >= report.num_batches
            loss = None if mostly_refused else report.mean_loss
            self._ramp.saw(loss, self._courses.pop(lease.id))
        self._history.progressed("replicas", self._process_of[replica].index)
        if report.wall_s > 0:
            rates = self._rates.setdefault(replica, deque(maxlen=RATE_WINDOWS))
            rates.append(report.num_batches / report.wall_s)
        self._history.progressed("shuffler", 0)
        if report.unsettled:
            self._doubt[lease.id] = lease
        else:
            self._book.complete(lease.id, replica)
        policy, num_refused = self._config.policy, len(self._telemetry.refused)
        bound = 0 if policy.on_refusal == "stop" else policy.max_refused
        if bound is not None and num_refused > bound and self._stop_reason is None:
            batch = next(iter(report.refused), None)
            named = "" if batch is None else f", the last of them (epoch {report.epoch}, {batch})"
            self._stop_reason = (
                f"{num_refused} mini-batches were refused for a loss or gradient that is "
                f"not finite{named} from replica {replica}: lower --learning-rate, or raise "
                "--max-refused"
            )

    def _on_shuffler_lost(self) -> None:
        # Its death is told by every window that it was to deliver; it is replaced once.
        for _ in range(self._backend.replace_shufflers()):
            self._recover(Loss(part="shuffler", index=0, name="a shuffler", cause="died"))

    def _drop_windows(self, process: Process) -> None:
        """Put every window of a process in doubt."""
        process.ready = False
        for replica in process.replicas:
            self._holding[replica] = 0
            self._rates.pop(replica, None)
            for lease in self._book.lost(replica):
                self._live.discard(lease.id)
                self._courses.pop(lease.id, None)
                self._doubt[lease.id] = lease

    # Losses

    def _recover(self, loss: Loss, *, followed: bool = False) -> str:
        """Decide what is done about a loss, and tell of it; gives the action."""
        limit = self._config.replicas.max_restarts
        recovery = decide(loss, self._history, max_restarts=limit, followed=followed)
        self._telemetry.event(recovery.reason)
        if loss.part in ("replicas", "partition") and self._weak_since_s is None:
            self._weak_since_s = self._clock()
        if recovery.action == "give up":
            raise RunFailed(
                f"{recovery.reason}: see the logs, then go on with `downpour resume "
                f"{self._folder.path}`"
            )
        return recovery.action

    def _on_process_lost(self, process: Process, cause: str, detail: str = "") -> None:
        process.runs = process.starting = False
        self._drop_windows(process)
        self._recover(_loss("replicas", process.index, process.name, cause, detail))
        if self._all_up and process.wanted:
            self._start_process(process)
        # Otherwise it is started once all partitions are there again.

    def _on_process_failed(self, process: Process, error: Exception) -> None:
        """An error that is nobody's death: the user's to repair, or the process's own."""
        if isinstance(error, RunFailed) or user_message(error) is not None:
            raise error
        detail = f"{type(error).__name__}: {_last_line(error)}"
        try:
            self._on_process_lost(process, "failed", detail)
        except RunFailed as failure:
            raise failure from error

    def _cut(self, process: Process, error: Exception) -> None:
        """A process has lost a connection. Which partition's fault that is, the probe will tell."""
        self._drop_windows(process)
        self._next_report_s = self._clock()
        if self._all_up:
            loss = _loss("replicas", process.index, process.name, "disconnected", str(error))
            process.runs = self._recover(loss) == "reconnect"

    def _cut_off(self) -> bool:
        """Whether somebody runs without his connections, or not at all."""
        waits = any(p.wanted and not p.ready and not p.starting for p in self._processes)
        return waits or (self._evaluator_runs and not self._evaluator_ready)

    def _on_probed(self, _: Sequence[PartitionReport]) -> None:
        """All partitions are alive: connect again."""
        self._probing = False
        for process in self._processes:
            if process.wanted and not process.ready and not process.starting:
                self._start_process(process)
        if self._evaluator_runs and not self._evaluator_ready:
            self._connect_evaluator(self._backend.reconnect_evaluator())

    def _start_process(self, process: Process) -> None:
        process.starting = True
        backend = self._backend
        start = backend.reconnect_process if process.runs else backend.start_process

        def handle(done: Done) -> None:
            process.starting = False
            if done.error is None:
                process.ready = process.runs = True
                self._phase = "training"
                if self._all_replicas_at is None and all(p.ready for p in self._processes):
                    self._all_replicas_at = time.time()
                    self._spares_due_s = self._clock() + SPARES_AFTER_S
                    if not self._evaluator_started:
                        self._start_evaluator()
            elif isinstance(done.error, PartitionLost):
                process.runs = True
                self._cut(process, done.error)
            elif isinstance(done.error, ProcessLost):
                self._on_process_lost(process, "died")
            else:
                self._on_process_failed(process, done.error)

        self._tickets[start(process.index)] = handle

    # The evaluator

    def _start_evaluator(self) -> None:
        self._evaluator_started = True
        self._connect_evaluator(self._backend.start_evaluator())

    def _connect_evaluator(self, ticket: Ticket) -> None:
        self._evaluator_runs = self._evaluator_ready = False

        def handle(done: Done) -> None:
            if done.error is None:
                self._evaluator_ready = self._evaluator_runs = True
            else:
                self._on_evaluator_error(done.error)

        self._tickets[ticket] = handle

    def _on_evaluator_error(self, error: Exception) -> None:
        self._evaluator_ready = False
        if isinstance(error, WriteFailed):
            self._evaluator_ready = True
            self._telemetry.event(f"the best weights could not be written ({error}): going on")
            return
        if isinstance(error, PartitionLost):
            self._evaluator_runs = True
            self._next_report_s = self._clock()
            if not self._all_up:
                return
            loss = _loss("evaluator", 0, "the evaluator", "disconnected", str(error))
            if self._recover(loss) == "reconnect":
                return
            self._start_evaluator()
            return
        if not isinstance(error, ProcessLost) and user_message(error) is not None:
            raise error
        cause = "died" if isinstance(error, ProcessLost) else "failed"
        detail = "" if cause == "died" else f"{type(error).__name__}: {_last_line(error)}"
        self._recover(_loss("evaluator", 0, "the evaluator", cause, detail))
        self._evaluator_runs = False
        self._start_evaluator()

    def _evaluate(self, best: float | None, name: str) -> None:
        """Score the current weights; keep them under `name` if they beat `best`."""
        self._evaluating = True
        began_s = self._clock()

        def handle(done: Done) -> None:
            self._evaluating = False
            ended_s = self._clock()
            self._next_evaluation_s = next_evaluation_s(
                self._config.policy, began_s, ended_s, self._shortest_evaluation_s
            )
            if done.error is not None:
                self._on_evaluator_error(done.error)
            else:
                self._shortest_evaluation_s = min(self._shortest_evaluation_s, ended_s - began_s)
                self._history.progressed("evaluator", 0)
                self._telemetry.evaluated(done.value)

        self._tickets[self._backend.evaluate(best, str(self._folder.path / name))] = handle

    # The partitions

    @property
    def _all_up(self) -> bool:
        return all(p.up for p in self._partitions)

    def _start_partition(self, partition: Partition, checkpoint: Checkpoint | None) -> None:
        ticket = self._backend.start_partition(partition.index, checkpoint)
        self._await_partition(partition, ticket)

    def _await_partition(self, partition: Partition, ticket: Ticket) -> None:
        """A new incarnation is on its way."""
        partition.up, partition.asked_s, partition.version = False, None, None
        partition.incarnation += 1

        def arrived(_: Any) -> None:
            partition.up, partition.asked_s = True, None
            if self._all_up:
                self._probing = self._census = False
                self._phase = "training" if self._all_replicas_at else "starting the replicas"

        self._tickets[ticket] = self._from_partition(partition, arrived)

    def _on_partition_lost(self, partition: Partition, cause: str, detail: str = "") -> None:
        name = f"partition {partition.index}"
        followed = self._followers.can_take_over(partition.index)
        loss = _loss("partition", partition.index, name, cause, detail)
        promoted = self._recover(loss, followed=followed) == "promote"
        self._followers.partition_replaced(partition.index)
        self._phase = f"replacing {name}"
        self._checkpointer.abandon()
        self._reopening = True
        if self._ramp is not None and not promoted:
            self._ramp.restarted()
        for process in self._processes:
            self._drop_windows(process)
        self._evaluator_ready = False
        if promoted:
            self._await_partition(partition, self._backend.promote(partition.index))
            partition.asked_s = self._clock()  # a follower that does not answer is lost, too
            return
        checkpoint, passed = self._store.latest_for(partition.index)
        for problem in passed:
            self._telemetry.event(f"{problem}; taking the one before")
        self._telemetry.event(
            f"{name} starts again from "
            + (f"checkpoint {checkpoint.number}" if checkpoint else "the initial weights")
        )
        self._start_partition(partition, checkpoint)

    def _on_follower_lost(self, index: int, detail: str) -> bool:
        """Whether there is to be another."""
        loss = _loss("follower", index, f"the follower of partition {index}", "died", detail)
        another = self._recover(loss) == "restart"
        if another and self._weak_since_s is None:
            self._spares_due_s = self._clock() + SPARES_AFTER_S
        return another

    def _from_partition(
        self, partition: Partition, then: Callable[[Any], None]
    ) -> Callable[[Done], None]:
        """Give `then` what this incarnation of a partition answers; replace it if it is lost."""
        incarnation = partition.incarnation

        def handle(done: Done) -> None:
            if partition.incarnation != incarnation:
                return
            if done.error is None:
                then(done.value)
            elif isinstance(done.error, PartitionLost):
                self._on_partition_lost(partition, "died")
            elif isinstance(done.error, RunFailed) or user_message(done.error) is not None:
                raise done.error
            else:
                self._on_partition_failed(partition, done.error)

        return handle

    def _on_partition_failed(self, partition: Partition, error: Exception) -> None:
        """Its serving thread has ended by an error that is nobody's but its own."""
        try:
            detail = f"{type(error).__name__}: {_last_line(error)}"
            self._on_partition_lost(partition, "failed", detail)
        except RunFailed as failure:
            raise failure from error

    def _ask_all(self, ask: Callable[[int], Ticket], then: Callable[[Sequence[Any]], None]) -> None:
        """Ask every partition; `then` gets their answers, unless one is lost meanwhile."""
        answers: dict[int, Any] = {}
        before = [p.incarnation for p in self._partitions]

        def taker(index: int) -> Callable[[Any], None]:
            def take(value: Any) -> None:
                answers[index] = value
                if len(answers) == len(before) and before == [
                    p.incarnation for p in self._partitions
                ]:
                    then([answers[i] for i in range(len(before))])

            return take

        for partition in self._partitions:
            handle = self._from_partition(partition, taker(partition.index))
            self._tickets[ask(partition.index)] = handle

    def _answers(self, ask: Callable[[int], Ticket]) -> Sequence[Any] | None:
        """What every partition answers, waited for; None where one was lost meanwhile."""
        got: list[Sequence[Any]] = []
        if not self._all_up:
            return None
        before = [p.incarnation for p in self._partitions]
        give_up_s = self._clock() + SILENT_AFTER_S
        self._ask_all(ask, got.append)
        while not got and before == [p.incarnation for p in self._partitions]:
            if self._clock() > give_up_s:
                raise RunFailed(
                    f"a partition has not answered for {SILENT_AFTER_S:.0f} s: go on with "
                    f"`downpour resume {self._folder.path}`"
                )
            self._turn(1.0)
        return got[0] if got else None

    def _ask_reports(self) -> None:
        for partition in self._partitions:
            if partition.up and partition.asked_s is None:
                partition.asked_s = self._clock()
                ticket = self._backend.report(partition.index)
                self._tickets[ticket] = self._from_partition(partition, self._on_report)

    def _on_report(self, report: PartitionReport) -> None:
        partition = self._partitions[report.index]
        partition.asked_s = None
        if partition.version is None:
            partition.version = report.version
        elif report.version > partition.version:
            self._history.progressed("partition", partition.index)
        self._reports[report.index] = report
        self._followers.reported(report)
        if report.has_follower:
            self._history.progressed("follower", report.index)
        self._quarantine(report)
        if len(self._reports) == len(self._partitions) and not any(
            p.asked_s is not None for p in self._partitions
        ):
            self._tell()

    # Checkpoints

    def _checkpoint(self) -> None:
        try:
            folder = self._checkpointer.begin()
        except OSError as error:
            self._on_checkpoint_failed(error)
            return
        number = self._checkpointer.under_way

        def handler(index: int) -> Callable[[Done], None]:
            def handle(done: Done) -> None:
                if self._checkpointer.under_way != number:
                    return  # it has been given up
                if isinstance(done.error, WriteFailed):
                    self._on_checkpoint_failed(done.error)
                    return
                self._from_partition(self._partitions[index], take)(done)

            def take(file: Any) -> None:
                try:
                    self._checkpointer.received(
                        index,
                        file,
                        elapsed_s=self._telemetry.elapsed_s,
                        accuracy=self._telemetry.accuracy,
                        ramp=None if self._ramp is None else self._ramp.dump(),
                    )
                except OSError as error:
                    self._on_checkpoint_failed(error)

            return handle

        for index in range(len(self._partitions)):
            self._tickets[self._backend.snapshot(index, folder)] = handler(index)

    def _on_checkpoint_failed(self, error: Exception) -> None:
        self._checkpointer.abandon()
        last = self._checkpointer.last
        kept = "there is none yet" if last is None else f"the last good one is {last}"
        self._telemetry.event(
            f"a checkpoint could not be written ({one_line(error)}): going on, {kept}"
        )

    # What the applied sets say

    def _take_census(self) -> None:
        """Ask what the partitions have settled, and set the lease book right by it."""
        doubt, reopening = dict(self._doubt), self._reopening
        epochs = tuple(
            range(self._book.epochs_entered)
            if reopening
            else sorted({lease.epoch for lease in doubt.values()})
        )

        def take(answers: Sequence[Flags]) -> None:
            self._census = False
            settled = {e: settled_by_all(answers, e) for e in epochs}
            for lease in doubt.values():
                self._book.reconcile(lease.id, settled[lease.epoch])
                del self._doubt[lease.id]
            if reopening:
                again = sum(self._book.reopen(e, settled[e]) for e in epochs)
                self._reopening = False
                self._telemetry.event(f"{again:,} mini-batches are run again")

        self._ask_all(lambda index: self._backend.flags(index, epochs), take)

    def _rebuild(self) -> None:
        """Lease only what some partition has not settled: what resuming is."""
        epochs = tuple(range(self._config.policy.epochs))
        flags: Sequence[Flags] | None = None
        while flags is None:
            if self._stop_reason is not None:
                return
            flags = self._answers(lambda index: self._backend.flags(index, epochs))
            if flags is None:
                self._turn(1.0)
        done = {}
        for epoch in epochs:
            settled = settled_by_all(flags, epoch)
            self._telemetry.refused |= refused_by_any(flags, epoch)
            if settled.any():
                done[epoch] = settled
        self._book = LeaseBook(
            self._plan,
            self._config.policy.epochs,
            unit=self._config.replicas.steps.n_push,
            done=done,
        )
        self._reopening = False

    def _tell(self) -> None:
        outstanding = [self._holding[r] for r in self._holding]
        working = {r for r, held in self._holding.items() if held and self._process_of[r].ready}
        alive, held = self._alive(), self._telemetry.held
        kept_back = 0 if held is None else max(0, self._telemetry.replicas_wanted - held)
        self._telemetry.reported(
            self._reports.values(),
            phase=self._phase,
            alive=alive,
            replicas={
                "training": len(working),
                "waiting": max(0, alive - len(working) - kept_back),
                "held": kept_back,
                "starting": self._telemetry.replicas_wanted - alive,
            },
            leases=Leases(
                outstanding=sum(outstanding),
                queued=sum(max(0, held - 1) for held in outstanding),
                returned=self._book.num_returned,
            ),
            restarts={str(part): self._history.restarts[part] for part in get_args(Part)},
        )

    def _alive(self) -> int:
        wanted = self._telemetry.replicas_wanted
        return sum(r < wanted for p in self._processes if p.ready for r in p.replicas)

    def _progress(self) -> None:
        self._show(self._telemetry.progress(phase=self._phase, alive=self._alive()))

    # The end

    def _wind_up(self) -> Outcome | None:
        """A last checkpoint, the last figures and, of a finished run, the last evaluation.

        None where a partition was lost on the way, and the run is not finished any more.
        """
        finished = self._book.finished
        self._phase = "finishing" if finished else "stopping"
        self._progress()
        if not self._write_last_checkpoint() and finished and not self._all_up:
            return None
        reports = self._answers(self._backend.report)
        if reports is not None:
            self._reports = {r.index: r for r in reports}
            self._tell()
        self._progress()
        exactly_once = False
        if finished:
            if reports is None or not self._final_evaluation():
                return None
            flags = self._answers(self._flags_of_all)
            if flags is None or self._reopening:
                return None
            exactly_once = settled_once(flags, self._telemetry.reports)
        return Outcome(
            finished=finished,
            reports=self._telemetry.reports,
            evaluation=self._telemetry.evaluation,
            best_accuracy=self._telemetry.best_accuracy,
            exactly_once=exactly_once,
            refused=len(self._telemetry.refused),
            skipped=self._telemetry.skipped,
            quarantined=tuple(sorted(self._telemetry.quarantined)),
            restarts={part: n for part, n in self._history.restarts.items() if n},
            updates_before=self._resumed.updates if self._resumed else 0,
            all_replicas_at=self._all_replicas_at,
            elapsed_s=self._telemetry.elapsed_s,
            wall_s=self._telemetry.wall_s,
            checkpoint=self._checkpointer.last,
        )

    def _flags_of_all(self, index: int) -> Ticket:
        return self._backend.flags(index, tuple(range(self._config.policy.epochs)))

    def _write_last_checkpoint(self) -> bool:
        """Whether it was written."""
        self._await_checkpoint()  # one that began before the end
        if not self._all_up:
            return False
        before = self._checkpointer.last
        self._checkpoint()
        self._await_checkpoint()
        return self._checkpointer.last != before

    def _await_checkpoint(self) -> None:
        while self._checkpointer.under_way is not None:
            self._turn(1.0)

    def _final_evaluation(self) -> bool:
        """Score the last weights, and keep them. False where a partition was lost meanwhile."""
        self._phase = "evaluating"
        before = [p.incarnation for p in self._partitions]
        if not self._evaluator_started:
            self._start_evaluator()  # the run was over before all of its replicas were up
        while self._evaluating:  # of weights that were not the last
            self._turn(1.0)
        paths = {BEST: self._telemetry.best_accuracy, MODEL: None}
        for name, best in paths.items():
            wanted = self._telemetry.num_evaluations + 1
            while self._telemetry.num_evaluations < wanted:
                if before != [p.incarnation for p in self._partitions]:
                    return False
                if not self._evaluator_ready:
                    self._look_after()
                elif not self._evaluating:
                    self._evaluate(best, name)
                self._turn(1.0)
        self._progress()
        return True

    @property
    def stop_reason(self) -> str | None:
        """Why the run was asked to stop, if it was."""
        return self._stop_reason


def _guard(config: RunConfig, resumed: Checkpoint | None) -> RampGuard | None:
    replicas = config.replicas
    joins = replicas.warm_start_epochs or replicas.ramp_epochs
    if replicas.ramp_guard is None or not joins:
        return None
    return RampGuard(
        factor=replicas.ramp_guard,
        replicas=replicas.replicas,
        ramp_epochs=replicas.ramp_epochs,
        state=None if resumed is None else resumed.ramp,
    )


def _loss(part: Any, index: int, name: str, cause: Any, detail: str = "") -> Loss:
    return Loss(part=part, index=index, name=name, cause=cause, detail=detail)


def _last_line(error: Exception) -> str:
    """The end of an error's text, which of one that comes from afar is a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else ""

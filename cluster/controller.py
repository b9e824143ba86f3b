"""The controller: hands out windows, watches over the run, and keeps no truth of its own.

What has been trained on is what the partitions' applied sets say; the leases can be rebuilt from
them at any time, and are, when a process is lost and when a run is resumed. The controller talks
to the actors through a `Backend`, and to people through a callback that takes `Progress`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cluster.backend import (
    Backend,
    Done,
    PartitionLost,
    ProcessLost,
    RunFailed,
    ShufflerLost,
    Ticket,
)
from cluster.checkpoint import Checkpoint, CheckpointStore, slowest
from cluster.config import RunConfig, active_replicas, next_evaluation_s
from cluster.display import Progress
from cluster.run_folder import BEST, MODEL, RunFolder
from cluster.telemetry import Telemetry
from paramserver.applied import REFUSED, WAITING
from shuffler.lease import Lease, LeaseBook
from shuffler.plan import Plan

if TYPE_CHECKING:
    from paramserver.actor import PartitionReport
    from workers.actor import Evaluation
    from workers.replica import WindowReport

REPORT_EVERY_S = 1.0
CALL_DEADLINE_S = 120.0


@dataclass(kw_only=True)
class _Process:
    """A process of replicas as the controller sees it."""

    replicas: tuple[int, ...]
    starting: Ticket | None = None
    ready: bool = False
    restarts: int = 0


@dataclass(kw_only=True)
class Outcome:
    """How the controller's part of a run ended."""

    finished: bool
    """Every epoch is complete; otherwise the run was asked to stop."""
    reports: list[PartitionReport]
    evaluation: Evaluation | None
    best_accuracy: float | None
    exactly_once: bool
    """Every partition has settled every mini-batch of every finished epoch."""
    refused: int
    """Distinct mini-batches that some partition refused."""
    restarts: int
    all_replicas_at: float | None
    """Unix time at which the last process of replicas was ready."""
    elapsed_s: float
    """Seconds of training, over all sessions of the run."""
    wall_s: float


class Controller:
    """Runs one training run on a backend that has its partitions and shufflers up."""

    def __init__(
        self,
        *,
        config: RunConfig,
        plan: Plan,
        backend: Backend,
        folder: RunFolder,
        store: CheckpointStore,
        show: Callable[[Progress], None],
        resumed: Checkpoint | None = None,
        clock: Callable[[], float] = time.monotonic,
        began_s: float | None = None,
    ) -> None:
        """`resumed` is the checkpoint that the backend's partitions started from, if any;
        `began_s` is when the command began, by `clock`.
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
        )
        self._checkpoint_number = max([0, *store.numbers()])
        self._resumed = resumed
        self._processes = [_Process(replicas=r) for r in backend.processes]
        self._process_of = {r: p for p in self._processes for r in p.replicas}
        self._holding: dict[int, int] = dict.fromkeys(self._process_of, 0)
        self._live: set[int] = set()
        self._tickets: dict[Ticket, Callable[[Done], None]] = {}
        self._stop_reason: str | None = None
        self._phase = "starting the replicas"
        self._evaluator_started = self._evaluator_ready = False
        self._evaluator_restarts = 0
        self._all_replicas_at: float | None = None
        self._next_report_s = self._next_evaluation_s = clock()
        self._next_checkpoint_s = clock() + config.policy.checkpoint_every_s
        self._reports: dict[int, PartitionReport] = {}
        self._reporting: set[int] = set()
        self._evaluating = False
        self._snapshots: dict[int, Any] | None = None
        self._book = LeaseBook(plan, config.policy.epochs, unit=config.replicas.steps.n_push)

    def request_stop(self, reason: str) -> None:
        """Ask `run` to write a checkpoint and return. Safe to call from a signal handler."""
        self._stop_reason = reason

    def run(self) -> Outcome:
        """Train until every epoch is complete, or until asked to stop."""
        if self._resumed is not None:
            self._rebuild()
        for index in range(len(self._processes)):
            self._start_process(index)
        while not self._book.finished and self._stop_reason is None:
            self._grant()
            self._look_after()
            self._turn(0.25)
        return self._finish()

    # What goes on all the time

    def _turn(self, timeout_s: float) -> None:
        for done in self._backend.wait(list(self._tickets), timeout_s):
            self._tickets.pop(done.ticket)(done)
        self._progress()

    def _grant(self) -> None:
        done = self._book.progress * self._config.policy.epochs
        active = active_replicas(self._config.replicas, done)
        for replica in range(active):
            if not self._process_of[replica].ready:
                continue
            while self._holding[replica] < self._config.replicas.queued_windows:
                lease = self._book.grant(replica)
                if lease is None:
                    return
                self._holding[replica] += 1
                self._live.add(lease.id)
                ticket = self._backend.run_window(replica, lease)
                self._tickets[ticket] = self._on_window(replica, lease)

    def _on_window(self, replica: int, lease: Lease) -> Callable[[Done], None]:
        def handle(done: Done) -> None:
            if lease.id not in self._live:
                return  # the process was lost, and its windows have been dealt with
            if isinstance(done.error, ProcessLost):
                self._on_process_lost(self._process_of[replica])
                return
            self._live.discard(lease.id)
            self._holding[replica] -= 1
            if isinstance(done.error, ShufflerLost):
                self._book.give_back(lease.id)
                self._backend.replace_shufflers()
            elif done.error is not None:
                raise self._failure(done.error)
            else:
                self._on_trained(replica, lease, done.value)

        return handle

    def _on_trained(self, replica: int, lease: Lease, report: WindowReport) -> None:
        self._telemetry.trained(report)
        if report.unsettled:
            self._reconcile(lease)
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

    def _on_process_lost(self, process: _Process) -> None:
        if process.starting is None:
            process.ready = False
            index = self._processes.index(process)
            process.restarts += 1
            if sum(p.restarts for p in self._processes) > self._config.replicas.max_restarts:
                raise RunFailed(
                    f"processes of replicas died {self._config.replicas.max_restarts} times: see "
                    f"their logs, then go on with `downpour resume {self._folder.path}`"
                )
            self._start_process(index)
        for replica in process.replicas:
            self._holding[replica] = 0
            for lease in self._book.lost(replica):
                self._live.discard(lease.id)
                self._reconcile(lease)

    def _start_process(self, index: int) -> None:
        process = self._processes[index]
        process.starting = ticket = self._backend.start_process(index)

        def handle(done: Done) -> None:
            process.starting = None
            if isinstance(done.error, ProcessLost):
                self._on_process_lost(process)
                return
            if done.error is not None:
                raise self._failure(done.error)
            process.ready = True
            self._phase = "training"
            if self._all_replicas_at is None and all(p.ready for p in self._processes):
                self._all_replicas_at = time.time()
                if not self._evaluator_started:
                    self._start_evaluator()

        self._tickets[ticket] = handle

    def _replace_evaluator(self) -> None:
        self._evaluator_restarts += 1
        if self._evaluator_restarts > self._config.replicas.max_restarts:
            raise RunFailed(
                f"the evaluator died {self._config.replicas.max_restarts} times: see its log, then "
                f"go on with `downpour resume {self._folder.path}`"
            )
        self._evaluator_ready = False
        self._start_evaluator()

    def _start_evaluator(self) -> None:
        self._evaluator_started = True

        def handle(done: Done) -> None:
            if isinstance(done.error, ProcessLost):
                self._replace_evaluator()
            elif done.error is not None:
                raise self._failure(done.error)
            else:
                self._evaluator_ready = True

        self._tickets[self._backend.start_evaluator()] = handle

    def _look_after(self) -> None:
        now = self._clock()
        if now >= self._next_report_s:
            self._next_report_s = now + REPORT_EVERY_S
            self._ask_reports()
        if self._evaluator_ready and now >= self._next_evaluation_s and not self._evaluating:
            self._evaluate(self._telemetry.best_accuracy, BEST)
        if now >= self._next_checkpoint_s and self._snapshots is None:
            self._next_checkpoint_s = now + self._config.policy.checkpoint_every_s
            self._checkpoint()

    def _ask_reports(self) -> None:
        for index in range(self._backend.num_partitions):
            if index not in self._reporting:
                self._reporting.add(index)
                self._tickets[self._backend.report(index)] = self._on_report

    def _on_report(self, done: Done) -> None:
        if done.error is not None:
            raise self._failure(done.error)
        report: PartitionReport = done.value
        self._reporting.discard(report.index)
        self._reports[report.index] = report
        if not self._reporting:
            self._tell()

    def _evaluate(self, best: float | None, name: str) -> None:
        """Score the current weights; keep them under `name` if they beat `best`."""
        self._evaluating = True
        began_s = self._clock()

        def handle(done: Done) -> None:
            self._evaluating = False
            self._next_evaluation_s = next_evaluation_s(self._config.policy, began_s, self._clock())
            if isinstance(done.error, ProcessLost):
                self._replace_evaluator()
            elif done.error is not None:
                raise self._failure(done.error)
            else:
                self._telemetry.evaluated(done.value)

        self._tickets[self._backend.evaluate(best, str(self._folder.path / name))] = handle

    def _checkpoint(self) -> None:
        self._checkpoint_number += 1
        number = self._checkpoint_number
        folder = self._store.begin(number)
        files: dict[int, Any] = {}
        self._snapshots = files

        def handler(index: int) -> Callable[[Done], None]:
            def handle(done: Done) -> None:
                if done.error is not None:
                    raise self._failure(done.error)
                files[index] = done.value
                if len(files) == self._backend.num_partitions:
                    self._commit(number, files)

            return handle

        for index in range(self._backend.num_partitions):
            self._tickets[self._backend.snapshot(index, folder)] = handler(index)

    def _commit(self, number: int, files: Mapping[int, Any]) -> None:
        in_order = tuple(files[i] for i in range(self._backend.num_partitions))
        self._store.commit(
            Checkpoint(
                number=number,
                updates=slowest(in_order),
                elapsed_s=self._telemetry.elapsed_s,
                files=in_order,
            )
        )
        self._snapshots = None
        self._store.prune(self._config.policy.keep_checkpoints)

    # What the applied sets say

    def _all_flags(self, epochs: tuple[int, ...]) -> list[Mapping[int, npt.NDArray[np.uint8]]]:
        tickets = [
            self._backend.flags(index, epochs) for index in range(self._backend.num_partitions)
        ]
        return [self._result(ticket) for ticket in tickets]

    def _handled(self, epoch: int) -> npt.NDArray[np.bool_]:
        """Mini-batches of `epoch` that every partition has settled, bool [q]."""
        flags = self._all_flags((epoch,))
        settled: npt.NDArray[np.bool_] = np.logical_and.reduce([f[epoch] != WAITING for f in flags])
        return settled

    def _reconcile(self, lease: Lease) -> None:
        self._book.reconcile(lease.id, self._handled(lease.epoch))

    def _rebuild(self) -> None:
        """Lease only what some partition has not settled: what resuming is."""
        epochs = tuple(range(self._config.policy.epochs))
        flags = self._all_flags(epochs)
        done = {}
        for epoch in epochs:
            settled = np.logical_and.reduce([f[epoch] != WAITING for f in flags])
            refused = np.logical_or.reduce([f[epoch] == REFUSED for f in flags])
            self._telemetry.refused |= {(epoch, int(b)) for b in np.flatnonzero(refused)}
            if settled.any():
                done[epoch] = settled
        self._book = LeaseBook(
            self._plan,
            self._config.policy.epochs,
            unit=self._config.replicas.steps.n_push,
            done=done,
        )

    def _result(self, ticket: Ticket) -> Any:
        """Wait for one ticket alone."""
        answers = self._backend.wait([ticket], CALL_DEADLINE_S)
        if not answers:
            raise RunFailed(
                f"an actor has not answered for {CALL_DEADLINE_S:.0f} s: go on with `downpour "
                f"resume {self._folder.path}`"
            )
        (done,) = answers
        if done.error is not None:
            raise self._failure(done.error)
        return done.value

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, PartitionLost | ProcessLost | ShufflerLost):
            return RunFailed(
                f"{error}: go on from the last checkpoint with `downpour resume "
                f"{self._folder.path}`"
            )
        return error

    def _tell(self) -> None:
        reports = self._reports.values()
        self._telemetry.reported(reports, phase=self._phase, alive=self._alive())

    def _alive(self) -> int:
        return sum(len(p.replicas) for p in self._processes if p.ready)

    def _progress(self) -> None:
        self._show(self._telemetry.progress(phase=self._phase, alive=self._alive()))

    # The end

    def _finish(self) -> Outcome:
        finished = self._book.finished
        self._phase = "finishing" if finished else "stopping"
        self._progress()
        self._await_checkpoint()  # one may be under way
        self._checkpoint()
        self._await_checkpoint()
        reports = [
            self._result(self._backend.report(i)) for i in range(self._backend.num_partitions)
        ]
        self._reports = {r.index: r for r in reports}
        self._tell()
        self._progress()
        if finished:
            self._final_evaluation()
        return Outcome(
            finished=finished,
            reports=reports,
            evaluation=self._telemetry.evaluation,
            best_accuracy=self._telemetry.best_accuracy,
            exactly_once=finished and self._exactly_once(),
            refused=len(self._telemetry.refused),
            restarts=sum(p.restarts for p in self._processes),
            all_replicas_at=self._all_replicas_at,
            elapsed_s=self._telemetry.elapsed_s,
            wall_s=self._telemetry.wall_s,
        )

    def _await_checkpoint(self) -> None:
        while self._snapshots is not None:
            self._turn(1.0)

    def _final_evaluation(self) -> None:
        """Score the last weights, and keep them."""
        self._phase = "evaluating"
        if not self._evaluator_started:
            self._start_evaluator()  # the run was over before all of its replicas were up
        while self._evaluating:  # of weights that were not the last
            self._turn(1.0)
        paths = {BEST: self._telemetry.best_accuracy, MODEL: None}
        for name, best in paths.items():
            wanted = self._telemetry.num_evaluations + 1
            while self._telemetry.num_evaluations < wanted:
                if self._evaluator_ready and not self._evaluating:
                    self._evaluate(best, name)
                self._turn(1.0)
        self._progress()

    def _exactly_once(self) -> bool:
        """Whether every partition settled every mini-batch of every epoch, and applied all that
        none refused as often as it has versions.
        """
        epochs = tuple(range(self._config.policy.epochs))
        for flags, report in zip(self._all_flags(epochs), self._telemetry.reports, strict=True):
            if any((flags[epoch] == WAITING).any() for epoch in epochs):
                return False
            if report.batches_applied + report.batches_refused != len(epochs) * len(flags[0]):
                return False
        return True

    @property
    def stop_reason(self) -> str | None:
        """Why the run was asked to stop, if it was."""
        return self._stop_reason

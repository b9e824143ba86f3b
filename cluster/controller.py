"""The controller: hands out windows, watches over the run, and keeps no truth of its own.

What has been trained on is what the partitions' applied sets say; the leases can be rebuilt from
them at any time, and are, when a process is lost and when a run is resumed. The controller talks
to the actors through a `Backend`, and to people through a callback that takes `Progress`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
from cluster.config import RunConfig, active_replicas
from cluster.display import Progress
from cluster.run_folder import BEST, MODEL, STATUS, RunFolder
from paramserver.actor import PartitionReport
from paramserver.applied import REFUSED, WAITING
from paramserver.staleness import Histogram
from shuffler.lease import Lease, LeaseBook
from shuffler.plan import Plan
from workers.actor import Evaluation
from workers.replica import WindowReport

REPORT_EVERY_S = 1.0
CALL_DEADLINE_S = 120.0
RATE_WINDOW_S = 10.0


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


@dataclass(kw_only=True)
class _Latest:
    """The newest figures, for progress."""

    reports: dict[int, PartitionReport] = field(default_factory=dict)
    loss: float | None = None
    evaluation: Evaluation | None = None
    best_accuracy: float | None = None
    history: deque[tuple[float, int, int]] = field(default_factory=deque)
    """(seconds, updates, examples) of late."""


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
        self._began_s = clock() if began_s is None else began_s
        self._elapsed_before_s = resumed.elapsed_s if resumed else 0.0
        self._checkpoint_number = max([0, *store.numbers()])
        self._resumed = resumed
        self._processes = [_Process(replicas=r) for r in backend.processes]
        self._process_of = {r: p for p in self._processes for r in p.replicas}
        self._holding: dict[int, int] = dict.fromkeys(self._process_of, 0)
        self._live: set[int] = set()
        self._tickets: dict[Ticket, Callable[[Done], None]] = {}
        self._latest = _Latest()
        self._stop_reason: str | None = None
        self._phase = "starting the replicas"
        self._evaluator_started = self._evaluator_ready = False
        self._evaluator_restarts = 0
        self._num_evaluations = 0
        self._all_replicas_at: float | None = None
        self._next_report_s = self._next_evaluation_s = clock()
        self._next_checkpoint_s = clock() + config.policy.checkpoint_every_s
        self._refused: set[tuple[int, int]] = set()
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
        if report.mean_loss is not None:
            self._latest.loss = report.mean_loss
        if report.unsettled:
            self._reconcile(lease)
        else:
            self._book.complete(lease.id, replica)
        self._refused |= {(report.epoch, batch) for batch in report.refused}
        policy = self._config.policy
        bound = 0 if policy.on_refusal == "stop" else policy.max_refused
        if bound is not None and len(self._refused) > bound and self._stop_reason is None:
            batch = next(iter(report.refused), None)
            named = "" if batch is None else f", the last of them (epoch {report.epoch}, {batch})"
            self._stop_reason = (
                f"{len(self._refused)} mini-batches were refused for a loss or gradient that is "
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
            self._next_evaluation_s = now + self._config.policy.evaluate_every_s
            self._evaluate(self._latest.best_accuracy, BEST)
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
        self._latest.reports[report.index] = report
        if not self._reporting:
            self._note()

    def _evaluate(self, best: float | None, name: str) -> None:
        """Score the current weights; keep them under `name` if they beat `best`."""
        self._evaluating = True

        def handle(done: Done) -> None:
            self._evaluating = False
            if isinstance(done.error, ProcessLost):
                self._replace_evaluator()
            elif done.error is not None:
                raise self._failure(done.error)
            else:
                self._on_evaluation(done.value)

        self._tickets[self._backend.evaluate(best, str(self._folder.path / name))] = handle

    def _on_evaluation(self, evaluation: Evaluation) -> None:
        latest = self._latest
        latest.evaluation = evaluation
        self._num_evaluations += 1
        accuracy = evaluation.score.accuracy
        latest.best_accuracy = max(latest.best_accuracy or 0.0, accuracy)
        self._folder.append_metrics(
            {
                "time_s": round(self._elapsed_s(), 3),
                "updates": min(evaluation.versions),
                "epoch": self._epochs_done(),
                "accuracy": accuracy,
                "evaluation_loss": evaluation.score.loss,
            }
        )

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
                elapsed_s=self._elapsed_s(),
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
            self._refused |= {(epoch, int(b)) for b in np.flatnonzero(refused)}
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

    # What people see

    def _elapsed_s(self) -> float:
        return self._elapsed_before_s + self._clock() - self._began_s

    def _epochs_done(self) -> float:
        reports = self._latest.reports.values()
        if not reports:
            return 0.0
        return round(min(r.examples for r in reports) / self._plan.num_rows, 4)

    def _note(self) -> None:
        """A new set of reports has come in: work out rates, and write a line of metrics."""
        latest = self._latest
        reports = list(latest.reports.values())
        updates = min(r.version for r in reports)
        examples = min(r.examples for r in reports)
        now = self._clock()
        history = latest.history
        history.append((now, updates, examples))
        while len(history) > 2 and now - history[0][0] > RATE_WINDOW_S:
            history.popleft()
        staleness = merged_staleness(reports).summary()
        values: dict[str, Any] = {
            "time_s": round(self._elapsed_s(), 3),
            "updates": updates,
            "examples": examples,
            "epoch": self._epochs_done(),
            "updates_per_s": self._rates()[0],
            "learning_rate": reports[0].rate,
            "staleness_mean": round(staleness["mean"], 2),
            "staleness_p99": staleness["p99"],
            "replicas": self._alive(),
            "duplicates": sum(r.pushes_duplicate for r in reports),
            "refused": len(self._refused),
        }
        if latest.loss is not None and math.isfinite(latest.loss):
            values["loss"] = round(latest.loss, 6)
        self._folder.append_metrics(values)
        self._folder.write_json(STATUS, {"state": self._phase, "at": time.time(), **values})

    def _rates(self) -> tuple[float | None, float | None]:
        history = self._latest.history
        if len(history) < 2 or history[-1][0] <= history[0][0]:
            return None, None
        seconds = history[-1][0] - history[0][0]
        return (
            round((history[-1][1] - history[0][1]) / seconds, 1),
            round((history[-1][2] - history[0][2]) / seconds, 1),
        )

    def _alive(self) -> int:
        return sum(len(p.replicas) for p in self._processes if p.ready)

    def _progress(self) -> None:
        latest, policy = self._latest, self._config.policy
        reports = list(latest.reports.values())
        updates_per_s, examples_per_s = self._rates()
        staleness = merged_staleness(reports).summary() if reports else {}
        examples = min((r.examples for r in reports), default=0)
        self._show(
            Progress(
                elapsed_s=self._elapsed_s(),
                phase=self._phase,
                epoch=min(policy.epochs, int(self._epochs_done()) + 1),
                epochs=policy.epochs,
                examples=examples,
                total_examples=policy.epochs * self._plan.num_rows,
                updates=min((r.version for r in reports), default=0),
                updates_per_s=updates_per_s,
                examples_per_s=examples_per_s,
                loss=latest.loss,
                accuracy=latest.evaluation.score.accuracy if latest.evaluation else None,
                best_accuracy=latest.best_accuracy,
                staleness_mean=staleness.get("mean"),
                staleness_p99=staleness.get("p99"),
                replicas_alive=self._alive(),
                replicas=self._config.replicas.replicas,
                duplicates=sum(r.pushes_duplicate for r in reports),
                refused=len(self._refused),
            )
        )

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
        self._latest.reports = {r.index: r for r in reports}
        self._note()
        self._progress()
        if finished:
            self._final_evaluation()
        return Outcome(
            finished=finished,
            reports=reports,
            evaluation=self._latest.evaluation,
            best_accuracy=self._latest.best_accuracy,
            exactly_once=finished and self._exactly_once(),
            refused=len(self._refused),
            restarts=sum(p.restarts for p in self._processes),
            all_replicas_at=self._all_replicas_at,
            elapsed_s=self._elapsed_s(),
            wall_s=self._clock() - self._began_s,
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
        paths = {BEST: self._latest.best_accuracy, MODEL: None}
        for name, best in paths.items():
            wanted = self._num_evaluations + 1
            while self._num_evaluations < wanted:
                if self._evaluator_ready and not self._evaluating:
                    self._evaluate(best, name)
                self._turn(1.0)
        self._progress()

    def _exactly_once(self) -> bool:
        """Whether every partition settled every mini-batch of every epoch, and applied all that
        none refused as often as it has versions.
        """
        epochs = tuple(range(self._config.policy.epochs))
        for flags, report in zip(
            self._all_flags(epochs), self._latest.reports.values(), strict=True
        ):
            if any((flags[epoch] == WAITING).any() for epoch in epochs):
                return False
            if report.batches_applied + report.batches_refused != len(epochs) * len(flags[0]):
                return False
        return True

    @property
    def stop_reason(self) -> str | None:
        """Why the run was asked to stop, if it was."""
        return self._stop_reason


def merged_staleness(reports: list[PartitionReport]) -> Histogram:
    """The staleness of every push applied on every partition."""
    whole = Histogram()
    for report in reports:
        for counts in report.staleness.values():
            whole = whole.merge(Histogram(counts))
    return whole

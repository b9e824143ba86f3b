"""The controller: hands out windows, watches over the run, and keeps no truth of its own.

What has been trained on is what the partitions' applied sets say; the leases can be rebuilt from
them at any time, and are, when a process or a partition is lost and when a run is resumed. The
controller talks to the actors through a `Backend`, and to people through callbacks. Each kind of
member has a file that starts it and brings it back (`partitions`, `processes`, `evaluating`,
`followers`); which windows are out is `lending`'s. Here is what goes on between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from downpour.cluster.config.derive import step_config
from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.backend import Backend, Done, ShufflerLost, Ticket
from downpour.cluster.controller.checkpointing import Checkpointer
from downpour.cluster.controller.coverage import (
    Flags,
    refused_by_any,
    same,
    settled_by_some,
    settled_once,
    unfinished_epochs,
)
from downpour.cluster.controller.evaluation import Evaluating
from downpour.cluster.controller.failure_policy import Part
from downpour.cluster.controller.failures import Losses
from downpour.cluster.controller.lease_book import Lease
from downpour.cluster.controller.lease_manager import Lending
from downpour.cluster.controller.members import Outcome
from downpour.cluster.controller.partitions import Partitions
from downpour.cluster.controller.pending_calls import Tickets
from downpour.cluster.controller.replica_processes import Processes
from downpour.cluster.monitoring.observation import Sink
from downpour.cluster.monitoring.progress import Progress
from downpour.cluster.monitoring.telemetry import Telemetry
from downpour.cluster.run.checkpoint import Checkpoint, CheckpointStore
from downpour.cluster.run.early_stopping import EarlyStopping, Ended
from downpour.cluster.run.folder import RunFolder
from downpour.shuffler.plan.plan import Plan

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport
    from downpour.workers.actor import Evaluation
    from downpour.workers.replica.replicas import WindowReport

ASKED = "downpour stop"
"""The reason of a stop that was asked for through the run's folder."""


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
        self._backend = backend
        self._folder = folder
        self._show = show
        self._resumed = resumed
        self._stop_reason: str | None = None
        self._probing = False
        """The partitions have been asked whether all are alive, for those who lost one."""
        self._all_replicas_at: float | None = None
        self._stopping = EarlyStopping(config.policy, resumed.scores if resumed else None)
        self._ended: Ended | None = None
        """Why the run ends early, once it does."""
        self._tickets = Tickets(backend, after=self._progress)
        self._telemetry = Telemetry(
            config=config,
            plan=plan,
            folder=folder,
            clock=clock,
            began_s=clock() if began_s is None else began_s,
            elapsed_before_s=resumed.elapsed_s if resumed else 0.0,
            trained_before_s=self._stopping.trained_before_s,
            best_accuracy=self._stopping.best,
            say=say,
            sinks=sinks,
        )
        self._lending = Lending(
            plan,
            epochs=config.policy.epochs,
            replicas=config.replicas,
            unit=step_config(config).batches_per_push,
            ramp=resumed.ramp if resumed else None,
        )
        self._losses = Losses(
            max_restarts=config.replicas.max_restarts,
            folder=folder,
            tell=self._telemetry.event,
            clock=clock,
        )
        self._partitions = Partitions(
            backend,
            tickets=self._tickets,
            losses=self._losses,
            telemetry=self._telemetry,
            folder=folder,
            store=store,
            hot_standby=config.server.hot_standby,
            clock=clock,
            lost=self._on_partition_lost,
            back=self._on_partitions_back,
            reported=self._on_report,
        )
        self._processes = Processes(
            backend,
            config=config.replicas,
            tickets=self._tickets,
            losses=self._losses,
            telemetry=self._telemetry,
            partitions=self._partitions,
            lending=self._lending,
            up=self._on_process_up,
        )
        self._evaluating = Evaluating(
            backend,
            policy=config.policy,
            tickets=self._tickets,
            losses=self._losses,
            telemetry=self._telemetry,
            partitions=self._partitions,
            folder=folder,
            clock=clock,
            scored=self._on_scored,
        )
        self._checkpointer = Checkpointer(
            backend,
            store=store,
            policy=config.policy,
            tickets=self._tickets,
            partitions=self._partitions,
            about=self._about_checkpoint,
            tell=self._telemetry.event,
            clock=clock,
        )

    def request_stop(self, reason: str) -> None:
        """Ask `run` to write a checkpoint and return. Safe to call from a signal handler."""
        self._stop_reason = reason

    @property
    def stop_reason(self) -> str | None:
        """Why the run was asked to stop, if it was."""
        return self._stop_reason

    def run(self) -> Outcome:
        """Train until every epoch is complete, the run has arrived, or it is asked to stop."""
        self._partitions.start(self._resumed)
        while not self._partitions.all_up and self._stop_reason is None:
            self._tickets.turn(1.0)
        if self._resumed is not None:
            self._rebuild()
        if self._partitions.all_up and self._stop_reason is None:
            self._processes.start()
        while True:
            while not self._lending.finished and self._stop_reason is None:
                self._grant()
                self._look_after()
                self._tell_of_strength()
                self._tickets.turn(0.25)
            outcome = self._wind_up()
            if outcome is not None:
                return outcome

    # What goes on all the time

    def _look_after(self) -> None:
        if self._partitions.ask_reports():
            self._heed_people()
            self._processes.retire()
            self._processes.look_for_stragglers()
        self._partitions.look_for_silent()
        if not self._partitions.all_up:
            return
        if self._losses.take_reserves_due():
            self._backend.make_spares()
            self._partitions.followers.start_missing()
        self._mend()
        if self._ended is None and self._telemetry.has_begun:
            self._evaluating.score_if_due()
        self._checkpointer.begin_if_due()

    def _heed_people(self) -> None:
        """Do what has been asked for through the run's folder."""
        wanted = self._folder.replicas_asked_for()
        if wanted is not None:
            self._processes.scale(wanted)
        if self._stop_reason is None and self._folder.stop_requested():
            self.request_stop(ASKED)

    def _mend(self) -> None:
        """Bring back what has lost its connections, and lend again what was lost."""
        if not self._probing and (self._processes.any_cut_off or self._evaluating.cut_off):
            self._probing = True
            self._partitions.ask_all(self._backend.report, self._on_probed)
        census = self._lending.census(quiet=self._processes.quiet)
        if census is None:
            return

        def take(answers: Sequence[Flags]) -> None:
            again = self._lending.settle(census, answers)
            if again is not None:
                self._telemetry.event(f"{again:,} mini-batches are run again")

        self._partitions.ask_all(lambda index: self._backend.flags(index, census.epochs), take)

    def _on_probed(self, _: Sequence[PartitionReport]) -> None:
        """All partitions are alive: connect again."""
        self._probing = False
        self._processes.start_cut_off()
        self._evaluating.reconnect()

    def _tell_of_strength(self) -> None:
        partitions_whole = self._partitions.all_up and not self._lending.reopening
        if partitions_whole and self._processes.all_wanted_up:
            self._losses.whole()

    # Windows

    def _grant(self) -> None:
        if self._lending.reopening:
            return
        wanted = self._telemetry.replicas_wanted
        course = self._lending.course(wanted)
        if course.reason is not None:
            self._telemetry.event(course.reason)
        self._telemetry.held = self._lending.held
        sound = [r for r in range(wanted) if r not in self._telemetry.quarantined]
        active = [r for r in sound[: course.replicas] if self._processes.is_up(r)]
        for replica, lease in self._lending.lend(active):
            ticket = self._backend.run_window(replica, lease)
            self._tickets.expect(ticket, self._on_window(replica, lease))

    def _on_window(self, replica: int, lease: Lease) -> Callable[[Done], None]:
        def handle(done: Done) -> None:
            if not self._lending.is_live(lease):
                return  # the process was lost, and its windows have been dealt with
            if done.error is None:
                self._on_trained(replica, lease, done.value)
            elif isinstance(done.error, ShufflerLost):
                self._lending.undelivered(replica, lease)
                # Its death is told by every window that it was to deliver; it is replaced once.
                for _ in range(self._backend.replace_shufflers()):
                    self._losses.recover("shuffler", 0, "a shuffler", "died")
            else:
                self._processes.failed(replica, done.error)

        return handle

    def _on_trained(self, replica: int, lease: Lease, report: WindowReport) -> None:
        self._telemetry.trained(report)
        self._lending.trained(replica, lease, report)
        self._processes.trained(replica, report)
        self._losses.progressed("shuffler")
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

    def _rebuild(self) -> None:
        """Lease only what some partition has not settled: what resuming is."""
        flags: Sequence[Flags] | None = None
        while flags is None:
            if self._stop_reason is not None:
                return
            flags = self._partitions.answers(self._flags_of_all)
            if flags is None:
                self._tickets.turn(1.0)
        for epoch in range(self._config.policy.epochs):
            self._telemetry.refused |= refused_by_any(flags, epoch)
        self._lending.resume(flags)

    def _flags_of_all(self, index: int) -> Ticket:
        return self._backend.flags(index, tuple(range(self._config.policy.epochs)))

    # What is heard of members

    def _on_partition_lost(self, promoted: bool) -> None:
        self._checkpointer.abandon()
        self._lending.partition_lost(promoted=promoted)
        self._processes.drop_windows()
        self._evaluating.disconnected()

    def _on_partitions_back(self) -> None:
        self._probing = False
        self._lending.census_lost()
        trained = self._all_replicas_at is not None
        self._telemetry.phase = "training" if trained else "starting the replicas"

    def _on_process_up(self) -> None:
        self._telemetry.phase = "training"
        if self._all_replicas_at is None and self._processes.all_up:
            self._all_replicas_at = time.time()
            self._losses.reserve_soon()
            self._evaluating.start()

    def _on_scored(self, evaluation: Evaluation) -> None:
        ended = self._stopping.scored(self._telemetry.scoring(evaluation))
        if ended is None or self._ended or self._lending.finished or self._stop_reason is not None:
            return
        self._ended = ended
        self._telemetry.event(f"the run ends early: {ended.reason}")
        self._end_early()

    def _end_early(self) -> None:
        """Have all processes drop their windows; what every partition has by then is the run."""
        self._processes.drop_windows()
        self._lending.end_early()

    def _on_report(self, report: PartitionReport) -> None:
        self._quarantine(report)
        if self._partitions.all_reported:
            self._tell(self._partitions.reports.values())

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

    # What is told of the run

    def _tell(self, reports: Iterable[PartitionReport]) -> None:
        wanted, held = self._telemetry.replicas_wanted, self._telemetry.held
        alive, working = self._processes.num_alive(wanted), self._processes.num_working()
        kept_back = 0 if held is None else max(0, wanted - held)
        self._telemetry.reported(
            reports,
            alive=alive,
            replicas={
                "training": working,
                "waiting": max(0, alive - working - kept_back),
                "held": kept_back,
                "starting": wanted - alive,
            },
            leases=self._lending.leases,
            restarts={str(part): self._losses.restarts[part] for part in get_args(Part)},
        )

    def _progress(self) -> None:
        alive = self._processes.num_alive(self._telemetry.replicas_wanted)
        self._show(self._telemetry.progress(alive=alive))

    def _about_checkpoint(self) -> Mapping[str, Any]:
        return {
            "elapsed_s": self._telemetry.elapsed_s,
            "accuracy": self._telemetry.accuracy,
            "ramp": self._lending.dump_ramp(),
            "scores": self._stopping.dump(self._telemetry.training_s),
        }

    # The end

    def _wind_up(self) -> Outcome | None:
        """A last checkpoint, the last figures and, of a finished run, the last evaluation.

        None where a partition was lost on the way, and the run is not finished any more.
        """
        finished = self._lending.finished
        self._telemetry.phase = "finishing" if finished else "stopping"
        self._progress()
        # Those who were stopped may have left pushes that their partitions have yet to see.
        ending = self._ended is not None and finished
        before = self._partitions.answers(self._flags_of_all) if ending else None
        written = self._checkpointer.write_last()
        if not written and finished and not self._partitions.all_up:
            return None
        reports = self._partitions.answers(self._backend.report)
        if reports is not None:
            for report in reports:
                self._quarantine(report)
            self._tell(reports)
        self._progress()
        exactly_once, unfinished = False, dict[int, int]()
        if finished:
            # The model of a run that arrived is what reached the accuracy, and is written.
            arrived = self._ended is not None and self._ended.by == "accuracy"
            if reports is None or not (arrived or self._evaluating.score_last(self._look_after)):
                return None
            self._progress()
            flags = self._partitions.answers(self._flags_of_all)
            if flags is None or self._lending.reopening:
                return None
            if ending and any(settled_by_some(flags, e).any() for e in flags[0]):
                self._end_early()
                return None
            if ending and (before is None or not same(before, flags)):
                return None
            whole = self._ended is None
            exactly_once = settled_once(flags, self._telemetry.reports, whole=whole)
            unfinished = unfinished_epochs(flags)
        return Outcome(
            finished=finished,
            ended=self._ended or Ended(),
            reached=self._stopping.reached,
            unfinished_epochs=unfinished,
            reports=self._telemetry.reports,
            evaluation=self._telemetry.evaluation,
            best_accuracy=self._telemetry.best_accuracy,
            exactly_once=exactly_once,
            refused=len(self._telemetry.refused),
            skipped=self._telemetry.skipped,
            quarantined=tuple(sorted(self._telemetry.quarantined)),
            restarts={part: n for part, n in self._losses.restarts.items() if n},
            updates_before=self._resumed.updates if self._resumed else 0,
            all_replicas_at=self._all_replicas_at,
            elapsed_s=self._telemetry.elapsed_s,
            wall_s=self._telemetry.wall_s,
            checkpoint=self._checkpointer.last,
        )

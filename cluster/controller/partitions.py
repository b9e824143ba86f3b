"""The partitions of a run: asking them, and bringing back those that are lost.

What is lost with a partition, and who else is to know of it, is the controller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from downpour.cluster.controller.backend import Backend, Done, PartitionLost, RunFailed, Ticket
from downpour.cluster.controller.failure_policy import Cause
from downpour.cluster.controller.failures import Losses
from downpour.cluster.controller.followers import Followers
from downpour.cluster.controller.members import Partition
from downpour.cluster.controller.pending_calls import Tickets
from downpour.cluster.errors import user_message
from downpour.cluster.monitoring.telemetry import Telemetry
from downpour.cluster.run.checkpoint import Checkpoint, CheckpointStore
from downpour.cluster.run.folder import RunFolder

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport

REPORT_EVERY_S = 1.0
SILENT_AFTER_S = 60.0
"""A partition that has not answered for so long is taken for lost."""


class Partitions:
    """All partitions of one run, with their followers."""

    def __init__(
        self,
        backend: Backend,
        *,
        tickets: Tickets,
        losses: Losses,
        telemetry: Telemetry,
        folder: RunFolder,
        store: CheckpointStore,
        hot_standby: bool,
        clock: Callable[[], float],
        lost: Callable[[bool], None],
        back: Callable[[], None],
        reported: Callable[[PartitionReport], None],
    ) -> None:
        """None is up. `lost` is told of each that is lost, and whether a follower takes its place;
        `back`, when all are up (again); `reported` gets every report that was not asked for by
        `ask_all`. Checkpoints are in `store`.
        """
        self._backend = backend
        self._tickets = tickets
        self._losses = losses
        self._telemetry = telemetry
        self._folder, self._store = folder, store
        self._clock = clock
        self._lost, self._back, self._reported = lost, back, reported
        self._all = [Partition(index=i) for i in range(backend.num_partitions)]
        self._next_report_s = clock()
        self.reports: dict[int, PartitionReport] = {}
        """The newest of each."""
        self.followers = Followers(
            backend,
            wanted=hot_standby,
            submit=tickets.expect,
            lost=self._on_follower_lost,
            tell=telemetry.event,
        )

    @property
    def all_up(self) -> bool:
        """Whether every partition can be reached, as far as is known."""
        return all(p.up for p in self._all)

    @property
    def all_reported(self) -> bool:
        """Whether there is a report of each, and none is being waited for."""
        asked = any(p.asked_s is not None for p in self._all)
        return len(self.reports) == len(self._all) and not asked

    @property
    def incarnations(self) -> tuple[int, ...]:
        """How often each was started: other numbers, and one was lost meanwhile."""
        return tuple(p.incarnation for p in self._all)

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Start all of them from a checkpoint, or from the initial weights."""
        for partition in self._all:
            self._start(partition, checkpoint)

    # Asking

    def handler(self, index: int, then: Callable[[Any], None]) -> Callable[[Done], None]:
        """Give `then` what this incarnation of a partition answers; replace it if it is lost."""
        partition = self._all[index]
        incarnation = partition.incarnation

        def handle(done: Done) -> None:
            if partition.incarnation != incarnation:
                return
            if done.error is None:
                then(done.value)
            elif isinstance(done.error, PartitionLost):
                self._on_lost(partition, "died")
            elif user_message(done.error) is not None:
                raise done.error
            else:  # its serving thread has ended by an error that is nobody's but its own
                self._on_lost(partition, "failed", done.error)

        return handle

    def ask_all(self, ask: Callable[[int], Ticket], then: Callable[[Sequence[Any]], None]) -> None:
        """Ask every partition; `then` gets their answers, unless one is lost meanwhile."""
        answers: dict[int, Any] = {}
        before = self.incarnations

        def taker(index: int) -> Callable[[Any], None]:
            def take(value: Any) -> None:
                answers[index] = value
                if len(answers) == len(before) and before == self.incarnations:
                    then([answers[i] for i in range(len(before))])

            return take

        for index in range(len(before)):
            handle = self.handler(index, taker(index))
            self._tickets.expect(ask(index), handle)

    def answers(self, ask: Callable[[int], Ticket]) -> Sequence[Any] | None:
        """What every partition answers, waited for; None where one was lost meanwhile."""
        got: list[Sequence[Any]] = []
        if not self.all_up:
            return None
        before = self.incarnations
        give_up_s = self._clock() + SILENT_AFTER_S
        self.ask_all(ask, got.append)
        while not got and before == self.incarnations:
            if self._clock() > give_up_s:
                raise RunFailed(
                    f"a partition has not answered for {SILENT_AFTER_S:.0f} s: go on with "
                    f"`downpour resume {self._folder.path}`"
                )
            self._tickets.turn(1.0)
        return got[0] if got else None

    def ask_reports(self) -> bool:
        """Have all that are up report, once a second; whether it was time for it."""
        now = self._clock()
        if now < self._next_report_s:
            return False
        self._next_report_s = now + REPORT_EVERY_S
        for partition in self._all:
            if partition.up and partition.asked_s is None:
                partition.asked_s = now
                ticket = self._backend.report(partition.index)
                self._tickets.expect(ticket, self.handler(partition.index, self._on_report))
        return True

    def ask_reports_now(self) -> None:
        """Have the next reports asked for at once: one of the partitions may be lost."""
        self._next_report_s = self._clock()

    def _on_report(self, report: PartitionReport) -> None:
        partition = self._all[report.index]
        partition.asked_s = None
        if partition.version is None:
            partition.version = report.version
        elif report.version > partition.version:
            self._losses.progressed("partition", partition.index)
        self.reports[report.index] = report
        self.followers.reported(report)
        if report.has_follower:
            self._losses.progressed("follower", report.index)
        self._reported(report)

    # Losses

    def look_for_silent(self) -> None:
        """Replace those that have been asked, and do not answer."""
        now = self._clock()
        for partition in self._all:
            if partition.asked_s is not None and now - partition.asked_s > SILENT_AFTER_S:
                self._on_lost(partition, "silent")

    def _on_lost(self, partition: Partition, cause: Cause, error: Exception | None = None) -> None:
        index, name = partition.index, f"partition {partition.index}"
        followed = self.followers.can_take_over(index)
        action = self._losses.recover(
            "partition", index, name, cause, error=error, followed=followed
        )
        promoted = action == "promote"
        self.followers.partition_replaced(index)
        self._telemetry.phase = f"replacing {name}"
        self._lost(promoted)
        if promoted:
            self._await(partition, self._backend.promote(index))
            partition.asked_s = self._clock()  # a follower that does not answer is lost, too
            return
        checkpoint, passed = self._store.latest_for(index)
        for problem in passed:
            self._telemetry.event(f"{problem}; taking the one before")
        self._telemetry.event(
            f"{name} starts again from "
            + (f"checkpoint {checkpoint.number}" if checkpoint else "the initial weights")
        )
        self._start(partition, checkpoint)

    def _on_follower_lost(self, index: int, detail: str) -> bool:
        """Whether there is to be another."""
        name = f"the follower of partition {index}"
        return self._losses.recover("follower", index, name, "died", detail=detail) == "restart"

    def _start(self, partition: Partition, checkpoint: Checkpoint | None) -> None:
        self._await(partition, self._backend.start_partition(partition.index, checkpoint))

    def _await(self, partition: Partition, ticket: Ticket) -> None:
        """A new incarnation is on its way."""
        partition.up, partition.asked_s, partition.version = False, None, None
        partition.incarnation += 1

        def arrived(_: Any) -> None:
            partition.up, partition.asked_s = True, None
            if self.all_up:
                self._back()

        self._tickets.expect(ticket, self.handler(partition.index, arrived))

"""What follows from what partitions say, and from their losses. Pure.

Answers and failures come through `reactions`. Here is what happens to the rest of the run because
of a partition: what it lacks is leased again, and everybody connects anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from downpour.cluster.controller.failures.account import GaveUp
from downpour.cluster.controller.failures.policy import Cause
from downpour.cluster.controller.leases.coverage import (
    Flags,
    covered_by_some,
    covered_once,
    refused_by_any,
    same,
    unfinished_epochs,
)
from downpour.cluster.controller.members.partitions import Inquiry
from downpour.cluster.controller.parts import RunParts
from downpour.cluster.controller.protocol.backend import (
    PartitionLost,
)
from downpour.cluster.controller.protocol.instructions import (
    AllReported,
    AskFlags,
    AskReport,
    CommitCheckpoint,
    PartitionCall,
    Promote,
    StartPartition,
    Tell,
    WriteSnapshot,
)
from downpour.cluster.errors import user_message
from downpour.cluster.run.checkpoint import Checkpoint, slowest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from downpour.paramserver.actor import PartitionReport
    from downpour.paramserver.partition.snapshot import SnapshotFile


def partition_answered(run: RunParts, call: PartitionCall, value: Any, now: float) -> None:
    """A partition, as it is now, has answered a call."""
    match call:
        case AskReport(inquiry=None):
            run.partitions.reported(value, now)
            _quarantine(run, value)
            if run.partitions.all_reported:
                run.out.append(AllReported())
        case AskReport(inquiry=int() as number) | AskFlags(inquiry=number):
            inquiry = run.partitions.take_answer(number, call.partition, value)
            if inquiry is not None:
                _inquiry_answered(run, inquiry, now)
        case WriteSnapshot():
            files = run.checkpoints.written(call, value, len(run.partitions.members))
            if files is not None:
                _commit(run, call.number, files, now)
        case StartPartition() | Promote():
            run.partitions.arrived(call.partition)


def partition_failed(run: RunParts, call: PartitionCall, error: Exception, now: float) -> None:
    """A call to a partition, as it is now, has failed.

    Raises:
        GaveUp: the run cannot go on.
    """
    if isinstance(error, PartitionLost):
        partition_lost(run, call.partition, "died", now)
    elif user_message(error) is not None:
        raise GaveUp(error)
    else:  # its serving thread has ended by an error of its own
        partition_lost(run, call.partition, "failed", now, error=error)


def partition_lost(
    run: RunParts,
    index: int,
    cause: Cause,
    now: float,
    *,
    error: Exception | None = None,
    detail: str = "",
) -> None:
    """A partition is lost: what it lacks is leased again, and everybody connects anew."""
    promoted = run.partitions.fail(index, cause, now, error=error, detail=detail)
    run.checkpoints.abandon()
    run.leases.partition_lost(promoted=promoted)
    run.processes.drop_windows()
    run.evaluation.disconnected()
    run.partitions.replace(index, promoted=promoted, now=now)
    if run.winds_up and run.finished:
        run.stage = "training"  # and not finished any more, until the partition has all again


def _inquiry_answered(run: RunParts, inquiry: Inquiry, now: float) -> None:
    answers = inquiry.in_order
    match inquiry.purpose:
        case "probe":  # all partitions are alive: connect again
            run.processes.start_cut_off(now)
            run.evaluation.reconnect()
        case "census":
            assert inquiry.census is not None
            again = run.leases.settle(inquiry.census, answers)
            if again is not None:
                run.out.append(Tell(text=f"{again:,} mini-batches are run again"))
        case "resume":
            _resume(run, answers)
        case "first flags":
            run.covered_before = answers
        case "last reports":
            _last_reports(run, answers, now)
        case "last flags":
            _last_flags(run, answers)


def _last_reports(run: RunParts, reports: Sequence[PartitionReport], now: float) -> None:
    for report in reports:
        run.partitions.note_report(report, now)
        _quarantine(run, report)
    run.out.append(AllReported())
    if not run.finished:
        run.stage = "ended"
    elif run.ended is not None and run.ended.by in ("accuracy", "metric"):
        run.stage = "verifying"  # the weights that reached the goal have been kept
    else:
        run.stage = "scoring"
        run.evaluation.begin_final()


def _last_flags(run: RunParts, answers: Sequence[Flags]) -> None:
    if run.ended is not None:
        # Processes that were stopped may have left pushes that the partitions saw only now.
        in_part = any(covered_by_some(answers, epoch).any() for epoch in answers[0])
        if in_part:
            end_early(run)
        if in_part or run.covered_before is None or not same(run.covered_before, answers):
            run.stage = "training"
            return
    whole = run.ended is None
    run.exactly_once = covered_once(
        answers,
        run.partitions.latest_reports,
        whole=whole,
        plan=run.plan,
        skips=run.config.data.on_bad_image == "skip",
    )
    run.unfinished_epochs = unfinished_epochs(answers)
    run.stage = "ended"


def _resume(run: RunParts, answers: Sequence[Flags]) -> None:
    """Lease only what some partition does not cover; `answers` are of all epochs."""
    for epoch in range(run.config.policy.epochs):
        run.refused |= refused_by_any(answers, epoch)
    run.leases.resume(answers)
    run.processes.start()
    run.evaluation.start()
    run.stage = "training"


def _quarantine(run: RunParts, report: PartitionReport) -> None:
    """Grant no more leases to replicas that a partition does not listen to any more."""
    for replica in sorted(set(report.quarantined) - run.quarantined):
        run.quarantined.add(replica)
        applied = sum(report.staleness.get(replica, []))
        text = (
            f"replica {replica} is quarantined: partition {report.index} refused "
            f"{report.refusals.get(replica, 0)} of its pushes (a loss or gradient that is not "
            f"finite, or enormous) and took {applied}, and hardly any of the others'"
        )
        run.out.append(Tell(text=text))
    if len(run.quarantined) >= run.replicas_wanted:
        run.stop_reason = run.stop_reason or (
            "every replica is quarantined, for losses or gradients that are not finite: lower "
            "--learning-rate, or give --quarantine-after none"
        )


def _commit(run: RunParts, number: int, files: tuple[SnapshotFile, ...], now: float) -> None:
    figure = run.evaluation.figure
    checkpoint = Checkpoint(
        number=number,
        updates=slowest(files),
        files=files,
        elapsed_s=run.elapsed_s(now),
        accuracy=None if figure is None else figure.accuracy,
        goodness=None if figure is None else figure.goodness,
        ramp=run.leases.warm_start.dump(),
        scores=run.early_stopping.dump(run.training_s(now)),
    )
    run.out.append(CommitCheckpoint(checkpoint=checkpoint))


def hand_over(run: RunParts, now: float) -> None:
    """Have followers take the places of their partitions; everybody connects anew.

    Windows that are still out are in doubt, and what nobody has settled of them is leased again.
    """
    if not run.partitions.hand_over(now):
        return
    run.checkpoints.abandon()
    run.leases.partition_lost(promoted=True)
    run.processes.drop_windows()
    run.evaluation.disconnected()
    if run.winds_up and run.finished:
        run.stage = "training"  # until it is known that the followers lack nothing


def end_early(run: RunParts) -> None:
    """Have all processes drop their windows; what every partition covers by then is the run."""
    run.processes.drop_windows()
    run.leases.end_early()

"""What follows from what is heard: answers and failures of calls, one function for each. Pure.

A part of the run looks after itself; here is what happens to one part because of another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from downpour.cluster.controller.backend import (
    FollowerLost,
    PartitionLost,
    RunFailed,
    ShufflerLost,
    WriteFailed,
)
from downpour.cluster.controller.departures.notice import Departing
from downpour.cluster.controller.events import Answered, Failed
from downpour.cluster.controller.failure_policy import Cause, Failure
from downpour.cluster.controller.failures import GaveUp
from downpour.cluster.controller.hangs.patience import Wait
from downpour.cluster.controller.instructions import (
    AllReported,
    AskDepartures,
    AskFlags,
    AskProgress,
    AskReport,
    BeginCheckpoint,
    CommitCheckpoint,
    Evaluate,
    FindLateShufflers,
    Instruction,
    LetAlone,
    MoveShufflers,
    PartitionCall,
    Promote,
    PruneCheckpoints,
    ReconnectEvaluator,
    ReconnectProcess,
    ReplaceShufflers,
    RunWindow,
    StartEvaluator,
    StartFollower,
    StartPartition,
    StartProcess,
    Tell,
    WatchPrimary,
    WindowTrained,
    WriteSnapshot,
)
from downpour.cluster.controller.leases.coverage import (
    Flags,
    covered_by_some,
    covered_once,
    refused_by_any,
    same,
    unfinished_epochs,
)
from downpour.cluster.controller.partitions import Inquiry
from downpour.cluster.controller.parts import RunParts
from downpour.cluster.errors import user_message
from downpour.cluster.run.checkpoint import Checkpoint, slowest
from downpour.cluster.run.early_stopping import Ended

if TYPE_CHECKING:
    from collections.abc import Sequence

    from downpour.paramserver.actor import PartitionReport
    from downpour.paramserver.partition.snapshot import SnapshotFile
    from downpour.workers.actor import Evaluation
    from downpour.workers.replica.replicas import WindowReport


TOLD_STILL_S = 10.0
"""People hear of it if the driver stood still for so long."""


def answered(run: RunParts, event: Answered, now: float) -> None:
    """A call has been answered."""
    value = event.value
    match event.call:
        case RunWindow() as call:
            run.num_windows_out -= 1
            if run.leases.is_live(call.lease):
                _trained(run, call, value, now)
            # Otherwise its process was lost, and its windows have been dealt with.
        case (
            StartPartition()
            | Promote()
            | LetAlone()
            | AskReport()
            | AskFlags()
            | WriteSnapshot() as call
        ):
            if run.partitions.is_current(call):
                _partition_answered(run, call, value, now)
        case StartFollower() as call:
            run.partitions.followers.started(call, value)
        case WatchPrimary() as call:
            if run.partitions.followers.suspects(call, value, now):
                run.partitions.ask_reports_now(now)
        case StartProcess() | ReconnectProcess() as call:
            if not _is_current_process(run, call):
                return
            run.processes.started(call.process)
            if run.all_replicas_s is None and run.processes.all_up:
                run.all_replicas_s = now
                run.failures.reserve_soon(now)
        case AskDepartures():
            _depart(run, value, now)
        case MoveShufflers():
            _shufflers_moved(run, value)
        case FindLateShufflers() as call:
            _blamed(run, call, value, now)
        case ReplaceShufflers() as call:
            cause: Cause = "died" if call.hung is None else "silent"
            for index in range(value):  # one failure of each: a node may have had many of them
                failure = Failure(
                    part="shuffler",
                    index=index,
                    name="a shuffler",
                    cause=cause,
                    detail=call.hung or "",
                )
                run.failures.recover(failure, now)
                run.processes.be_patient(now)
        case StartEvaluator() | ReconnectEvaluator() as call:
            if call.life == run.evaluation.life:
                run.evaluation.connected()
        case Evaluate() as call:
            if call.life == run.evaluation.life:
                run.evaluation.scored(call, value, now)
                _scored(run, value, now)
        case AskProgress() as call:
            if call.life == run.evaluation.life:
                run.evaluation.progressed(value, now)
        case BeginCheckpoint() as call:
            run.checkpoints.begun(call, value, run.partitions.members)
        case CommitCheckpoint() as call:
            run.checkpoints.committed(call.checkpoint)


def failed(run: RunParts, event: Failed, now: float) -> None:
    """A call has failed.

    Raises:
        GaveUp: the run cannot go on.
    """
    error = event.error
    match event.call:
        case RunWindow() as call:
            run.num_windows_out -= 1
            if run.leases.is_live(call.lease):
                _window_failed(run, call, error, now)
        case WriteSnapshot() as call if isinstance(error, WriteFailed):
            run.checkpoints.failed(call.number, error)
        case (
            StartPartition()
            | Promote()
            | LetAlone()
            | AskReport()
            | AskFlags()
            | WriteSnapshot() as call
        ):
            if run.partitions.is_current(call):
                _partition_failed(run, call, error, now)
        case StartFollower() as call:
            run.partitions.followers.start_failed(call, error, now)
        case WatchPrimary():
            pass  # the follower is gone: its partition will say so
        case MoveShufflers():
            _shufflers_failed(run, error)
        case StartProcess() | ReconnectProcess() as call:
            if _is_current_process(run, call):
                run.processes.start_failed(call.process, error, now)
        case StartEvaluator() | ReconnectEvaluator() as call:
            if call.life == run.evaluation.life:
                run.evaluation.failed(error, now)
        case Evaluate() as call:
            if call.life == run.evaluation.life:
                run.evaluation.score_failed(call, error, now)
        case AskProgress() as call:
            if call.life == run.evaluation.life:
                run.evaluation.progress_failed()
        case BeginCheckpoint() as call:
            run.checkpoints.failed(call.number, error)
        case CommitCheckpoint() as call:
            run.checkpoints.failed(call.checkpoint.number, error)
        case PruneCheckpoints():
            run.checkpoints.tell_failure(error)
        case _:
            raise GaveUp(error)


# Partitions


def _partition_answered(run: RunParts, call: PartitionCall, value: Any, now: float) -> None:
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


def _partition_failed(run: RunParts, call: PartitionCall, error: Exception, now: float) -> None:
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


# Departures


def _depart(run: RunParts, departing: Departing, now: float) -> None:
    """Have members on nodes that are to leave finish what they do, and go on elsewhere."""
    run.notice.heard(departing, now)
    run.processes.depart(departing.processes)
    run.evaluation.depart(departing.evaluator)
    run.partitions.depart(departing, now)
    if not departing.shufflers:
        run.shufflers_stay = False
    elif not run.shufflers_move and not run.shufflers_stay:
        run.shufflers_move = True
        run.out.append(Tell(text=f"{departing.shufflers} shufflers move: their node is to leave"))
        run.out.append(MoveShufflers())
    if departing.crowded:
        text = (
            f"{departing.crowded} processes of replicas stay until their node is gone: no other "
            "node has a GPU that is free"
        )
        if run.notice.is_news(text):
            run.out.append(Tell(text=text))
    if departing.driver and run.notice.is_news("the driver leaves"):
        text = (
            "the driver's own node is to leave, and the run ends with it: what is there stays; a "
            "checkpoint is written now and shortly before, to go on from with `downpour resume`"
        )
        run.out.append(Tell(text=text))
        run.checkpoints.hasten(now)


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


def _shufflers_moved(run: RunParts, count: int) -> None:
    """Shufflers elsewhere deliver from now on."""
    run.shufflers_move = False
    if count:
        run.out.append(Tell(text=f"{count} shufflers have moved"))


def _shufflers_failed(run: RunParts, error: Exception) -> None:
    """They could not move: the next look tries again, unless their rows are nowhere else."""
    run.shufflers_move = False
    if isinstance(error, RunFailed):
        run.shufflers_stay = True
        run.out.append(Tell(text=f"shufflers stay until their node is gone: {error}"))


# Hangs


def wait_of(given: Instruction) -> Wait | None:
    """Return what an instruction that is answered later is waited for as.

    None if it is done at once, or seen by its progress.
    """
    match given:
        case AskReport(inquiry=None):
            return "report"
        case AskReport() | AskFlags() | LetAlone():
            return "answer"
        case WriteSnapshot():
            return "snapshot"
        case RunWindow():
            return "window"
        case StartPartition() | StartProcess() | StartFollower() | StartEvaluator():
            return "start"
        case MoveShufflers():
            return "start"
        case Promote() | ReconnectProcess() | ReconnectEvaluator():
            return "connection"
    return None


def stood_still(run: RunParts, seconds: float) -> None:
    """The driver did nothing for a while: whoever it waits for is not to blame for that time."""
    run.watch.forgive(seconds)
    run.partitions.forgive(seconds)
    run.processes.forgive(seconds)
    run.evaluation.forgive(seconds)
    if seconds >= TOLD_STILL_S:
        text = f"the driver stood still for {seconds:.0f} s: it was stopped, suspended or kept"
        run.out.append(Tell(text=f"{text} waiting by a disk; nobody is blamed for that time"))


def end_hung_calls(run: RunParts, now: float) -> None:
    """Give up the calls that last too long, and replace who does not answer them.

    Raises:
        GaveUp: the run cannot go on.
    """
    for call, why in run.watch.overdue(now):
        match call:
            case WriteSnapshot():  # whoever writes answers reports: the disk hangs
                error = TimeoutError(f"partition {call.partition}'s snapshot hangs: {why}")
                run.checkpoints.failed(call.number, error)
            case StartPartition() | Promote() | LetAlone() | AskReport() | AskFlags():
                if run.partitions.is_current(call):
                    partition_lost(run, call.partition, "silent", now, detail=why)
            case StartFollower():
                run.partitions.followers.start_failed(call, FollowerLost(why), now)
            case MoveShufflers():
                _shufflers_failed(run, ShufflerLost(why))
            case StartProcess() | ReconnectProcess():
                if _is_current_process(run, call):
                    run.processes.hung(call.process, why, now)
            case StartEvaluator() | ReconnectEvaluator():
                if call.life == run.evaluation.life:
                    run.evaluation.hung(why, now)
            case RunWindow():
                if run.leases.is_live(call.lease):
                    blame(run, (call.replica,), why)
    for index, why in run.partitions.silent(now).items():
        partition_lost(run, index, "silent", now, detail=why)
    run.evaluation.look_for_hang(now)


def blame(run: RunParts, replicas: Sequence[int], why: str) -> None:
    """Find out who is to blame that windows of these replicas, of one process, do not get on."""
    process = run.processes.of(replicas[0])
    windows = tuple(
        RunWindow(replica=replica, lease=lease)
        for replica in replicas
        if (lease := run.leases.oldest_of(replica)) is not None
    )
    run.out.append(
        FindLateShufflers(process=process.index, life=process.life, windows=windows, why=why)
    )


def _blamed(run: RunParts, call: FindLateShufflers, num_late: int, now: float) -> None:
    if not any(run.leases.is_live(window.lease) for window in call.windows):
        return  # they have come back meanwhile
    if num_late:
        run.processes.be_patient(now)
        run.out.append(ReplaceShufflers(hung=call.why))
    elif _is_current_process(run, call) and run.processes.members[call.process].ready:
        run.processes.hung(call.process, call.why, now)


def _is_current_process(
    run: RunParts, call: StartProcess | ReconnectProcess | FindLateShufflers
) -> bool:
    return run.processes.members[call.process].life == call.life


# The end


def _scored(run: RunParts, evaluation: Evaluation, now: float) -> None:
    """Weights were scored: does the run end with that?"""
    ended = run.early_stopping.scored(run.scoring(evaluation, now))
    if ended is not None:
        finish(run, ended)


def finish(run: RunParts, ended: Ended) -> None:
    """The run is finished for this reason, unless it ends already."""
    if run.ended or run.leases.finished or run.stop_reason is not None:
        return
    run.ended = ended
    run.out.append(Tell(text=f"the run ends early: {ended.reason}"))
    end_early(run)


def end_early(run: RunParts) -> None:
    """Have all processes drop their windows; what every partition covers by then is the run."""
    run.processes.drop_windows()
    run.leases.end_early()


# Windows


def _trained(run: RunParts, call: RunWindow, report: WindowReport, now: float) -> None:
    run.out.append(WindowTrained(report=report))
    run.refused |= {(report.epoch, batch) for batch in report.refused}
    run.skipped.update(report.skipped)
    run.leases.trained(call.replica, call.lease, report)
    run.processes.trained(call.replica, report, now)
    run.failures.policy.progressed("shuffler")
    policy, num_refused = run.config.policy, len(run.refused)
    bound = 0 if policy.on_refusal == "stop" else policy.max_refused
    if bound is not None and num_refused > bound and run.stop_reason is None:
        batch = next(iter(report.refused), None)
        named = "" if batch is None else f", the last of them (epoch {report.epoch}, {batch})"
        run.stop_reason = (
            f"{num_refused} mini-batches were refused for a loss or gradient that is "
            f"not finite{named} from replica {call.replica}: lower --learning-rate, or raise "
            "--max-refused"
        )


def _window_failed(run: RunParts, call: RunWindow, error: Exception, now: float) -> None:
    if isinstance(error, ShufflerLost):
        # Its death is told by every window that it was to deliver; it is replaced once.
        run.leases.undelivered(call.lease)
        run.out.append(ReplaceShufflers())
    else:
        run.processes.window_failed(call.replica, error, now)

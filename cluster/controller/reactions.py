"""What follows from what is heard: answers and failures of calls, one function for each. Pure.

A part of the run looks after itself; here is what happens to one part because of another. What
follows from partitions, departures and hangs is in the modules of those names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from downpour.cluster.controller.departure_reactions import (
    depart,
    shufflers_failed,
    shufflers_moved,
)
from downpour.cluster.controller.failures.account import GaveUp
from downpour.cluster.controller.failures.policy import Cause, Failure
from downpour.cluster.controller.hang_reactions import blamed, is_current_process
from downpour.cluster.controller.partition_reactions import (
    end_early,
    partition_answered,
    partition_failed,
)
from downpour.cluster.controller.parts import RunParts
from downpour.cluster.controller.protocol.backend import (
    ShufflerLost,
    WriteFailed,
)
from downpour.cluster.controller.protocol.events import Answered, Failed
from downpour.cluster.controller.protocol.instructions import (
    AskDepartures,
    AskFlags,
    AskProgress,
    AskReport,
    BeginCheckpoint,
    CommitCheckpoint,
    Evaluate,
    FindLateShufflers,
    LetAlone,
    MoveShufflers,
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
from downpour.cluster.run.early_stopping import Ended

if TYPE_CHECKING:
    from downpour.workers.actor import Evaluation
    from downpour.workers.replica.replicas import WindowReport


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
                partition_answered(run, call, value, now)
        case StartFollower() as call:
            run.partitions.followers.started(call, value)
        case WatchPrimary() as call:
            if run.partitions.followers.suspects(call, value, now):
                run.partitions.ask_reports_now(now)
        case StartProcess() | ReconnectProcess() as call:
            if not is_current_process(run, call):
                return
            run.processes.started(call.process)
            if run.all_replicas_s is None and run.processes.all_up:
                run.all_replicas_s = now
                run.failures.reserve_soon(now)
        case AskDepartures():
            depart(run, value, now)
        case MoveShufflers():
            shufflers_moved(run, value)
        case FindLateShufflers() as call:
            blamed(run, call, value, now)
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
                partition_failed(run, call, error, now)
        case StartFollower() as call:
            run.partitions.followers.start_failed(call, error, now)
        case WatchPrimary():
            pass  # the follower is gone: its partition will say so
        case MoveShufflers():
            shufflers_failed(run, error)
        case StartProcess() | ReconnectProcess() as call:
            if is_current_process(run, call):
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

"""What follows when nothing is heard: who is to blame, and is replaced. Pure.

How long a wait may last is in `hangs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from downpour.cluster.controller.departure_reactions import shufflers_failed
from downpour.cluster.controller.partition_reactions import partition_lost
from downpour.cluster.controller.parts import RunParts
from downpour.cluster.controller.protocol.backend import (
    FollowerLost,
    ShufflerLost,
)
from downpour.cluster.controller.protocol.instructions import (
    AskFlags,
    AskReport,
    FindLateShufflers,
    LetAlone,
    MoveShufflers,
    Promote,
    ReconnectEvaluator,
    ReconnectProcess,
    ReplaceShufflers,
    RunWindow,
    StartEvaluator,
    StartFollower,
    StartPartition,
    StartProcess,
    Tell,
    WriteSnapshot,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


TOLD_STILL_S = 10.0
"""People hear of it if the driver stood still for so long."""


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
                shufflers_failed(run, ShufflerLost(why))
            case StartProcess() | ReconnectProcess():
                if is_current_process(run, call):
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


def blamed(run: RunParts, call: FindLateShufflers, num_late: int, now: float) -> None:
    """It is known how many shufflers are late: these, or the process itself, are to blame."""
    if not any(run.leases.is_live(window.lease) for window in call.windows):
        return  # they have come back meanwhile
    if num_late:
        run.processes.be_patient(now)
        run.out.append(ReplaceShufflers(hung=call.why))
    elif is_current_process(run, call) and run.processes.members[call.process].ready:
        run.processes.hung(call.process, call.why, now)


def is_current_process(
    run: RunParts, call: StartProcess | ReconnectProcess | FindLateShufflers
) -> bool:
    """Return whether the process is still the one that the call was for."""
    return run.processes.members[call.process].life == call.life

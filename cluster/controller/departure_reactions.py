"""What follows from the news that nodes are to leave: members on them go on elsewhere. Pure.

The handing over of partitions to their followers is in `partition_reactions`.
"""

from __future__ import annotations

from downpour.cluster.controller.departures.notice import Departing
from downpour.cluster.controller.parts import RunParts
from downpour.cluster.controller.protocol.backend import (
    RunFailed,
)
from downpour.cluster.controller.protocol.instructions import (
    MoveShufflers,
    Tell,
)


def depart(run: RunParts, departing: Departing, now: float) -> None:
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


def shufflers_moved(run: RunParts, count: int) -> None:
    """Shufflers elsewhere deliver from now on."""
    run.shufflers_move = False
    if count:
        run.out.append(Tell(text=f"{count} shufflers have moved"))


def shufflers_failed(run: RunParts, error: Exception) -> None:
    """They could not move: the next look tries again, unless their rows are nowhere else."""
    run.shufflers_move = False
    if isinstance(error, RunFailed):
        run.shufflers_stay = True
        run.out.append(Tell(text=f"shufflers stay until their node is gone: {error}"))

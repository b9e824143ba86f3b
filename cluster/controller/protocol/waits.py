"""What an instruction is waited for as. Pure."""

from __future__ import annotations

from downpour.cluster.controller.hangs.patience import Wait
from downpour.cluster.controller.protocol.instructions import (
    AskFlags,
    AskReport,
    Instruction,
    LetAlone,
    MoveShufflers,
    Promote,
    ReconnectEvaluator,
    ReconnectProcess,
    RunWindow,
    StartEvaluator,
    StartFollower,
    StartPartition,
    StartProcess,
    WriteSnapshot,
)


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

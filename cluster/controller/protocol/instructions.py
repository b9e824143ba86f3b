"""What comes out of the run's state: instructions, which the controller carries out.

An instruction that is a *call* is answered by one event, `Answered` or `Failed`, at once or later.
All of it is plain frozen data. What goes in is in `events`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.run.checkpoint import Checkpoint
from downpour.cluster.run.early_stopping import Ended
from downpour.workers.tasks import Figure

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport
    from downpour.workers.actor import Evaluation
    from downpour.workers.replica.replicas import WindowReport

# Calls


@dataclass(frozen=True, kw_only=True)
class StartPartition:
    """Start a partition, or start it again; answered once it can be reached."""

    partition: int
    incarnation: int
    again: bool
    """It starts from the newest checkpoint that is whole for it, not from where the run starts."""


@dataclass(frozen=True, kw_only=True)
class Promote:
    """Have a partition's follower take its place; answered once it can be reached."""

    partition: int
    incarnation: int


@dataclass(frozen=True, kw_only=True)
class LetAlone:
    """Have a partition answer without a follower that is lost and will never take its place."""

    partition: int
    incarnation: int
    follower: int
    """Which one: the count of its start."""


@dataclass(frozen=True, kw_only=True)
class AskReport:
    """Ask a partition where it stands; answered by a `PartitionReport`."""

    partition: int
    incarnation: int
    inquiry: int | None = None
    """The inquiry that this is part of; None for the regular report."""


@dataclass(frozen=True, kw_only=True)
class AskFlags:
    """Ask a partition for the state of every mini-batch of some epochs; answered by `Flags`."""

    partition: int
    incarnation: int
    inquiry: int
    epochs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class WriteSnapshot:
    """Have a partition write its part of a checkpoint; answered by a `SnapshotFile`."""

    partition: int
    incarnation: int
    number: int
    folder_uri: str


@dataclass(frozen=True, kw_only=True)
class StartFollower:
    """Start a partition's follower; answered by its `Endpoint` once it has the state."""

    partition: int
    start: int
    """Counts the starts for this partition."""


@dataclass(frozen=True, kw_only=True)
class WatchPrimary:
    """Have a follower on another machine look after its partition; answered, in words, once that is
    gone or silent.
    """

    partition: int
    start: int
    """As for `StartFollower`."""


@dataclass(frozen=True, kw_only=True)
class StartProcess:
    """Start a process of replicas; answered once it is connected."""

    process: int
    life: int = 0
    """Counts the times that it hung: what was asked of it before is of no interest."""


@dataclass(frozen=True, kw_only=True)
class ReconnectProcess:
    """Have a process that runs connect to the partitions anew; answered once it has."""

    process: int
    life: int = 0
    """As for `StartProcess`."""


@dataclass(frozen=True, kw_only=True)
class AskDepartures:
    """Ask which members are on nodes that are to leave; answered by `Departing`."""


@dataclass(frozen=True, kw_only=True)
class RunWindow:
    """Deliver a window to a replica and train on it; answered by a `WindowReport`."""

    replica: int
    lease: Lease


@dataclass(frozen=True, kw_only=True)
class FindLateShufflers:
    """Look which shufflers still owe a part of these windows, for `ReplaceShufflers`; answered by
    how many those are.
    """

    process: int
    """Whose windows they are."""
    life: int
    windows: tuple[RunWindow, ...]
    why: str
    """Why the process, or a window, is taken to hang."""


@dataclass(frozen=True, kw_only=True)
class ReplaceShufflers:
    """Replace every shuffler that failed to deliver; answered by how many those were."""

    hung: str | None = None
    """Why they are taken to hang, if they did not die."""


@dataclass(frozen=True, kw_only=True)
class MoveShufflers:
    """Have shufflers on other nodes take the places of those whose nodes are to leave; answered
    once they do, by how many those are.
    """


@dataclass(frozen=True, kw_only=True)
class StartEvaluator:
    """Start the evaluator; answered once it is connected."""

    life: int = 0
    """Counts the times that it hung or moved: what was asked of it before is of no interest."""


@dataclass(frozen=True, kw_only=True)
class ReconnectEvaluator:
    """Have the evaluator connect to the partitions anew; answered once it has."""

    life: int = 0
    """As for `StartEvaluator`."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score the current weights; answered by an `Evaluation`."""

    best: float | None
    """The accuracy above which the weights are kept as the best; None keeps them in any case."""
    goal: float
    """The accuracy from which on the weights are the run's model."""
    final: bool
    """The weights are the run's last."""
    life: int = 0
    """As for `StartEvaluator`."""


@dataclass(frozen=True, kw_only=True)
class AskProgress:
    """Ask the evaluator how many mini-batches it has scored in its life; answered by an int."""

    life: int


@dataclass(frozen=True, kw_only=True)
class BeginCheckpoint:
    """Make the folder of a checkpoint; answered by its URI."""

    number: int


@dataclass(frozen=True, kw_only=True)
class CommitCheckpoint:
    """Finish a checkpoint whose snapshots have all been written."""

    checkpoint: Checkpoint


@dataclass(frozen=True, kw_only=True)
class PruneCheckpoints:
    """Remove checkpoints that are not to be kept any more."""


PartitionCall = StartPartition | Promote | LetAlone | AskReport | AskFlags | WriteSnapshot
Call = (
    PartitionCall
    | StartFollower
    | WatchPrimary
    | StartProcess
    | ReconnectProcess
    | AskDepartures
    | RunWindow
    | FindLateShufflers
    | ReplaceShufflers
    | MoveShufflers
    | StartEvaluator
    | ReconnectEvaluator
    | Evaluate
    | AskProgress
    | BeginCheckpoint
    | CommitCheckpoint
    | PruneCheckpoints
)

# Instructions without an answer


@dataclass(frozen=True, kw_only=True)
class StopFollower:
    """End a partition's follower, if it has one."""

    partition: int


@dataclass(frozen=True, kw_only=True)
class AddProcess:
    """Make room for one more process of replicas, which is to be started."""

    process: int
    replicas: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StopProcess:
    """End a process of replicas that has no windows."""

    process: int


@dataclass(frozen=True, kw_only=True)
class MakeSpares:
    """Have processes ready that can take the place of one that dies, if that is wanted."""


@dataclass(frozen=True, kw_only=True)
class DiscardCheckpoint:
    """Remove what there is of an unfinished checkpoint."""

    number: int


@dataclass(frozen=True, kw_only=True)
class ReadRequests:
    """Look for what people ask for through the run's folder."""


# What listeners are told


@dataclass(frozen=True, kw_only=True)
class Tell:
    """News that people want to hear of at once, and to read later."""

    text: str


@dataclass(frozen=True, kw_only=True)
class WindowTrained:
    """A window is done."""

    report: WindowReport


@dataclass(frozen=True, kw_only=True)
class AllReported:
    """There is a new report of every partition."""


@dataclass(frozen=True, kw_only=True)
class WeightsScored:
    """Weights were scored."""

    evaluation: Evaluation


@dataclass(frozen=True, kw_only=True)
class CheckpointFinished:
    """A checkpoint is whole."""

    checkpoint: Checkpoint


Note = Tell | WindowTrained | AllReported | WeightsScored | CheckpointFinished

# The end


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """How the controller's part of a run ended."""

    finished: bool
    """Every epoch is complete, or the run has arrived; otherwise it was asked to stop."""
    ended: Ended
    """Why it is finished, if it is."""
    reached: Mapping[str, Mapping[str, float]]
    """When it first had which accuracy, see `EarlyStopping.reached`."""
    unfinished_epochs: Mapping[int, int]
    """Of a finished run that ended early: by epoch that is not complete, its mini-batches that
    were trained on."""
    reports: list[PartitionReport]
    """The newest report of each partition, in their order."""
    evaluation: Evaluation | None
    best: Figure | None
    """The best figure of a scoring."""
    exactly_once: bool
    """Every partition covers every mini-batch once: those of all epochs or, if the run ended early,
    those that were trained on."""
    refused: int
    """Distinct mini-batches that some partition refused."""
    skipped: Mapping[int, str]
    """Training rows whose image could not be decoded and was left out, each with a line on why."""
    quarantined: tuple[int, ...]
    """Replicas that got no more leases, for what they sent."""
    restarts: Mapping[str, int]
    """Members that were replaced, by kind."""
    updates_before: int
    """Updates at the beginning of this session."""
    all_replicas_s: float | None
    """Seconds of this session until the last process of replicas was ready for the first time."""
    first_update_s: float | None
    """Seconds of this session until its first update."""
    last_update_s: float | None
    """Seconds of this session until its last update."""
    elapsed_s: float
    """Seconds of training, over all sessions of the run."""
    wall_s: float
    """Seconds of this session."""
    checkpoint: int | None
    """Number of the last checkpoint of this session, if there was one."""


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Return from the run with its outcome."""

    outcome: RunOutcome


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """Raise `error`: the run cannot go on by itself."""

    error: Exception
    cause: Exception | None = None


Instruction = (
    Call
    | StopFollower
    | AddProcess
    | StopProcess
    | MakeSpares
    | DiscardCheckpoint
    | ReadRequests
    | Note
    | Finish
    | GiveUp
)

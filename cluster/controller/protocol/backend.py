"""The protocol of whatever runs the actors of a run, and the exceptions that it gives.

`cluster.ray_backend.backend` implements it with Ray, tests with threads in one process. A call
starts something and returns a pending call at once; `wait` collects what is done.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from downpour.cluster.controller.departures.notice import Departing
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.errors import UserError
from downpour.cluster.run.checkpoint import Checkpoint
from downpour.workers.messages import Keeping

PendingCall = Any
"""Stands for something under way; hashable."""


class RunFailed(UserError):
    """The run cannot go on by itself. The message says what to do."""


class ProcessLost(Exception):
    """A process of replicas died, or cannot be reached."""


class ShufflerLost(Exception):
    """A shuffler died, or cannot be reached."""


class PartitionLost(Exception):
    """A partition died, or cannot be reached."""

    def __init__(self, why: str, *, partition: int | None = None) -> None:
        """Say why; `partition` is whose side of a connection ended, if that is how it was seen."""
        super().__init__(why)
        self.partition = partition


class FollowerLost(Exception):
    """A partition's follower died, or could not join it."""


class WriteFailed(Exception):
    """Something could not be written: the disk is full, or the place is gone."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What became of a call: a value, or an exception: one of those above, or an actor's own."""

    call: PendingCall
    value: Any = None
    error: Exception | None = None


class Backend(Protocol):
    """Starts, reaches and replaces the actors of one run."""

    num_partitions: int
    processes: tuple[tuple[int, ...], ...]
    """Replicas of each process."""

    def start_partition(self, index: int, checkpoint: Checkpoint | None) -> PendingCall:
        """Start, or start again, a partition from its snapshot in `checkpoint`, or from the initial
        weights; done once it can be reached. One that still runs is ended first.
        """

    def start_follower(self, index: int, number: int) -> PendingCall:
        """Start a follower of a partition that is up; gives its `Endpoint` once it has the state.

        `number` counts the partition's followers.
        """

    def watch_primary(self, index: int) -> PendingCall:
        """Gives, in words, that a partition's follower does not hear it; done once that is so."""

    def let_alone(self, index: int, number: int) -> PendingCall:
        """Have a partition answer without its follower `number`, which will not take its place."""

    def stop_follower(self, index: int) -> None:
        """End a partition's follower, if it has one."""

    def promote(self, index: int) -> PendingCall:
        """End a partition and have its follower take its place; done once it can be reached."""

    def start_process(self, index: int) -> PendingCall:
        """Start, or start again, a process of replicas; done once it is connected."""

    def add_process(self, replicas: tuple[int, ...]) -> int:
        """Make room for one more process of replicas, which is to be started; gives its index."""

    def make_spares(self) -> None:
        """Have processes ready that can take the place of one that dies, if that is wanted."""

    def stop_process(self, index: int) -> None:
        """End a process of replicas that has no windows, for good or until it is started again."""

    def departing(self) -> Departing:
        """The members on nodes that are to leave, by what is known of them."""

    def move_shufflers(self) -> PendingCall:
        """Start shufflers in place of those on nodes that are to leave; gives their number once
        they deliver. The others finish what they were asked for.

        Raises:
            RunFailed: no other node has their rows.
        """

    def reconnect_process(self, index: int) -> PendingCall:
        """Have a process that runs drop its windows and connect to the partitions anew."""

    def reconnect_evaluator(self) -> PendingCall:
        """Have the evaluator connect to the partitions anew."""

    def start_evaluator(self) -> PendingCall:
        """Start the evaluator; done once it is connected."""

    def run_window(self, replica: int, lease: Lease) -> PendingCall:
        """Deliver a window to a replica and train on it; gives a `WindowReport`."""

    def find_late_shufflers(self, window: PendingCall) -> int:
        """Note the shufflers that still owe a part of a window; gives how many those are."""

    def replace_shufflers(self) -> int:
        """Replace every shuffler that failed to deliver, or was found late; gives their number."""

    def report(self, partition: int) -> PendingCall:
        """Gives a `PartitionReport`."""

    def flags(self, partition: int, epochs: tuple[int, ...]) -> PendingCall:
        """Gives the state of every mini-batch of these epochs."""

    def snapshot(self, partition: int, folder_uri: str) -> PendingCall:
        """Write a snapshot; gives a `SnapshotFile`."""

    def evaluate(self, keeping: Keeping) -> PendingCall:
        """Score the current weights, and keep them as `keeping` says; gives an `Evaluation`."""

    def evaluator_progress(self) -> PendingCall:
        """Gives how many mini-batches the evaluator has scored in its life."""

    def wait(self, calls: Collection[PendingCall], timeout_s: float) -> list[Done]:
        """Wait for at least one of the calls, at most `timeout_s`; gives those that are done."""

    def stop(self) -> None:
        """Stop every actor."""

"""What the controller asks of whatever runs the actors.

`cluster.ray_backend.backend` does it with Ray; tests do it with threads in one process. Calls start
something and return a ticket at once; `wait` collects what is done. Nothing here knows Ray.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from downpour.cluster.controller.lease_book import Lease
from downpour.cluster.errors import UserError
from downpour.cluster.run.checkpoint import Checkpoint
from downpour.workers.messages import Keeping

Ticket = Any
"""Stands for something under way; hashable."""


class RunFailed(UserError):
    """The run cannot go on by itself. The message says what to do."""


class ProcessLost(Exception):
    """A process of replicas died, or cannot be reached."""


class ShufflerLost(Exception):
    """A shuffler died, or cannot be reached."""


class PartitionLost(Exception):
    """A partition died, or cannot be reached."""


class FollowerLost(Exception):
    """A partition's follower died, or could not join it."""


class WriteFailed(Exception):
    """Something could not be written: the disk is full, or the place is gone."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What became of a ticket: a value, or one of the exceptions above."""

    ticket: Ticket
    value: Any = None
    error: Exception | None = None


class Backend(Protocol):
    """Starts, reaches and replaces the actors of one run."""

    num_partitions: int
    processes: tuple[tuple[int, ...], ...]
    """Replicas of each process."""

    def start_partition(self, index: int, checkpoint: Checkpoint | None) -> Ticket:
        """Start, or start again, a partition from its snapshot in `checkpoint`, or from the initial
        weights; done once it can be reached. One that still runs is ended first.
        """

    def start_follower(self, index: int) -> Ticket:
        """Start a follower of a partition that is up; done once it has the partition's state."""

    def stop_follower(self, index: int) -> None:
        """End a partition's follower, if it has one."""

    def promote(self, index: int) -> Ticket:
        """End a partition and have its follower take its place; done once it can be reached."""

    def start_process(self, index: int) -> Ticket:
        """Start, or start again, a process of replicas; done once it is connected."""

    def add_process(self, replicas: tuple[int, ...]) -> int:
        """Make room for one more process of replicas, which is to be started; gives its index."""

    def make_spares(self) -> None:
        """Have processes ready that can take the place of one that dies, if that is wanted."""

    def stop_process(self, index: int) -> None:
        """End a process of replicas that has no windows, for good or until it is started again."""

    def reconnect_process(self, index: int) -> Ticket:
        """Have a process that runs drop its windows and connect to the partitions anew."""

    def reconnect_evaluator(self) -> Ticket:
        """Have the evaluator connect to the partitions anew."""

    def start_evaluator(self) -> Ticket:
        """Start the evaluator; done once it is connected."""

    def run_window(self, replica: int, lease: Lease) -> Ticket:
        """Deliver a window to a replica and train on it; gives a `WindowReport`."""

    def replace_shufflers(self) -> int:
        """Replace every shuffler that failed to deliver; gives how many those were."""

    def report(self, partition: int) -> Ticket:
        """Gives a `PartitionReport`."""

    def flags(self, partition: int, epochs: tuple[int, ...]) -> Ticket:
        """Gives the state of every mini-batch of these epochs."""

    def snapshot(self, partition: int, folder_uri: str) -> Ticket:
        """Write a snapshot; gives a `SnapshotFile`."""

    def evaluate(self, keeping: Keeping) -> Ticket:
        """Score the current weights, and keep them as `keeping` says; gives an `Evaluation`."""

    def wait(self, tickets: Collection[Ticket], timeout_s: float) -> list[Done]:
        """Wait for at least one of the tickets, at most `timeout_s`; gives those that are done."""

    def stop(self) -> None:
        """Stop every actor."""

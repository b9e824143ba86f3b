"""Followers: which partition has one that can take its place, and starting those that are missing.

A follower counts once its partition says that it has it. A partition fences off a follower that it
goes on without (`paramserver.standby.primary`), so a stale belief here costs a refusal and no
update.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from downpour.cluster.controller.failure_policy import Failure
from downpour.cluster.controller.failures import Failures
from downpour.cluster.controller.instructions import Instruction, StartFollower, StopFollower, Tell

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport

REPORTS_TO_FOLLOW = 2
"""Reports without a follower after one has joined: the first may have been on its way before."""


class Standing(enum.Enum):
    """What a partition has of a follower."""

    MISSING = enum.auto()
    STARTING = enum.auto()
    FOLLOWS = enum.auto()
    LEFT_OUT = enum.auto()
    """It is to have none."""


class Followers:
    """The followers of all partitions of one run."""

    def __init__(
        self, num_partitions: int, *, wanted: bool, failures: Failures, out: list[Instruction]
    ) -> None:
        """None has been started. None ever will be, unless they are `wanted`."""
        self._failures = failures
        self._out = out
        first = Standing.MISSING if wanted else Standing.LEFT_OUT
        self._standing = [first] * num_partitions
        self._starts = [0] * num_partitions
        self._without = [0] * num_partitions

    def can_take_over(self, partition: int) -> bool:
        """Return whether a partition has a follower that is to take its place."""
        return self._standing[partition] is Standing.FOLLOWS

    def start_missing(self) -> None:
        """Start the missing followers of partitions, which are all up."""
        for index, standing in enumerate(self._standing):
            if standing is Standing.MISSING:
                self._standing[index] = Standing.STARTING
                self._starts[index] += 1
                self._out.append(StartFollower(partition=index, start=self._starts[index]))

    def started(self, call: StartFollower) -> None:
        """A follower has its partition's state."""
        if self._is_current(call):
            index = call.partition
            self._standing[index], self._without[index] = Standing.FOLLOWS, 0
            self._out.append(Tell(text=f"partition {index} has a follower"))

    def start_failed(self, call: StartFollower, error: Exception, now: float) -> None:
        """A follower could not join its partition."""
        if self._is_current(call):
            self._on_lost(call.partition, str(error), now)

    def partition_replaced(self, partition: int) -> None:
        """A partition is another process from now on, which nobody follows yet."""
        if self._standing[partition] is not Standing.LEFT_OUT:
            self._standing[partition] = Standing.MISSING
            self._starts[partition] += 1  # a follower that was just being started is none of it

    def reported(self, report: PartitionReport, now: float) -> None:
        """A partition says whether it has a follower."""
        index = report.index
        if report.has_follower:
            self._failures.policy.progressed("follower", index)
        if self._standing[index] is not Standing.FOLLOWS:
            return
        self._without[index] = 0 if report.has_follower else self._without[index] + 1
        if self._without[index] == REPORTS_TO_FOLLOW:
            self._on_lost(index, "its partition goes on without it", now)

    def _is_current(self, call: StartFollower) -> bool:
        return self._starts[call.partition] == call.start

    def _on_lost(self, index: int, detail: str, now: float) -> None:
        self._out.append(StopFollower(partition=index))
        name = f"the follower of partition {index}"
        failure = Failure(part="follower", index=index, name=name, cause="died", detail=detail)
        another = self._failures.recover(failure, now) == "restart"
        self._standing[index] = Standing.MISSING if another else Standing.LEFT_OUT

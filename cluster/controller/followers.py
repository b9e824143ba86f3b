"""Followers: which partition has one that can take its place, and starting those that are missing.

A follower counts once its partition says that it has it: what a partition goes on without can never
take its place (`paramserver.standby.primary`), so a stale belief here costs a refusal and no
update.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

from downpour.cluster.controller.backend import Backend, Done, Ticket

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport

REPORTS_TO_FOLLOW = 2
"""Reports without a follower after one has joined: the first may have been on its way before."""


class _Standing(enum.Enum):
    MISSING = enum.auto()
    STARTING = enum.auto()
    FOLLOWS = enum.auto()
    LEFT_OUT = enum.auto()


class Followers:
    """Those of all partitions of one run."""

    def __init__(
        self,
        backend: Backend,
        *,
        wanted: bool,
        submit: Callable[[Ticket, Callable[[Done], None]], None],
        lost: Callable[[int, str], bool],
        tell: Callable[[str], None],
    ) -> None:
        """None yet; none ever, unless they are `wanted`.

        `submit` has a ticket waited for; `lost`, given a partition and how its follower was lost,
        says whether there is to be another; `tell` has a line of news.
        """
        self._backend, self._submit, self._lost, self._tell = backend, submit, lost, tell
        first = _Standing.MISSING if wanted else _Standing.LEFT_OUT
        self._standing = [first] * backend.num_partitions
        self._starts = [0] * backend.num_partitions
        self._without = [0] * backend.num_partitions

    def can_take_over(self, index: int) -> bool:
        """Whether a partition has a follower that is to take its place."""
        return self._standing[index] is _Standing.FOLLOWS

    def start_missing(self) -> None:
        """Start them for all partitions, which are up."""
        for index, standing in enumerate(self._standing):
            if standing is _Standing.MISSING:
                self._standing[index] = _Standing.STARTING
                self._starts[index] += 1
                ticket = self._backend.start_follower(index)
                self._submit(ticket, self._arrival(index, self._starts[index]))

    def partition_replaced(self, index: int) -> None:
        """A partition is another process from now on, which nobody follows yet."""
        if self._standing[index] is not _Standing.LEFT_OUT:
            self._standing[index] = _Standing.MISSING
            self._starts[index] += 1  # of one that was just being started nothing more is heard

    def reported(self, report: PartitionReport) -> None:
        """A partition says whether it has a follower."""
        index = report.index
        if self._standing[index] is not _Standing.FOLLOWS:
            return
        self._without[index] = 0 if report.has_follower else self._without[index] + 1
        if self._without[index] == REPORTS_TO_FOLLOW:
            self._on_lost(index, "its partition goes on without it")

    def _arrival(self, index: int, start: int) -> Callable[[Done], None]:
        def handle(done: Done) -> None:
            if self._starts[index] != start:
                return
            if done.error is not None:
                self._on_lost(index, str(done.error))
            else:
                self._standing[index], self._without[index] = _Standing.FOLLOWS, 0
                self._tell(f"partition {index} has a follower")

        return handle

    def _on_lost(self, index: int, detail: str) -> None:
        self._backend.stop_follower(index)
        another = self._lost(index, detail)
        self._standing[index] = _Standing.MISSING if another else _Standing.LEFT_OUT

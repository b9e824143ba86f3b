"""The lease manager: which replica is leased windows now, and what becomes of those that are out.

Pure. Who holds what, and which leases are in doubt, is written in the lease book and nowhere else.
The book is set right by the partitions' applied sets, which are asked in a *census*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from downpour.cluster.controller.leases.book import Lease, LeaseBook
from downpour.cluster.controller.leases.coverage import (
    Covered,
    Flags,
    covered_by_all,
    covered_by_some,
)
from downpour.cluster.controller.leases.warm_start import Course, WarmStart
from downpour.shuffler.plan.plan import Plan

if TYPE_CHECKING:
    from downpour.workers.replica.replicas import WindowReport


@dataclass(frozen=True, kw_only=True)
class Leases:
    """How many windows of the run are out."""

    outstanding: int = 0
    """Leased to replicas: in work, or queued there."""
    returned: int = 0
    """Put back after a failure, so far."""
    queued: int = 0
    """Outstanding ones behind the one that their replica works on."""


@dataclass(frozen=True, kw_only=True)
class Census:
    """What the partitions are to be asked: which mini-batches of `epochs` they cover."""

    epochs: tuple[int, ...]
    doubted: tuple[Lease, ...]
    """Leases that the answers decide on."""
    reopening: bool
    """Whatever is done, but not covered any more, is to be leased again."""
    closing: bool = False
    """Whatever no partition covers is not to be leased any more: the run ends early."""


class LeaseManager:
    """Leases the windows of one session to replicas."""

    def __init__(
        self, plan: Plan, *, epochs: int, unit: int, queued_windows: int, warm_start: WarmStart
    ) -> None:
        """Open an empty book.

        Args:
            plan: the plan whose windows are leased.
            epochs: epochs of the run.
            unit: mini-batches of a push (n_push).
            queued_windows: windows that each replica has at a time: one in work, and the next.
            warm_start: how many replicas train.
        """
        self._plan = plan
        self._epochs = epochs
        self._unit = unit
        self._queued_windows = queued_windows
        self.warm_start = warm_start
        self._book = LeaseBook(plan, epochs, unit=unit)
        self._courses: dict[int, int] = {}
        """The warm start's course on which each live lease was granted, by the lease's id."""
        self.reopening = False
        """A partition has gone back in time: what it lost is to be leased again."""
        self._ending = False
        """The run ends early."""
        self._closed = False
        """It does, and only what some partition lacks is left to be leased."""

    @property
    def finished(self) -> bool:
        """Whether every mini-batch of every epoch is done, or all that a run trained that ends
        early.
        """
        return self._book.finished and not self.reopening and not self._closing

    @property
    def _closing(self) -> bool:
        """Whether the run ends early, and what it has trained is not known yet."""
        return self._ending and not self._closed

    @property
    def leases(self) -> Leases:
        """How many windows are out."""
        held = self._book.held.values()
        return Leases(
            outstanding=sum(held),
            queued=sum(max(0, count - 1) for count in held),
            returned=self._book.num_returned,
        )

    def num_held_by(self, *replicas: int) -> int:
        """Return how many windows these replicas have in work or queued."""
        held = self._book.held
        return sum(held.get(r, 0) for r in replicas)

    def oldest_of(self, replica: int) -> Lease | None:
        """Return the window that a replica has had for longest, if it has any."""
        held = self._book.leases_of(replica)
        return held[0] if held else None

    def is_live(self, lease: Lease) -> bool:
        """Return whether its holder still has a lease: news of any other comes too late."""
        return self._book.is_live(lease.id)

    # Who is leased windows

    def decide_course(self, wanted: int) -> Course:
        """Decide how many of the `wanted` replicas train now."""
        return self.warm_start.decide(wanted, self._book.progress * self._epochs)

    def grant(self, replicas: Iterable[int]) -> Iterator[tuple[int, Lease]]:
        """Lease windows to these until each has its queue full, or nothing waits.

        Each lease is out when it is yielded.
        """
        if self._closing:
            return
        for replica in replicas:
            while self._book.held.get(replica, 0) < self._queued_windows:
                lease = self._book.grant(replica)
                if lease is None:
                    return
                self._courses[lease.id] = self.warm_start.course
                yield replica, lease

    # What becomes of windows

    def trained(self, replica: int, lease: Lease, report: WindowReport) -> None:
        """A live window is done: every partition covers it, or it is in doubt."""
        # Mini-batches whose loss was not finite are not in the mean.
        mostly_refused = 2 * len(report.refused) >= report.num_batches
        loss = None if mostly_refused else report.mean_loss
        self.warm_start.saw(loss, self._courses.pop(lease.id))
        if report.unsettled:
            self._book.doubt(lease.id)
        else:
            self._book.complete(lease.id, replica)

    def undelivered(self, lease: Lease) -> None:
        """Nothing of a live window was trained on."""
        del self._courses[lease.id]
        self._book.give_back(lease.id)

    def lost(self, replicas: Iterable[int]) -> None:
        """Put every window of these replicas in doubt."""
        for replica in replicas:
            for lease in self._book.lost(replica):
                del self._courses[lease.id]

    def partition_lost(self, *, promoted: bool) -> None:
        """A partition has gone back in time, unless its follower was `promoted`.

        What it lacks is leased again either way: a follower may lack what was not answered.
        """
        self.reopening = True
        self._closed = False
        if not promoted:
            self.warm_start.restarted()

    def end_early(self) -> None:
        """Lease nothing more, except what a partition lacks that another covers.

        All windows that are out have to be lost before. Once nobody works on them any more, a
        census tells what has been trained. It is rare that a partition lacks a part of it: a
        process was stopped between two partitions.
        """
        assert not self._courses, "windows are out that somebody may still push"
        self._ending, self._closed = True, False

    # What the applied sets say

    def census(self, *, quiet: bool = True) -> Census | None:
        """Return what the partitions are to be asked now; None if nothing is in doubt.

        A run that ends early asks only once all is `quiet`: nobody pushes what is not leased.
        """
        doubted = self._book.in_doubt
        if not (doubted or self.reopening or self._closing) or (self._closing and not quiet):
            return None
        if self._closing:
            epochs = tuple(range(self._epochs))
        elif self.reopening:
            epochs = tuple(range(self._book.epochs_entered))
        else:
            epochs = tuple(sorted({lease.epoch for lease in doubted}))
        return Census(
            epochs=epochs, doubted=doubted, reopening=self.reopening, closing=self._closing
        )

    def settle(self, census: Census, answers: Sequence[Flags]) -> int | None:
        """Set the book right by what the partitions answered, in their order.

        Returns:
            How many mini-batches are leased again: if a partition has gone back in time, or if some
            partition lacks them at an early end. None otherwise.
        """
        if census.closing:
            return self._close(answers)
        covered = {e: covered_by_all(answers, e) for e in census.epochs}
        for lease in census.doubted:
            self._book.reconcile(lease.id, covered[lease.epoch])
        if not census.reopening:
            return None
        self.reopening = False
        return sum(self._book.reopen(e, covered[e]) for e in census.epochs)

    def _close(self, answers: Sequence[Flags]) -> int | None:
        """Go on with a book in which only what some partition lacks is not done."""
        lacking = {e: covered_by_some(answers, e) for e in range(self._epochs)}
        self._renew_book({e: ~batches for e, batches in lacking.items()})
        self._closed = True
        return self._book.remaining_batches or None

    def resume(self, answers: Sequence[Flags]) -> None:
        """Lease only what some partition does not cover; `answers` are of all epochs."""
        self._renew_book({e: covered_by_all(answers, e) for e in range(self._epochs)})

    def _renew_book(self, done: Mapping[int, Covered]) -> None:
        # News of leases of the old book may still come: no lease of the new one has their ids.
        self._book = LeaseBook(
            self._plan, self._epochs, unit=self._unit, done=done, first_id=self._book.next_id
        )
        self._courses.clear()
        self.reopening = False

    def check(self) -> None:
        """Assert the invariants of the book, and that each live lease has its course."""
        self._book.check()
        live = {lease.id for lease in self._book.outstanding} - {
            lease.id for lease in self._book.in_doubt
        }
        assert live == self._courses.keys(), f"{live} are live, {self._courses} have a course"

"""Which windows are out, and with whom: the lease book, and what is in doubt of it. Pure.

Nothing here is the truth: that is what the partitions' applied sets say (`settled`). When a process
or a partition is lost they are asked, in a `Census`, and the book is set right by their answers.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from downpour.cluster.config.policy import active_replicas
from downpour.cluster.controller.coverage import Flags, settled_by_all, settled_by_some
from downpour.cluster.controller.lease_book import Lease, LeaseBook
from downpour.cluster.controller.warm_start import Course, RampGuard
from downpour.cluster.monitoring.observation import Leases
from downpour.shuffler.plan.plan import Plan
from downpour.workers.config import ReplicaConfig

if TYPE_CHECKING:
    from downpour.workers.replica.replicas import WindowReport


@dataclass(frozen=True, kw_only=True)
class Census:
    """What the partitions are to be asked: what they have settled of `epochs`."""

    epochs: tuple[int, ...]
    doubt: Mapping[int, Lease]
    """Leases, by their number, that the answers decide on."""
    reopening: bool
    """Whatever is done, but not settled any more, is to be lent again."""
    closing: bool = False
    """Whatever no partition has settled is not to be lent any more: the run ends early."""


class Lending:
    """Lends the windows of one session to replicas."""

    def __init__(
        self,
        plan: Plan,
        *,
        epochs: int,
        replicas: ReplicaConfig,
        unit: int = 1,
        ramp: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing has been trained on. A push names `unit` mini-batches (`LeaseBook`). `ramp` is
        what the guard of an earlier session remembered, see `dump_ramp`.
        """
        self._plan = plan
        self._epochs = epochs
        self._replicas = replicas
        self._unit = unit
        self._book = LeaseBook(plan, epochs, unit=unit)
        self._guard = _guard(replicas, ramp)
        self._holding: Counter[int] = Counter()
        """Windows that each replica has in work or queued."""
        self._live: dict[int, int] = {}
        """Leases of those windows; each with the ramp's course on which it was lent."""
        self._doubt: dict[int, Lease] = {}
        """Leases whose holder is lost, until the partitions say what became of them."""
        self.reopening = False
        """A partition has gone back in time: what it lost is to be lent again."""
        self._asked = False
        """A census is under way."""
        self._ending = False
        """The run ends early."""
        self._closed = False
        """It does, and what is left to be lent is only what some partition lacks."""

    @property
    def finished(self) -> bool:
        """Whether every mini-batch of every epoch is done, or all that a run trained which ends
        early.
        """
        whole = self._book.finished and not self.reopening
        return whole and (self._closed or not self._ending)

    @property
    def held(self) -> int | None:
        """Replicas that train while the others may not join, for the loss; None: all may."""
        return None if self._guard is None else self._guard.held

    @property
    def leases(self) -> Leases:
        """How many windows are out."""
        return Leases(
            outstanding=self._holding.total(),
            queued=sum(max(0, held - 1) for held in self._holding.values()),
            returned=self._book.num_returned,
        )

    def num_held_by(self, *replicas: int) -> int:
        """Windows that these have in work or queued."""
        return sum(self._holding[r] for r in replicas)

    def is_live(self, lease: Lease) -> bool:
        """Whether its holder still has it: news of any other comes too late."""
        return lease.id in self._live

    # Who is lent windows

    def course(self, wanted: int) -> Course:
        """How many of the `wanted` replicas are lent windows now: the warm start, and its guard."""
        epochs = self._book.progress * self._epochs
        scheduled = active_replicas(dataclasses.replace(self._replicas, replicas=wanted), epochs)
        if self._guard is None:
            return Course(replicas=scheduled)
        return self._guard.decide(scheduled, wanted, epochs)

    def lend(self, replicas: Iterable[int]) -> Iterator[tuple[int, Lease]]:
        """Lend windows to these until each has its queue full, or nothing waits to be lent.

        Each is out when it is yielded.
        """
        if self._ending and not self._closed:
            return
        for replica in replicas:
            while self._holding[replica] < self._replicas.queued_windows:
                lease = self._book.grant(replica)
                if lease is None:
                    return
                self._holding[replica] += 1
                self._live[lease.id] = 0 if self._guard is None else self._guard.course
                yield replica, lease

    def dump_ramp(self) -> dict[str, Any] | None:
        """What the warm start's guard remembers, if there is one."""
        return None if self._guard is None else self._guard.dump()

    # What becomes of windows

    def trained(self, replica: int, lease: Lease, report: WindowReport) -> None:
        """A live window is done: every partition has settled it, or it is in doubt."""
        course = self._end(replica, lease)
        if self._guard is not None:
            # Mini-batches whose loss was not finite are not in the mean.
            mostly_refused = 2 * len(report.refused) >= report.num_batches
            self._guard.saw(None if mostly_refused else report.mean_loss, course)
        if report.unsettled:
            self._doubt[lease.id] = lease
        else:
            self._book.complete(lease.id, replica)

    def undelivered(self, replica: int, lease: Lease) -> None:
        """Nothing of a live window was trained on."""
        self._end(replica, lease)
        self._book.give_back(lease.id)

    def _end(self, replica: int, lease: Lease) -> int:
        self._holding[replica] -= 1
        return self._live.pop(lease.id)

    def lost(self, replicas: Iterable[int]) -> None:
        """Put every window of these replicas in doubt."""
        for replica in replicas:
            self._holding[replica] = 0
            for lease in self._book.lost(replica):
                self._live.pop(lease.id, None)
                self._doubt[lease.id] = lease

    def partition_lost(self, *, promoted: bool) -> None:
        """A partition has gone back in time, unless its follower was `promoted`.

        What it lacks is to be lent again either way: a follower may lack what was not answered.
        """
        self.reopening = True
        self._closed = False
        if self._guard is not None and not promoted:
            self._guard.restarted()

    def end_early(self) -> None:
        """Lend nothing more, but what a partition lacks that another has settled.

        All windows that are out are to be lost first. Once nobody works on them any more, a census
        tells what has been trained. That a partition lacks a part of it is rare: a process was
        stopped between two partitions.
        """
        assert not self._live, "windows are out that somebody may still push"
        self._ending, self._closed = True, False

    # What the applied sets say

    def census(self, *, quiet: bool = True) -> Census | None:
        """What the partitions are to be asked now; None where nothing is in doubt, or they have
        been asked.

        A run that ends early asks only when all is `quiet`: nobody pushes what is not lent.
        """
        closing = self._ending and not self._closed
        if self._asked or not (self._doubt or self.reopening or closing):
            return None
        if closing and not quiet:
            return None
        self._asked = True
        doubted = sorted({lease.epoch for lease in self._doubt.values()})
        if closing:
            epochs = tuple(range(self._epochs))
        elif self.reopening:
            epochs = tuple(range(self._book.epochs_entered))
        else:
            epochs = tuple(doubted)
        return Census(
            epochs=epochs, doubt=dict(self._doubt), reopening=self.reopening, closing=closing
        )

    def census_lost(self) -> None:
        """A partition was lost over the census under way: ask again."""
        self._asked = False

    def settle(self, census: Census, answers: Sequence[Flags]) -> int | None:
        """Set the book right. Gives how many mini-batches were done and are lent again, where a
        partition has gone back in time.
        """
        self._asked = False
        if census.closing:
            return self._close(answers)
        settled = {e: settled_by_all(answers, e) for e in census.epochs}
        for lease in census.doubt.values():
            self._book.reconcile(lease.id, settled[lease.epoch])
            del self._doubt[lease.id]
        if not census.reopening:
            return None
        self.reopening = False
        return sum(self._book.reopen(e, settled[e]) for e in census.epochs)

    def _close(self, answers: Sequence[Flags]) -> int | None:
        """Go on with a book in which only what some partition lacks is not done."""
        lacking = {e: settled_by_some(answers, e) for e in range(self._epochs)}
        self._book = LeaseBook(
            self._plan,
            self._epochs,
            unit=self._replicas.steps.n_push,
            done={e: ~batches for e, batches in lacking.items()},
        )
        self._doubt.clear()
        self.reopening, self._closed = False, True
        return self._book.remaining_batches or None

    def resume(self, answers: Sequence[Flags]) -> None:
        """Lend only what some partition has not settled; `answers` are of all epochs."""
        settled = {e: settled_by_all(answers, e) for e in range(self._epochs)}
        self._book = LeaseBook(
            self._plan,
            self._epochs,
            unit=self._unit,
            done={e: batches for e, batches in settled.items() if batches.any()},
        )
        self.reopening = False


def _guard(replicas: ReplicaConfig, state: Mapping[str, Any] | None) -> RampGuard | None:
    joins = replicas.warm_start_epochs or replicas.ramp_epochs
    if replicas.ramp_guard is None or not joins:
        return None
    return RampGuard(
        factor=replicas.ramp_guard,
        replicas=replicas.replicas,
        ramp_epochs=replicas.ramp_epochs,
        state=state,
    )

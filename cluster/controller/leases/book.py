"""The lease book: which mini-batches are done, which are leased and to whom, and which wait. Pure.

The book is not the truth. The partitions' applied sets are, and a book made from them goes on where
the last one stopped. How many leases a replica gets, and when, is decided in `lease_manager`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from downpour.cluster.controller.leases.coverage import Covered, PushUnits, RunCoverage
from downpour.shuffler.errors import LeaseError
from downpour.shuffler.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Lease:
    """Mini-batches of one window, leased to one holder."""

    id: int
    """Unique in its book. Mini-batches that are leased again get a lease of another id."""

    epoch: int
    """Epoch of the mini-batches."""

    window: int
    """Window that they belong to."""

    batches: tuple[int, ...]
    """Mini-batches to train on, in this order; whole units of the window's order."""


@dataclass(slots=True)
class _Loan:
    """A lease that is out, and its holder."""

    lease: Lease
    holder: int
    in_doubt: bool = False
    """The holder does not work on it any more, and the partitions have to say what it pushed."""


class LeaseBook:
    """Leases the windows of epochs [first_epoch, epochs), each mini-batch to one holder at a time.

    A unit of mini-batches (see `PushUnits`) is applied as a whole or not at all. So a lease holds
    whole units, and a unit is done only when all of its mini-batches are. Each mini-batch is in one
    of three places: done, leased, waiting.

    There is no barrier between epochs, and only open epochs take memory (see `RunCoverage`).
    """

    def __init__(
        self,
        plan: Plan,
        epochs: int,
        first_epoch: int = 0,
        unit: int = 1,
        done: Mapping[int, Covered] | None = None,
        first_id: int = 0,
    ) -> None:
        """Open a book, empty or from what a run had done before.

        Args:
            plan: the plan whose windows are leased.
            epochs: end of the run, exclusive.
            first_epoch: first epoch that is not complete.
            unit: mini-batches of a unit (n_push).
            done: by epoch, the mini-batches that every partition covers, bool [q]. An epoch that is
                missing has none.
            first_id: id of the first lease; above those of a book that this one replaces.

        Raises:
            LeaseError: a number is out of range, or `done` does not fit the plan.
            PlanError: the plan does not reach `epochs`.
        """
        if unit < 1:
            raise LeaseError(f"unit={unit} is not positive; give 1 or more batches a unit")
        if not 0 <= first_epoch <= epochs:
            raise LeaseError(
                f"first_epoch={first_epoch} is not in [0, {epochs}]; resume within the run, or "
                f"raise epochs={epochs}"
            )
        plan.check_epochs(epochs)
        self._plan = plan
        self._total_batches = (epochs - first_epoch) * plan.num_batches
        self._units = PushUnits(plan, unit)
        self._coverage = RunCoverage(plan, self._units, first_epoch, epochs, done or {})
        self.next_id = first_id
        """Id of the next lease."""
        self._loans: dict[int, _Loan] = {}
        self._num_live: Counter[int] = Counter()
        """Leases of each holder that are not in doubt."""
        self._returned: list[tuple[int, int, int, tuple[int, ...]]] = []
        self._num_returns = 0

    @property
    def total_batches(self) -> int:
        """Mini-batches of epochs [first_epoch, epochs)."""
        return self._total_batches

    @property
    def remaining_batches(self) -> int:
        """Mini-batches that are not done: leased or waiting."""
        return self.total_batches - self._coverage.num_done

    @property
    def progress(self) -> float:
        """Fraction of `total_batches` that is done, in [0, 1]; 1 if there are none."""
        return self._coverage.num_done / self.total_batches if self.total_batches else 1.0

    @property
    def finished(self) -> bool:
        """Whether every mini-batch of every epoch is done."""
        return self.remaining_batches == 0

    @property
    def epochs_finished(self) -> int:
        """Number of leading epochs that are complete: all of [0, epochs_finished) are done."""
        return self._coverage.epochs_finished

    @property
    def epochs_entered(self) -> int:
        """End, exclusive, of the epochs of which a window has been leased."""
        return self._coverage.next_epoch

    @property
    def num_returned(self) -> int:
        """Leases that were put back because their holder lost them, since the book was made."""
        return self._num_returns

    @property
    def outstanding(self) -> tuple[Lease, ...]:
        """Leases that are out, in doubt or not, oldest first."""
        return tuple(loan.lease for loan in self._loans.values())

    @property
    def in_doubt(self) -> tuple[Lease, ...]:
        """Leases whose holder is lost or has stopped, until they are reconciled, oldest first."""
        return tuple(loan.lease for loan in self._loans.values() if loan.in_doubt)

    @property
    def held(self) -> Mapping[int, int]:
        """By holder, how many leases it has that are not in doubt."""
        return self._num_live

    def is_live(self, lease_id: int) -> bool:
        """Return whether a lease is out and not in doubt."""
        loan = self._loans.get(lease_id)
        return loan is not None and not loan.in_doubt

    def leases_of(self, holder: int) -> tuple[Lease, ...]:
        """Return the leases that `holder` has and that are not in doubt, oldest first."""
        return tuple(
            loan.lease
            for loan in self._loans.values()
            if loan.holder == holder and not loan.in_doubt
        )

    def done(self, epoch: int) -> Covered:
        """Return which mini-batches of `epoch` are done, a copy, bool [q].

        Raises:
            LeaseError: `epoch` is not in the run.
        """
        return self._coverage.done(epoch)

    def grant(self, holder: int) -> Lease | None:
        """Lease the next mini-batches to `holder`; None if nothing waits.

        Mini-batches that came back are first, oldest epoch first, then the windows in the plan's
        order. If a part of a window is done, the lease holds the rest of it.
        """
        if self._returned:
            epoch, _, window, batches = heapq.heappop(self._returned)
        else:
            fresh = self._coverage.take_window()
            if fresh is None:
                return None
            epoch, window, batches = fresh
        lease = Lease(self.next_id, epoch, window, batches)
        self.next_id += 1
        self._loans[lease.id] = _Loan(lease, holder)
        self._num_live[holder] += 1
        return lease

    def complete(self, lease_id: int, holder: int) -> bool:
        """Mark all mini-batches of a lease as done, and return whether that was so.

        False says that the lease is not this holder's any more: it was put in doubt, reconciled or
        given back before. What the holder pushed counts all the same, since the partitions know it
        and `reconcile` asks them.

        Raises:
            LeaseError: no lease of this id was ever granted.
        """
        self._check_id(lease_id)
        loan = self._loans.get(lease_id)
        if loan is None or loan.in_doubt or loan.holder != holder:
            return False
        self._pop(lease_id)
        self._coverage.mark(loan.lease.epoch, loan.lease.batches)
        return True

    def doubt(self, lease_id: int) -> None:
        """Put a live lease in doubt: its holder is done with it, but a partition lacks some of it.

        Raises:
            LeaseError: no such lease is outstanding.
        """
        loan = self._outstanding(lease_id)
        if not loan.in_doubt:
            loan.in_doubt = True
            self._num_live[loan.holder] -= 1

    def lost(self, holder: int) -> list[Lease]:
        """Put every live lease of `holder` in doubt, and return them.

        A holder that comes back under its old number may be granted leases at once.
        """
        taken = list(self.leases_of(holder)) if self._num_live[holder] else []
        for lease in taken:
            self.doubt(lease.id)
        return taken

    def reconcile(self, lease_id: int, covered: Covered) -> int:
        """End a lease by what the partitions cover; return how many mini-batches wait again.

        Units whose mini-batches are all in `covered` become done. The others are put back as a
        whole; a partition that covers one of their mini-batches already ignores its second push.
        Call this only when the holder does not work on the lease any more.

        Args:
            lease_id: a lease that is outstanding, in doubt or not.
            covered: for the lease's epoch, the mini-batches that every partition covers, bool [q].

        Raises:
            LeaseError: no such lease is outstanding, or `covered` is not bool [q].
        """
        lease = self._outstanding(lease_id).lease
        self._coverage.check_covered(covered, lease.epoch)
        self._pop(lease_id)
        leased = set(lease.batches)
        ended: list[int] = []
        back: list[int] = []
        for unit in self._units.of(lease.epoch, lease.window):
            if unit[0] in leased:
                (ended if covered[list(unit)].all() else back).extend(unit)
        if ended:
            self._coverage.mark(lease.epoch, tuple(ended))
        self._put_back(lease.epoch, lease.window, tuple(back))
        return len(back)

    def give_back(self, lease_id: int) -> None:
        """Put all mini-batches of a lease back: its holder stopped before it pushed any of them.

        Raises:
            LeaseError: no such lease is outstanding.
        """
        self.reconcile(lease_id, np.zeros(self._plan.num_batches, dtype=np.bool_))

    def reopen(self, epoch: int, covered: Covered) -> int:
        """Take back what is done and not covered any more; return how many mini-batches that is.

        Call this after a partition was restored from a snapshot: it has lost what it applied since.
        Leases that are out are not touched. Reopen again once they have ended, since their early
        pushes may be among the lost ones.

        Args:
            epoch: an epoch of the run.
            covered: the mini-batches of the epoch that every partition covers now, bool [q].

        Raises:
            LeaseError: `epoch` is not in the run, or `covered` is not bool [q].
        """
        num_back, passed = self._coverage.reopen(epoch, covered)
        for window, batches in passed.items():
            self._put_back(epoch, window, batches)
        return num_back

    def check(self) -> None:
        """Assert the invariants: every mini-batch is in one place, and every count is right."""
        self._coverage.check()
        out = [(loan.lease.epoch, loan.lease.batches) for loan in self._loans.values()]
        out += [(epoch, batches) for epoch, _, _, batches in self._returned]
        open_epochs = self._coverage.open_epochs
        assert {epoch for epoch, _ in out} <= set(open_epochs)
        for epoch in open_epochs:
            places = self._coverage.places(epoch)
            for of, batches in out:
                if of == epoch:
                    places[list(batches)] += 1
            assert (places == 1).all(), f"epoch {epoch}: batches {np.flatnonzero(places != 1)}"
        live = Counter(loan.holder for loan in self._loans.values() if not loan.in_doubt)
        assert live == +self._num_live, f"{live} leases are live, not {self._num_live}"

    def _pop(self, lease_id: int) -> None:
        loan = self._loans.pop(lease_id)
        self._num_live[loan.holder] -= not loan.in_doubt

    def _put_back(self, epoch: int, window: int, batches: tuple[int, ...]) -> None:
        if batches:
            heapq.heappush(self._returned, (epoch, self._num_returns, window, batches))
            self._num_returns += 1

    def _outstanding(self, lease_id: int) -> _Loan:
        self._check_id(lease_id)
        if lease_id not in self._loans:
            raise LeaseError(f"lease {lease_id} is not outstanding; reconcile a lease once")
        return self._loans[lease_id]

    def _check_id(self, lease_id: int) -> None:
        if not 0 <= lease_id < self.next_id:
            raise LeaseError(
                f"lease {lease_id} was never granted; this book has granted {self.next_id}"
            )

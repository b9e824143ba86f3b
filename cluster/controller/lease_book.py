"""The lease book: which mini-batches are done, which are out with whom, and which wait.

A pure state machine, without clock, messages or Ray: events in (`grant`, `complete`, `lost`,
`reconcile`, `give_back`, `reopen`), leases out, and `check()` of its invariants. It keeps no truth
of its own: what is done is what every parameter partition says it has applied, and a book built
from those sets goes on where the last one stopped. Which rows a batch holds is `plan`'s.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from downpour.shuffler.errors import LeaseError
from downpour.shuffler.plan.plan import Plan

Handled = NDArray[np.bool_]
"""Mini-batches of one epoch, bool [q]: True where every partition has applied the batch."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Mini-batches of one window, lent to one holder at a time."""

    id: int
    """Unique in its book; a batch that is lent again has a lease of another id."""

    epoch: int
    """Epoch of the batches."""

    window: int
    """Window that the batches belong to."""

    batches: tuple[int, ...]
    """Mini-batches to train on, in this order; whole units of the window's order."""


@dataclass(slots=True)
class _Loan:
    """A lease that is out: with its holder, or in doubt since the holder was lost."""

    lease: Lease
    holder: int
    in_doubt: bool = False


@dataclass(slots=True)
class _Epoch:
    """An epoch that has been entered and is not complete."""

    done: Handled
    order: NDArray[np.int64]
    """Windows in the order in which they run."""

    next_window: int = 0
    """Position in `order` of the first window that has not been lent out."""


class LeaseBook:
    """Lends the windows of epochs [first_epoch, epochs) out, each batch to one holder at a time.

    A window's execution order is cut into *units* of `unit` batches (the last may be shorter): the
    batches whose gradients a replica accumulates into one push (DistBelief's n_push). A unit is
    applied whole or not at all, so a lease holds whole units, and a unit is done only when all of
    its batches are. Each batch is in exactly one of three places: done, leased, waiting.

    There is no barrier between epochs: when the last window of one is out, the next one's follow.
    Only epochs that have begun and are not complete take memory, one byte a batch.
    """

    def __init__(
        self,
        plan: Plan,
        epochs: int,
        first_epoch: int = 0,
        unit: int = 1,
        done: Mapping[int, Handled] | None = None,
    ) -> None:
        """Open a book, empty or from what a run had done before.

        Args:
            plan: the plan whose windows are lent.
            epochs: end of the run, exclusive: epochs [first_epoch, epochs) are lent.
            first_epoch: first epoch that is not wholly done.
            unit: batches of an atomic unit (n_push).
            done: by epoch, the batches that every partition has applied, bool [q]. An epoch
                that is missing has none.

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
        self._first_epoch = first_epoch
        self._epochs = epochs
        self._unit = unit
        self._num_done = 0
        self._next_id = 0
        self._next_epoch = first_epoch
        self._complete: set[int] = set()
        self._resumed: dict[int, Handled] = {}
        self._open: dict[int, _Epoch] = {}
        self._loans: dict[int, _Loan] = {}
        self._returned: list[tuple[int, int, int, tuple[int, ...]]] = []
        self._num_returns = 0
        for epoch in sorted(done or {}):
            self._resume(epoch, (done or {})[epoch])

    @property
    def epochs(self) -> int:
        """End of the run, exclusive."""
        return self._epochs

    @property
    def total_batches(self) -> int:
        """Batches of epochs [first_epoch, epochs)."""
        return (self._epochs - self._first_epoch) * self._plan.num_batches

    @property
    def remaining_batches(self) -> int:
        """Batches that are not done: leased or waiting."""
        return self.total_batches - self._num_done

    @property
    def progress(self) -> float:
        """Fraction of `total_batches` that is done, in [0, 1]; 1 for a run of no batches."""
        return self._num_done / self.total_batches if self.total_batches else 1.0

    @property
    def finished(self) -> bool:
        """Whether every batch of every epoch is done."""
        return self.remaining_batches == 0

    @property
    def epochs_finished(self) -> int:
        """Number of leading epochs that are complete: all of [0, epochs_finished) are done."""
        epoch = self._first_epoch
        while epoch in self._complete:
            epoch += 1
        return epoch

    @property
    def epochs_entered(self) -> int:
        """End, exclusive, of the epochs of which a window has been lent."""
        return self._next_epoch

    @property
    def num_returned(self) -> int:
        """Leases that were put back because their holder lost them, since the book was made."""
        return self._num_returns

    @property
    def outstanding(self) -> tuple[Lease, ...]:
        """Leases that are out, those in doubt among them, oldest first."""
        return tuple(loan.lease for loan in self._loans.values())

    def leases_of(self, holder: int) -> tuple[Lease, ...]:
        """Return the leases that `holder` has and that are not in doubt, oldest first."""
        return tuple(
            loan.lease
            for loan in self._loans.values()
            if loan.holder == holder and not loan.in_doubt
        )

    def done(self, epoch: int) -> Handled:
        """Return which batches of `epoch` are done, a copy, bool [q]."""
        self._check_epoch(epoch)
        q = self._plan.num_batches
        if epoch in self._complete:
            return np.ones(q, dtype=np.bool_)
        if epoch in self._open:
            return self._open[epoch].done.copy()
        if epoch in self._resumed:
            return self._resumed[epoch].copy()
        return np.zeros(q, dtype=np.bool_)

    def grant(self, holder: int) -> Lease | None:
        """Lend the next batches to `holder`; None when nothing waits (leased ones may return).

        Returned batches come first, oldest epoch first, then the windows in the plan's order. A
        window of which a part is done is lent without it.
        """
        if self._returned:
            epoch, _, window, batches = heapq.heappop(self._returned)
        else:
            fresh = next(self._fresh(), None)
            if fresh is None:
                return None
            epoch, window, batches = fresh
        lease = Lease(self._next_id, epoch, window, batches)
        self._next_id += 1
        self._loans[lease.id] = _Loan(lease, holder)
        return lease

    def complete(self, lease_id: int, holder: int) -> bool:
        """Mark all batches of a lease done, and return whether that was so.

        False means that the lease is no longer this holder's: it was lost, reconciled or given
        back before the message came. What the holder pushed counts nevertheless, through
        `reconcile`, because the partitions know of it.

        Raises:
            LeaseError: no lease of this id was ever granted.
        """
        self._check_id(lease_id)
        loan = self._loans.get(lease_id)
        if loan is None or loan.in_doubt or loan.holder != holder:
            return False
        del self._loans[lease_id]
        self._mark_done(loan.lease.epoch, loan.lease.batches)
        return True

    def lost(self, holder: int) -> list[Lease]:
        """Put every lease of `holder` in doubt, and return them: each is to be reconciled.

        Leases of the holder that are already in doubt are not returned again. A holder that comes
        back under its old number may be granted leases at once.
        """
        taken = []
        for loan in self._loans.values():
            if loan.holder == holder and not loan.in_doubt:
                loan.in_doubt = True
                taken.append(loan.lease)
        return taken

    def reconcile(self, lease_id: int, handled: Handled) -> int:
        """End a lease by what the partitions hold; return how many batches wait again.

        Units whose batches are all in `handled` become done; the others are put back whole, and a
        partition that holds a batch of them already ignores its second push. To be called when
        the holder no longer works on the lease: it is lost, or it has stopped.

        Args:
            lease_id: a lease that is outstanding, in doubt or not.
            handled: for the lease's epoch, the batches that every partition holds, bool [q].

        Raises:
            LeaseError: no such lease is outstanding, or `handled` is not bool [q].
        """
        self._check_id(lease_id)
        if lease_id not in self._loans:
            raise LeaseError(f"lease {lease_id} is not outstanding; reconcile a lease once")
        self._check_handled(handled, self._loans[lease_id].lease.epoch)
        lease = self._loans.pop(lease_id).lease
        lent = set(lease.batches)
        ended: list[int] = []
        back: list[int] = []
        for unit in self._units(lease.epoch, lease.window):
            if unit[0] in lent:
                (ended if handled[list(unit)].all() else back).extend(unit)
        self._mark_done(lease.epoch, tuple(ended))
        self._put_back(lease.epoch, lease.window, tuple(back))
        return len(back)

    def give_back(self, lease_id: int) -> None:
        """Put all batches of a lease back: its holder stopped before it pushed any of them.

        Raises:
            LeaseError: no such lease is outstanding.
        """
        self.reconcile(lease_id, np.zeros(self._plan.num_batches, dtype=np.bool_))

    def reopen(self, epoch: int, handled: Handled) -> int:
        """Take back what is done and no longer held; return how many batches wait again.

        For a partition that was restored from a snapshot: the batches that it applied since are
        lost to it. Leases that are out are not touched; once such a lease is completed, reopen
        again, because its early pushes may be among the lost.

        Args:
            epoch: an epoch of the run.
            handled: the batches of the epoch that every partition holds now, bool [q].

        Raises:
            LeaseError: `epoch` is not in the run, or `handled` is not bool [q].
        """
        self._check_handled(handled, epoch)
        done = self.done(epoch)
        back = self._taken_back(epoch, done & ~handled)
        if not back:
            return 0
        for batches in back.values():
            done[list(batches)] = False
        num_back = sum(len(batches) for batches in back.values())
        self._num_done -= num_back
        self._complete.discard(epoch)
        if epoch >= self._next_epoch:  # the cursor has yet to come, and will find them
            self._resumed[epoch] = done
            return num_back
        state = self._open.get(epoch)
        if state is None:
            order = self._plan.window_order(epoch)
            state = self._open[epoch] = _Epoch(done, order, next_window=len(order))
        state.done = done
        unvisited = set(state.order[state.next_window :].tolist())
        for window, batches in back.items():
            if window not in unvisited:
                self._put_back(epoch, window, batches)
        return num_back

    def check(self) -> None:
        """Assert the book's invariants: every batch is in one place, every count is right."""
        q = self._plan.num_batches
        assert not self._complete & (self._open.keys() | self._resumed.keys())
        assert not self._open.keys() & self._resumed.keys()
        for epoch, state in self._open.items():
            places = state.done.astype(np.int64)
            for position in range(state.next_window, self._plan.num_windows):
                waiting = self._waiting_units(epoch, int(state.order[position]), state.done)
                places[list(waiting)] += 1
            for loan in self._loans.values():
                if loan.lease.epoch == epoch:
                    places[list(loan.lease.batches)] += 1
            for returned_epoch, _, _, batches in self._returned:
                if returned_epoch == epoch:
                    places[list(batches)] += 1
            assert (places == 1).all(), f"epoch {epoch}: batches {np.flatnonzero(places != 1)}"
            assert not state.done.all()
        outside = [loan.lease.epoch for loan in self._loans.values()]
        outside += [epoch for epoch, *_ in self._returned]
        assert set(outside) <= self._open.keys()
        in_part = [state.done for state in self._open.values()] + list(self._resumed.values())
        num_done = len(self._complete) * q + sum(int(done.sum()) for done in in_part)
        assert num_done == self._num_done, f"{num_done} batches are done, not {self._num_done}"

    def _resume(self, epoch: int, handled: Handled) -> None:
        self._check_handled(handled, epoch)
        done = self._whole_units(epoch, handled)
        self._num_done += int(done.sum())
        if done.all():
            self._complete.add(epoch)
        elif done.any():
            self._resumed[epoch] = done

    def _whole_units(self, epoch: int, handled: Handled) -> Handled:
        """Return `handled` without the batches of units that are handled in part."""
        done = handled.copy()
        if self._unit == 1:
            return done
        starts = np.arange(0, self._plan.num_batches, self._plan.window_batches)
        sizes = np.diff(starts, append=self._plan.num_batches)
        counts = np.add.reduceat(handled.astype(np.int64), starts)
        for window in np.flatnonzero((counts > 0) & (counts < sizes)).tolist():
            for unit in self._units(epoch, window):
                members = list(unit)
                done[members] = handled[members].all()
        return done

    def _fresh(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Yield the windows that no one had yet, moving each epoch's cursor past them."""
        for epoch in sorted(self._open):
            yield from self._fresh_of(epoch)
        while self._next_epoch < self._epochs:
            epoch = self._next_epoch
            self._next_epoch += 1
            if epoch in self._complete:
                continue
            done = self.done(epoch)
            self._resumed.pop(epoch, None)
            self._open[epoch] = _Epoch(done, self._plan.window_order(epoch))
            yield from self._fresh_of(epoch)

    def _fresh_of(self, epoch: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        state = self._open[epoch]
        while state.next_window < len(state.order):
            window = int(state.order[state.next_window])
            state.next_window += 1
            waiting = self._waiting_units(epoch, window, state.done)
            if waiting:
                yield epoch, window, waiting

    def _taken_back(self, epoch: int, missing: Handled) -> dict[int, tuple[int, ...]]:
        """Return, by window, the batches of the units that have a batch in `missing`."""
        windows = np.unique(np.flatnonzero(missing) // self._plan.window_batches)
        return {
            window: tuple(
                batch
                for unit in self._units(epoch, window)
                if missing[list(unit)].any()
                for batch in unit
            )
            for window in windows.tolist()
        }

    def _units(self, epoch: int, window: int) -> list[tuple[int, ...]]:
        order = self._plan.window_batches_order(epoch, window).tolist()
        return [tuple(order[i : i + self._unit]) for i in range(0, len(order), self._unit)]

    def _waiting_units(self, epoch: int, window: int, done: Handled) -> tuple[int, ...]:
        """Return the batches of a window's units that are not done, in execution order."""
        units = self._units(epoch, window)
        return tuple(batch for unit in units if not done[unit[0]] for batch in unit)

    def _mark_done(self, epoch: int, batches: tuple[int, ...]) -> None:
        state = self._open[epoch]
        state.done[list(batches)] = True
        self._num_done += len(batches)
        if state.done.all():
            del self._open[epoch]
            self._complete.add(epoch)

    def _put_back(self, epoch: int, window: int, batches: tuple[int, ...]) -> None:
        if batches:
            heapq.heappush(self._returned, (epoch, self._num_returns, window, batches))
            self._num_returns += 1

    def _check_id(self, lease_id: int) -> None:
        if not 0 <= lease_id < self._next_id:
            raise LeaseError(
                f"lease {lease_id} was never granted; this book has granted {self._next_id}"
            )

    def _check_epoch(self, epoch: int) -> None:
        if not self._first_epoch <= epoch < self._epochs:
            raise LeaseError(
                f"epoch {epoch} is not in [{self._first_epoch}, {self._epochs}); "
                "open the book on the epochs of the run"
            )

    def _check_handled(self, handled: Handled, epoch: int) -> None:
        self._check_epoch(epoch)
        q = self._plan.num_batches
        if handled.shape != (q,) or handled.dtype != np.bool_:
            raise LeaseError(
                f"handled batches of epoch {epoch} are {handled.dtype} {list(handled.shape)}, not "
                f"bool [{q}]; resume with the dataset and batch size that the run began with"
            )

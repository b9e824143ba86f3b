"""Which mini-batches are covered: the partitions' answers taken together, and the run's progress.

A partition covers a mini-batch once it has applied or refused it. The run has covered it once every
partition has. Pushes cover whole *units*: the mini-batches whose gradients a replica adds up before
it pushes (`n_push`). All of it is pure. Who works on what is kept in `lease_book`, not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from downpour.paramserver.partition.applied_set import APPLIED, REFUSED, WAITING
from downpour.paramserver.partition.witness import expected
from downpour.shuffler.errors import LeaseError
from downpour.shuffler.plan.plan import Plan

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport

Flags = Mapping[int, npt.NDArray[np.uint8]]
"""By epoch, the state of every mini-batch on one partition, uint8 [q]."""

Covered = npt.NDArray[np.bool_]
"""Mini-batches of one epoch, bool [q]: True if every partition covers the mini-batch."""


def covered_by_all(answers: Sequence[Flags], epoch: int) -> Covered:
    """Return the mini-batches of `epoch` that every partition covers, bool [q]."""
    covered: Covered = np.logical_and.reduce([flags[epoch] != WAITING for flags in answers])
    return covered


def refused_by_any(answers: Sequence[Flags], epoch: int) -> set[tuple[int, int]]:
    """Return the mini-batches of `epoch`, as (epoch, index), that some partition refused."""
    refused = np.logical_or.reduce([flags[epoch] == REFUSED for flags in answers])
    return {(epoch, int(b)) for b in np.flatnonzero(refused)}


def covered_by_some(answers: Sequence[Flags], epoch: int) -> Covered:
    """Return the mini-batches of `epoch` that some partitions cover, but not all, bool [q]."""
    by_any: Covered = np.logical_or.reduce([flags[epoch] != WAITING for flags in answers])
    return by_any & ~covered_by_all(answers, epoch)


def covered_once(
    answers: Sequence[Flags],
    reports: Sequence[PartitionReport],
    *,
    whole: bool = True,
    plan: Plan | None = None,
    skips: bool = False,
) -> bool:
    """Return whether all partitions cover the same mini-batches, and applied each of them once.

    Flags look the same whether a mini-batch was applied once or twice. So they are compared with
    what else each partition keeps: how many mini-batches it counted, which ones went into its
    weights (`paramserver.partition.witness`), and the sum of their examples.

    Args:
        answers: flags of all epochs of the run, by partition.
        reports: a report of each partition, in the same order.
        whole: these have to be all mini-batches of all epochs. A run that ended early is judged by
            what it trained, which is less.
        plan: the run's mini-batches; None does not look at examples.
        skips: rows may have been left out, since their image could not be decoded.
    """
    for flags, report in zip(answers, reports, strict=True):
        waiting = sum(int((state == WAITING).sum()) for state in flags.values())
        if whole and waiting:
            return False
        total = sum(len(state) for state in flags.values()) - waiting
        if report.batches_applied + report.refused != total:
            return False
        if report.witness is not None and tuple(report.witness) != expected(flags):
            return False
        if plan is not None:
            least, most = examples_of(flags, plan)
            if report.examples > most or (report.examples < least and not skips):
                return False
    return not any(covered_by_some(answers, epoch).any() for epoch in answers[0])


def examples_of(flags: Flags, plan: Plan) -> tuple[int, int]:
    """Return the fewest and the most examples that the applied mini-batches can have.

    They are the same for epochs of which all mini-batches were applied, or none.
    """
    least = most = 0
    for states in flags.values():
        applied = int((states == APPLIED).sum())
        whole = applied == len(states)
        least += plan.num_rows if whole else applied
        most += min(plan.num_rows, applied * plan.batch_size)
    return least, most


def same(answers: Sequence[Flags], others: Sequence[Flags]) -> bool:
    """Return whether every partition has answered both times that it covers the same."""
    return all(
        np.array_equal(flags[epoch], before[epoch])
        for flags, before in zip(answers, others, strict=True)
        for epoch in flags
    )


def unfinished_epochs(answers: Sequence[Flags]) -> dict[int, int]:
    """Return, by epoch that was begun and not completed, how many mini-batches are covered."""
    covered = {epoch: covered_by_all(answers, epoch) for epoch in answers[0]}
    return {e: int(done.sum()) for e, done in covered.items() if done.any() and not done.all()}


class PushUnits:
    """The units of a plan's windows: each is pushed, and covered, as a whole.

    A window's execution order is cut into units of `size` mini-batches. The last unit of a window
    may be shorter.
    """

    def __init__(self, plan: Plan, size: int) -> None:
        """Cut the windows of `plan` into units of `size` mini-batches."""
        self._plan = plan
        self._size = size

    def of(self, epoch: int, window: int) -> list[tuple[int, ...]]:
        """Return the units of one window, in execution order."""
        order = self._plan.window_batches_order(epoch, window).tolist()
        return [tuple(order[i : i + self._size]) for i in range(0, len(order), self._size)]

    def waiting(self, epoch: int, window: int, done: Covered) -> tuple[int, ...]:
        """Return the mini-batches of a window's units that are not in `done`, in their order."""
        units = self.of(epoch, window)
        return tuple(batch for unit in units if not done[unit[0]] for batch in unit)

    def whole(self, epoch: int, covered: Covered) -> Covered:
        """Return a copy of `covered`, bool [q], without units that are covered in part."""
        done = covered.copy()
        if self._size == 1:
            return done
        q, step = self._plan.num_batches, self._plan.window_batches
        starts = np.arange(0, q, step)
        sizes = np.diff(starts, append=q)
        counts = np.add.reduceat(covered.astype(np.int64), starts)
        for window in np.flatnonzero((counts > 0) & (counts < sizes)).tolist():
            for unit in self.of(epoch, window):
                members = list(unit)
                done[members] = covered[members].all()
        return done

    def touched(self, epoch: int, missing: Covered) -> dict[int, tuple[int, ...]]:
        """Return, by window, the mini-batches of the units that have one in `missing`, bool [q]."""
        windows = np.unique(np.flatnonzero(missing) // self._plan.window_batches)
        return {
            window: tuple(
                batch
                for unit in self.of(epoch, window)
                if missing[list(unit)].any()
                for batch in unit
            )
            for window in windows.tolist()
        }


@dataclass(slots=True)
class _Epoch:
    """An epoch that has been entered and is not complete."""

    done: Covered
    order: npt.NDArray[np.int64]
    """Windows in the order in which they run."""

    next_window: int = 0
    """Position in `order` of the first window that has not been handed out."""


class RunCoverage:
    """Which mini-batches of epochs [first_epoch, epochs) are done, and which window is next.

    There is no barrier between epochs: the windows of the next epoch follow the last window of this
    one. Only epochs that have begun and are not complete take memory, one byte a mini-batch.
    """

    def __init__(
        self,
        plan: Plan,
        units: PushUnits,
        first_epoch: int,
        epochs: int,
        done: Mapping[int, Covered],
    ) -> None:
        """Start from `done`: by epoch, the mini-batches that every partition covers, bool [q].

        Raises:
            LeaseError: `done` does not fit the plan.
        """
        self._plan, self._units = plan, units
        self._first_epoch, self._epochs = first_epoch, epochs
        self.num_done = 0
        self.next_epoch = first_epoch
        """End, exclusive, of the epochs that have been entered."""
        self._complete: set[int] = set()
        self._resumed: dict[int, Covered] = {}
        self._open: dict[int, _Epoch] = {}
        for epoch, covered in sorted(done.items()):
            self.check_covered(covered, epoch)
            whole = units.whole(epoch, covered)
            self.num_done += int(whole.sum())
            if whole.all():
                self._complete.add(epoch)
            elif whole.any():
                self._resumed[epoch] = whole

    @property
    def epochs_finished(self) -> int:
        """Number of leading epochs that are complete: all of [0, epochs_finished) are done."""
        epoch = self._first_epoch
        while epoch in self._complete:
            epoch += 1
        return epoch

    @property
    def open_epochs(self) -> tuple[int, ...]:
        """Epochs that have been entered and are not complete."""
        return tuple(self._open)

    def done(self, epoch: int) -> Covered:
        """Return which mini-batches of `epoch` are done, a copy, bool [q].

        Raises:
            LeaseError: `epoch` is not in the run.
        """
        self._check_epoch(epoch)
        q = self._plan.num_batches
        if epoch in self._complete:
            return np.ones(q, dtype=np.bool_)
        if epoch in self._open:
            return self._open[epoch].done.copy()
        if epoch in self._resumed:
            return self._resumed[epoch].copy()
        return np.zeros(q, dtype=np.bool_)

    def take_window(self) -> tuple[int, int, tuple[int, ...]] | None:
        """Return (epoch, window, mini-batches that are not done) of the next window, and pass it.

        None if every window has been taken.
        """
        return next(self._windows(), None)

    def mark(self, epoch: int, batches: tuple[int, ...]) -> None:
        """Mark mini-batches of an open epoch as done."""
        state = self._open[epoch]
        state.done[list(batches)] = True
        self.num_done += len(batches)
        if state.done.all():
            del self._open[epoch]
            self._complete.add(epoch)

    def reopen(self, epoch: int, covered: Covered) -> tuple[int, dict[int, tuple[int, ...]]]:
        """Take back units that are done and not in `covered`, bool [q], any more.

        Returns:
            How many mini-batches that is, and by window those that `take_window` has passed.
        """
        self.check_covered(covered, epoch)
        done = self.done(epoch)
        back = self._units.touched(epoch, done & ~covered)
        if not back:
            return 0, {}
        for batches in back.values():
            done[list(batches)] = False
        num_back = sum(len(batches) for batches in back.values())
        self.num_done -= num_back
        self._complete.discard(epoch)
        if epoch >= self.next_epoch:
            self._resumed[epoch] = done
            return num_back, {}
        state = self._open.get(epoch)
        if state is None:
            order = self._plan.window_order(epoch)
            state = self._open[epoch] = _Epoch(done, order, next_window=len(order))
        state.done = done
        to_come = set(state.order[state.next_window :].tolist())
        return num_back, {window: of for window, of in back.items() if window not in to_come}

    def places(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return, for an open epoch, in how many places each mini-batch is, int64 [q]: among those
        that are done, or in a window to come.
        """
        state = self._open[epoch]
        places = state.done.astype(np.int64)
        for window in state.order[state.next_window :].tolist():
            places[list(self._units.waiting(epoch, window, state.done))] += 1
        return places

    def check(self) -> None:
        """Assert that each epoch is in one state, and that the count is right."""
        assert not self._complete & (self._open.keys() | self._resumed.keys())
        assert not self._open.keys() & self._resumed.keys()
        assert not any(state.done.all() for state in self._open.values())
        in_part = [state.done for state in self._open.values()] + list(self._resumed.values())
        complete = len(self._complete) * self._plan.num_batches
        num_done = complete + sum(int(done.sum()) for done in in_part)
        assert num_done == self.num_done, f"{num_done} batches are done, not {self.num_done}"

    def check_covered(self, covered: Covered, epoch: int) -> None:
        """Check that `covered` is bool [q], for an epoch of the run.

        Raises:
            LeaseError: it is not.
        """
        self._check_epoch(epoch)
        q = self._plan.num_batches
        if covered.shape != (q,) or covered.dtype != np.bool_:
            raise LeaseError(
                f"covered batches of epoch {epoch} are {covered.dtype} {list(covered.shape)}, not "
                f"bool [{q}]; resume with the dataset and batch size that the run began with"
            )

    def _check_epoch(self, epoch: int) -> None:
        if not self._first_epoch <= epoch < self._epochs:
            raise LeaseError(
                f"epoch {epoch} is not in [{self._first_epoch}, {self._epochs}); "
                "open the book on the epochs of the run"
            )

    def _windows(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Yield the windows that nobody had yet, moving each epoch's cursor past them."""
        for epoch in sorted(self._open):
            yield from self._windows_of(epoch)
        while self.next_epoch < self._epochs:
            epoch = self.next_epoch
            self.next_epoch += 1
            if epoch in self._complete:
                continue
            done = self.done(epoch)
            self._resumed.pop(epoch, None)
            self._open[epoch] = _Epoch(done, self._plan.window_order(epoch))
            yield from self._windows_of(epoch)

    def _windows_of(self, epoch: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        state = self._open[epoch]
        while state.next_window < len(state.order):
            window = int(state.order[state.next_window])
            state.next_window += 1
            waiting = self._units.waiting(epoch, window, state.done)
            if waiting:
                yield epoch, window, waiting

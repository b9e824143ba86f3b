"""Plans for tests: one that works each order out once, and the pairs that meet under a plan."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from downpour.shuffler.plan.plan import Plan


class RememberedPlan(Plan):
    """The same orders; books that are checked after every event ask for them again and again."""

    @functools.cache  # noqa: B019 (plans of tests are few)
    def window_order(self, epoch: int) -> NDArray[np.int64]:
        return _frozen(super().window_order(epoch))

    @functools.cache  # noqa: B019
    def window_batches_order(self, epoch: int, window: int) -> NDArray[np.int64]:
        return _frozen(super().window_batches_order(epoch, window))


def _frozen(order: NDArray[np.int64]) -> NDArray[np.int64]:
    order.setflags(write=False)
    return order


def meetings(plan: Plan, epochs: int) -> NDArray[np.int64]:
    """How often any two rows share a mini-batch, by brute force: int64 [num_rows, num_rows]."""
    met = np.zeros((plan.num_rows, plan.num_rows), dtype=np.int64)
    for epoch in range(epochs):
        rows, lengths = plan.rows_of(epoch, np.arange(plan.num_batches))
        for batch in np.split(rows, np.cumsum(lengths)[:-1]):
            met[np.ix_(batch, batch)] += 1
    np.fill_diagonal(met, 0)
    return met


def repeats(plan: Plan, epochs: int) -> int:
    """Meetings of pairs that had met before."""
    return int(np.maximum(meetings(plan, epochs) - 1, 0).sum()) // 2

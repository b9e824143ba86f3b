"""How often pairs of rows share a mini-batch more than once, counted from a plan.

This is what section 4.2.1's "more thorough shuffling" is about: batch normalization regularises
through whom an example shares its mini-batch with. Nothing is assumed about the plan's strategy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.permutation import Permutation
from downpour.shuffler.plan.plan import Plan

_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PairStatistics:
    """Pairs over some epochs."""

    epochs: int
    """Epochs counted."""

    rows: int
    """Rows whose company was counted, of all that the plan has."""

    meetings: int
    """Meetings of these rows with others: pairs in one mini-batch, each time that they are."""

    repeats: int
    """Meetings of pairs that had met before."""

    chance: float
    """Repeats to be expected if each epoch's mini-batches were drawn at random."""

    @property
    def times_chance(self) -> float:
        """Repeats over what chance would give; 1 is as random, 0 is never."""
        return self.repeats / self.chance if self.chance else 0.0


def count_pairs(
    plan: Plan,
    epochs: int,
    *,
    max_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PairStatistics:
    """Count the repeats of the first `epochs` epochs of a plan.

    For each row, all others that it shares a mini-batch with in any epoch are listed and sorted;
    one that is listed n times has met it again n - 1 times.

    Args:
        plan: any plan.
        epochs: to count.
        max_rows: count the company of so many rows only, drawn at random; None: of all, and then
            each pair is counted once. Memory is 8 bytes a row and epoch.
        progress: told the steps done and the steps in all.
    """
    n, width = plan.num_rows, plan.batch_size
    chosen = np.arange(n, dtype=np.int64)
    if max_rows is not None and max_rows < n:
        chosen = Permutation(n, stream_key(plan.seed, "rows to count")).forward(chosen[:max_rows])
    per_chunk = max(1, _CHUNK_BYTES // (4 * max(1, epochs) * width))
    num_steps = epochs + -(-len(chosen) // per_chunk)
    tables, batch_of = [], []
    for epoch in range(epochs):
        table, where = _company(plan, epoch)
        tables.append(table)
        batch_of.append(where[chosen])
        if progress is not None:
            progress(epoch + 1, num_steps)
    meetings = repeats = 0
    for step, start in enumerate(range(0, len(chosen), per_chunk)):
        rows = chosen[start : start + per_chunk]
        companies = [
            table[where[start : start + per_chunk]]
            for table, where in zip(tables, batch_of, strict=True)
        ]
        partners = np.concatenate(companies, axis=1)
        partners[partners == rows[:, None]] = -1
        partners.sort(axis=1)
        there = partners >= 0
        meetings += int(there.sum())
        repeats += int(((partners[:, 1:] == partners[:, :-1]) & there[:, 1:]).sum())
        if progress is not None:
            progress(epochs + step + 1, num_steps)
    whole = len(chosen) == n
    return PairStatistics(
        epochs=epochs,
        rows=len(chosen),
        meetings=meetings // 2 if whole else meetings,
        repeats=repeats // 2 if whole else repeats,
        chance=_chance(plan, epochs) / (1 if whole else n / (2 * len(chosen))),
    )


def _company(plan: Plan, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the rows of each mini-batch, int32 [q, batch_size] filled up with -1, and where each
    row is, int32 [num_rows].
    """
    rows, lengths = plan.rows_of(epoch, np.arange(plan.num_batches))
    batches = np.repeat(np.arange(plan.num_batches, dtype=np.int32), lengths)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    table = np.full((plan.num_batches, plan.batch_size), -1, dtype=np.int32)
    table[batches, places] = rows
    where = np.empty(plan.num_rows, dtype=np.int32)
    where[rows] = batches
    return table, where


def _chance(plan: Plan, epochs: int) -> float:
    """Repeats to be expected of random mini-batches of the plan's sizes.

    Each of the T = N (N - 1) / 2 pairs meets in an epoch with probability p = M / T, where M is the
    number of pairs in an epoch's mini-batches; of E meetings expected, 1 - (1 - p)^E are first
    ones.
    """
    _, lengths = plan.rows_of(0, np.arange(plan.num_batches))
    in_batches = float((lengths * (lengths - 1)).sum()) / 2
    pairs = plan.num_rows * (plan.num_rows - 1) / 2
    if not pairs:
        return 0.0
    share = in_batches / pairs
    return float(epochs * in_batches + pairs * np.expm1(epochs * np.log1p(-share)))

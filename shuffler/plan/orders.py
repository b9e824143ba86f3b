"""Orders of the rows of an epoch as other loaders have them, and fresh orders of groups of rows.

Each order is a function of its arguments alone, so that any mini-batch of any epoch can be asked
for again. How rows are put into mini-batches is `plan`'s.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from downpour.shuffler.errors import PlanError
from downpour.shuffler.plan.draws import uniforms
from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.permutation import Permutation, mix64

_ORDERS_KEPT = 3
_MOST_INDEX_BITS = 30
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def random_rows(
    seed: int, epoch: int, num_rows: int, places: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the rows at `places` of a fresh uniform order of all rows; in constant memory."""
    return Permutation(num_rows, stream_key(seed, "random", epoch)).forward(places)


def within_shard_rows(
    seed: int, epoch: int, shard_rows: tuple[int, ...], places: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the rows at `places` where shards come in a fresh order, and rows within each shard.

    That is the shuffle of loaders that keep a shard in memory (`py1s` of MosaicML's streaming).

    Args:
        seed: of the run.
        epoch: from 0.
        shard_rows: rows of each shard, in the order of the rows' numbers.
        places: of the epoch, [n].
    """
    sizes = np.asarray(shard_rows, dtype=np.int64)
    firsts = np.cumsum(sizes) - sizes
    order = Permutation(len(sizes), stream_key(seed, "shards", epoch)).order()
    ends = np.cumsum(sizes[order])
    turns = np.searchsorted(ends, places, side="right")
    rows = np.empty_like(places)
    for turn in np.unique(turns).tolist():
        shard = int(order[turn])
        here = turns == turn
        within = Permutation(int(sizes[shard]), stream_key(seed, "rows", epoch, shard))
        begin = int(ends[turn] - sizes[shard])
        rows[here] = firsts[shard] + within.forward(places[here] - begin)
    return rows


def buffer_rows(
    seed: int, epoch: int, num_rows: int, capacity: int, places: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the rows at `places` where rows run in stored order through a buffer.

    A place takes a row of the buffer at random, and the next stored row takes its room; at last
    the buffer is emptied in random order (`tf.data.Dataset.shuffle`, `webdataset`). The order of
    an epoch takes 8 bytes a row; the last few are kept.
    """
    return _buffered(seed, epoch, num_rows, min(capacity, num_rows))[places]


@functools.lru_cache(maxsize=_ORDERS_KEPT)
def _buffered(seed: int, epoch: int, num_rows: int, capacity: int) -> NDArray[np.int64]:
    """The whole order, int64 [num_rows].

    At step t the slot j_t is drawn, its row goes out, and row capacity + t comes in. So what goes
    out is the row that came in when the slot was last drawn before, or row j_t at its first time.
    """
    steps = num_rows - capacity
    drawn = uniforms(stream_key(seed, "buffer", epoch), np.arange(steps), 1)[:, 0]
    slots = (drawn * capacity).astype(np.int64)
    by_slot = np.argsort(slots, kind="stable")
    again = np.flatnonzero(np.diff(slots[by_slot]) == 0)
    out = slots.copy()
    out[by_slot[again + 1]] = capacity + by_slot[again]
    left = np.arange(capacity)
    last = np.flatnonzero(np.diff(slots[by_slot], append=-1))
    left[slots[by_slot[last]]] = capacity + by_slot[last]
    emptied = Permutation(capacity, stream_key(seed, "buffer's end", epoch)).order()
    order = np.concatenate([out, left[emptied]])
    order.setflags(write=False)
    return order


@functools.lru_cache(maxsize=2)
def group_orders(key: int, size: int, num_groups: int) -> NDArray[np.int64]:
    """Return a uniform order of the rows of each group: int64 [num_groups, size], row numbers.

    Row r of the groups laid end to end gets number r of a SplitMix64 stream (Steele et al. 2014);
    each group is sorted by these numbers. Their lower bits give way to the row's place in its
    group, so one sort of plain integers does it and equal numbers cannot occur.

    Args:
        key: 64 bits; see `keys.stream_key`.
        size: rows of a group.
        num_groups: groups.

    Raises:
        PlanError: a group has more than 2^30 rows.
    """
    bits = max(1, (size - 1).bit_length())
    if bits > _MOST_INDEX_BITS:
        raise PlanError(
            f"groups of {size} rows are too large to be put in a fresh order; train for fewer "
            "epochs than the plan's bound, or use larger mini-batches"
        )
    place_mask = np.uint64((1 << bits) - 1)
    drawn: NDArray[np.uint64] = np.arange(num_groups * size, dtype=np.uint64)
    drawn *= _GOLDEN
    drawn = mix64(drawn, np.uint64(key)).reshape(num_groups, size)
    drawn &= ~place_mask
    drawn |= np.arange(size, dtype=np.uint64)
    drawn.sort(axis=1)
    drawn &= place_mask
    table = drawn.view(np.int64)
    table += (np.arange(num_groups) * size)[:, None]
    table.setflags(write=False)
    return table


def even_bounds(num_rows: int, count: int, batches: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where `batches` of `count` begin if `num_rows` are dealt out evenly; exact."""
    return batches * (num_rows // count) + batches * (num_rows % count) // count

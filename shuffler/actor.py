"""The Ray actor of the shuffler. Plain Python: `cluster.training.launch` wraps it with
`ray.remote`.
"""

from __future__ import annotations

import os
import time

import numpy as np
import pyarrow as pa

from downpour.shuffler.dataset.reader import DEFAULT_CACHE_BYTES, RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.delivery import Part, Reading
from downpour.shuffler.holdings import Holding, Ranges
from downpour.shuffler.plan.plan import Plan

_LARGE_BYTES = 4 << 20
"""From here on a window's memory is given back at once, which takes less than a millisecond."""


class ShufflerActor:
    """Reads the rows of windows from the shards that are its own, and hands them over."""

    def __init__(
        self,
        index: int,
        data_uri: str,
        split: str,
        plan: Plan,
        num_classes: int,
        num_shufflers: int = 1,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        holding: Holding | None = None,
        prefetch_windows: int = 2,
    ) -> None:
        """Open the split.

        Args:
            index: of this shuffler, in [0, num_shufflers).
            data_uri: the dataset.
            split: to be read.
            plan: which rows a window holds.
            num_classes: labels must lie in [0, num_classes).
            num_shufflers: among which the rows are divided, by shards.
            cache_bytes: bound of the row groups that are kept in memory.
            holding: the shards that are its own, in a folder of its node, where `data_uri` does
                not have them all; `num_shufflers` does not matter then.
            prefetch_windows: that are read ahead into the cache, in the plan's order.
        """
        self._index = index
        self._plan = plan
        if holding is None:
            dataset = Dataset.open(data_uri, split)
            start, stop = (np.array([edge]) for edge in dataset.share(index, num_shufflers))
            self._ranges = Ranges(start, stop, start)
        else:
            dataset = holding.open()
            self._ranges = Ranges.of(holding)
        self._reader = RowReader(dataset, num_classes=num_classes, cache_bytes=cache_bytes)
        self._prefetch_windows = prefetch_windows

    def __repr__(self) -> str:
        """What Ray's dashboard and log prefixes show."""
        return f"Shuffler {self._index}"

    def ready(self) -> int:
        """Answers, with the process id, once the actor is up."""
        return os.getpid()

    def deliver(self, epoch: int, batches: tuple[int, ...]) -> Part:
        """Those rows of these mini-batches of an epoch that are in this shuffler's shards."""
        began_s = time.monotonic()
        rows, lengths = self._plan.rows_of(epoch, batches)
        positions, mine = self._ranges.find(rows)
        batch = self._reader.take(mine)
        if batch.nbytes >= _LARGE_BYTES:
            pa.default_memory_pool().release_unused()  # what the parts of it have left
        self._prefetch(epoch, batches[0] // self._plan.window_batches)
        reading = Reading(
            shuffler=self._index,
            rows=len(positions),
            seconds=time.monotonic() - began_s,
            hits=self._reader.hits,
            misses=self._reader.misses,
        )
        return Part(batch=batch, positions=positions, lengths=lengths, rows=rows, reading=reading)

    def _prefetch(self, epoch: int, window: int) -> None:
        """Begin to read the windows that come after one, as far as the cache has room."""
        plan = self._plan
        windows = plan.next_windows(epoch, window, self._prefetch_windows)
        rows = [plan.rows_of(e, plan.window_batches_order(e, w))[0] for e, w in windows]
        self._reader.prefetch(*(self._ranges.find(each)[1] for each in rows))

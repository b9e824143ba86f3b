"""The actor of the shuffler.

A plain class, which a test can construct; `cluster.ray_backend` makes a Ray actor of it.
"""

from __future__ import annotations

import os
import time

import numpy as np
import pyarrow as pa

from downpour.shuffler.config import WINDOW_BYTES
from downpour.shuffler.dataset.encoding import EncodedImages
from downpour.shuffler.dataset.own import OwnDataset, open_split
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.delivery import Part, Reading
from downpour.shuffler.holdings import Ranges
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.pixel_store import PixelStore
from downpour.shuffler.spec import ShufflerSpec

_LARGE_BYTES = 4 << 20
"""From here on a window's memory is given back at once, which takes less than a millisecond."""


class ShufflerActor:
    """Reads the rows of windows from the shards that are its own, and hands them over."""

    def __init__(self, spec: ShufflerSpec) -> None:
        """Open the split, or those shards of it that are on this node.

        Raises:
            DatasetError: the data, or a shard of it, cannot be read.
        """
        self._index = spec.index
        self._plan = spec.plan
        if spec.holding is None:
            dataset = open_split(spec.data, spec.split, spec.columns)
            share = dataset.share(spec.index, spec.num_shufflers)
            start, stop = (np.array([edge]) for edge in share)
            self._ranges = Ranges(start, stop, start)
        else:
            dataset = spec.holding.open(spec.columns)
            self._ranges = Ranges.of(spec.holding)
        self._reader = RowReader(
            dataset, num_classes=spec.num_classes, cache_bytes=spec.cache_bytes
        )
        self._pixels = _pixel_store(spec, dataset, self._ranges)
        self._prefetch_windows = spec.prefetch_windows

    def __repr__(self) -> str:
        """What Ray's dashboard and log prefixes show."""
        return f"Shuffler {self._index}"

    def ready(self, *others: object) -> int:
        """Answers, with the process id, once the actor is up, and `others` have been answered."""
        return os.getpid()

    def deliver(self, epoch: int, batches: tuple[int, ...]) -> Part:
        """Those rows of these mini-batches of an epoch that are in this shuffler's shards."""
        began_s = time.monotonic()
        rows, lengths = self._plan.rows_of(epoch, batches)
        positions, mine = self._ranges.find(rows)
        batch = self._reader.take(mine)
        if self._pixels is not None:
            share = len(mine) / max(1, len(rows))
            batch = self._pixels.deliver(batch, mine, int(WINDOW_BYTES * share))
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
        if self._reader.keeps_all:
            return
        plan = self._plan
        windows = plan.next_windows(epoch, window, self._prefetch_windows)
        rows = [plan.rows_of(e, plan.window_batches_order(e, w))[0] for e, w in windows]
        self._reader.prefetch(*(self._ranges.find(each)[1] for each in rows))


def _pixel_store(spec: ShufflerSpec, dataset: Dataset, mine: Ranges) -> PixelStore | None:
    """Return what keeps pictures' pixels; None if rows have no pictures, or new ones each time.

    The room is what the row groups leave of the cache if all of them are kept. Without that there
    is none: a row group that is read again costs more than its pictures.
    """
    if not isinstance(spec.input, ImageSpec) or isinstance(dataset, OwnDataset):
        return None
    if not isinstance(dataset.encoding, EncodedImages):
        return None
    share = int((mine.stops - mine.starts).sum()) / max(1, dataset.num_rows)
    room = spec.cache_bytes - int(dataset.decoded_bytes * share)
    return PixelStore(spec.input, num_rows=dataset.num_rows, room_bytes=room)

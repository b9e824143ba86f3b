"""Mini-batches of training rows for the population statistics, in bounded memory.

Ioffe & Szegedy 2015, Algorithm 2, step 10: training mini-batches, each of the run's own size, seen
as in training. Here: which rows these are, and their inputs. Not here: the statistics
(`evaluator`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from downpour.shuffler.dataset.own import open_split
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.permutation import Permutation
from downpour.workers.spec import RecomputeSpec

MOST_ROWS = 8192
"""Rows of a sample: 256 mini-batches of 32."""
SAMPLE_BYTES = 256 << 20
"""Most bytes that a sample keeps: its rows decoded, or encoded if that is less."""
READ_BYTES = 512 << 20
"""Most bytes of row groups that it is drawn from, so that a large dataset is not read whole."""


class TrainingSample:
    """Whole mini-batches of distinct training rows, the same and in one order at every call.

    The rows are drawn by a hashed stream, from all of the split if it is small. From a large one,
    row groups are drawn first, as many as `READ_BYTES` hold, and rows from all of these.
    """

    def __init__(self, spec: RecomputeSpec) -> None:
        """Open the split, which is read at the first call.

        Raises:
            DatasetError: it cannot be opened.
        """
        self._spec = spec
        self._dataset = open_split(spec.data, spec.split, spec.decoder.columns)
        self._rows = drawn_rows(self._dataset, spec)
        self.batch_size = min(spec.batch_size, self._dataset.num_rows)
        """Rows of each mini-batch."""
        self.num_batches = max(1, len(self._rows) // self.batch_size)
        """Mini-batches of the sample."""
        input_bytes = 4 * math.prod(spec.decoder.spec.input_shape)
        self._keeps_inputs = len(self._rows) * input_bytes <= SAMPLE_BYTES
        self._encoded: pa.RecordBatch | None = None
        self._decoded: list[tuple[Tensor, Tensor] | None] = []

    def load(self) -> None:
        """Read the rows now, and decode them if they are kept decoded.

        Raises:
            DatasetError: rows cannot be read.
        """
        if self._keeps_inputs:
            for _ in self():
                pass
        elif self._encoded is None:
            self._encoded = self._read()

    def __call__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs `[m, ...]` and targets of each mini-batch, m the batch size.

        A mini-batch with an image that cannot be decoded is left out.

        Raises:
            DatasetError: rows cannot be read.
        """
        for index in range(self.num_batches):
            if index < len(self._decoded):
                pair = self._decoded[index]
            else:
                pair = self._decode(index)
                if self._keeps_inputs:
                    self._decoded.append(pair)
            if pair is not None:
                yield pair

    def _decode(self, index: int) -> tuple[Tensor, Tensor] | None:
        if self._encoded is None:
            self._encoded = self._read()
        start, size = index * self.batch_size, self.batch_size
        rows = self._rows[start : start + size]
        decoded = self._spec.decoder.decode(self._encoded.slice(start, size), rows=rows)
        if len(decoded.kept) < size:
            return None
        if self._keeps_inputs and index + 1 == self.num_batches:
            self._encoded = None
        return torch.from_numpy(decoded.inputs), torch.from_numpy(decoded.labels)

    def _read(self) -> pa.RecordBatch:
        reader = RowReader(
            self._dataset, cache_bytes=0, num_threads=1, num_classes=self._spec.num_classes
        )
        with contextlib.closing(reader):
            return reader.take(self._rows)


def drawn_rows(dataset: Dataset, spec: RecomputeSpec) -> npt.NDArray[np.int64]:
    """The rows of a sample in their order, int64 [n]: at least a mini-batch, if there are as many.

    No row stands twice in it.
    """
    starts = dataset.row_group_starts()
    order = Permutation(len(starts) - 1, stream_key(spec.seed, "population row groups")).order()
    sizes = np.diff(starts)[order]
    least = min(spec.batch_size, dataset.num_rows)
    affordable = max(least, int(READ_BYTES / max(dataset.row_bytes, 1e-9)))
    before = np.cumsum(sizes) - sizes
    chosen = order[(before < least) | (before + sizes <= affordable)]
    pool = np.concatenate([np.arange(starts[g], starts[g + 1]) for g in np.sort(chosen)])
    kept = min(MOST_ROWS, int(SAMPLE_BYTES / max(dataset.row_bytes, 1e-9)))
    count = min(len(pool), max(least, kept))
    places = Permutation(len(pool), stream_key(spec.seed, "population rows"))
    rows: npt.NDArray[np.int64] = pool[places.forward(np.arange(count, dtype=np.int64))]
    return rows

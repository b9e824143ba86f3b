"""The Ray actor of the shuffler. Plain Python: `cluster.launch` wraps it with `ray.remote`."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shuffler.plan import Plan
from shuffler.reader import RowReader
from shuffler.records import Dataset

Delivery = tuple[pa.RecordBatch, NDArray[np.int64], NDArray[np.int64]]
"""Rows in mini-batch order, the length of each mini-batch, and the rows' numbers."""


class ShufflerActor:
    """Reads the rows of windows and hands them over as Arrow batches."""

    def __init__(self, index: int, data_uri: str, split: str, plan: Plan, num_classes: int) -> None:
        """Open the split."""
        self._index = index
        self._plan = plan
        self._reader = RowReader(Dataset.open(data_uri, split), num_classes=num_classes)

    def __repr__(self) -> str:
        """What Ray's dashboard and log prefixes show."""
        return f"Shuffler({self._index})"

    def ready(self) -> int:
        """Answers, with the process id, once the actor is up."""
        return os.getpid()

    def deliver(self, epoch: int, batches: tuple[int, ...]) -> Delivery:
        """The rows of these mini-batches of an epoch, in the order given."""
        rows, lengths = self._plan.rows_of(epoch, batches)
        return self._reader.take(rows), lengths, rows

"""Whole splits as decoded batches, for evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.images.decode import decode
from downpour.workers.evaluation.evaluator import Batches
from downpour.workers.spec import ModelSpec

EVALUATION_ROWS = 1000
"""Most rows that are decoded and scored at a time."""
EVALUATION_BYTES = 16 << 20
"""Most bytes of inputs at a time: a network's activations are many times as large."""


class SplitBatches:
    """A split in row order, decoded some rows at a time; decoded once where that is small."""

    KEEP_BYTES = 256 << 20

    def __init__(self, spec: ModelSpec, data_uri: str, split: str) -> None:
        """Open the split."""
        self._spec = spec
        self._dataset = Dataset.open(data_uri, split)
        self._reader = RowReader(self._dataset, num_classes=spec.num_classes)
        row_bytes = 4 * math.prod(spec.image.input_shape)
        self._rows = max(1, min(EVALUATION_ROWS, EVALUATION_BYTES // row_bytes))
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def load(self) -> None:
        """Decode the split now if it is small enough to be kept."""
        row_bytes = 4 * math.prod(self._spec.image.input_shape)
        if self._dataset.num_rows * row_bytes <= self.KEEP_BYTES:
            for _ in self():
                pass

    def __call__(self) -> Batches:
        """The split afresh."""
        return self._kept or self._decode()

    def _decode(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        num_bytes = 0
        for start in range(0, self._dataset.num_rows, self._rows):
            stop = min(start + self._rows, self._dataset.num_rows)
            rows = self._reader.take(np.arange(start, stop, dtype=np.int64))
            inputs, labels = decode(rows, self._spec.image)
            pair = torch.from_numpy(inputs), torch.from_numpy(labels)
            num_bytes += pair[0].nbytes
            if num_bytes <= self.KEEP_BYTES:
                kept.append(pair)
            yield pair
        if num_bytes <= self.KEEP_BYTES:
            self._kept = kept

"""Whole splits as decoded batches, for evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from downpour.shuffler.dataset.own import open_split
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.decode import Decoder
from downpour.workers.evaluation.evaluator import Batches
from downpour.workers.spec import ModelSpec

EVALUATION_ROWS = 1000
"""Most rows that are decoded and scored at a time."""
EVALUATION_BYTES = 16 << 20
"""Most bytes of inputs at a time: a network's activations are many times as large."""


class SplitBatches:
    """A split in row order, decoded some rows at a time; decoded once where that is small.

    Rows whose image cannot be decoded are left out: by the time that they are found, a training is
    under way that they have nothing to do with.
    """

    KEEP_BYTES = 256 << 20

    def __init__(self, spec: ModelSpec, data_uri: str, split: str) -> None:
        """Open the split.

        Raises:
            DatasetError: it cannot be opened.
        """
        self._spec = spec
        self._dataset = open_split(data_uri, split, spec.columns)
        self._reader = RowReader(self._dataset, num_classes=spec.num_classes)
        row_bytes = self._row_bytes
        self._rows = max(1, min(EVALUATION_ROWS, EVALUATION_BYTES // row_bytes))
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._decoder = Decoder(
            spec=spec.image.of_any_size, columns=spec.columns, on_bad_image="skip"
        )
        self._skipped: dict[int, str] = {}

    @property
    def _row_bytes(self) -> int:
        """Bytes of a row's input and target, decoded."""
        mask = 8 * math.prod(self._spec.columns.target_shape)
        return 4 * math.prod(self._spec.image.input_shape) + mask

    @property
    def skipped(self) -> tuple[str, ...]:
        """A line for each row that was left out so far; it names the row."""
        return tuple(self._skipped[row] for row in sorted(self._skipped))

    @property
    def scored_rows(self) -> NDArray[np.int64]:
        """The rows that were scored, in their order, int64 [n]."""
        bad = np.array(sorted(self._skipped), np.int64)
        return np.setdiff1d(np.arange(self._dataset.num_rows, dtype=np.int64), bad)

    @property
    def note(self) -> str | None:
        """What is to be told of the rows that are left out, on one line; None if there are none."""
        if not self._skipped:
            return None
        lines = self.skipped
        more = f" ({len(lines) - 1} more like it)" if len(lines) > 1 else ""
        return f"not scored: {lines[0]}{more}; replace it or remove the row"

    def load(self) -> None:
        """Decode the split now if it is small enough to be kept.

        Raises:
            DecodeError: none of its images can be decoded.
        """
        if self._dataset.num_rows * self._row_bytes <= self.KEEP_BYTES:
            for _ in self():
                pass

    def __call__(self) -> Batches:
        """The split afresh.

        Raises:
            DecodeError: none of its images can be decoded.
        """
        return self._kept or self._decode()

    def _decode(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        num_bytes = 0
        for start in range(0, self._dataset.num_rows, self._rows):
            stop = min(start + self._rows, self._dataset.num_rows)
            numbers = np.arange(start, stop, dtype=np.int64)
            decoded = self._decoder.decode(self._reader.take(numbers), rows=numbers)
            bad = np.setdiff1d(numbers - start, decoded.kept) + start
            self._skipped |= dict(zip(bad.tolist(), decoded.problems, strict=True))
            if not len(decoded.kept):
                continue
            pair = torch.from_numpy(decoded.inputs), torch.from_numpy(decoded.labels)
            num_bytes += pair[0].nbytes + pair[1].nbytes
            if num_bytes <= self.KEEP_BYTES:
                kept.append(pair)
            yield pair
        if len(self._skipped) == self._dataset.num_rows:
            raise DecodeError(
                f"no image of split {self._dataset.split!r} can be decoded: {self.skipped[0]}; "
                "give another split to score"
            )
        if num_bytes <= self.KEEP_BYTES:
            self._kept = kept

"""What shufflers hand over: the rows of a window, whole or the part of it that one of them has.

Plain data that travels through Ray; who reads it and who decodes it is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from downpour.shuffler.dataset.encoding import indices
from downpour.shuffler.dataset.reader import check_bytes
from downpour.shuffler.errors import DatasetError


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """The rows of a window in the order of its mini-batches."""

    batch: pa.RecordBatch
    """The rows, n."""

    lengths: NDArray[np.int64]
    """Rows of each mini-batch."""

    rows: NDArray[np.int64]
    """Their numbers in the dataset, [n]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a part cost the shuffler that delivered it."""

    shuffler: int
    """Its index."""

    rows: int
    """Rows in the part."""

    seconds: float
    """From being asked to being done."""

    hits: int
    """Row groups that the shuffler found in its cache, since it started."""

    misses: int
    """Row groups that it had to read, since it started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Those rows of a window that lie in one shuffler's shards."""

    batch: pa.RecordBatch
    """The rows, in the window's order."""

    positions: NDArray[np.int64]
    """Their positions in the window, ascending."""

    lengths: NDArray[np.int64]
    """Rows of each mini-batch of the window, with all parts together."""

    rows: NDArray[np.int64]
    """The numbers of all rows of the window, [n]."""

    reading: Reading | None = None
    """What it cost."""


def join(parts: Sequence[Part]) -> Delivery:
    """Return the window that parts make up.

    Raises:
        DatasetError: a row is in none of the parts, or in two; or they are too large together.
    """
    first = parts[0]
    positions = np.concatenate([part.positions for part in parts])
    order = np.argsort(positions, kind="stable")
    if not np.array_equal(positions[order], np.arange(len(first.rows))):
        raise DatasetError(
            f"{len(parts)} shufflers delivered {len(positions)} rows of a window of "
            f"{len(first.rows)}; every row has to be in just one of them"
        )
    batch = first.batch
    if len(parts) > 1:
        check_bytes([part.batch for part in parts])
        batch = pa.concat_batches([part.batch for part in parts]).take(indices(order))
    return Delivery(batch=batch, lengths=first.lengths, rows=first.rows)

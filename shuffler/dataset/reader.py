"""Rows by number: any rows of a dataset, in any order, through its Parquet row groups.

Row groups are read and kept by `row_groups`. Which rows to read is `plan`'s; what their bytes show
is `decode`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from downpour.shuffler.dataset.columns import TARGET, from_bytes
from downpour.shuffler.dataset.encoding import indices, label_values
from downpour.shuffler.dataset.own import OwnDataset
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.dataset.row_groups import RowGroups
from downpour.shuffler.errors import DatasetError

DEFAULT_CACHE_BYTES = 1 << 30
NOT_COUNTED = 255
"""Class of pixels that do not count."""


MOST_BYTES = 2**31 - 1
"""Most bytes of a column of images: Arrow counts them in 31 bits."""


def check_bytes(parts: Sequence[pa.RecordBatch]) -> None:
    """Check that rows fit one record batch together.

    Raises:
        DatasetError: they do not.
    """
    size = sum(part.nbytes for part in parts)
    if size > MOST_BYTES:
        raise DatasetError(
            f"{sum(map(len, parts))} rows that are read at once take {size / 1e9:.1f} GB, and may "
            "take 2.1 GB; read fewer at once: give a smaller --window-batches or --batch-size"
        )


class RowReader:
    """Reads rows of one dataset; may be used by several threads at once.

    A dataset that fits `cache_bytes` is in memory after the first epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        num_threads: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        """Prepare to read; nothing is read yet.

        Args:
            dataset: what to read.
            cache_bytes: bound of the row groups that are kept; 0 keeps none.
            num_threads: row groups that are read at once; see `RowGroups`.
            num_classes: labels must lie in [0, num_classes); by default the number of the
                dataset's class names, or no bound where it has none.

        Raises:
            DatasetError: an argument is out of range.
        """
        if num_classes is not None and num_classes < 1:
            raise DatasetError(f"num_classes={num_classes} leaves no label; give 1 or more")
        self._dataset = dataset
        self._num_classes = num_classes or len(dataset.class_names) or None
        self._starts = dataset.row_group_starts()
        self._groups = RowGroups(dataset, cache_bytes=cache_bytes, num_threads=num_threads)

    @property
    def dataset(self) -> Dataset:
        """What is read."""
        return self._dataset

    @property
    def cached_bytes(self) -> int:
        """Decoded bytes that are kept now."""
        return self._groups.cached_bytes

    @property
    def hits(self) -> int:
        """Row groups that were there, or were being read, when they were wanted."""
        return self._groups.hits

    @property
    def misses(self) -> int:
        """Row groups that were read from disk."""
        return self._groups.misses

    @property
    def keeps_all(self) -> bool:
        """Whether all rows are in memory, so that there is nothing to prefetch."""
        return self._groups.num_cached == len(self._starts) - 1

    def take(self, rows: NDArray[np.int64]) -> pa.RecordBatch:
        """Return rows in the order asked for; a row may be asked for more than once.

        Args:
            rows: int64 [n], row numbers in [0, num_rows).

        Returns:
            n rows of the dataset's `schema`: the input's column and the target's.

        Raises:
            DatasetError: a row does not exist, a label is out of range or missing, or a shard
                can no longer be read.
        """
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        num_rows = int(self._starts[-1])
        if not wanted.size:
            return pa.RecordBatch.from_pylist([], schema=self._dataset.schema)
        if wanted.min() < 0 or wanted.max() >= num_rows:
            raise DatasetError(
                f"rows {wanted.min()}..{wanted.max()} are not all in [0, {num_rows}), the rows of "
                f"split {self._dataset.split!r} of {self._dataset.uri}; plan for that many rows"
            )
        if isinstance(self._dataset, OwnDataset):
            batch = self._dataset.take(wanted)
            self._check_labels(batch, wanted)
            return batch
        by_row = np.argsort(wanted, kind="stable")
        ascending = wanted[by_row]
        group_of = np.searchsorted(self._starts, ascending, side="right") - 1
        groups, begins = np.unique(group_of, return_index=True)
        runs = np.split(ascending, begins[1:])
        parts = list(self._groups.pool.map(self._take_from, groups.tolist(), runs))
        check_bytes(parts)
        # A window of large images takes its own size again while it is put in order: not twice.
        batch = pa.concat_batches(parts)
        del parts
        back = np.empty_like(by_row)
        back[by_row] = np.arange(len(by_row))
        batch = batch.take(indices(back))
        self._check_labels(batch, wanted)
        return batch

    def prefetch(self, *windows: NDArray[np.int64]) -> None:
        """Begin to read rows into the cache, those of the first window first; returns at once.

        What the cache has no room for is left out, and what cannot be read is told when it is
        taken. A later call replaces what has not begun.
        """
        if isinstance(self._dataset, OwnDataset):
            return  # its items are asked for when their turn comes, each once
        groups = [
            np.unique(np.searchsorted(self._starts, rows, side="right") - 1).tolist()
            for rows in windows
        ]
        self._groups.read_ahead(list(dict.fromkeys(itertools.chain.from_iterable(groups))))

    def close(self) -> None:
        """Stop the threads and empty the cache; the reader is of no use afterwards."""
        self._groups.close()

    def _take_from(self, group: int, rows: NDArray[np.int64]) -> pa.RecordBatch:
        """Return ascending `rows` of one row group; only they outlive the call, not the group."""
        return self._groups.get(group).take(indices(rows - self._starts[group]))

    def _check_masks(self, batch: pa.RecordBatch, rows: NDArray[np.int64]) -> None:
        columns = self._dataset.columns
        masks = from_bytes(batch.column(TARGET), (columns.target_width,), "int64")
        bound = self._num_classes or NOT_COUNTED
        outside = ((masks < 0) | (masks >= bound)) & (masks != NOT_COUNTED)
        if outside.any():
            bad = int(np.flatnonzero(outside.any(1))[0])
            found = masks[bad][outside[bad]][0]
            row = self._dataset.describe_row(int(rows[bad]))
            raise DatasetError(
                f"class {found} out of range: the mask of {row} must have classes in "
                f"[0, {bound}), or {NOT_COUNTED} for what does not count; "
                "correct it or the number of classes"
            )

    def _check_labels(self, batch: pa.RecordBatch, rows: NDArray[np.int64]) -> None:
        columns = self._dataset.columns
        if columns.target_type == "int64" and columns.kind == "numbers":
            self._check_masks(batch, rows)
        if columns.kind != "label":
            return
        column = batch.column("label")
        if column.null_count:
            bad = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0]
            raise DatasetError(
                f"{self._dataset.describe_row(int(rows[bad]))} has no label; label it or remove it"
            )
        labels = label_values(column)
        outside = labels < 0
        if self._num_classes is not None:
            outside |= labels >= self._num_classes
        if outside.any():
            bad = np.flatnonzero(outside)[0]
            bound = "" if self._num_classes is None else f", {self._num_classes}"
            raise DatasetError(
                f"label {labels[bad]} out of range: {self._dataset.describe_row(int(rows[bad]))} "
                f"must have a label in [0{bound}); correct the label or the number of classes"
            )

"""Rows by number: any rows of a dataset, in any order, through its Parquet row groups.

A row group is the least that Parquet decodes at once, so row groups are what is cached. Which rows
to read is `plan`'s; what their bytes show is `decode`'s.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shuffler import files
from shuffler.encoding import indices, label_values
from shuffler.errors import DatasetError
from shuffler.records import Dataset

DEFAULT_CACHE_BYTES = 1 << 30
DEFAULT_THREADS = 8
_FETCH_THREADS = 2


class RowReader:
    """Reads rows of one dataset; may be used by several threads at once.

    Row groups are read by a few threads in parallel, because on object stores the wait for the
    first byte dominates, and kept in a cache of at most `cache_bytes` decoded bytes from which
    the least recently used go first. A dataset that fits is in memory after the first epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        num_threads: int = DEFAULT_THREADS,
        num_classes: int | None = None,
    ) -> None:
        """Prepare to read; nothing is read yet.

        Args:
            dataset: what to read.
            cache_bytes: bound of the row groups that are kept; 0 keeps none.
            num_threads: row groups that are read at once.
            num_classes: labels must lie in [0, num_classes); by default the number of the
                dataset's class names, or no bound where it has none.

        Raises:
            DatasetError: an argument is out of range.
        """
        if cache_bytes < 0 or num_threads < 1 or (num_classes is not None and num_classes < 1):
            raise DatasetError(
                f"cache_bytes={cache_bytes}, num_threads={num_threads}, "
                f"num_classes={num_classes}: give 0 or more bytes, and 1 or more of the others"
            )
        self._dataset = dataset
        self._num_classes = num_classes or len(dataset.class_names) or None
        self._starts = dataset.row_group_starts()
        self._places = [
            (shard, number)
            for shard in dataset.shards
            for number in range(shard.metadata.num_row_groups)
        ]
        self._schema = dataset.schema
        # Worth its threads where a file is far away: it asks for all columns at once.
        self._pre_buffer = not files.is_local(dataset.filesystem)
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._cached_bytes = 0
        self.hits = 0
        """Row groups that were in the cache, or were being read, when they were wanted."""
        self.misses = 0
        """Row groups that were read from disk."""
        self._loading: dict[int, Future[pa.RecordBatch]] = {}
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="row-reader")
        self._fetching = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="row-fetcher")

    @property
    def dataset(self) -> Dataset:
        """What is read."""
        return self._dataset

    @property
    def cached_bytes(self) -> int:
        """Decoded bytes that the cache holds now."""
        return self._cached_bytes

    def take(self, rows: NDArray[np.int64]) -> pa.RecordBatch:
        """Return rows in the order asked for; a row may be asked for more than once.

        Args:
            rows: int64 [n], row numbers in [0, num_rows).

        Returns:
            n rows of the dataset's `schema`: the image column and the label.

        Raises:
            DatasetError: a row does not exist, a label is out of range or missing, or a shard
                can no longer be read.
        """
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        num_rows = int(self._starts[-1])
        if not wanted.size:
            return pa.RecordBatch.from_pylist([], schema=self._schema)
        if wanted.min() < 0 or wanted.max() >= num_rows:
            raise DatasetError(
                f"rows {wanted.min()}..{wanted.max()} are not all in [0, {num_rows}), the rows of "
                f"split {self._dataset.split!r} of {self._dataset.uri}; plan for that many rows"
            )
        by_row = np.argsort(wanted, kind="stable")
        ascending = wanted[by_row]
        group_of = np.searchsorted(self._starts, ascending, side="right") - 1
        groups, begins = np.unique(group_of, return_index=True)
        runs = np.split(ascending, begins[1:])
        parts = list(self._pool.map(self._take_from, groups.tolist(), runs))
        back = np.empty_like(by_row)
        back[by_row] = np.arange(len(by_row))
        batch = pa.concat_batches(parts).take(indices(back))
        self._check_labels(batch, wanted)
        return batch

    def prefetch(self, rows: NDArray[np.int64]) -> None:
        """Begin to read the row groups of `rows` into the cache, and return at once.

        What cannot be read is told when it is taken.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        groups = np.unique(np.searchsorted(self._starts, wanted, side="right") - 1)
        with self._lock:
            missing = [
                g for g in groups.tolist() if g not in self._cache and g not in self._loading
            ]
        for group in missing:
            self._fetching.submit(self._row_group, group)

    def close(self) -> None:
        """Stop the threads and empty the cache; the reader is of no use afterwards."""
        self._fetching.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._cache.clear()
            self._cached_bytes = 0

    def _take_from(self, group: int, rows: NDArray[np.int64]) -> pa.RecordBatch:
        """Return ascending `rows` of one row group; only they outlive the call, not the group."""
        return self._row_group(group).take(indices(rows - self._starts[group]))

    def _row_group(self, group: int) -> pa.RecordBatch:
        """Return a row group from the cache, from a thread that is reading it, or from disk."""
        with self._lock:
            cached = self._cache.get(group)
            if cached is not None:
                self._cache.move_to_end(group)
                self.hits += 1
                return cached
            loading = self._loading.get(group)
            if loading is not None:
                self.hits += 1
            else:
                self.misses += 1
                mine: Future[pa.RecordBatch] = Future()
                self._loading[group] = mine
        if loading is not None:
            return loading.result()
        try:
            batch = self._read(group)
        except BaseException as error:
            with self._lock:
                del self._loading[group]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._loading[group]
            self._keep(group, batch)
        mine.set_result(batch)
        return batch

    def _keep(self, group: int, batch: pa.RecordBatch) -> None:
        if batch.nbytes > self._cache_bytes:
            return
        self._cache[group] = batch
        self._cached_bytes += batch.nbytes
        while self._cached_bytes > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes

    def _read(self, group: int) -> pa.RecordBatch:
        shard, number = self._places[group]
        try:
            with (
                self._dataset.filesystem.open_input_file(shard.path) as source,
                pq.ParquetFile(
                    source,
                    metadata=shard.metadata,
                    pre_buffer=self._pre_buffer,
                    page_checksum_verification=True,
                ) as parquet,
            ):
                # Row groups are read side by side; threads within one cost more than they gain.
                table = parquet.read_row_group(
                    number, columns=self._schema.names, use_threads=False
                )
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(
                f"row group {number} of {shard.path} cannot be read ({files.one_line(error)}); "
                "copy the shard again"
            ) from error
        return conform(table, self._schema)

    def _check_labels(self, batch: pa.RecordBatch, rows: NDArray[np.int64]) -> None:
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


def conform(table: pa.Table, schema: pa.Schema) -> pa.RecordBatch:
    """Return a table of one row group as one batch of `schema`: columns in order, no others."""
    columns = []
    for target in schema:
        column = table.column(target.name).combine_chunks()
        if column.type != target.type:  # a struct whose fields stand in another order
            fields = [column.field(part.name) for part in target.type]
            column = pa.StructArray.from_arrays(
                fields, fields=list(target.type), mask=column.is_null()
            )
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)

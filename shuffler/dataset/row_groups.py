"""Row groups by number, in bounded memory: read, kept while there is room, read ahead of their use.

A row group is the least that Parquet decodes at once. Which of its rows are wanted is `reader`'s.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from downpour.shuffler.dataset import columns as packing
from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.columns import Columns
from downpour.shuffler.dataset.encoding import PLAIN, Numbers
from downpour.shuffler.dataset.image_columns import as_images
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.errors import BadValueError, DatasetError
from downpour.shuffler.processors import processors

REMOTE_THREADS = 8
"""Row groups read at once where a file is far away: the wait for its first byte dominates."""

LEAST_READING_BYTES = 32 << 20
"""What may be in the middle of being read at a time, however small the cache is."""


class RowGroups:
    """The row groups of one dataset; may be used by several threads at once.

    Three bounds hold, whatever the dataset's size. Decoded row groups are kept up to `cache_bytes`,
    the least recently used go first. What is being read (files' bytes and what they decode to) is
    at most a quarter of that, or `LEAST_READING_BYTES`, or a single row group. And no more is read
    ahead than the cache holds, so that nothing is read that would be gone before its use.
    """

    def __init__(self, dataset: Dataset, *, cache_bytes: int, num_threads: int | None) -> None:
        """Prepare to read; nothing is read yet.

        Args:
            dataset: what to read.
            cache_bytes: bound of the row groups that are kept; 0 keeps none.
            num_threads: row groups that are read at once; None: as many as there are processors,
                or `REMOTE_THREADS` where files are not on this machine.

        Raises:
            DatasetError: an argument is out of range.
        """
        if cache_bytes < 0 or (num_threads is not None and num_threads < 1):
            raise DatasetError(
                f"cache_bytes={cache_bytes}, num_threads={num_threads}: give 0 or more bytes, and "
                "1 or more threads"
            )
        self._dataset = dataset
        self._local = files.is_local(dataset.filesystem)
        self._schema = dataset.schema
        self._stored = stored_columns(dataset)
        self._shard_starts = dataset.shard_group_starts()
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self.cached_bytes = 0
        """Decoded bytes that are kept now."""
        self.hits = 0
        """Row groups that were there, or were being read, when they were wanted."""
        self.misses = 0
        """Row groups that were read from disk."""
        self._lock = threading.Lock()
        self._loading: dict[int, Future[pa.RecordBatch]] = {}
        self._read_some = threading.Condition(self._lock)
        self._reading_bytes = 0
        self._most_reading_bytes = max(LEAST_READING_BYTES, cache_bytes // 4)
        self._ahead: deque[int] = deque()
        self._ahead_running = 0
        threads = num_threads or (processors() if self._local else REMOTE_THREADS)
        self._num_threads = threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="row-groups")
        """Whose threads read. All of them, because each keeps some freed memory for itself."""

    @property
    def num_cached(self) -> int:
        """Row groups that are kept now."""
        return len(self._cache)

    def get(self, group: int) -> pa.RecordBatch:
        """Return a row group: kept, from a thread that is reading it, or from disk.

        Raises:
            DatasetError: its shard can no longer be read.
        """
        with self._lock:
            kept = self._cache.get(group)
            if kept is not None:
                self._cache.move_to_end(group)
                self.hits += 1
                return kept
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

    def read_ahead(self, groups: Sequence[int]) -> None:
        """Begin to read row groups into the cache, the first needed first, and return at once.

        They replace those that were asked for before and have not begun. What the cache has no
        room for is left out; what cannot be read is told when it is wanted.
        """
        chosen: list[int] = []
        room = self._cache_bytes
        for group in groups:
            room -= self._sizes(group)[1]
            if room < 0:
                break
            chosen.append(group)
        with self._lock:
            for group in reversed(chosen):
                if group in self._cache:
                    self._cache.move_to_end(group)
            missing = [g for g in chosen if g not in self._cache and g not in self._loading]
            self._ahead = deque(missing)
            for _ in range(min(len(missing), self._num_threads) - self._ahead_running):
                self._ahead_running += 1
                self.pool.submit(self._read_ahead)

    def close(self) -> None:
        """Stop the threads and let go of what is kept."""
        with self._lock:
            self._ahead.clear()
        self.pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._cache.clear()
            self.cached_bytes = 0

    def _read_ahead(self) -> None:
        """Read the next of what is ahead; then whatever is wanted by now has its turn."""
        with self._lock:
            group = self._ahead.popleft() if self._ahead else None
        if group is not None:
            with contextlib.suppress(Exception):  # whoever wants it will meet it, too
                self.get(group)
        with self._lock:
            if self._ahead:
                self.pool.submit(self._read_ahead)
            else:
                self._ahead_running -= 1

    def _keep(self, group: int, batch: pa.RecordBatch) -> None:
        if batch.nbytes > self._cache_bytes:
            return
        self._cache[group] = batch
        self.cached_bytes += batch.nbytes
        while self.cached_bytes > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self.cached_bytes -= oldest.nbytes

    def _place(self, group: int) -> tuple[int, int]:
        """The shard of a row group, and its number there."""
        shard = int(self._shard_starts.searchsorted(group, side="right")) - 1
        return shard, group - int(self._shard_starts[shard])

    def _sizes(self, group: int) -> tuple[int, int]:
        """Bytes of a row group in its file, and about as many as it decodes to."""
        shard, number = self._place(group)
        about = self._dataset.shards[shard].metadata.row_group(number)
        columns = [about.column(i) for i in range(about.num_columns)]
        return sum(c.total_compressed_size for c in columns), about.total_byte_size

    @contextlib.contextmanager
    def _admitted(self, num_bytes: int) -> Iterator[None]:
        """Wait until so many more bytes may be in the middle of being read."""
        with self._read_some:
            while self._reading_bytes and (
                self._reading_bytes + num_bytes > self._most_reading_bytes
            ):
                self._read_some.wait()
            self._reading_bytes += num_bytes
        try:
            yield
        finally:
            with self._read_some:
                self._reading_bytes -= num_bytes
                self._read_some.notify_all()

    def _read(self, group: int) -> pa.RecordBatch:
        shard, number = self._place(group)
        path = self._dataset.shards[shard].path
        try:
            with (
                self._admitted(sum(self._sizes(group))),
                self._dataset.filesystem.open_input_file(path) as source,
                pq.ParquetFile(
                    source,
                    metadata=self._dataset.shards[shard].metadata,
                    # Worth its threads where a file is far away: it asks for all columns at once.
                    pre_buffer=not self._local,
                    page_checksum_verification=True,
                ) as parquet,
            ):
                # Row groups are read side by side; threads within one cost more than they gain.
                table = parquet.read_row_group(number, columns=self._stored, use_threads=False)
                return conform(table, self._schema, self._dataset.columns)
        except BadValueError as error:
            row = int(self._dataset.row_group_starts()[group]) + error.position
            raise DatasetError(f"{self._dataset.describe_row(row)}: {error.what}") from None
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(
                f"row group {number} of {path} cannot be read ({files.one_line(error)}); "
                "copy the shard again"
            ) from error


def stored_columns(dataset: Dataset) -> list[str]:
    """Return the columns of a dataset's files that make up its rows."""
    columns = dataset.columns
    encoding = dataset.encoding
    inputs = columns.inputs if isinstance(encoding, Numbers) else (encoding.column,)
    return list(dict.fromkeys((*inputs, *columns.targets)))


def conform(table: pa.Table, schema: pa.Schema, chosen: Columns = PLAIN) -> pa.RecordBatch:
    """Return a table of one row group as one batch of `schema`: columns in order, no others.

    Raises:
        BadValueError: a value of a chosen column is missing, or float32 does not hold it.
    """
    columns = []
    for target in schema:
        if target.name == packing.INPUT and chosen.inputs:
            columns.append(packing.pack(table, chosen.inputs, chosen.input_widths))
            continue
        if chosen != PLAIN and target.name == chosen.target_field.name:
            columns.append(packing.pack_target(table, chosen))
            continue
        column = table.column(target.name).combine_chunks()
        if column.type != target.type:  # fields that stand in another order, or bytes alone
            column = as_images(column)
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)

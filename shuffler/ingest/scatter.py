"""A global shuffle in bounded memory: rows out to buckets on disk, and back in their new order.

Pass 1 sends each row, with its final position, to the bucket file of a range of positions; pass 2
loads one bucket after the other and hands out its rows by position. Where rows come from and go to
is `ingest`'s. Bucket files hold Arrow IPC streams, one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from downpour.shuffler.errors import IngestError
from downpour.shuffler.plan.permutation import Permutation

_POSITION = "position"


class Scatter:
    """The rows of one split on their way from the source's order to a permuted one.

    Holds at most about half of `memory_bytes`: rows that wait to be written to buckets in pass 1,
    one bucket and a copy of the rows being handed out in pass 2.
    """

    def __init__(
        self, folder: Path, permutation: Permutation, num_bytes: int, memory_bytes: int
    ) -> None:
        """Prepare buckets in an existing, empty folder.

        Args:
            folder: where bucket files go, on this machine.
            permutation: source row i becomes row permutation.forward(i); its size is the number
                of rows.
            num_bytes: about what all rows take in memory.
            memory_bytes: bound of the memory to use.
        """
        self._folder = folder
        self._permutation = permutation
        num_buckets = max(1, min(permutation.n, -(-num_bytes * 6 // memory_bytes)))
        self._bucket_rows = -(-permutation.n // num_buckets)
        self._pending: dict[int, list[pa.RecordBatch]] = {}
        self._pending_bytes = 0
        self._flush_bytes = memory_bytes // 6
        self._num_added = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Take the next rows of the source (pass 1).

        Raises:
            IngestError: there are more rows than the permutation has.
        """
        stop = self._num_added + len(batch)
        if stop > self._permutation.n:
            raise IngestError(
                f"the source has more than the {self._permutation.n} rows that it declared; keep "
                "it unchanged while it is ingested"
            )
        positions = self._permutation.forward(np.arange(self._num_added, stop))
        order = np.argsort(positions)
        positions = positions[order]
        rows = batch.take(pa.array(order)).append_column(_POSITION, pa.array(positions))
        buckets, begins = np.unique(positions // self._bucket_rows, return_index=True)
        for bucket, begin, end in zip(
            buckets.tolist(), begins.tolist(), [*begins[1:].tolist(), len(rows)], strict=True
        ):
            self._pending.setdefault(bucket, []).append(rows.slice(begin, end - begin))
        self._pending_bytes += rows.nbytes
        self._num_added = stop
        if self._pending_bytes >= self._flush_bytes:
            self._flush()

    def ordered(self, sizes: Iterator[int]) -> Iterator[pa.RecordBatch]:
        """Yield the rows in their new order in pieces of `sizes` rows (pass 2), once.

        Raises:
            IngestError: fewer rows were added than the permutation has.
        """
        if self._num_added != self._permutation.n:
            raise IngestError(
                f"the source has {self._num_added} of the {self._permutation.n} rows that it "
                "declared; keep it unchanged while it is ingested"
            )
        self._flush()
        bucket, at = -1, 0
        rows: pa.RecordBatch | None = None
        order: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        for size in sizes:
            parts: list[pa.RecordBatch] = []
            missing = size
            while missing:
                if rows is None or at == len(order):
                    bucket, at = bucket + 1, 0
                    rows, order = None, order[:0]  # before the next is loaded, not after
                    rows, order = self._load(bucket)
                taken = order[at : at + missing]
                parts.append(rows.take(pa.array(taken)))
                at += len(taken)
                missing -= len(taken)
            yield parts[0] if len(parts) == 1 else pa.concat_batches(parts)

    def _flush(self) -> None:
        for bucket, parts in self._pending.items():
            rows = pa.concat_batches(parts)
            with (
                self._path(bucket).open("ab") as target,
                pa.ipc.new_stream(target, rows.schema) as writer,
            ):
                writer.write_batch(rows)
        self._pending = {}
        self._pending_bytes = 0

    def _load(self, bucket: int) -> tuple[pa.RecordBatch, NDArray[np.int64]]:
        """Return a bucket's rows as they were written, and the order that sorts them."""
        path = self._path(bucket)
        parts: list[pa.RecordBatch] = []
        with pa.memory_map(str(path)) as source:
            while source.tell() < source.size():
                with pa.ipc.open_stream(source) as stream:
                    parts.extend(stream)
            rows = pa.concat_batches(parts)
            del parts
        path.unlink()
        positions = rows.column(_POSITION).to_numpy()
        order = np.argsort(positions)
        first = bucket * self._bucket_rows
        assert (positions[order] == np.arange(first, first + len(order))).all()
        return rows.drop_columns([_POSITION]), order

    def _path(self, bucket: int) -> Path:
        return self._folder / f"bucket-{bucket:05d}.arrows"

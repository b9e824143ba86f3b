"""Rows of the training split that are held out for validation, at random and of an exact number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from downpour.shuffler.errors import IngestError
from downpour.shuffler.ingest.formats.source import Batches, Source, SourceSplit
from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.permutation import Permutation


def hold_out(source: Source, share: float, seed: int) -> Source:
    """Return the source with a share of its split `train` as split `validation`.

    Which rows these are depends on the seed alone. Their number is rounded, and at least 1.

    Raises:
        IngestError: there is no split `train`, or it is too small, or there is a split
            `validation` already.
    """
    by_name = {split.name: split for split in source.splits}
    if share == 0:
        return source
    train = by_name.get("train")
    if train is None or "validation" in by_name:
        has = ", ".join(by_name) or "none"
        raise IngestError(
            f"validation_share={share:g} needs a source with a split train and no split validation "
            f"(it has {has}); leave it out"
        )
    held = max(1, round(train.num_rows * share))
    if held >= train.num_rows:
        raise IngestError(
            f"validation_share={share:g} of {train.num_rows} rows leaves none to train on; give "
            "fewer, or more rows"
        )
    order = Permutation(train.num_rows, stream_key(seed, "validation"))
    parts = (
        _part(train, "train", order, held, train.num_rows),
        _part(train, "validation", order, 0, held),
    )
    others = tuple(split for split in source.splits if split is not train)
    return dataclasses.replace(source, splits=(*parts, *others))


def _part(split: SourceSplit, name: str, order: Permutation, start: int, stop: int) -> SourceSplit:
    """Return the rows whose places in a random order are in [start, stop), as a split."""

    def batches() -> Iterator[pa.RecordBatch]:
        first = 0
        for batch in split.batches():
            places = order.forward(np.arange(first, min(first + len(batch), order.n)))
            first += len(batch)
            chosen = (places >= start) & (places < stop)
            if chosen.any():
                yield batch.filter(pa.array(chosen))

    read: Batches = batches
    count = stop - start
    size = split.num_bytes * count // split.num_rows
    return SourceSplit(name=name, num_rows=count, num_bytes=size, batches=read)

"""The plan's mini-batches in their order, read, decoded and varied: for training of any kind.

    feed = Feed("data/cifar10", image=ImageSpec(height=28, width=28, fit="crop"), epochs=10)
    for inputs, labels in feed: ...

Reading runs ahead on a thread, decoding on several; memory is bounded by what runs ahead and by
the reader's cache. Where a feed stands is a few integers, so `state_dict` is cheap and a feed goes
on from any place at once. PyTorch is not known here: see `workers.torch_feed`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from downpour.shuffler.ahead import map_ahead
from downpour.shuffler.config import WINDOW_BYTES
from downpour.shuffler.dataset.own import open_split
from downpour.shuffler.dataset.reader import DEFAULT_CACHE_BYTES, RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.delivery import Delivery
from downpour.shuffler.errors import PlanError
from downpour.shuffler.images.augment import AugmentConfig
from downpour.shuffler.images.decode import BadImage, Decoder
from downpour.shuffler.images.specs import InputSpec
from downpour.shuffler.plan.plan import PastBound, Plan, Strategy
from downpour.shuffler.processors import processors

_At = tuple[int, int]
"""Epoch, and place in it."""

_Made = tuple[_At, Any, int]
"""Where a mini-batch stands, the mini-batch, and how many of its images were skipped."""

FIRST_BATCHES = 4
"""Mini-batches that are read first of all, so that the first of them is there soon."""

SMALL_BYTES = 6 << 10
"""Images of fewer bytes are decoded by one thread."""

CHUNK_BYTES = 2 << 20
"""Mini-batches of less than this are decoded several at once, up to it: what is done for each call
would otherwise take longer than what is done for each image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """Mini-batches that are read at once: part of a window."""

    epoch: int
    batches: tuple[int, ...]
    places: tuple[int, ...]
    """Where each of them stands in its epoch."""


class Feed:
    """An iterable of mini-batches that remembers where it stands.

    It yields (inputs, targets): float32 [m, *image.input_shape] and, of classes, int64 [m]; without
    an `image`, the rows as they are kept, as Arrow record batches. With `world_size` several feeds
    of the same seed share the mini-batches: each rank gets every `world_size`-th.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | Dataset,
        split: str = "train",
        *,
        image: InputSpec | None = None,
        augment: AugmentConfig | None = None,
        batch_size: int = 32,
        epochs: int = 1,
        seed: int = 0,
        strategy: Strategy = "pairwise",
        past_bound: PastBound = "auto",
        buffer_rows: int = 1000,
        window_batches: int = 64,
        on_bad_image: BadImage = "stop",
        num_threads: int | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Open the split; nothing of its rows is read yet.

        Args:
            data: folder or URI of the dataset, or a split of it that is open already.
            split: of the dataset.
            image: the inputs wanted; None yields rows as they are kept.
            augment: how images are varied; None leaves them as they are.
            batch_size: rows of a mini-batch.
            epochs: that an iteration runs through, all in all.
            seed: of the order and of the variations.
            strategy: see `Plan`.
            past_bound: see `Plan`.
            buffer_rows: see `Plan`.
            window_batches: mini-batches that are read at once.
            on_bad_image: whether an image that cannot be decoded stops the feed, or is skipped.
            num_threads: that decode; None: as many as there are processors to use, or a single
                one where images are so small that handing Python's lock round costs more.
            cache_bytes: bound of the row groups that are kept in memory.
            rank: of this feed.
            world_size: feeds that share the mini-batches.

        Raises:
            DatasetError: the dataset cannot be opened.
            PlanError: a number is out of range, or the plan does not reach so many epochs.
        """
        if not 0 <= rank < world_size:
            raise PlanError(f"rank={rank} is not in [0, {world_size}); give one of world_size")
        dataset = data if isinstance(data, Dataset) else open_split(data, split)
        self.dataset = dataset
        """The split."""
        self.plan = Plan(
            num_rows=dataset.num_rows,
            batch_size=batch_size,
            seed=seed,
            window_batches=window_batches,
            strategy=strategy,
            past_bound=past_bound,
            shard_rows=dataset.shard_rows if strategy == "within_shard" else (),
            buffer_rows=buffer_rows,
        )
        """Which rows are in which mini-batch."""
        self.plan.check_epochs(epochs)
        self.num_skipped = 0
        """Images that were left out so far."""
        self._decoder: Decoder | None = None
        if image is not None:
            self._decoder = Decoder(
                spec=image,
                columns=dataset.columns,
                augment=augment or AugmentConfig(),
                seed=seed,
                on_bad_image=on_bad_image,
            )
        self._epochs = epochs
        # Large images are read fewer at once, which does not change their order.
        fitting = int(WINDOW_BYTES / max(1.0, dataset.row_bytes * batch_size))
        self._read_batches = max(1, min(window_batches, fitting))
        self._rank, self._world_size = rank, world_size
        small = dataset.row_bytes < SMALL_BYTES
        self._num_threads = num_threads or (1 if small else processors())
        self._reader = RowReader(dataset, cache_bytes=cache_bytes)
        self._epoch = self._place = 0

    def __len__(self) -> int:
        """Mini-batches of an epoch that this rank gets (the first ranks may get one more)."""
        return len(range(self._rank, self.plan.num_batches, self._world_size))

    def __iter__(self) -> Iterator[Any]:
        """Go on from where the feed stands; at the end it stands at the end."""
        with contextlib.ExitStack() as stack:
            reading = stack.enter_context(_threads(1, "feed-read"))
            reads = (partial(self._deliver, read) for read in self._reads())
            deliveries = map_ahead(reading, reads, 2)
            found: Iterator[_Made]
            if self._decoder is None:
                found = _slices(deliveries)
            else:
                decoding = stack.enter_context(_threads(self._num_threads, "feed-decode"))
                jobs = _decodings(self._decoder, self.plan.batch_size, deliveries)
                chunks = map_ahead(decoding, jobs, 2 * self._num_threads)
                found = itertools.chain.from_iterable(chunks)
            for (epoch, place), made, skipped in found:
                self._epoch, self._place = epoch, place + 1
                self.num_skipped += skipped
                yield made
        self._epoch, self._place = self._epochs, 0

    def state_dict(self) -> dict[str, Any]:
        """Return where the feed stands: what `load_state_dict` takes, here or elsewhere.

        The state of one rank is good for all of them, and for another number of ranks, if they
        all have taken as many mini-batches.
        """
        rounds = -(-self._place // self._world_size)
        return {
            "epoch": self._epoch,
            "place": min(rounds * self._world_size, self.plan.num_batches),
            "seed": self.plan.seed,
            "batch_size": self.plan.batch_size,
            "window_batches": self.plan.window_batches,
            "strategy": self.plan.strategy,
            "plan_version": self.plan.version,
            "fingerprint": self.dataset.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where another feed of the same plan and dataset stood.

        Raises:
            PlanError: the state is of another plan or another dataset; it names what differs.
        """
        old = int(state.get("plan_version", 1))
        if old != self.plan.version:  # the feed goes on with the mini-batches that it began with
            self.plan = dataclasses.replace(self.plan, version=old)
            self.plan.check_epochs(self._epochs)
        state = {"plan_version": 1, **state}
        mine = self.state_dict()
        for name in mine.keys() - {"epoch", "place"}:
            if state.get(name) != mine[name]:
                raise PlanError(
                    f"the state has {name}={state.get(name)!r}, and this feed {mine[name]!r}; go "
                    "on with the values and the dataset that the state was saved with"
                )
        self._epoch, self._place = int(state["epoch"]), int(state["place"])

    def close(self) -> None:
        """Stop reading, and empty the cache."""
        self._reader.close()

    def _reads(self) -> Iterator[_Read]:
        """What is read at once, from where the feed stands to the end."""
        size = min(FIRST_BATCHES, self._read_batches)
        begin = self._place
        for epoch in range(self._epoch, self._epochs):
            place = begin
            while place < self.plan.num_batches:
                turn, offset = self.plan.locate(epoch, place)
                window = int(self.plan.window_at(epoch, turn))
                batches = self.plan.window_batches_order(epoch, window).tolist()[offset:][:size]
                places = range(place, place + len(batches))
                mine = [i for i in places if (i - begin) % self._world_size == self._rank]
                if mine:
                    yield _Read(
                        epoch=epoch,
                        batches=tuple(batches[i - place] for i in mine),
                        places=tuple(mine),
                    )
                place += len(batches)
                size = self._read_batches
            begin = 0

    def _deliver(self, read: _Read) -> tuple[Delivery, list[_At]]:
        rows, lengths = self.plan.rows_of(read.epoch, read.batches)
        delivery = Delivery(batch=self._reader.take(rows), lengths=lengths, rows=rows)
        return delivery, [(read.epoch, place) for place in read.places]


def _slices(deliveries: Iterable[tuple[Delivery, list[_At]]]) -> Iterator[_Made]:
    """Mini-batches as they are kept."""
    for delivery, ats in deliveries:
        bounds = np.concatenate([[0], np.cumsum(delivery.lengths)]).tolist()
        for at, start, stop in zip(ats, bounds, bounds[1:], strict=False):
            yield at, delivery.batch.slice(start, stop - start), 0


def _decodings(
    decoder: Decoder, batch_size: int, deliveries: Iterable[tuple[Delivery, list[_At]]]
) -> Iterator[Callable[[], list[_Made]]]:
    """What decodes each chunk of mini-batches."""
    batch_bytes = 4 * batch_size * math.prod(decoder.spec.input_shape)
    several = max(1, CHUNK_BYTES // batch_bytes)
    for delivery, ats in deliveries:
        for first in range(0, len(ats), several):
            yield partial(_decode, decoder, delivery, ats, first, min(first + several, len(ats)))


def _decode(
    decoder: Decoder, delivery: Delivery, ats: list[_At], first: int, last: int
) -> list[_Made]:
    """Mini-batches [first, last) of a delivery, all of one epoch."""
    bounds = np.concatenate([[0], np.cumsum(delivery.lengths)])[first : last + 1]
    start, stop = int(bounds[0]), int(bounds[-1])
    decoded = decoder.decode(
        delivery.batch.slice(start, stop - start),
        epoch=ats[first][0],
        rows=delivery.rows[start:stop],
    )
    ends = np.searchsorted(decoded.kept, bounds - start).tolist()
    lengths = np.diff(bounds).tolist()
    return [
        (
            ats[first + number],
            (decoded.inputs[begin:end], decoded.labels[begin:end]),
            length - (end - begin),
        )
        for number, (begin, end, length) in enumerate(zip(ends, ends[1:], lengths, strict=False))
    ]


@contextlib.contextmanager
def _threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

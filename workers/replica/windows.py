"""From what shufflers deliver to mini-batches that a slot can step on, decoded in bounded memory.

A window of small images is decoded whole: that is cheapest. One of large images would take
gigabytes as floats, so its mini-batches are decoded a few ahead of their steps by threads, and are
gone after them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from downpour.shuffler.ahead import Ahead
from downpour.shuffler.delivery import Delivery
from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.decode import Decoded, Decoder
from downpour.workers.replica.replicas import Joined, Window

Rows = npt.NDArray[np.int64]
Load = Callable[[int, int], list["Joined"]]

WHOLE_BYTES = 32 << 20
"""Windows of inputs up to this are decoded whole."""

AHEAD_BYTES = 256 << 20
"""Inputs that a process holds ahead of its steps, at least one mini-batch for each window."""


class WindowDecoder:
    """Decodes the windows of one process."""

    def __init__(
        self, decoder: Decoder, *, num_threads: int, num_windows: int, together: int = 1
    ) -> None:
        """Prepare; threads start when there are large images.

        Args:
            decoder: how rows become inputs.
            num_threads: that decode mini-batches ahead.
            num_windows: that the process has at a time.
            together: mini-batches of a step; `Window.load` is asked for whole groups of these.
        """
        self._decoder = decoder
        self._num_windows = num_windows
        self._together = together
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def open(
        self, epoch: int, batches: tuple[int, ...], delivery: Delivery
    ) -> tuple[Window, Callable[[], dict[int, str]]]:
        """Return a window ready to train on, and what tells which rows were skipped, and why.

        Raises:
            DecodeError: an image of a small window cannot be decoded, and is not to be skipped.
        """
        problems: dict[int, str] = {}
        lock = threading.Lock()
        bounds = np.concatenate([[0], np.cumsum(delivery.lengths)])

        def decode(order: Rows) -> Decoded:
            rows = delivery.rows[order]
            batch = delivery.batch.slice(order[0], len(order)) if _is_run(order) else None
            batch = delivery.batch.take(order) if batch is None else batch
            decoded = self._decoder.decode(batch, epoch=epoch, rows=rows)
            if decoded.problems:
                skipped = np.setdiff1d(np.arange(len(order)), decoded.kept)
                with lock:
                    problems.update(zip(rows[skipped].tolist(), decoded.problems, strict=True))
            return decoded

        largest = int(delivery.lengths.max(initial=1))
        batch_bytes = 4 * largest * int(np.prod(self._decoder.spec.input_shape))
        if batch_bytes * len(batches) <= WHOLE_BYTES:
            load = self._decode_whole(decode, delivery.lengths, epoch, batches)
        else:
            depth = max(1, AHEAD_BYTES // (self._num_windows * batch_bytes))
            ahead = Ahead(
                self._pool,
                len(batches),
                lambda place: decode(np.arange(bounds[place], bounds[place + 1])),
                depth,
            )

            def load(place: int, count: int) -> list[Joined]:
                parts = []
                for at in range(place, place + count):
                    part = ahead.take(at)
                    x, y = torch.from_numpy(part.inputs), torch.from_numpy(part.labels)
                    parts.append(_checked(x, y, epoch, batches[at]))
                return join_rows(parts)

        return Window(epoch=epoch, batches=batches, load=load), lambda: dict(problems)

    def _decode_whole(
        self,
        decode: Callable[[Rows], Decoded],
        lengths: Rows,
        epoch: int,
        batches: tuple[int, ...],
    ) -> Load:
        """Decode a window at once. Rows of mini-batches that go together are interleaved first."""
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        order, joined = interleaved(lengths, self._together)
        whole = decode(order)
        if whole.problems and joined.any():  # mini-batches that were equal may not be any more
            order, joined = np.arange(len(order)), np.zeros(len(lengths), bool)
            whole = decode(order)
        ends = np.searchsorted(whole.kept, bounds).tolist()
        inputs, targets = torch.from_numpy(whole.inputs), torch.from_numpy(whole.labels)

        def load(place: int, count: int) -> list[Joined]:
            if count > 1 and joined[place]:
                start, stop = ends[place], ends[place + count]
                return [Joined(inputs[start:stop], targets[start:stop], count)]
            return [
                _checked(inputs[start:stop], targets[start:stop], epoch, batches[at])
                for at in range(place, place + count)
                for start, stop in [(ends[at], ends[at + 1])]
            ]

        return load

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def interleaved(lengths: Rows, together: int) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """The order of a window's rows in which mini-batches that go together are interleaved.

    Args:
        lengths: examples of each mini-batch, int64 [n].
        together: mini-batches of a step. A group whose mini-batches differ in length stays as it
            is.

    Returns:
        The rows' order, int64 [sum of lengths]: within a group, example i of its mini-batch j at
        i*k + j. And whether each mini-batch is interleaved with its group, bool [n].
    """
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    joined = np.zeros(len(lengths), bool)
    order = np.arange(bounds[-1])
    for first in range(0, len(lengths) if together > 1 else 0, together):
        group = lengths[first : first + together]
        if len(group) > 1 and (group == group[0]).all():
            joined[first : first + len(group)] = True
            start, stop = bounds[first], bounds[first + len(group)]
            order[start:stop] = order[start:stop].reshape(len(group), -1).T.reshape(-1)
    return order, joined


def join_rows(parts: Sequence[Joined]) -> list[Joined]:
    """Single mini-batches as one, their rows interleaved, if all are of equal size."""
    if len(parts) == 1 or len({part.inputs.shape for part in parts}) > 1:
        return list(parts)
    inputs, targets = (
        torch.stack([getattr(part, name) for part in parts], 1).flatten(0, 1)
        for name in ("inputs", "targets")
    )
    return [Joined(inputs, targets, len(parts))]


def _is_run(order: Rows) -> bool:
    return bool(order[-1] - order[0] == len(order) - 1 and (np.diff(order) == 1).all())


def _checked(inputs: Tensor, targets: Tensor, epoch: int, batch: int) -> Joined:
    if not len(targets):
        raise DecodeError(
            f"mini-batch ({epoch}, {batch}) has no image that can be decoded; repair the dataset"
        )
    return Joined(inputs, targets)

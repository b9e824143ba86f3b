"""From what shufflers deliver to mini-batches that a slot can step on, decoded in bounded memory.

A window of small images is decoded whole: that is cheapest. One of large images would take
gigabytes as floats, so its mini-batches are decoded a few ahead of their steps by threads, and are
gone after them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from downpour.shuffler.ahead import Ahead
from downpour.shuffler.delivery import Delivery
from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.decode import Decoded, Decoder
from downpour.workers.replica.replicas import Window

WHOLE_BYTES = 32 << 20
"""Windows of inputs up to this are decoded whole."""

AHEAD_BYTES = 256 << 20
"""Inputs that a process holds ahead of its steps, at least one mini-batch for each window."""


class WindowDecoder:
    """Decodes the windows of one process."""

    def __init__(self, decoder: Decoder, *, num_threads: int, num_windows: int) -> None:
        """Prepare; threads start when there are large images.

        Args:
            decoder: how rows become inputs.
            num_threads: that decode mini-batches ahead.
            num_windows: that the process has at a time.
        """
        self._decoder = decoder
        self._num_windows = num_windows
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

        def decode(start: int, stop: int) -> Decoded:
            rows = delivery.rows[start:stop]
            decoded = self._decoder.decode(
                delivery.batch.slice(start, stop - start), epoch=epoch, rows=rows
            )
            if decoded.problems:
                skipped = np.setdiff1d(np.arange(stop - start), decoded.kept)
                with lock:
                    problems.update(zip(rows[skipped].tolist(), decoded.problems, strict=True))
            return decoded

        largest = int(delivery.lengths.max(initial=1))
        batch_bytes = 4 * largest * int(np.prod(self._decoder.spec.input_shape))
        if batch_bytes * len(batches) <= WHOLE_BYTES:
            whole = decode(0, int(bounds[-1]))
            ends = np.searchsorted(whole.kept, bounds).tolist()
            inputs, targets = torch.from_numpy(whole.inputs), torch.from_numpy(whole.labels)

            def load(place: int) -> tuple[Tensor, Tensor]:
                start, stop = ends[place], ends[place + 1]
                return _checked(inputs[start:stop], targets[start:stop], epoch, batches[place])

        else:
            depth = max(1, AHEAD_BYTES // (self._num_windows * batch_bytes))
            ahead = Ahead(
                self._pool,
                len(batches),
                lambda place: decode(int(bounds[place]), int(bounds[place + 1])),
                depth,
            )

            def load(place: int) -> tuple[Tensor, Tensor]:
                part = ahead.take(place)
                inputs, targets = torch.from_numpy(part.inputs), torch.from_numpy(part.labels)
                return _checked(inputs, targets, epoch, batches[place])

        return Window(epoch=epoch, batches=batches, load=load), lambda: dict(problems)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _checked(inputs: Tensor, targets: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
    if not len(targets):
        raise DecodeError(
            f"mini-batch ({epoch}, {batch}) has no image that can be decoded; repair the dataset"
        )
    return inputs, targets

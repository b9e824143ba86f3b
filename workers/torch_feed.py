"""The shuffler's feed for PyTorch: a `torch.utils.data.IterableDataset` of whole mini-batches.

    dataset = TorchFeed("data/cifar10", image=ImageSpec(height=28, width=28, fit="crop"))
    loader = DataLoader(dataset, batch_size=None)

It works without a `DataLoader` too. With its workers, each takes a share of the mini-batches, and
so does each rank of `torch.distributed` that is told its `rank` and `world_size`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from downpour.shuffler.feed import Feed


class TorchFeed(IterableDataset[tuple[Tensor, Tensor]]):
    """Inputs and labels of mini-batches, in the plan's order; takes what `Feed` takes.

    `state_dict` says where this object's own iteration stands. The workers of a `DataLoader` have
    copies, which tell it nothing; `torchdata`'s `StatefulDataLoader` asks them, and gives each its
    state back.
    """

    def __init__(self, data: str | os.PathLike[str], split: str = "train", **options: Any) -> None:
        """Check the options by opening the dataset; see `Feed`."""
        if options.get("image") is None:
            raise TypeError("TorchFeed needs image=ImageSpec(...): tensors are of decoded images")
        self._arguments = (os.fspath(data), split)
        self._options = options
        self._feed: Feed | None = Feed(*self._arguments, **options)
        self._state: dict[str, Any] = self._feed.state_dict()

    def __len__(self) -> int:
        """Mini-batches that this rank gets in all epochs."""
        return len(self._of_worker(0, 1)) * int(self._options.get("epochs", 1))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Go on from where the dataset stands."""
        worker = get_worker_info()
        feed = self._of_worker(worker.id, worker.num_workers) if worker else self._of_worker(0, 1)
        for inputs, labels in feed:
            self._state = feed.state_dict()
            yield torch.from_numpy(inputs), torch.from_numpy(labels)
        self._state = feed.state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """What travels to a worker: neither threads nor open files."""
        return {**self.__dict__, "_feed": None}

    def state_dict(self) -> dict[str, Any]:
        """Return where the iteration stands; see `Feed.state_dict`."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where another stood.

        Raises:
            PlanError: the state is of another plan or dataset.
        """
        feed = self._of_worker(0, 1)
        feed.load_state_dict(state)
        self._state = feed.state_dict()

    def _of_worker(self, worker: int, num_workers: int) -> Feed:
        """The feed of a worker, where it stands."""
        if self._feed is None or num_workers > 1:
            rank, world_size = self._options.get("rank", 0), self._options.get("world_size", 1)
            options = self._options | {
                "rank": rank * num_workers + worker,
                "world_size": world_size * num_workers,
            }
            self._feed = Feed(*self._arguments, **options)
        self._feed.load_state_dict(self._state)
        return self._feed

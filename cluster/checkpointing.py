"""One checkpoint after the other, each written by the partitions while training goes on.

Which checkpoint is in the making, what has come of it, and what is done with one that fails: it is
removed, and the run goes on with those that it has. The files are `checkpoint`'s.
"""

from __future__ import annotations

from typing import Any

from cluster.checkpoint import Checkpoint, CheckpointStore, slowest
from paramserver.snapshot import SnapshotFile


class Checkpointer:
    """The checkpoint in the making of one run."""

    def __init__(
        self, store: CheckpointStore, *, num_partitions: int, keep_last: int, keep_best: int
    ) -> None:
        """Go on behind the last number that `store` has."""
        self._store = store
        self._num_partitions = num_partitions
        self._keep_last, self._keep_best = keep_last, keep_best
        self._number = max([0, *store.numbers()])
        self._files: dict[int, SnapshotFile] | None = None
        self.last: int | None = None
        """Number of the last one that this session finished."""

    @property
    def under_way(self) -> int | None:
        """Number of the checkpoint in the making."""
        return None if self._files is None else self._number

    def begin(self) -> str:
        """Start one; gives the URI of its folder. `OSError` where that cannot be made."""
        assert self._files is None, "one at a time"
        self._number += 1
        folder = self._store.begin(self._number)
        self._files = {}
        return folder

    def received(
        self,
        index: int,
        file: SnapshotFile,
        *,
        elapsed_s: float,
        accuracy: float | None,
        ramp: dict[str, Any] | None = None,
    ) -> bool:
        """A partition has written its part; True where that was the last, and all is finished.

        The rest is what is noted beside the snapshots, see `Checkpoint`.
        `OSError` where it cannot be: call `abandon` then.
        """
        assert self._files is not None
        self._files[index] = file
        if len(self._files) < self._num_partitions:
            return False
        files = tuple(self._files[i] for i in range(self._num_partitions))
        self._store.commit(
            Checkpoint(
                number=self._number,
                updates=slowest(files),
                elapsed_s=elapsed_s,
                accuracy=accuracy,
                ramp=ramp,
                files=files,
            )
        )
        self._files = None
        self.last = self._number
        self._store.prune(self._keep_last, self._keep_best)
        return True

    def abandon(self) -> None:
        """Give up the one in the making, and remove what there is of it, if that can be done."""
        if self._files is not None:
            self._files = None
            self._store.discard(self._number)

"""One checkpoint after the other, each written by the partitions while training goes on.

Which checkpoint is in the making, what has come of it, and what is done with one that fails: it is
removed, and the run goes on with those that it has. The files are `checkpoint`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from downpour.cluster.config.policy import PolicyConfig
from downpour.cluster.controller.backend import Backend, Done, WriteFailed
from downpour.cluster.controller.partitions import Partitions
from downpour.cluster.controller.pending_calls import Tickets
from downpour.cluster.errors import one_line
from downpour.cluster.run.checkpoint import Checkpoint, CheckpointStore, slowest
from downpour.paramserver.partition.snapshot import SnapshotFile


class Checkpointer:
    """The checkpoint in the making of one run."""

    def __init__(
        self,
        backend: Backend,
        *,
        store: CheckpointStore,
        policy: PolicyConfig,
        tickets: Tickets,
        partitions: Partitions,
        about: Callable[[], Mapping[str, Any]],
        tell: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        """Go on behind the last number that `store` has; `about` gives what is noted beside the
        snapshots, see `Checkpoint`; `tell` has a line of news.
        """
        self._backend = backend
        self._store = store
        self._policy = policy
        self._tickets = tickets
        self._partitions = partitions
        self._about = about
        self._tell = tell
        self._clock = clock
        self._number = max([0, *store.numbers()])
        self._files: dict[int, SnapshotFile] | None = None
        """Snapshots of the one in the making, by partition."""
        self._next_s = clock() + policy.checkpoint_every_s
        self.last: int | None = None
        """Number of the last one that this session finished."""

    def begin_if_due(self) -> None:
        """Begin one now and then, unless one is in the making."""
        if self._clock() >= self._next_s and self._files is None:
            self._next_s = self._clock() + self._policy.checkpoint_every_s
            self._begin()

    def write_last(self) -> bool:
        """Write one more, after one that began before; whether it was written."""
        self._await()
        if not self._partitions.all_up:
            return False
        before = self.last
        self._begin()
        self._await()
        return self.last != before

    def abandon(self) -> None:
        """Give up the one in the making, and remove what there is of it, if that can be done."""
        if self._files is not None:
            self._files = None
            self._store.discard(self._number)

    def _await(self) -> None:
        while self._files is not None:
            self._tickets.turn(1.0)

    def _begin(self) -> None:
        assert self._files is None, "one at a time"
        self._number += 1
        try:
            folder = self._store.begin(self._number)
        except OSError as error:
            self._on_failed(error)
            return
        self._files = {}
        for index in range(self._backend.num_partitions):
            ticket = self._backend.snapshot(index, folder)
            self._tickets.expect(ticket, self._handler(index, self._number))

    def _handler(self, index: int, number: int) -> Callable[[Done], None]:
        def handle(done: Done) -> None:
            if self._files is None or self._number != number:
                return  # it has been given up
            if isinstance(done.error, WriteFailed):
                self._on_failed(done.error)
                return
            self._partitions.handler(index, take)(done)

        def take(file: SnapshotFile) -> None:
            assert self._files is not None
            self._files[index] = file
            if len(self._files) == self._backend.num_partitions:
                self._finish(self._files)

        return handle

    def _finish(self, files: Mapping[int, SnapshotFile]) -> None:
        in_order = tuple(files[i] for i in range(len(files)))
        checkpoint = Checkpoint(
            number=self._number, updates=slowest(in_order), files=in_order, **self._about()
        )
        try:
            self._store.commit(checkpoint)
            self._files = None
            self.last = self._number
            self._store.prune(self._policy.keep_checkpoints, self._policy.keep_best_checkpoints)
        except OSError as error:
            self._on_failed(error)

    def _on_failed(self, error: Exception) -> None:
        self.abandon()
        kept = "there is none yet" if self.last is None else f"the last good one is {self.last}"
        self._tell(f"a checkpoint could not be written ({one_line(error)}): going on, {kept}")

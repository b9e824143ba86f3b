"""One checkpoint after the other, each written by the partitions while training goes on.

Here stands which checkpoint is in the making, and what has come of it. A checkpoint that fails is
removed, and the run goes on with those that it has. The files are `cluster.run.checkpoint`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from downpour.cluster.config.policy import PolicyConfig
from downpour.cluster.controller.members.partitions import PartitionMember
from downpour.cluster.controller.protocol.instructions import (
    BeginCheckpoint,
    CheckpointFinished,
    DiscardCheckpoint,
    Instruction,
    PruneCheckpoints,
    Tell,
    WriteSnapshot,
)
from downpour.cluster.errors import one_line
from downpour.cluster.run.checkpoint import Checkpoint
from downpour.paramserver.partition.snapshot import SnapshotFile


class CheckpointSchedule:
    """The checkpoint in the making of one run, and when the next one is due."""

    def __init__(
        self, policy: PolicyConfig, *, newest: int, out: list[Instruction], now: float
    ) -> None:
        """Go on behind `newest`, the last number that has been used."""
        self._policy = policy
        self._out = out
        self._next_s = now + policy.checkpoint_every_s
        self._files: dict[int, SnapshotFile] | None = None
        """Snapshots of the one in the making, by partition."""
        self.number = newest
        """Number of the newest one, finished or not."""
        self.last: int | None = None
        """Number of the last one that this session finished."""

    @property
    def in_the_making(self) -> bool:
        """Whether one has begun that is neither finished nor given up."""
        return self._files is not None

    def begin_if_due(self, now: float) -> None:
        """Begin one now and then, unless one is in the making."""
        if now >= self._next_s and self._files is None:
            self._next_s = now + self._policy.checkpoint_every_s
            self.begin()

    def hasten(self, now: float) -> None:
        """Have one begun as soon as may be, and the next one in its usual time after that."""
        self._next_s = now

    def begin(self) -> None:
        """Begin one now."""
        assert self._files is None, "one at a time"
        self._files = {}
        self.number += 1
        self._out.append(BeginCheckpoint(number=self.number))

    def begun(
        self, call: BeginCheckpoint, folder_uri: str, partitions: Sequence[PartitionMember]
    ) -> None:
        """There is a folder for one: have all partitions write their snapshots into it."""
        if self._is_current(call.number):
            self._out.extend(
                WriteSnapshot(
                    partition=p.index,
                    incarnation=p.incarnation,
                    number=call.number,
                    folder_uri=folder_uri,
                )
                for p in partitions
            )

    def written(
        self, call: WriteSnapshot, file: SnapshotFile, num_partitions: int
    ) -> tuple[SnapshotFile, ...] | None:
        """A snapshot has been written; return all, in their order, if it was the last one."""
        if self._files is None or not self._is_current(call.number):
            return None
        self._files[call.partition] = file
        if len(self._files) < num_partitions:
            return None
        return tuple(self._files[index] for index in range(num_partitions))

    def committed(self, checkpoint: Checkpoint) -> None:
        """One is finished: remove older ones."""
        if self._is_current(checkpoint.number):
            self.last = checkpoint.number
            self._files = None
            self._out.append(CheckpointFinished(checkpoint=checkpoint))
            self._out.append(PruneCheckpoints())

    def failed(self, number: int, error: Exception) -> None:
        """One could not be written: remove what there is of it, and go on."""
        if self._is_current(number):
            self.abandon()
            self.tell_failure(error)

    def tell_failure(self, error: Exception) -> None:
        """Tell people that checkpoints cannot be written, and which one there is."""
        kept = "there is none yet" if self.last is None else f"the last good one is {self.last}"
        text = f"a checkpoint could not be written ({one_line(error)}): going on, {kept}"
        self._out.append(Tell(text=text))

    def abandon(self) -> None:
        """Give up the one in the making, and remove what there is of it."""
        if self._files is not None:
            self._files = None
            self._out.append(DiscardCheckpoint(number=self.number))

    def _is_current(self, number: int) -> bool:
        return self._files is not None and self.number == number

    def check(self) -> None:
        """Assert that the last finished one is not newer than the newest."""
        assert self.last is None or self.last <= self.number

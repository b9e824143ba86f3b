"""One branch of one partition, computed again by the partition's own code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from downpour.cluster.replay.history import VersionId
from downpour.paramserver.errors import BadRecord
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.applied_set import REFUSED
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.record import Branch, Entry
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Version
from downpour.paramserver.transport.network.compress import BITS
from downpour.paramserver.transport.wire.gradients import place_of, rounded

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from downpour.workers.recompute import Computed


class BranchReplay:
    """A partition's state, on its way through the entries of one branch."""

    def __init__(
        self,
        branch: Branch,
        partition: Partition,
        config: UpdateConfig,
        *,
        weights: Tensor,
        statistics: npt.NDArray[np.float64] | None = None,
        parent: PartitionState | None = None,
    ) -> None:
        """At the branch's beginning.

        Args:
            branch: with its entries.
            partition: that the branch is of.
            config: of the run.
            weights: float32 [num_parameters], the partition's initial weights.
            statistics: the partition's initial BN statistics, see `PartitionStart`.
            parent: the state of the branch that this one began from, at that version.
        """
        self.branch = branch
        current, self._spare = _version(partition), _version(partition)
        current.weights.copy_(weights)
        self.state = PartitionState(partition, config, current)
        if statistics is not None:
            self.state.vectors.begin(statistics)
        if parent is not None:
            self.state.load(*parent.dump())
        self._at = 0

    @property
    def next(self) -> Entry | None:
        """The entry that comes next; None at the end."""
        entries = self.branch.entries
        return entries[self._at] if self._at < len(entries) else None

    def done(self) -> None:
        """Go on to the entry after the next one."""
        self._at += 1

    @property
    def version_id(self) -> VersionId:
        """The version that the branch is at."""
        return VersionId(self.branch.partition, self.branch.number, self.state.version)

    @property
    def weights_id(self) -> VersionId:
        """The version that the weights last changed at; within a round it is an older one."""
        return VersionId(self.branch.partition, self.branch.number, self.state.weights_version)

    def apply(self, entry: Entry, result: Computed) -> tuple[Push, Tensor]:
        """Apply an entry's gradient, as the partition did.

        Returns:
            The push, and its moments here, float32 [1, 3, num_features].

        Raises:
            BadRecord: the partition does not apply it this time.
        """
        part = self.state.partition
        push = Push(
            mailbox=0,
            replica=entry.replica,
            epoch=entry.epoch,
            batches=(entry.batch,),
            examples=result.examples,
            version=entry.version,
            loss=result.loss,
            gradient_norm=result.gradient_norm,
            wire=entry.wire,
        )
        moments = result.moments[:, :, part.feature_start : part.feature_stop]
        gradient = result.gradient[part.trained].clone()
        if entry.wire in BITS:
            place = place_of(entry.epoch, entry.batch, part.index)
            gradient = rounded(gradient, place, BITS[entry.wire])
        before = self.state.current
        outcome = self.state.apply(push, gradient, moments, self._room)
        self._turn_over(before)
        if outcome is not Outcome.APPLIED:
            raise BadRecord(
                f"partition {part.index} applied mini-batch (epoch {entry.epoch}, {entry.batch}), "
                f"which comes out as {outcome.name.lower()} here"
            )
        return push, moments

    def refuse(self, entry: Entry) -> bool:
        """Settle a mini-batch as refused, as the partition did.

        Returns:
            Whether the weights have changed: the last round may have ended with it.
        """
        before, version = self.state.current, self.state.weights_version
        self.state.ledger.applied.add(entry.epoch, entry.batch, REFUSED)
        self.state.close_last_round(self._room)
        self._turn_over(before)
        return self.state.weights_version != version

    def _turn_over(self, before: Version) -> None:
        if self.state.current is not before:
            self._spare = before

    def _room(self) -> Version:
        """Memory for the next version. Versions that the state still needs are left alone."""
        if self.state.config.policy.versions_kept:
            return _version(self.state.partition)
        return self._spare


def _version(partition: Partition) -> Version:
    """Memory for a version, with statistics as nobody has seen anything: mean 0, variance 1."""
    version = Version(
        weights=torch.zeros(partition.num_parameters),
        statistics=torch.zeros(2, partition.num_features),
    )
    version.statistics[1:].fill_(1.0)
    return version

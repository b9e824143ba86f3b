"""Gradients computed again, each on just the weights that it was computed on.

Here are the weights of the versions that are still needed, and the search for a version that the
record does not name. Not here: what is done with a gradient (`replay`).
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from downpour.cluster.replay.history import BranchId, Computation, ComputationId, History, VersionId
from downpour.paramserver.errors import BadRecord
from downpour.paramserver.messages import WireDtype
from downpour.paramserver.partition import record
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.transport.wire.weights import on_grid

if TYPE_CHECKING:
    from torch import Tensor

    from downpour.workers.recompute import Computed, Recomputer

MAX_TRIES = 20_000
"""Combinations of versions that a search tries at the most."""


class KeptWeights:
    """The weights of versions that gradients are still to be computed on."""

    def __init__(self, needed: Counter[VersionId], window: int) -> None:
        """Nothing yet.

        Args:
            needed: how many computations need each version.
            window: how many of each branch's last versions to keep besides; 0 keeps just those
                that are needed.
        """
        self._needed, self._window = needed, window
        self._kept: dict[BranchId, dict[int, Tensor]] = defaultdict(dict)

    def offer(self, version: VersionId, weights: Tensor) -> None:
        """Keep a copy of a version's weights, float32 [num_parameters], if it is needed."""
        kept = self._kept[version.branch]
        if (self._window or self._needed[version]) and version.version not in kept:
            kept[version.version] = weights.clone()

    def pass_by(self, version: VersionId) -> None:
        """A branch is at this version: drop what the window has left behind."""
        old = version._replace(version=version.version - self._window)
        if self._window and not self._needed[old]:
            self._kept[old.branch].pop(old.version, None)

    def has(self, bases: Sequence[VersionId]) -> bool:
        """Whether all of these are there."""
        return all(base.version in self._kept[base.branch] for base in bases)

    def get(self, version: VersionId) -> Tensor:
        """The weights of a version, float32 [num_parameters] of its partition."""
        return self._kept[version.branch][version.version]

    def used(self, bases: Sequence[VersionId]) -> None:
        """One computation does not need these any more."""
        for base in bases:
            self._needed[base] -= 1
            if not self._window and self._needed[base] <= 0:
                self._kept[base.branch].pop(base.version, None)

    def of_partition(self, partition: int) -> list[VersionId]:
        """All that is kept of a partition, the newest version of each branch first."""
        return [
            VersionId(p, number, version)
            for (p, number), kept in self._kept.items()
            if p == partition
            for version in sorted(kept, reverse=True)
        ]


class Gradients:
    """The computations of a history, computed again when their weights are there."""

    def __init__(
        self, history: History, partitions: Sequence[Partition], recomputer: Recomputer
    ) -> None:
        """Nothing computed yet."""
        self._history, self._partitions, self._recomputer = history, partitions, recomputer
        self.weights = KeptWeights(history.needed(), history.search_window())
        self._results: dict[ComputationId, Computed] = {}

    def get(self, computation: Computation) -> Computed | None:
        """The gradient of a computation; None if the weights for it are not there yet.

        Raises:
            BadRecord: it is another gradient than the one that was recorded.
        """
        found = self._results.get(computation.id)
        if found is not None or not self._history.complete(computation):
            return found
        bases = [computation.bases[p] for p in range(len(self._partitions))]
        if not self.weights.has(bases):
            return None
        wires = [computation.wires[p] for p in range(len(self._partitions))]
        result = self._compute(computation.id, bases, wires)
        if not _is_recorded(result, computation.id):
            epoch, batch, _ = computation.id
            at = ", ".join(f"version {v} of partition {p}" for p, _, v in bases)
            raise BadRecord(
                f"the gradient of mini-batch (epoch {epoch}, {batch}) on {at} is not the one that "
                f"was recorded: loss {result.loss!r}, norm {result.gradient_norm!r} here"
            )
        self._keep(computation, bases, result)
        return result

    def applied(self, computation: Computation) -> None:
        """One entry has applied this gradient; after the last one it is forgotten."""
        computation.left -= 1
        if not computation.left:
            self._results.pop(computation.id, None)

    def search(self, computation: Computation) -> bool:
        """Find the versions that the record does not name, by trying those that are there.

        The loss and the gradient's norm have to come out right to the last bit.
        """
        if self._history.complete(computation):
            return False
        choices = [
            self._choices(computation, partition) for partition in range(len(self._partitions))
        ]
        for chosen in itertools.islice(itertools.product(*choices), MAX_TRIES):
            bases, wires = zip(*chosen, strict=True)
            if not self.weights.has(bases):
                continue
            result = self._compute(computation.id, bases, wires)
            if _is_recorded(result, computation.id):
                computation.bases = {base.partition: base for base in bases}
                computation.wires = dict(enumerate(wires))
                self._keep(computation, bases, result)
                return True
        return False

    def _choices(
        self, computation: Computation, partition: int
    ) -> list[tuple[VersionId, WireDtype]]:
        """The versions of a partition, and ways, that a gradient may have been computed on."""
        if partition in computation.bases:
            return [(computation.bases[partition], computation.wires[partition])]
        wires = self._history.wires(partition)
        return [(base, wire) for base in self.weights.of_partition(partition) for wire in wires]

    def _compute(
        self, id: ComputationId, bases: Sequence[VersionId], wires: Sequence[WireDtype]
    ) -> Computed:
        for base, wire in zip(bases, wires, strict=True):
            part = self._partitions[base.partition]
            weights = self.weights.get(base)
            if wire.rounds_weights:
                weights = on_grid(weights)
            self._recomputer.weights[part.start : part.stop] = weights.numpy()
        epoch, batch, _ = id
        return self._recomputer.compute(epoch, batch)

    def _keep(self, computation: Computation, bases: Sequence[VersionId], result: Computed) -> None:
        self._results[computation.id] = result
        self.weights.used(bases)


def _is_recorded(result: Computed, id: ComputationId) -> bool:
    return record.fingerprint(result.loss, result.gradient_norm) == id[2]

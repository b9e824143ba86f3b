"""What the records of a run say when they are put together. Pure: nothing is computed here.

Each start of a partition recorded a branch. A partition that started again from a snapshot is a
branch that begins where an older one, its parent, had the same version. What the parent applied
after that version is lost.

One computation is one gradient: a mini-batch on certain weights. Its fingerprint is the same in the
records of all partitions, which tells the entries of one computation from those of another on the
same mini-batch.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from downpour.paramserver.errors import BadRecord
from downpour.paramserver.messages import Outcome, WireDtype
from downpour.paramserver.partition.record import Branch, Entry

BranchId: TypeAlias = tuple[int, int]
"""Partition, and number of the branch."""
ComputationId: TypeAlias = tuple[int, int, int]
"""Epoch, mini-batch, and fingerprint."""


class VersionId(NamedTuple):
    """One version of a partition, on one of its branches."""

    partition: int
    number: int
    """Of the branch."""
    version: int

    @property
    def branch(self) -> BranchId:
        """The branch that it is on."""
        return self.partition, self.number


def computation_of(entry: Entry) -> ComputationId:
    """Which computation an entry is about."""
    return entry.epoch, entry.batch, entry.fingerprint


@dataclass(kw_only=True)
class Computation:
    """One gradient, and who took it."""

    id: ComputationId
    bases: dict[int, VersionId] = field(default_factory=dict)
    """By partition, the version that it was computed on. A partition that never got the push is
    missing: its process died between two pushes."""
    wires: dict[int, WireDtype] = field(default_factory=dict)
    """By partition, how the weights went and the gradient came; for those in `bases`."""
    left: int = 0
    """Entries that apply it and have not been replayed yet."""


class History:
    """The branches and computations of a run."""

    def __init__(self, branches: Iterable[Branch], num_partitions: int) -> None:
        """Put the branches together.

        Args:
            branches: of all partitions. Those of followers that never became the partition do not
                count: the partition recorded the same pushes.
            num_partitions: of the run.

        Raises:
            BadRecord: a partition's first branch is missing.
        """
        self.num_partitions = num_partitions
        self.branches = {(b.partition, b.number): b for b in branches if b.counts}
        for partition in range(num_partitions):
            if (partition, 0) not in self.branches or self.branches[partition, 0].version:
                raise BadRecord(f"the record of partition {partition} has no beginning")
        self._parents = _parents(self.branches)
        self._lasting = _lasting(self.branches, self._parents)
        self._children: dict[VersionId, list[Branch]] = defaultdict(list)
        for (partition, number), parent in self._parents.items():
            branch = self.branches[partition, number]
            self._children[VersionId(partition, parent, branch.version)].append(branch)
        self.computations: dict[ComputationId, Computation] = {}
        for branch in self.branches.values():
            for entry in branch.entries:
                self._note(branch, entry)

    @property
    def num_entries(self) -> int:
        """Entries of all branches."""
        return sum(len(branch.entries) for branch in self.branches.values())

    def children(self, version: VersionId) -> list[Branch]:
        """The branches that begin at a version of another."""
        return self._children.get(version, [])

    def lasts(self, version: VersionId) -> bool:
        """Whether the update that led to a version is in the newest branch.

        It is not if the partition started again from an older version.
        """
        return version.version <= self._lasting.get(version.branch, 0)

    def complete(self, computation: Computation) -> bool:
        """Whether the record says on which version of every partition it was computed."""
        return len(computation.bases) == self.num_partitions

    def wires(self, partition: int) -> list[WireDtype]:
        """The ways by which gradients came to a partition."""
        found = {c.wires[partition] for c in self.computations.values() if partition in c.wires}
        return sorted(found)

    def needed(self) -> Counter[VersionId]:
        """How many computations need the weights of each version."""
        needed: Counter[VersionId] = Counter()
        for computation in self.computations.values():
            if computation.left:
                needed.update(computation.bases.values())
        return needed

    def search_window(self) -> int:
        """How many of the last versions to keep, so that a missing one is among them.

        It is 0 if the record is complete.
        """
        complete = all(self.complete(c) for c in self.computations.values() if c.left)
        return 0 if complete else 2 * self._largest_staleness() + 64

    def _note(self, branch: Branch, entry: Entry) -> None:
        id = computation_of(entry)
        computation = self.computations.setdefault(id, Computation(id=id))
        computation.left += entry.outcome is Outcome.APPLIED
        if entry.outcome is not Outcome.REFUSED_UNKNOWN:
            # A follower has taken pushes that were computed before its own branch began.
            number = branch.number
            while entry.version < self.branches[branch.partition, number].version:
                number = self._parents[branch.partition, number]
            base = VersionId(branch.partition, number, entry.version)
            computation.bases[branch.partition] = base
            computation.wires[branch.partition] = entry.wire

    def _largest_staleness(self) -> int:
        largest = 0
        for branch in self.branches.values():
            version = branch.version
            for entry in branch.entries:
                if entry.outcome is Outcome.APPLIED:
                    largest = max(largest, version - entry.version)
                    version += 1
        return largest


def _parents(branches: Mapping[BranchId, Branch]) -> dict[BranchId, int]:
    """By branch, the number of the branch that it began from.

    That is the newest older branch that is not ahead of it.

    Raises:
        BadRecord: there is none.
    """
    parents: dict[BranchId, int] = {}
    for (partition, number), branch in sorted(branches.items()):
        if number == 0:
            continue
        older = [n for p, n in branches if p == partition and n < number]
        behind = [n for n in older if branches[partition, n].version <= branch.version]
        if not behind:
            raise BadRecord(f"the record of partition {partition} has no beginning")
        parents[partition, number] = max(behind)
    return parents


def _lasting(
    branches: Mapping[BranchId, Branch], parents: Mapping[BranchId, int]
) -> dict[BranchId, int]:
    """The version up to which each branch's updates are in the newest branch of its partition.

    A branch of which nothing lasts is left out.
    """
    lasting: dict[BranchId, int] = {}
    for partition in {p for p, _ in branches}:
        number = max(n for p, n in branches if p == partition)
        lasting[partition, number] = sys.maxsize
        while (partition, number) in parents:
            version = branches[partition, number].version
            number = parents[partition, number]
            lasting[partition, number] = version
    return lasting

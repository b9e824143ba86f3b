"""A run computed again, in one process, from its record: `downpour replay`.

Every partition's record says in which order it took which pushes, and on which version each was
computed. So each gradient can be computed again from just the weights that it was computed on, and
applied in the same order by the same code: the weights come out the same to the bit, on the same
kind of processor with the same number of threads. Where they do not, the first gradient that is
another one is named. A partition that started again from a snapshot is a branch of its own, which
begins where the one before had that version.

Where a process died between its pushes to two partitions, only one of them knows on which version
of its own the gradient was computed. The other's is found by trying those that it had: the loss and
the gradient's norm have to come out right to the last bit.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from downpour.paramserver.errors import BadRecord
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition import record
from downpour.paramserver.partition.applied_set import REFUSED
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.record import Branch, Entry

if TYPE_CHECKING:
    from torch import Tensor

    from downpour.paramserver.partition.state import PartitionState
    from downpour.paramserver.partition.update_config import UpdateConfig
    from downpour.workers.recompute import Computed, Recomputer

Key = tuple[int, int, int]
"""Epoch, mini-batch and fingerprint of one computation."""
Place = tuple[int, int, int]
"""Partition, branch and version."""
Taken: TypeAlias = "Callable[[PartitionState, Push, Tensor], None]"
"""Gets a partition's state after a push, the push, and its moments `[1, 3, F]` there."""
MAX_TRIES = 20_000


@dataclass(kw_only=True)
class _Computation:
    """One gradient, and who took it."""

    key: Key
    places: dict[int, Place] = field(default_factory=dict)
    """By partition, the version that it was computed on."""
    left: int = 0
    """Entries that apply it and are still to come."""
    result: Computed | None = None


class _Line:
    """One branch of one partition, as it is computed again."""

    def __init__(self, branch: Branch, state: PartitionState, spare: Any) -> None:
        self.branch, self.state = branch, state
        self._spare = spare
        self.at = 0
        self.kept: dict[int, Tensor] = {}
        """Weights of versions that are still needed."""

    @property
    def head(self) -> Entry | None:
        """The entry that is next."""
        return self.branch.entries[self.at] if self.at < len(self.branch.entries) else None

    def apply(self, push: Push, gradient: Tensor, moments: Tensor) -> Outcome:
        """Take in a push, as the partition did."""
        before = self.state.current
        outcome = self.state.apply(push, gradient, moments, self._room)
        if self.state.current is not before:
            self._spare = before
        return outcome

    def refuse(self, entry: Entry) -> None:
        """Settle a mini-batch as refused, as the partition did."""
        before = self.state.current
        self.state.ledger.applied.add(entry.epoch, entry.batch, REFUSED)
        self.state.close_last_round(self._room)
        if self.state.current is not before:
            self._spare = before

    def _room(self) -> Any:
        """Where the next version goes; versions that the state still needs are left alone."""
        if not self.state.config.policy.versions_kept:
            return self._spare
        import torch

        from downpour.paramserver.partition.vectors import Version

        current = self.state.current
        return Version(
            weights=torch.empty_like(current.weights),
            statistics=torch.empty_like(current.statistics),
        )


def _parents(known: Mapping[tuple[int, int], Branch]) -> dict[tuple[int, int], int]:
    """By branch (partition, number), the number of the one that it began as."""
    before: dict[tuple[int, int], int] = {}
    for (partition, number), branch in sorted(known.items()):
        if number == 0:
            continue
        older = [n for p, n in known if p == partition and n < number]
        parents = [n for n in older if known[partition, n].version <= branch.version]
        if not parents:
            raise BadRecord(f"the record of partition {partition} has no beginning")
        before[partition, number] = max(parents)
    return before


def _lasting(
    known: Mapping[tuple[int, int], Branch], before: Mapping[tuple[int, int], int]
) -> dict[tuple[int, int], int]:
    """Up to which version each branch's updates are in the newest; `before` has the parents.

    Branches (partition, number) of which nothing lasts are not in it.
    """
    lasting: dict[tuple[int, int], int] = {}
    for partition in {p for p, _ in known}:
        number = max(n for p, n in known if p == partition)
        lasting[partition, number] = sys.maxsize
        while (partition, number) in before:
            version = known[partition, number].version
            number = before[partition, number]
            lasting[partition, number] = version
    return lasting


class Replay:
    """The whole of a record, computed again."""

    def __init__(
        self,
        branches: Iterable[Branch],
        *,
        partitions: Sequence[Partition],
        config: UpdateConfig,
        weights: Tensor,
        recomputer: Recomputer,
        seen: Callable[[PartitionState], None] = lambda _: None,
        taken: Taken = lambda state, push, moments: None,
    ) -> None:
        """`weights` [P] are the initial ones; `seen` gets each state at each of its versions.

        `taken` gets, after `seen`, each push that was applied for good: not those that a partition
        lost when it started again from an older version.
        """
        self._partitions, self._config = partitions, config
        self._weights, self._recomputer, self._seen = weights, recomputer, seen
        self._taken = taken
        self._waiting: dict[Place, list[Branch]] = defaultdict(list)
        self._lines: dict[tuple[int, int], _Line] = {}
        self._computations: dict[Key, _Computation] = {}
        self._needed: Counter[Place] = Counter()
        self.num_entries = 0
        self.num_done = 0
        """Entries that have been computed again."""
        # What a follower applied that never became the partition, the partition recorded, too.
        known = {(b.partition, b.number): b for b in branches if b.counts}
        before = _parents(known)
        for branch in known.values():
            self._note(branch, known, before)
        for computation in self._computations.values():
            if computation.left:
                self._needed.update(computation.places.values())
        missing = [
            c for c in self._computations.values() if c.left and len(c.places) < len(partitions)
        ]
        # Where versions have to be guessed, the last ones are kept.
        self._window = 2 * self._largest_staleness(known.values()) + 64 if missing else 0
        for (partition, number), parent in before.items():
            branch = known[partition, number]
            self._waiting[partition, parent, branch.version].append(branch)
        self._lasting = _lasting(known, before)
        for partition in range(len(partitions)):
            if (partition, 0) not in known or known[partition, 0].version:
                raise BadRecord(f"the record of partition {partition} has no beginning")
            self._begin(known[partition, 0], None)
        self._num_lines = len(known)

    def _note(
        self,
        branch: Branch,
        known: Mapping[tuple[int, int], Branch],
        before: Mapping[tuple[int, int], int],
    ) -> None:
        self.num_entries += len(branch.entries)
        for entry in branch.entries:
            key = entry.epoch, entry.batch, entry.fingerprint
            found = self._computations.setdefault(key, _Computation(key=key))
            found.left += entry.outcome is Outcome.APPLIED
            if entry.outcome is not Outcome.REFUSED_UNKNOWN:
                # One that followed has taken pushes on versions from before its beginning.
                partition, number = branch.partition, branch.number
                while entry.version < known[partition, number].version:
                    number = before[partition, number]
                found.places[partition] = partition, number, entry.version

    @staticmethod
    def _largest_staleness(branches: Iterable[Branch]) -> int:
        largest = 0
        for branch in branches:
            version = branch.version
            for entry in branch.entries:
                if entry.outcome is Outcome.APPLIED:
                    largest = max(largest, version - entry.version)
                    version += 1
        return largest

    def run(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compute everything again. Raises `BadRecord` where that is not what was recorded."""
        while self.num_done < self.num_entries:
            before = self.num_done, len(self._lines)
            for line in list(self._lines.values()):
                self._advance(line)
            progress(self.num_done, self.num_entries)
            if (self.num_done, len(self._lines)) == before:
                self._search()
        if len(self._lines) < self._num_lines:
            raise BadRecord("a partition started from a version that the record does not reach")

    @property
    def versions(self) -> tuple[int, ...]:
        """Of the newest branch of each partition."""
        newest = {p: max(b for q, b in self._lines if q == p) for p, _ in self._lines}
        return tuple(self._lines[p, b].state.version for p, b in sorted(newest.items()))

    def _begin(self, branch: Branch, parent: PartitionState | None) -> None:
        import torch

        from downpour.paramserver.partition.state import PartitionState
        from downpour.paramserver.partition.vectors import Version

        partition = self._partitions[branch.partition]
        current, spare = (
            Version(
                weights=torch.zeros(partition.num_parameters),
                statistics=torch.zeros(2, partition.num_features),
            )
            for _ in range(2)
        )
        current.statistics[1:].fill_(1.0)
        current.weights.copy_(self._weights[partition.start : partition.stop])
        state = PartitionState(partition, self._config, current)
        if parent is not None:
            state.load(*parent.dump())
        line = _Line(branch, state, spare)
        self._lines[branch.partition, branch.number] = line
        self._reached(line)

    def _reached(self, line: _Line) -> None:
        """A line is at a new version."""
        version, branch = line.state.version, line.branch
        place = branch.partition, branch.number, version
        # A branch may begin in the middle of a round, with weights of an older version.
        changed = line.state.weights_version
        needed = self._window or self._needed[branch.partition, branch.number, changed]
        if needed and changed not in line.kept:
            line.kept[changed] = line.state.current.weights.clone()
        if self._window:
            old = version - self._window
            if not self._needed[branch.partition, branch.number, old]:
                line.kept.pop(old, None)
        self._seen(line.state)
        for child in self._waiting.pop(place, []):
            self._begin(child, line.state)

    def _advance(self, line: _Line) -> None:
        while (entry := line.head) is not None:
            key = entry.epoch, entry.batch, entry.fingerprint
            before = line.state.weights_version
            if entry.outcome is Outcome.APPLIED:
                computation = self._computations[key]
                if not self._ready(computation):
                    return
                self._take(line, entry, computation)
            elif entry.outcome in (Outcome.REFUSED_LOSS, Outcome.REFUSED_GRADIENT):
                line.refuse(entry)
                if line.state.weights_version != before:  # a last round's end
                    self._reached(line)
            line.at += 1
            self.num_done += 1

    def _ready(self, computation: _Computation) -> bool:
        if computation.result is not None:
            return True
        if len(computation.places) < len(self._partitions):
            return False
        places = [computation.places[p] for p in range(len(self._partitions))]
        if not self._all_kept(places):
            return False
        result = self._compute(computation.key, places)
        if record.fingerprint(result.loss, result.gradient_norm) != computation.key[2]:
            epoch, batch, _ = computation.key
            at = ", ".join(f"version {v} of partition {p}" for p, _, v in places)
            raise BadRecord(
                f"the gradient of mini-batch (epoch {epoch}, {batch}) on {at} is not the one that "
                f"was recorded: loss {result.loss!r}, norm {result.gradient_norm!r} here"
            )
        self._settle(computation, places, result)
        return True

    def _all_kept(self, places: Sequence[Place]) -> bool:
        return all((p, b) in self._lines and v in self._lines[p, b].kept for p, b, v in places)

    def _compute(self, key: Key, places: Sequence[Place]) -> Computed:
        for partition, branch, version in places:
            part = self._partitions[partition]
            kept = self._lines[partition, branch].kept[version]
            self._recomputer.weights[part.start : part.stop] = kept.numpy()
        return self._recomputer.compute(key[0], key[1])

    def _settle(self, computation: _Computation, places: Sequence[Place], result: Computed) -> None:
        computation.result = result
        for place in places:
            self._needed[place] -= 1
            if not self._window and self._needed[place] <= 0:
                self._lines[place[0], place[1]].kept.pop(place[2], None)

    def _take(self, line: _Line, entry: Entry, computation: _Computation) -> None:
        result = computation.result
        assert result is not None
        part = line.state.partition
        push = Push(
            mailbox=0,
            replica=entry.replica,
            epoch=entry.epoch,
            batches=(entry.batch,),
            examples=result.examples,
            version=entry.version,
            loss=result.loss,
            gradient_norm=result.gradient_norm,
        )
        moments = result.moments[:, :, part.feature_start : part.feature_stop]
        gradient = result.gradient[part.start : part.stop].clone()
        outcome = line.apply(push, gradient, moments)
        if outcome is not Outcome.APPLIED:
            raise BadRecord(
                f"partition {part.index} applied mini-batch (epoch {entry.epoch}, {entry.batch}), "
                f"which comes out as {outcome.name.lower()} here"
            )
        computation.left -= 1
        if not computation.left:
            computation.result = None
        self._reached(line)
        place = part.index, line.branch.number
        if line.state.version <= self._lasting.get(place, 0):
            self._taken(line.state, push, moments)

    def _search(self) -> None:
        """Nothing goes on: find on which versions a gradient was computed that some did not get."""
        heads = [line.head for line in self._lines.values() if line.head is not None]
        for entry in heads:
            computation = self._computations[entry.epoch, entry.batch, entry.fingerprint]
            partial = len(computation.places) < len(self._partitions)
            if partial and computation.result is None and self._guess(computation):
                return
        epoch, batch = (heads[0].epoch, heads[0].batch) if heads else (0, 0)
        raise BadRecord(
            f"the record does not say on which weights mini-batch (epoch {epoch}, {batch}) was "
            "computed: a part of it is missing"
        )

    def _guess(self, computation: _Computation) -> bool:
        choices: list[list[Place]] = []
        for partition in range(len(self._partitions)):
            if partition in computation.places:
                choices.append([computation.places[partition]])
                continue
            lines = [(b, line) for (p, b), line in self._lines.items() if p == partition]
            choices.append(
                [(partition, b, v) for b, line in lines for v in sorted(line.kept, reverse=True)]
            )
        tries = itertools.islice(itertools.product(*choices), MAX_TRIES)
        for places in tries:
            if not self._all_kept(places):
                continue
            result = self._compute(computation.key, places)
            if record.fingerprint(result.loss, result.gradient_norm) == computation.key[2]:
                computation.places = {place[0]: place for place in places}
                self._settle(computation, places, result)
                return True
        return False

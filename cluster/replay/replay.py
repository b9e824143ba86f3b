"""A run computed again, in one process, from its record.

The record of a partition says in which order it took which pushes, and on which version each was
computed. So each gradient is computed again on just the weights that it was computed on, and
applied in the same order by the same code. The weights come out the same to the bit, on the same
kind of processor with the same number of threads. If they do not, the first gradient that differs
is named.

If a process died between its pushes to two partitions, only one of them knows on which of its
versions the gradient was computed. The version of the other is found by search (`gradients`).

Here: the order in which all branches advance. What the records say together is in `history`, one
branch in `branch`, a run's folder in `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from downpour.cluster.replay.branch import BranchReplay
from downpour.cluster.replay.gradients import Gradients
from downpour.cluster.replay.history import BranchId, History, computation_of
from downpour.paramserver.errors import BadRecord
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.record import Branch, Entry
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from downpour.workers.recompute import Computed, Recomputer

Seen: TypeAlias = "Callable[[PartitionState], None]"
"""Gets each partition's state at each of its versions."""
Taken: TypeAlias = "Callable[[PartitionState, Push, Tensor], None]"
"""Gets a partition's state after a push, the push, and its moments there, float32 [1, 3, F]."""


REFUSED = (Outcome.REFUSED_LOSS, Outcome.REFUSED_GRADIENT)
"""What settles a mini-batch without an update."""


class Replay:
    """The whole of a record, computed again."""

    def __init__(
        self,
        branches: Iterable[Branch],
        *,
        partitions: Sequence[Partition],
        config: UpdateConfig,
        weights: Tensor,
        statistics: npt.NDArray[np.float64] | None = None,
        recomputer: Recomputer,
        seen: Seen = lambda _: None,
        taken: Taken = lambda state, push, moments: None,
    ) -> None:
        """Every partition is at its beginning.

        Args:
            branches: the record.
            partitions: of the run.
            config: of the run.
            weights: the initial weights, float32 [P].
            statistics: the initial BN statistics, float64 [4, F]; see `PartitionStart`.
            recomputer: computes a gradient from weights and a mini-batch.
            seen: gets each state at each of its versions.
            taken: gets, after `seen`, each push that was applied for good, which leaves out those
                that a partition lost when it started again from an older version.

        Raises:
            BadRecord: the record of a partition has no beginning.
        """
        self._history = History(branches, len(partitions))
        self._gradients = Gradients(self._history, partitions, recomputer)
        self._partitions, self._config, self._weights = partitions, config, weights
        self._statistics = statistics
        self._seen, self._taken = seen, taken
        self._branches: dict[BranchId, BranchReplay] = {}
        self.num_entries = self._history.num_entries
        self.num_done = 0
        """Entries that have been replayed."""
        for partition in range(len(partitions)):
            self._begin(self._history.branches[partition, 0], None)

    def run(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compute everything again.

        Args:
            progress: gets the entries done and the entries in all.

        Raises:
            BadRecord: something else comes out than what was recorded.
        """
        while self.num_done < self.num_entries:
            before = self.num_done, len(self._branches)
            for branch in list(self._branches.values()):
                self._advance(branch)
            progress(self.num_done, self.num_entries)
            if (self.num_done, len(self._branches)) == before:
                self._search()
        if len(self._branches) < len(self._history.branches):
            raise BadRecord("a partition started from a version that the record does not reach")

    @property
    def versions(self) -> tuple[int, ...]:
        """The version of each partition's newest branch."""
        newest = {p: max(b for q, b in self._branches if q == p) for p, _ in self._branches}
        return tuple(self._branches[p, b].state.version for p, b in sorted(newest.items()))

    def _begin(self, branch: Branch, parent: PartitionState | None) -> None:
        part = self._partitions[branch.partition]
        statistics = self._statistics
        if statistics is not None:
            statistics = statistics[:, part.feature_start : part.feature_stop]
        begun = BranchReplay(
            branch,
            part,
            self._config,
            weights=self._weights[part.start : part.stop],
            statistics=statistics,
            parent=parent,
        )
        self._branches[branch.partition, branch.number] = begun
        self._reached(begun)

    def _reached(self, branch: BranchReplay) -> None:
        """A branch is at a new version."""
        # A branch may begin in the middle of a round, with weights of an older version.
        self._gradients.weights.offer(branch.weights_id, branch.state.current.weights)
        self._gradients.weights.pass_by(branch.version_id)
        self._seen(branch.state)
        for child in self._history.children(branch.version_id):
            if (child.partition, child.number) not in self._branches:
                self._begin(child, branch.state)

    def _advance(self, branch: BranchReplay) -> None:
        """Replay entries up to the first whose gradient cannot be computed yet."""
        while (entry := branch.next) is not None:
            if entry.outcome is Outcome.APPLIED:
                computation = self._history.computations[computation_of(entry)]
                result = self._gradients.get(computation)
                if result is None:
                    return
                self._apply(branch, entry, result)
                self._gradients.applied(computation)
            elif entry.outcome in REFUSED and branch.refuse(entry):
                self._reached(branch)
            branch.done()
            self.num_done += 1

    def _apply(self, branch: BranchReplay, entry: Entry, result: Computed) -> None:
        push, moments = branch.apply(entry, result)
        self._reached(branch)
        if self._history.lasts(branch.version_id):
            self._taken(branch.state, push, moments)

    def _search(self) -> None:
        """No branch advances: find a version that the record does not name.

        Raises:
            BadRecord: there is none that gives the gradient that was recorded.
        """
        waiting = [b.next for b in self._branches.values() if b.next is not None]
        for entry in waiting:
            if self._gradients.search(self._history.computations[computation_of(entry)]):
                return
        epoch, batch = (waiting[0].epoch, waiting[0].batch) if waiting else (0, 0)
        raise BadRecord(
            f"the record does not say on which weights mini-batch (epoch {epoch}, {batch}) was "
            "computed: a part of it is missing"
        )

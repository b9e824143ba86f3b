"""The state of one partition, and its one door: `apply_all`.

Pure logic apart from transport, clock and Ray. A push comes in and is judged (`ledger`). Either it
becomes a new version (`combiner`, `vectors`), or it changes nothing but counters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition import persistence
from downpour.paramserver.partition.combiner import Place, make_combiner
from downpour.paramserver.partition.ledger import make_ledger
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Arrival, Version, make_vectors


class PartitionState:
    """Ledger and vectors of one partition, which change together."""

    def __init__(self, partition: Partition, config: UpdateConfig, current: Version) -> None:
        """Version 0, with the weights and statistics that `current` holds.

        Raises:
            BadConfiguration: The weights are of another length than the partition's.
        """
        self.partition = partition
        self.config = config
        self.ledger = make_ledger(config)
        self.vectors = make_vectors(partition, config, current)
        self._combiner = make_combiner(self.ledger, self.vectors)

    @property
    def version(self) -> int:
        """Pushes applied."""
        return self.ledger.version

    @property
    def weights_version(self) -> int:
        """The version at which the weights changed last: the latest, or the round's start."""
        return self.ledger.weights_version

    @property
    def current(self) -> Version:
        """Where the latest version lies."""
        return self.vectors.current

    def apply(
        self, push: Push, gradient: Tensor, moments: Tensor, into: Place | None = None
    ) -> Outcome:
        """Take in one push. See `apply_all`."""
        return self.apply_all(((push, gradient, moments),), into)[0]

    def apply_all(self, arrivals: Sequence[Arrival], into: Place | None = None) -> list[Outcome]:
        """Take in pushes in their order; between snapshots and rounds, the only way to change this.

        The result is to the bit what one push after the other would give, but only the last version
        can be seen.

        Args:
            arrivals: For each push its header; this partition's slice of the sum of its
                mini-batches' mean gradients, float32 [n], which is overwritten; and its moments,
                float32 [batches, 3, f].
            into: Gives where to write the new version, if there is one: over the latest (the
                default), or elsewhere. If gradients are compensated, versions that are at most
                `StalenessPolicy.versions_kept` old must be left alone.

        Returns:
            What became of each push.
        """
        return self._combiner.apply_all(arrivals, into)

    def close_round(self, into: Place | None = None) -> None:
        """Apply the mean of what an incomplete round has taken, if it has taken anything."""
        self._combiner.close_round(into)

    def close_last_round(self, into: Place | None = None) -> bool:
        """Close the round if no mini-batch of the run is to come.

        Returns:
            Whether a round was closed.
        """
        return self._combiner.close_last_round(into)

    def room(self) -> dict[str, Tensor]:
        """Return memory for the large tensors of a `dump`, as yet untouched."""
        return persistence.room(self.vectors)

    def dump(
        self, into: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, object], dict[str, Tensor]]:
        """Copy the state.

        Args:
            into: Tensors to copy large ones to, by name (`room`). Memory that was used before costs
                a fraction of fresh memory.

        Returns:
            Plain metadata, and tensors by name. `load` takes both.
        """
        return persistence.dump(self.ledger, self.vectors, self._combiner, into or {})

    def load(self, meta: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `dump` gave, writing the weights to where `current` lies.

        Raises:
            BadSnapshot: No `dump` of this configuration gave this. The state is then of no use.
        """
        persistence.load(self.ledger, self.vectors, self._combiner, meta, tensors)

    def check(self) -> None:
        """Assert the invariants."""
        persistence.check(self.ledger, self.vectors, self._combiner)

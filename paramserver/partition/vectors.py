"""The vectors of a partition, and one update of them.

Which push is applied, and at which rate, is `ledger`'s decision; how several pushes become one
version is `combiner`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.messages import Push
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.witness import Witness
from downpour.paramserver.rules.averaging import AVERAGE, AVERAGE_STATISTICS, Averaging
from downpour.paramserver.rules.statistics import BatchStatistics

Arrival = tuple[Push, Tensor, Tensor]
"""A push with this partition's gradient, float32 [t], t being the parameters that it trains, and
moments, float32 [batches, 3, f]."""


@dataclass(kw_only=True)
class Version:
    """Where the vectors of a version lie. The caller chooses; a later one may overwrite them."""

    weights: Tensor
    """float32 [n], n being the parameters of the partition."""
    statistics: Tensor
    """float32 [2, f], f being its features: moving averages of mean and unbiased variance."""


def measure(gradient: Tensor, moments: Tensor) -> tuple[float, float]:
    """Measure what `Ledger.is_sound` asks for, in one read of memory.

    `isfinite().all()` would write a mask, too.

    Args:
        gradient: float32 [n].
        moments: float32 [batches, 3, f].

    Returns:
        The gradient's squared length, and the sum of the moments.
    """
    total = float(moments.sum()) if moments.numel() else 0.0
    return float(torch.dot(gradient, gradient)), total


class Vectors:
    """Weights, rule state and BN statistics of a partition."""

    def __init__(self, partition: Partition, config: UpdateConfig, current: Version) -> None:
        """Start from the weights and statistics that `current` holds.

        Raises:
            BadConfiguration: The weights are of another length than the partition's.
        """
        if current.weights.shape != (partition.num_parameters,):
            raise BadConfiguration(
                f"partition {partition.index} has {partition.num_parameters} parameters, but was "
                f"given weights of shape {tuple(current.weights.shape)}"
            )
        self.partition = partition
        self.config = config
        self.current = current
        """The latest version."""
        self._rule = config.rule.within(partition.num_decayed, partition.layers)
        self.rule_state = self._rule.init(partition.num_trained)
        """The rule's vectors, float32 [t] by name, t being the trained parameters; a combiner's own
        are among them."""
        self.statistics = BatchStatistics(partition.num_features, config.statistics)
        self.witness = Witness()
        """The mini-batches whose gradients went into the weights, or into their round's sum."""

    def begin(self, statistics: npt.NDArray[np.float64]) -> None:
        """Start from BN statistics that a network brings along, float64 [4, f].

        See `PartitionStart.statistics`.
        """
        self.current.statistics.copy_(torch.from_numpy(statistics[:2].copy()))
        self.statistics.begin(statistics[2], statistics[3])

    @property
    def scored(self) -> Version:
        """The weights and statistics that are the run's model: the latest ones."""
        return self.current

    def step(
        self,
        gradient: Tensor,
        moments: Sequence[Tensor] | Tensor,
        rate: float,
        into: Version,
        push: Push | None = None,
    ) -> None:
        """Weight decay, the rule, and the BN statistics; `into` becomes the latest version.

        Args:
            gradient: float32 [t], t being the partition's trained parameters; overwritten if weight
                decay or the rule does so.
            moments: Of each mini-batch, float32 [3, f].
            rate: The learning rate.
            into: Where to write the new version; may be the latest one itself.
            push: Whose gradient it is: the sum of its mini-batches'. None if it is a round's mean.
        """
        config, current = self.config, self.current
        batches = 1
        if push is not None:
            batches = len(push.batches)
            self.witness.add(push.epoch, push.batches)
        config.regulariser.decay(gradient, current.weights, self.partition.num_decayed, batches)
        self._rule.update(current.weights, gradient, self.rule_state, rate, into.weights, batches)
        self.current = into
        if self.partition.num_features:
            if isinstance(moments, Tensor):
                self.statistics.update_all(current.statistics, moments, into.statistics)
                return
            source = current.statistics
            for each in moments:
                self.statistics.update(source, each, into.statistics)
                source = into.statistics

    def large(self) -> dict[str, Tensor]:
        """The vectors of a snapshot that are as long as the partition, by name."""
        large = {"weights": self.current.weights, "statistics": self.current.statistics}
        return large | {f"rule.{name}": vector for name, vector in self.rule_state.items()}

    def check(self) -> None:
        """Assert the invariants."""
        assert torch.isfinite(self.current.weights).all()
        assert torch.isfinite(self.current.statistics).all()


class PartialVectors(Vectors):
    """Vectors of which some are frozen, or whose weights are averaged as they change, or both.

    Frozen weights are the last ones. They take no part in an update, and the rule has no state for
    them.
    """

    def __init__(self, partition: Partition, config: UpdateConfig, current: Version) -> None:
        """As for `Vectors`; the average is that of no update yet, and is the weights."""
        super().__init__(partition, config, current)
        self._trained = partition.num_trained
        self._averaging: Averaging | None = None
        if config.average_decay is not None:
            self._averaging = Averaging(decay=config.average_decay)
            trained = self._part(current)
            self.rule_state |= self._averaging.init(trained.weights, trained.statistics)

    def begin(self, statistics: npt.NDArray[np.float64]) -> None:
        """See `Vectors`."""
        super().begin(statistics)
        if self._averaging is not None:
            self.rule_state[AVERAGE_STATISTICS].copy_(self.current.statistics)

    def _part(self, version: Version) -> Version:
        """Of a version, what updates change."""
        if self._trained == len(version.weights):
            return version
        return Version(weights=version.weights[: self._trained], statistics=version.statistics)

    @property
    def scored(self) -> Version:
        """See `Vectors`: the averages, if there are any; on memory of their own."""
        if self._averaging is None:
            return self.current
        state = self.rule_state
        weights = torch.cat([state[AVERAGE], self.current.weights[self._trained :]])
        return Version(weights=weights, statistics=state[AVERAGE_STATISTICS].clone())

    def step(
        self,
        gradient: Tensor,
        moments: Sequence[Tensor] | Tensor,
        rate: float,
        into: Version,
        push: Push | None = None,
    ) -> None:
        """See `Vectors`."""
        before, after = self.current.weights, self._part(into)
        self.current = self._part(self.current)
        super().step(gradient, moments, rate, after, push)
        self.current = into
        if self._trained < len(before) and into.weights.data_ptr() != before.data_ptr():
            into.weights[self._trained :] = before[self._trained :]
        if self._averaging is not None:
            state = self.rule_state
            self._averaging.update(state, after.weights, after.statistics, len(moments))


def make_vectors(partition: Partition, config: UpdateConfig, current: Version) -> Vectors:
    """Return the vectors that a partition needs, starting from what `current` holds.

    Raises:
        BadConfiguration: The weights are of another length than the partition's.
    """
    partial = partition.num_frozen or config.average_decay is not None
    return (PartialVectors if partial else Vectors)(partition, config, current)

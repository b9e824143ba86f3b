"""Partitions: byte-balanced half-open ranges of a model's flat vectors.

A model is two flat axes to the server: `P` parameters (weights and gradients, float32), of which
the first `num_decayed` take weight decay and the last `num_frozen` never change, and `F`
batch-normalised features (their moments). A partition owns one contiguous range of each. Cuts fall
anywhere, inside a tensor too, so no partition is larger than another by more than `ALIGNMENT`
elements, whatever the model's shapes. A rule that looks at whole layers (LARS) has them fall
between tensors, as near to there as can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from downpour.paramserver.errors import BadConfiguration

ALIGNMENT = 16
"""Partition boundaries are multiples of this many float32 elements (64 bytes, a cache line)."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What one partition owns of a model's flat vectors. All ranges are half-open."""

    index: int
    """This partition's place, in [0, num_partitions)."""
    num_partitions: int
    """How many partitions the model is cut into."""
    start: int
    """First parameter owned."""
    stop: int
    """One past the last parameter owned."""
    feature_start: int
    """First batch-normalised feature owned."""
    feature_stop: int
    """One past the last batch-normalised feature owned."""
    num_decayed: int
    """How many of the owned parameters, from `start` on, take weight decay."""
    total_parameters: int
    """P of the whole model."""
    total_features: int
    """F of the whole model."""
    num_frozen: int = 0
    """How many of the owned parameters, the last ones, never change."""
    stops: tuple[int, ...] = ()
    """Where each of its tensors ends, counted from `start`; empty if cuts fall anywhere."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stops", tuple(self.stops))  # JSON has lists

    @property
    def num_trained(self) -> int:
        """Parameters owned that updates change: the first ones."""
        return self.stop - self.start - self.num_frozen

    @property
    def trained(self) -> slice:
        """Where the owned parameters lie that updates change, in the whole vector."""
        return slice(self.start, self.stop - self.num_frozen)

    @property
    def layers(self) -> tuple[int, ...]:
        """Where each tensor ends that takes weight decay."""
        return tuple(stop for stop in self.stops if stop <= self.num_decayed)

    @property
    def num_parameters(self) -> int:
        """Parameters owned."""
        return self.stop - self.start

    @property
    def num_features(self) -> int:
        """Batch-normalised features owned."""
        return self.feature_stop - self.feature_start


def split(
    *,
    num_parameters: int,
    num_features: int,
    num_decayed: int,
    num_partitions: int,
    num_frozen: int = 0,
    stops: Sequence[int] = (),
) -> tuple[Partition, ...]:
    """Cut a model's flat vectors into byte-balanced partitions.

    Args:
        num_parameters: P of the whole model.
        num_features: F of the whole model.
        num_decayed: How many parameters, from the first on, take weight decay.
        num_partitions: How many partitions to make.
        num_frozen: How many parameters, the last ones, never change.
        stops: Where each tensor ends, if cuts are to fall between tensors; empty lets them fall
            anywhere.

    Returns:
        The partitions, by index.

    Raises:
        BadConfiguration: The numbers fit no model, a partition would have fewer than `ALIGNMENT`
            parameters, or there are fewer tensors than partitions.
    """
    num_trained = num_parameters - num_frozen
    if num_parameters < 1 or num_features < 0 or not 0 <= num_decayed <= num_trained:
        raise BadConfiguration(
            f"the model has {num_parameters} parameters, {num_decayed} of them decayed, and "
            f"{num_features} features: give at least 1 parameter, and counts that fit"
        )
    if num_partitions < 1:
        raise BadConfiguration(f"partitions is {num_partitions}: give at least 1")
    most = max(1, num_parameters // ALIGNMENT)
    if num_partitions > most:
        raise BadConfiguration(
            f"partitions is {num_partitions}, but a model of {num_parameters} parameters can be "
            f"cut into {most} at the most: give {most} or fewer"
        )

    def cuts(total: int, align: int) -> list[int]:
        # In whole blocks. The last one may be short, so the last partition gets the most blocks.
        blocks = -(-total // align)
        inner = [blocks * i // num_partitions * align for i in range(1, num_partitions)]
        return [0, *inner, total]

    parameters, features = cuts(num_parameters, ALIGNMENT), cuts(num_features, 1)
    if stops:
        parameters = _between(stops, parameters)
    return tuple(
        Partition(
            index=i,
            num_partitions=num_partitions,
            start=parameters[i],
            stop=parameters[i + 1],
            feature_start=features[i],
            feature_stop=features[i + 1],
            num_decayed=min(max(num_decayed - parameters[i], 0), parameters[i + 1] - parameters[i]),
            total_parameters=num_parameters,
            total_features=num_features,
            num_frozen=min(
                max(parameters[i + 1] - num_trained, 0), parameters[i + 1] - parameters[i]
            ),
            stops=tuple(s - parameters[i] for s in stops if parameters[i] < s <= parameters[i + 1]),
        )
        for i in range(num_partitions)
    )


def _between(stops: Sequence[int], cuts: Sequence[int]) -> list[int]:
    """The cuts, each moved to the nearest end of a tensor that leaves every partition one.

    Raises:
        BadConfiguration: There are fewer tensors than partitions.
    """
    ends = sorted(set(stops))
    num_partitions = len(cuts) - 1
    if num_partitions > len(ends):
        raise BadConfiguration(
            f"partitions is {num_partitions}, and the rule needs whole tensors, of which the model "
            f"has {len(ends)}: give {len(ends)} or fewer"
        )
    moved, at = [0], 0
    for i, cut in enumerate(cuts[1:-1], 1):
        last = len(ends) - (num_partitions - i)  # one past the furthest that leaves enough
        at = min(range(at, last), key=lambda j: abs(ends[j] - cut))
        moved.append(ends[at])
        at += 1
    return [*moved, ends[-1]]

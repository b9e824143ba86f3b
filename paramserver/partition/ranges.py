"""Partitions: byte-balanced half-open ranges of a model's flat vectors.

A model is two flat axes to the server: `P` parameters (weights and gradients, float32), of which
the first `num_decayed` take weight decay, and `F` batch-normalised features (their moments). A
partition owns one contiguous range of each. Cuts fall anywhere, inside a tensor too, so no
partition is larger than another by more than `ALIGNMENT` elements, whatever the model's shapes.
"""

from __future__ import annotations

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

    @property
    def num_parameters(self) -> int:
        """Parameters owned."""
        return self.stop - self.start

    @property
    def num_features(self) -> int:
        """Batch-normalised features owned."""
        return self.feature_stop - self.feature_start


def split(
    *, num_parameters: int, num_features: int, num_decayed: int, num_partitions: int
) -> tuple[Partition, ...]:
    """Cut a model's flat vectors into byte-balanced partitions.

    Args:
        num_parameters: P of the whole model.
        num_features: F of the whole model.
        num_decayed: How many parameters, from the first on, take weight decay.
        num_partitions: How many partitions to make.

    Returns:
        The partitions, by index.

    Raises:
        BadConfiguration: The numbers fit no model, or a partition would have fewer than `ALIGNMENT`
            parameters.
    """
    if num_parameters < 1 or num_features < 0 or not 0 <= num_decayed <= num_parameters:
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
        )
        for i in range(num_partitions)
    )

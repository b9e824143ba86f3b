"""What a process of the parameter server is told, and what it gives: plain data, through Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from downpour.paramserver.partition.ranges import Partition
    from downpour.paramserver.partition.update_config import UpdateConfig
    from downpour.paramserver.transport.endpoint import Endpoint
    from downpour.paramserver.transport.network.security import Credentials


@dataclass(frozen=True, kw_only=True)
class PartitionSpec:
    """One partition of the parameter server; the same for a primary and its follower."""

    partition: Partition
    """Which parameters and features are its own."""
    update: UpdateConfig
    """How a push changes them."""
    listen: str | None = None
    """Address to listen on for replicas on other machines, or `NODE`; None listens nowhere."""
    standby_wait: bool = True
    """Whether pushes wait for a follower that has come over the network."""
    record: str | None = None
    """Folder in which every push is recorded; None records nothing."""


@dataclass(frozen=True, kw_only=True)
class Restore:
    """A snapshot that a partition starts from."""

    uri: str
    """The file, as `pyarrow.fs` names it."""
    sha256: str | None = None
    """Its checksum; None does not check it."""


Origin: TypeAlias = "npt.NDArray[np.float32] | Restore | Endpoint"
"""What a partition's state comes from: initial weights float32 [num_parameters] of the partition,
a snapshot, or, for a follower, the endpoint of its primary."""


@dataclass(frozen=True, kw_only=True)
class PartitionStart:
    """What a partition gets at one start, besides its spec: secrets, and its state."""

    key: bytes = field(repr=False)
    """The run's key, which every client has to show."""
    origin: Origin = field(repr=False)
    """What its state comes from."""
    statistics: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    """With initial weights, the BN statistics that they begin with, float64 [4, num_features]:
    mean, variance, mini-batches seen, and momentum as `BatchStatistics.begin` takes them. None:
    fresh ones."""
    credentials: Credentials | None = None
    """For connections over the network; None encrypts nothing."""
    client_credentials: Credentials | None = None
    """For connections to partitions: a follower's own to its primary, and those of replicas, which
    another driver is told of."""
    follower: int = 1
    """Counts the partition's followers."""


@dataclass(frozen=True, kw_only=True)
class Papers:
    """What a driver has to know of a partition that it has not started itself."""

    version: int
    """Pushes applied."""
    key: bytes = field(repr=False)
    """The run's key."""
    credentials: Credentials | None
    """As in `PartitionStart`."""
    client_credentials: Credentials | None
    """As in `PartitionStart`."""


@dataclass(frozen=True, kw_only=True)
class Average:
    """A partition's averages (`rules.averaging`), on memory of their own."""

    version: int
    """Of the latest weights that are in them."""
    weights: npt.NDArray[np.float32]
    """float32 [n]."""
    statistics: npt.NDArray[np.float32]
    """float32 [2, f]."""

"""The parameter server, and how replicas reach it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from downpour.paramserver.rules.choice import (
    BY_LAYER,
    WITH_MOMENTUM,
    RuleName,
    RuleNumbers,
    make_regulariser,
    make_rule,
)
from downpour.paramserver.rules.policy import Guard, StalenessPolicy
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.statistics import StatisticsRule
from downpour.paramserver.rules.update import Regulariser, Rule, check_fraction
from downpour.paramserver.transport.names import NODE, TransportName, WireName

PARTITION_BYTES = 1 << 24
"""Weights for which another partition pays: below this, a push costs more than its bytes."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """How replicas and partitions reach each other."""

    transport: TransportName = "auto"
    """Shared memory within a machine and the network between machines, or one of the two always."""
    encrypt: bool = True
    """Whether what goes over the network is encrypted; peers are authenticated in any case."""
    wire: WireName = field(default="float32", metadata={"formerly": "wire-dtype"})
    """How gradients and weights go over the network. `bfloat16` and `float16` are for gradients,
    with error feedback. `int8` rounds both, to a byte and less, and `int4` gradients to half of
    one: these are for slow links. `auto` measures each process's way to each partition."""
    listen: str = "auto"
    """Address that partitions listen on: `auto` is the one by which Ray knows the node in a cluster
    of several, and on a single node loopback, or none where nobody comes over the network."""

    def __post_init__(self) -> None:
        if self.listen != "auto":
            try:
                ipaddress.ip_address(self.listen)
            except ValueError:
                raise ValueError(
                    f"listen is {self.listen!r}: give auto, or an IP address of the machine"
                ) from None

    def listens_on(self, num_nodes: int) -> str | None:
        """Return where partitions listen in a cluster of so many nodes; None for nowhere.

        `NODE` stands for the node's address.
        """
        if self.transport == "shared":
            return None
        if self.listen != "auto":
            return self.listen
        if num_nodes > 1:
            return NODE
        return "127.0.0.1" if self.transport == "network" else None


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The parameter server."""

    partitions: int | None = None
    """Actors that the parameters are cut over; none is one for each 16 MB of weights, at the most
    one a processor. More than a model needs costs every push and pull another message."""
    rule: RuleName = "momentum"
    """The update rule."""
    momentum: float = field(default=0.9, metadata={"only_with": ("rule", WITH_MOMENTUM)})
    """Momentum, for `momentum`, `nesterov`, `rmsprop` and `lars`."""
    numbers: RuleNumbers = field(default_factory=RuleNumbers)
    """What else some rules have."""
    weight_decay: float = 0.0
    """Decay of linear and convolutional weights: L2, and with `adamw` and `lars` the rule's own."""
    clip_norm: float | None = None
    """Largest norm of a gradient; longer ones are scaled down to it."""
    ema: float | None = None
    """Share of an average of the weights that is kept at each mini-batch, such as 0.999. The
    average is scored, and is the run's model; none is the weights themselves."""
    schedule: Schedule = field(default_factory=Schedule)
    """The learning rate."""
    statistics: StatisticsRule = field(default_factory=StatisticsRule)
    """How BN statistics are aggregated."""
    policy: StalenessPolicy = field(default_factory=StalenessPolicy)
    """What is done about staleness."""
    guard: Guard = field(default_factory=Guard)
    """What keeps poison out."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """How replicas reach it."""
    hot_standby: bool = False
    """Whether each partition has a follower, a second process that applies the same pushes and
    takes its place when it dies, so that no update is lost. In a cluster of several nodes it is on
    another node."""
    standby_wait: bool = field(default=True, metadata={"only_with": ("hot_standby", (True,))})
    """Whether a push is answered only once a follower that it reaches over the network has it.
    Without, pushes that the follower lacks when the partition is lost are computed again."""

    def __post_init__(self) -> None:
        if self.partitions is not None and self.partitions < 1:
            raise ValueError(f"partitions is {self.partitions}: give at least 1, or none")
        check_fraction("momentum", self.momentum)
        if self.ema is not None:
            check_fraction("ema", self.ema)
        self.make_regulariser()
        self.make_rule()
        if self.hot_standby and self.policy.versions_kept:
            raise ValueError(
                f"hot standby is on, and staleness policy is {self.policy.staleness_policy}, which "
                "needs versions from before a follower came: give another, or no hot standby"
            )

    @property
    def by_layer(self) -> bool:
        """Whether the rule needs whole layers, so that partitions are cut between tensors."""
        return self.rule in BY_LAYER

    def make_rule(self) -> Rule:
        """How a gradient changes the weights.

        Raises:
            BadConfiguration: A number is out of its range, or is of another rule.
        """
        return make_rule(self.rule, self.momentum, self.numbers, self.weight_decay)

    def make_regulariser(self) -> Regulariser:
        """What happens to a gradient before the rule.

        Raises:
            BadConfiguration: A number is out of its range.
        """
        return make_regulariser(self.rule, self.weight_decay, self.clip_norm)

    def num_partitions(
        self, num_parameters: int, num_processors: int, before: int | None = None
    ) -> int:
        """Partitions of a model with so many parameters.

        A run keeps the number that it began with (`before`), since its checkpoints are cut that
        way. Only a new run looks at the processors of its machine.
        """
        if self.partitions is not None:
            return self.partitions
        if before is not None:
            return before
        return min(num_processors, -(-4 * num_parameters // PARTITION_BYTES))

"""The configuration of a partition's updates."""

from __future__ import annotations

from dataclasses import dataclass, field

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.rules.policy import Guard, StalenessPolicy
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.statistics import StatisticsRule
from downpour.paramserver.rules.update import Momentum, Regulariser, Rule


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """Everything that decides how a push changes a partition.

    Raises:
        BadConfiguration: An epoch has no mini-batches, or no examples.
    """

    rule: Rule = field(default_factory=Momentum)
    """How a gradient changes the weights."""
    regulariser: Regulariser = field(default_factory=Regulariser)
    """What happens to a gradient before the rule."""
    schedule: Schedule = field(default_factory=Schedule)
    """The learning rate, by examples applied."""
    statistics: StatisticsRule = field(default_factory=StatisticsRule)
    """How BN moments are merged."""
    policy: StalenessPolicy = field(default_factory=StalenessPolicy)
    """What is done about staleness."""
    guard: Guard = field(default_factory=Guard)
    """What keeps poison out."""
    batches_per_epoch: int
    """q, mini-batches in an epoch."""
    epoch_examples: int
    """N, examples in an epoch."""
    average_decay: float | None = None
    """Share of the average of the weights that is kept at each mini-batch, in [0, 1); None keeps no
    average. See `rules.averaging`."""
    epochs: int | None = None
    """Epochs of the run. Once all their mini-batches are settled, an incomplete round is closed."""

    def __post_init__(self) -> None:
        if self.batches_per_epoch < 1 or self.epoch_examples < 1:
            raise BadConfiguration(
                f"an epoch has {self.batches_per_epoch} mini-batches and {self.epoch_examples} "
                "examples: give at least 1 of each"
            )

    @property
    def spoils_gradients(self) -> bool:
        """Whether an update may overwrite the memory of its gradient."""
        regulariser = self.regulariser
        spoils = bool(regulariser.weight_decay) or regulariser.clip_norm is not None
        return spoils or self.rule.overwrites_gradient

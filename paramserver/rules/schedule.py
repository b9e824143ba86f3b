"""The learning rate as a function of the examples that a partition has applied.

Counting examples, not updates or seconds, keeps a schedule the same whatever the number of
replicas, partitions or restarts: each partition reads it off its own applied set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from downpour.paramserver.errors import BadConfiguration


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Exponential decay after a linear warm-up, both by epochs of examples applied.

    `rate(x) = learning_rate * min(1, x / warmup_epochs) * decay_factor ** (x / decay_epochs)`
    with x in epochs; with `staircase` the exponent is rounded down (GoogLeNet: x0.96 every 8
    epochs). The warm-up counts at least one example, so that no update is without effect.

    Raises:
        BadConfiguration: A number is out of its range.
    """

    learning_rate: float = 0.01
    """The rate that decay starts from."""
    decay_factor: float = 1.0
    """What the rate is multiplied by every `decay_epochs`; 1 keeps it constant."""
    decay_epochs: float = 1.0
    """Epochs between two multiplications."""
    staircase: bool = False
    """Decay in steps rather than continuously."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises linearly from (nearly) 0."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise BadConfiguration(
                f"learning rate is {self.learning_rate}: give a finite number above 0"
            )
        if not 0 < self.decay_factor <= 1:
            raise BadConfiguration(f"decay factor is {self.decay_factor}: give 0 < factor <= 1")
        if not 0 < self.decay_epochs < math.inf or not 0 <= self.warmup_epochs < math.inf:
            raise BadConfiguration(
                f"decay epochs is {self.decay_epochs} and warm-up epochs {self.warmup_epochs}: "
                "give finite numbers, the first above 0 and the second 0 or more"
            )

    def rate(self, examples: int, epoch_examples: int) -> float:
        """Return the rate of the update after `examples` applied, `epoch_examples` to an epoch."""
        epochs = examples / epoch_examples
        rate = self.learning_rate
        if self.decay_factor != 1:
            exponent = epochs / self.decay_epochs
            rate *= self.decay_factor ** (int(exponent) if self.staircase else exponent)
        if epochs < self.warmup_epochs:
            rate *= min(1.0, max(epochs, 1 / epoch_examples) / self.warmup_epochs)
        return rate

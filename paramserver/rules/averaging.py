"""An average of the weights as they change, which is scored and kept as the run's model.

Averaging is Polyak & Juditsky's (1992); its exponential form is what torch's `AveragedModel` keeps
with an averaging function of that kind. After an update in which k mini-batches went into weights w
that n mini-batches had made::

    average <- average + a * (w - average),    a = max(1 - decay^k, k / (n + k))

So k mini-batches in one push weigh as much as k pushes. Early on it is the plain average over
mini-batches, so there is no start-up bias, as in the BN statistics' moving averages.

Those statistics are averaged with the same shares: to first order they are the ones of the averaged
weights, until somebody recomputes them on data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from downpour.paramserver.rules.update import check_fraction

if TYPE_CHECKING:
    from torch import Tensor

AVERAGE, AVERAGE_STATISTICS, AVERAGE_BATCHES = "average", "average_statistics", "average_batches"
"""Names among the rule's state: float32 [t], t being the trained parameters, [2, f] and [1]."""


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """How the average follows the weights; see the module's docstring.

    Raises:
        BadConfiguration: The decay is not in [0, 1).
    """

    decay: float
    """Share of the average that is kept at each mini-batch, in [0, 1)."""

    def __post_init__(self) -> None:
        check_fraction("ema", self.decay)

    def init(self, weights: Tensor, statistics: Tensor) -> dict[str, Tensor]:
        """Return the state before the first update: the weights [t] and statistics [2, f]."""
        import torch

        return {
            AVERAGE: weights.clone(),
            AVERAGE_STATISTICS: statistics.clone(),
            AVERAGE_BATCHES: torch.zeros(1),
        }

    def update(
        self, state: Mapping[str, Tensor], weights: Tensor, statistics: Tensor, batches: int
    ) -> None:
        """Follow an update, in place.

        Args:
            state: What `init` gave.
            weights: The new ones, float32 [t].
            statistics: The new moving averages, float32 [2, f].
            batches: Mini-batches that went into the update, k above.
        """
        seen = float(state[AVERAGE_BATCHES].add_(batches))
        share = max(1 - self.decay**batches, batches / seen)
        state[AVERAGE].lerp_(weights, share)
        state[AVERAGE_STATISTICS].lerp_(statistics, share)

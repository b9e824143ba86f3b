"""Delay compensation: a gradient on old weights, corrected for how far they have moved since.

Zheng et al. 2017, "Asynchronous stochastic gradient descent with delay compensation" (DC-ASGD).
A gradient g was computed on weights w_pulled and is applied to w. Its Taylor expansion about
w_pulled, with the Hessian taken for lambda times the diagonal of the gradient's outer product with
itself, gives the server's rule (section 4, Algorithm 2):

    g <- g + lambda * g * g * (w - w_pulled)

all elementwise. With `constant` (their DC-ASGD-c) lambda is the same always and everywhere; with
`adaptive` (DC-ASGD-a, section 6) it is divided by the root of a moving mean of squares:

    s <- decay * s + (1 - decay) * g * g
    lambda = lambda_0 / sqrt(s + 1e-7)

Departures from the paper:

- s is one for all replicas; the authors' code keeps one for each worker.
- g is clipped before and decays after it is compensated, so neither limit nor L2 term is
  extrapolated.
- Any rule may follow, momentum included.
- If a push is the sum of k gradients, g above is their mean, and the result is taken k times.
- A block of the correction that is not finite is left out, and its gradient applied as it came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from downpour.paramserver.rules.policy import StalenessPolicy

EPSILON = 1e-7
BLOCK = 1 << 17
"""Elements that are corrected at a time."""
MEAN_SQUARE = "mean_square"
"""Name of the adaptive variant's state among the rule's."""


@dataclass(frozen=True, kw_only=True)
class Compensation:
    """How a gradient is corrected."""

    strength: float
    """lambda, or lambda_0."""
    decay: float | None
    """Share of the mean of squares kept at each update, in [0, 1); None for a constant lambda."""

    def init(self, num_parameters: int) -> dict[str, Tensor]:
        """Return the state beside the rule's: s = 0, float32 [n], if lambda adapts."""
        import torch

        return {} if self.decay is None else {MEAN_SQUARE: torch.zeros(num_parameters)}

    def room(self, num_parameters: int) -> Tensor:
        """Return memory for `apply` to work in, float32 [2, at most BLOCK]."""
        import torch

        return torch.empty(2, min(BLOCK, num_parameters))

    def apply(
        self,
        gradient: Tensor,
        weights: Tensor,
        pulled: Tensor | None,
        state: Mapping[str, Tensor],
        room: Tensor,
        num_batches: int = 1,
    ) -> None:
        """Correct `gradient` in place, and bring `state` forward.

        It is done a block at a time, so that what is in between stays in a processor's cache.

        Args:
            gradient: Sum of the gradients of `num_batches` mini-batches, float32 [n].
            weights: The present weights, float32 [n].
            pulled: Those that it was computed on, float32 [n]; None if they have not moved.
            state: What `init` gave.
            room: What `room` gave.
            num_batches: k above.
        """
        import torch

        mean_square = state.get(MEAN_SQUARE)
        if mean_square is None and pulled is None:
            return
        for start in range(0, len(gradient), BLOCK):
            block = slice(start, start + BLOCK)
            g, s = gradient[block], None if mean_square is None else mean_square[block]
            if s is not None and self.decay is not None:
                s.mul_(self.decay).addcmul_(g, g, value=(1 - self.decay) / num_batches**2)
            if pulled is None:
                continue
            correction, root = room[:, : len(g)]
            torch.sub(weights[block], pulled[block], out=correction).mul_(g).mul_(g)
            if s is not None:
                correction.div_(torch.add(s, EPSILON, out=root).sqrt_())
            # A square that overflows is no correction either.
            if math.isfinite(float(torch.dot(correction, correction))):
                g.add_(correction, alpha=self.strength / num_batches)


def make_compensation(policy: StalenessPolicy) -> Compensation | None:
    """Return the compensation of a staleness policy; None if it does not compensate."""
    if policy.staleness_policy != "compensate":
        return None
    return Compensation(
        strength=policy.strength,
        decay=policy.compensation_decay if policy.compensation == "adaptive" else None,
    )

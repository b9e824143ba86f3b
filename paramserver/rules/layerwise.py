"""LARS: a rate for each layer, by the lengths of its weights and of its gradient.

You, Gitman & Ginsburg 2017, "Large batch training of convolutional networks", section 4 and
Algorithm 1. For the weights w of a layer and their gradient g, with weight decay beta::

    lambda = trust * |w| / (|g| + beta * |w|)
    v <- momentum * v + rate * lambda * (g + beta * w)          w <- w - v

The rate is inside the velocity, as in the paper. `|w|` and `|g|` are over the whole layer, so
partitions are cut between layers (`partition.ranges.split`), and nothing is exchanged.

What the paper leaves open:

- A *layer* is a parameter that takes weight decay: the weights of a linear or convolutional layer.
  Biases, gamma and beta have lambda = 1 and no decay, since their lengths say nothing of a scale
  (a bias that starts at 0 would stay there).
- If `|w|` or the divisor is 0, lambda is 1.
- A push of k mini-batches brings the sum S of their gradients: lambda is of their mean, S/k, and
  the velocity takes `S + k * beta * w`, as momentum SGD does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.rules.update import State, check_fraction

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LARS:
    """Layer-wise adaptive rate scaling; see the module's docstring.

    Raises:
        BadConfiguration: A number is out of its range.
    """

    momentum: float = 0.9
    """Share of the velocity kept at each update, in [0, 1)."""
    trust: float = 0.001
    """eta, the trust coefficient: how far a layer moves at rate 1, as a share of its length."""
    weight_decay: float = 0.0
    """beta, of the layers' weights."""
    layers: tuple[int, ...] = ()
    """Where each layer ends in the partition's vectors; what comes after the last is in none."""
    overwrites_gradient = True

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)
        if not 0 < self.trust < math.inf:
            raise BadConfiguration(f"trust is {self.trust}: give a finite number above 0, or none")

    def within(self, num_decayed: int, layers: Sequence[int]) -> Self:
        """See `Rule`: with the partition's own layers."""
        return replace(self, layers=tuple(layers))

    def init(self, num_parameters: int) -> dict[str, Tensor]:
        """The velocity v = 0."""
        import torch

        return {"velocity": torch.zeros(num_parameters)}

    def update(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: State,
        rate: float,
        out: Tensor,
        batches: int = 1,
    ) -> None:
        """One step; the gradient's buffer is left holding `lambda * (g + beta * w)`."""
        import torch

        start = 0
        for stop in self.layers:
            w, g = weights[start:stop], gradient[start:stop]
            trust = self._trust(_norm(w), _norm(g) / batches)
            g.add_(w, alpha=batches * self.weight_decay).mul_(trust)
            start = stop
        velocity = state["velocity"]
        velocity.mul_(self.momentum).add_(gradient, alpha=rate)
        torch.sub(weights, velocity, out=out)

    def _trust(self, weights_norm: float, gradient_norm: float) -> float:
        """lambda, from both lengths."""
        divisor = gradient_norm + self.weight_decay * weights_norm
        if not weights_norm or not divisor:
            return 1.0
        return self.trust * weights_norm / divisor


def _norm(vector: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(vector))

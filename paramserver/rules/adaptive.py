"""Rules that divide by a running mean of squares: Adam, AdamW and RMSProp.

The equations, defaults and the place of epsilon are `torch.optim`'s.

**A push of k mini-batches** brings the sum S of their gradients. Such a rule does not see how long
a gradient is, so it would move the weights no further for k mini-batches than for one. So it takes
`g = S / sqrt(k)`, and `sqrt(k)` times the rate. If the gradients are mostly noise, `g * g` is as
large as one mini-batch's, so pushes of any k share one second moment, and the weights move as far
as k mini-batches would move them: the square-root scaling rule (Malladi et al. 2022). The running
means decay once for each push.

**Staleness.** The second moment is a mean over pushes of all replicas, in the order in which they
come, so it is of gradients on slightly different weights; with beta2 near 1 it changes far more
slowly than that. The first moment is a momentum, and asynchrony adds to it as to any other. The
square of a gradient on old weights, from steeper ground, keeps the step small for 1 / (1 - beta2)
pushes, which is on the safe side. Early in a run it is not: the first pushes of all steps in flight
come from the same weights, so the second moment has seen one place only, and a warm-up of the rate
is worth its time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.rules.update import (
    Elementwise,
    State,
    check_fraction,
    copy_weights,
    root_of,
)

if TYPE_CHECKING:
    from torch import Tensor

UPDATES = "updates"
"""Name of the number of updates among a rule's state, float32 [1]. It stays at 2^24, when the
correction that it is for has long been 1."""


@dataclass(frozen=True, kw_only=True)
class Adam(Elementwise):
    """Adam (Kingma & Ba 2015, Algorithm 1).

    At update t, from 1 on::

        m <- beta1 * m + (1 - beta1) * g          v <- beta2 * v + (1 - beta2) * g * g
        w <- w - rate * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon)

    Weight decay is part of g, as in `torch.optim.Adam`.

    Raises:
        BadConfiguration: A number is out of its range.
    """

    beta1: float = 0.9
    """Share of the first moment kept at each update, in [0, 1)."""
    beta2: float = 0.999
    """Share of the second moment kept at each update, in [0, 1)."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    overwrites_gradient = True

    def __post_init__(self) -> None:
        check_fraction("beta1", self.beta1)
        check_fraction("beta2", self.beta2)
        _check_epsilon(self.epsilon)

    def init(self, num_parameters: int) -> dict[str, Tensor]:
        """Both moments are 0, and no update was made."""
        import torch

        return {
            "first_moment": torch.zeros(num_parameters),
            "second_moment": torch.zeros(num_parameters),
            UPDATES: torch.zeros(1),
        }

    def update(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: State,
        rate: float,
        out: Tensor,
        batches: int = 1,
    ) -> None:
        """One step, in one pass over all vectors; a gradient of several mini-batches is scaled."""
        _adam(self, weights, gradient, state, rate, out, batches)


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """AdamW (Loshchilov & Hutter 2019): Adam whose weight decay does not pass through the moments.

    `w <- w - rate * weight_decay * w` for the parameters that take decay, k times for a push of k
    mini-batches; and then Adam's step.

    Raises:
        BadConfiguration: A number is out of its range.
    """

    weight_decay: float = 0.0
    """Share of a weight, times the rate, that goes at each mini-batch."""
    num_decayed: int | None = None
    """How many parameters, from the first on, take weight decay; None is all."""

    def within(self, num_decayed: int, layers: Sequence[int]) -> Self:
        """See `Rule`."""
        return replace(self, num_decayed=num_decayed)

    def update(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: State,
        rate: float,
        out: Tensor,
        batches: int = 1,
    ) -> None:
        """See `Adam`."""
        num_decayed = len(weights) if self.num_decayed is None else self.num_decayed
        copy_weights(weights, out)
        if self.weight_decay and num_decayed:
            out[:num_decayed].mul_(1 - batches * rate * self.weight_decay)
        _adam(self, out, gradient, state, rate, out, batches)


@dataclass(frozen=True, kw_only=True)
class RMSProp(Elementwise):
    """RMSProp (Tieleman & Hinton 2012), with momentum as in `torch.optim.RMSprop`.

    ::

        s <- decay * s + (1 - decay) * g * g          b <- momentum * b + g / (sqrt(s) + epsilon)
        w <- w - rate * b

    Raises:
        BadConfiguration: A number is out of its range.
    """

    momentum: float = 0.0
    """Share of b kept at each update, in [0, 1)."""
    decay: float = 0.99
    """Share of the mean square kept at each update, in [0, 1)."""
    epsilon: float = 1e-8
    """Added to the root of the mean square."""
    overwrites_gradient = True

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)
        check_fraction("square decay", self.decay)
        _check_epsilon(self.epsilon)

    def init(self, num_parameters: int) -> dict[str, Tensor]:
        """The mean square s = 0, and with momentum b = 0."""
        import torch

        state = {"mean_square_gradient": torch.zeros(num_parameters)}
        if self.momentum:
            state["velocity"] = torch.zeros(num_parameters)
        return state

    def update(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: State,
        rate: float,
        out: Tensor,
        batches: int = 1,
    ) -> None:
        """One step; the gradient's buffer is left holding `sqrt(s) + epsilon` or the like."""
        import torch

        rate *= _per_batch(gradient, batches)
        square = state["mean_square_gradient"]
        square.mul_(self.decay).addcmul_(gradient, gradient, value=1 - self.decay)
        root = root_of(square, self.epsilon, weights, out)
        if not self.momentum:
            torch.addcdiv(weights, gradient, root, value=-rate, out=out)
            return
        velocity = state["velocity"]
        velocity.mul_(self.momentum).addcdiv_(gradient, root)
        torch.add(weights, velocity, alpha=-rate, out=out)


def _adam(
    rule: Adam,
    weights: Tensor,
    gradient: Tensor,
    state: State,
    rate: float,
    out: Tensor,
    batches: int,
) -> None:
    """Adam's step, by the kernel of `torch.optim.Adam(fused=True)`, with everything in place."""
    import torch

    rate *= _per_batch(gradient, batches)
    updates = state[UPDATES]
    updates.add_(1)
    copy_weights(weights, out)
    torch._fused_adam_(
        [out],
        [gradient],
        [state["first_moment"]],
        [state["second_moment"]],
        [],
        [updates],
        lr=rate,
        beta1=rule.beta1,
        beta2=rule.beta2,
        weight_decay=0.0,
        eps=rule.epsilon,
        amsgrad=False,
        maximize=False,
    )


def _per_batch(gradient: Tensor, batches: int) -> float:
    """Scale a sum of k gradients by 1/sqrt(k), in place; return sqrt(k)."""
    if batches == 1:
        return 1.0
    root = math.sqrt(batches)
    gradient.div_(root)
    return root


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise BadConfiguration(f"epsilon is {epsilon}: give a finite number above 0, or none")

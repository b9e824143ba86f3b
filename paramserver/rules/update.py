"""Update rules: how a gradient changes the weights of a partition.

A rule is a pair of functions over flat vectors, all float32 [n]. `init(n)` gives its state, vectors
by name. `update` reads weights `w`, gradient `g` and state, and writes the new weights to `out`.
`out` may be `w` itself or another buffer (from which the next version is published while `w` is
being read); the bits are the same. `rate` is the learning rate. Weight decay and clipping come
before the rule (`Regulariser`), but for rules that decay by themselves (`choice.DECOUPLED`).

The conventions are `torch.optim`'s, so that one replica with one step in flight equals it: momentum
without dampening, and the rate outside the velocity.

**A push of k mini-batches** (`n_push`, or steps together) brings the sum S of their gradients and
is one update. SGD, momentum and Nesterov take S as it is: the weights move as far as k mini-batches
would move them, and the velocity decays once. Adagrad adds S*S to its sums, which for gradients
that are mostly noise is what k mini-batches would add. What the others do is in `adaptive` and
`layerwise`.

Here: the rules of the papers. Not here: Adam and its kin (`adaptive`), LARS (`layerwise`), and
which rule a run has (`choice`).

PyTorch is imported where it is used: rules are part of the configuration, and commands that compute
nothing should start at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from downpour.paramserver.errors import BadConfiguration

if TYPE_CHECKING:
    from torch import Tensor

IN_PLACE_BYTES = 1 << 20
State = Mapping[str, "Tensor"]


def updates_in_place(num_parameters: int) -> bool:
    """Whether updating so many weights in place is faster than writing to another buffer.

    It is from `IN_PLACE_BYTES` on. Smaller vectors stay in a processor's cache, and overwriting
    lines that readers have copies of costs more than filling other ones.
    """
    return 4 * num_parameters >= IN_PLACE_BYTES


class Rule(Protocol):
    """An update rule over flat vectors."""

    @property
    def overwrites_gradient(self) -> bool:
        """Whether `update` may overwrite the memory of its gradient."""

    def within(self, num_decayed: int, layers: Sequence[int]) -> Rule:
        """Return the rule for one partition, which is chosen once.

        Args:
            num_decayed: How many of its parameters, from the first on, take weight decay.
            layers: Where each of its whole layers ends, if the partitions are cut between layers.
        """

    def init(self, num_parameters: int) -> dict[str, Tensor]:
        """Return the state before the first update: float32 [num_parameters] by name."""

    def update(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: State,
        rate: float,
        out: Tensor,
        batches: int = 1,
    ) -> None:
        """Write the new weights to `out`, and the new state in place.

        Args:
            weights: float32 [n].
            gradient: The sum of the gradients of `batches` mini-batches, float32 [n]; overwritten
                only if `overwrites_gradient`.
            state: What `init` gave.
            rate: The learning rate.
            out: float32 [n]; may be `weights`.
            batches: How many mini-batches were added up.
        """


class Elementwise:
    """What rules share that treat every parameter alike, whatever it is of."""

    overwrites_gradient = False

    def within(self, num_decayed: int, layers: Sequence[int]) -> Self:
        """See `Rule`: the same everywhere."""
        return self


@dataclass(frozen=True, kw_only=True)
class SGD(Elementwise):
    """Plain stochastic gradient descent: `w <- w - rate * g`."""

    def init(self, num_parameters: int) -> dict[str, Tensor]:
        """No state."""
        return {}

    def update(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: State,
        rate: float,
        out: Tensor,
        batches: int = 1,
    ) -> None:
        """One step; one pass that reads two vectors and writes one."""
        import torch

        torch.add(weights, gradient, alpha=-rate, out=out)


@dataclass(frozen=True, kw_only=True)
class Momentum(Elementwise):
    """SGD with momentum: `v <- momentum * v + g; w <- w - rate * v` (torch's convention).

    Raises:
        BadConfiguration: The momentum is not in [0, 1).
    """

    momentum: float = 0.9
    """Share of the velocity kept at each update, in [0, 1)."""
    looks_ahead: ClassVar[bool] = False
    """Whether the step is Nesterov's."""

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)

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
        """One step; Nesterov's may leave g + momentum * v in the gradient's buffer."""
        velocity, nesterov = state["velocity"], self.looks_ahead
        _sgd_with_momentum(weights, gradient, velocity, self.momentum, rate, out, nesterov=nesterov)


@dataclass(frozen=True, kw_only=True)
class Nesterov(Momentum):
    """Nesterov momentum: `v <- momentum * v + g; w <- w - rate * (g + momentum * v)`.

    Raises:
        BadConfiguration: The momentum is not in [0, 1).
    """

    looks_ahead: ClassVar[bool] = True
    overwrites_gradient = True


@dataclass(frozen=True, kw_only=True)
class Adagrad(Elementwise):
    """Adagrad: `s <- s + g*g; w <- w - rate * g / (sqrt(s) + epsilon)`.

    The rule of Dean et al. 2012, section 4.1: each parameter's own rate `gamma / sqrt(sum of its
    squared gradients)`. `epsilon` and its place are torch's.

    Raises:
        BadConfiguration: A number is negative or not finite, or both are 0.
    """

    epsilon: float = 1e-10
    """Added to the root, so that a parameter without a gradient yet does not divide by zero."""
    initial_accumulator: float = 0.0
    """What the sums of squares start from."""

    def __post_init__(self) -> None:
        finite = 0 <= self.epsilon < math.inf and 0 <= self.initial_accumulator < math.inf
        if not finite or self.epsilon + self.initial_accumulator == 0:  # 0/0 where a gradient is 0
            raise BadConfiguration(
                f"adagrad's epsilon is {self.epsilon} and its initial accumulator "
                f"{self.initial_accumulator}: give finite values of 0 or more, not both 0"
            )

    def init(self, num_parameters: int) -> dict[str, Tensor]:
        """The sums of squares s."""
        import torch

        return {"squares": torch.full((num_parameters,), float(self.initial_accumulator))}

    def update(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: State,
        rate: float,
        out: Tensor,
        batches: int = 1,
    ) -> None:
        """One step; `out` may be `weights`."""
        import torch

        squares = state["squares"]
        squares.addcmul_(gradient, gradient)
        root = root_of(squares, self.epsilon, weights, out)
        torch.addcdiv(weights, gradient, root, value=-rate, out=out)


def _sgd_with_momentum(
    weights: Tensor,
    gradient: Tensor,
    velocity: Tensor,
    momentum: float,
    rate: float,
    out: Tensor,
    *,
    nesterov: bool,
) -> None:
    """One step, rounded the same wherever `out` is.

    For vectors that fit into a cache, two kernels that fill `out` are the fastest. For longer ones
    it is the kernel of `torch.optim.SGD(fused=True)` with everything in place; weights that lie
    elsewhere are copied first.
    """
    import torch

    if not updates_in_place(len(weights)):
        torch.add(gradient, velocity, alpha=momentum, out=velocity)
        if nesterov:
            gradient.add_(velocity, alpha=momentum)
        torch.add(weights, gradient if nesterov else velocity, alpha=-rate, out=out)
        return
    copy_weights(weights, out)
    torch._fused_sgd_(
        [out],
        [gradient],
        [velocity] if momentum else [],
        weight_decay=0.0,
        momentum=momentum,
        lr=rate,
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
        is_first_step=False,
    )


@dataclass(frozen=True, kw_only=True)
class Regulariser:
    """What happens to a gradient before the rule: clipping by global norm, then L2 weight decay.

    Raises:
        BadConfiguration: A number is out of its range.
    """

    weight_decay: float = 0.0
    """L2 weight: `g <- g + weight_decay * w` for the parameters that take decay."""
    clip_norm: float | None = None
    """Largest norm of a whole gradient, over all partitions; longer ones are scaled down to it."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight_decay < math.inf:
            raise BadConfiguration(
                f"weight decay is {self.weight_decay}: give a finite number of 0 or more"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise BadConfiguration(f"clip norm is {self.clip_norm}: give more than 0, or none")

    def apply(
        self, gradient: Tensor, weights: Tensor, num_decayed: int, norm: float, batches: int = 1
    ) -> None:
        """Change `gradient` in place.

        Args:
            gradient: The sum of the gradients of `batches` mini-batches, float32 [n].
            weights: float32 [n].
            num_decayed: How many of them, from the first on, take weight decay.
            norm: Of the whole sum, over all partitions, as its replica measured it.
            batches: How many mini-batches were added up.
        """
        self.clip(gradient, norm, batches)
        self.decay(gradient, weights, num_decayed, batches)

    def clip(self, gradient: Tensor, norm: float, batches: int = 1) -> None:
        """The first half: scale the mean over the mini-batches down to `clip_norm`."""
        if self.clip_norm is not None and norm > batches * self.clip_norm:
            gradient.mul_(batches * self.clip_norm / norm)

    def decay(self, gradient: Tensor, weights: Tensor, num_decayed: int, batches: int = 1) -> None:
        """The second half: add the L2 term once for each of the mini-batches."""
        if self.weight_decay and num_decayed:
            gradient[:num_decayed].add_(weights[:num_decayed], alpha=batches * self.weight_decay)


def copy_weights(weights: Tensor, out: Tensor) -> None:
    """Copy the weights, float32 [n], to `out`, unless that is where they are."""
    if out.data_ptr() != weights.data_ptr():
        out.copy_(weights)


def root_of(squares: Tensor, epsilon: float, weights: Tensor, out: Tensor) -> Tensor:
    """Return `sqrt(squares) + epsilon`, float32 [n]; `out` may be left holding it."""
    import torch

    # The root needs room: `out` has it, unless that is where the weights still are.
    free = out.data_ptr() != weights.data_ptr()
    return (torch.sqrt(squares, out=out) if free else squares.sqrt()).add_(epsilon)


def check_fraction(name: str, value: float) -> None:
    """Raise `BadConfiguration` unless `value` is in [0, 1)."""
    if not 0 <= value < 1:
        raise BadConfiguration(f"{name} is {value}: give a number from 0 up to, not including, 1")

"""Policies: what is done about a gradient that was computed on old weights, or that is poison.

A policy is a pure function of a push's staleness and of the recent mean staleness. It says at which
share of the learning rate the push is applied, or that it is dropped. A dropped mini-batch is not
settled, so it is lent again and computed anew on newer weights. Each partition decides by its own
versions.

`Guard` says which gradients are refused for their size, and which replicas are quarantined: those
that send what has to be refused, while others do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.rules.update import check_fraction

MAX_NORM = 1e18
"""No gradient is longer: its square still fits into float32."""
NORMS_SEEN = 100
"""Updates after which their mean norm says what is usual."""

PolicyName = Literal["asynchronous", "bounded", "compensate", "drop", "scale", "synchronous"]
Variant = Literal["adaptive", "constant"]
STRENGTHS: dict[Variant, float] = {"adaptive": 2.0, "constant": 0.04}
"""lambda_0 and lambda of Zheng et al. 2017, section 6, on CIFAR-10."""
_WITH_BOUND = ("bounded", "compensate", "drop")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is done with a push, and why."""

    scale: float
    """What the learning rate is multiplied by; 0 if the push is dropped."""
    reason: str

    @property
    def dropped(self) -> bool:
        """Whether the push is not to be applied."""
        return self.scale == 0


APPLY = Decision(scale=1.0, reason="asynchronous")


@dataclass(frozen=True, kw_only=True)
class StalenessPolicy:
    """How staleness is governed.

    Raises:
        BadConfiguration: A number is out of its range.
    """

    staleness_policy: PolicyName = "asynchronous"
    """`asynchronous` applies every push as it comes; `bounded` has whoever is fast wait, so that no
    push goes beyond the bound; `compensate` corrects each gradient for how far the weights have
    moved (DC-ASGD); `drop` has mini-batches beyond the bound computed again; `scale` lowers the
    rate of those that are staler than the mean; `synchronous` applies the mean of a round's
    gradients, which are computed on the same weights, and has those computed again that come late.
    """
    staleness_bound: int = 200
    """For `bounded`, `compensate` and `drop`: the most versions between pull and push. With
    `compensate` a partition keeps so many versions of its weights, and drops what is older."""
    compensation: Variant = "adaptive"
    """For `compensate`: whether lambda adapts to the mean square of the gradients."""
    compensation_lambda: float | None = None
    """lambda_0, or the constant lambda; none is the paper's, 2 or 0.04."""
    compensation_decay: float = 0.95
    """For `adaptive`: share of the mean square that is kept at each update, in [0, 1)."""
    round_pushes: int | None = None
    """For `synchronous`: gradients in a round; concurrent steps beyond so many are backup workers,
    whose gradients are dropped if they come last. None is all steps, and no backup."""
    round_steps: int | None = field(default=None, metadata={"cli": False})
    """Steps begun for a round, backups among them: the run's concurrent steps."""

    def __post_init__(self) -> None:
        if self.staleness_bound < 0:
            raise BadConfiguration(f"staleness bound is {self.staleness_bound}: give 0 or more")
        if not 0 <= self.strength < math.inf:
            raise BadConfiguration(
                f"compensation lambda is {self.compensation_lambda}: give a finite number of 0 or "
                "more, or none"
            )
        check_fraction("compensation decay", self.compensation_decay)
        if self.round_pushes is not None and self.round_pushes < 1:
            raise BadConfiguration(f"round pushes is {self.round_pushes}: give at least 1, or none")

    @property
    def strength(self) -> float:
        """lambda, or lambda_0, of the compensation."""
        given = self.compensation_lambda
        return STRENGTHS[self.compensation] if given is None else given

    @property
    def versions_kept(self) -> int:
        """How many versions before the latest a partition has to keep."""
        return self.staleness_bound if self.staleness_policy == "compensate" else 0

    def decide(self, staleness: int, mean: float) -> Decision:
        """Decide what to do with a push.

        `scale` is relative, `min(1, (mean + 1) / (staleness + 1))`: with 50 steps in flight the
        mean is about 49, and dividing the rate by the staleness itself would stop the training.
        `synchronous` counts from the version of the round's weights, so whatever is stale is late.
        With `bounded`, nothing beyond the bound ever arrives (`BoundedPermits`).

        Args:
            staleness: Of the push, in versions.
            mean: The recent mean staleness, in versions.
        """
        if self.staleness_policy == "synchronous" and staleness > 0:
            return Decision(scale=0.0, reason="late: the round that it was computed for is over")
        if self.staleness_policy in _WITH_BOUND and staleness > self.staleness_bound:
            return Decision(
                scale=0.0, reason=f"staleness {staleness} is beyond {self.staleness_bound}"
            )
        if self.staleness_policy == "scale" and staleness > mean:
            scale = (mean + 1.0) / (staleness + 1.0)
            return Decision(scale=scale, reason=f"staleness {staleness}, mean {mean:.1f}")
        return APPLY


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What keeps poison out.

    Raises:
        BadConfiguration: A number is out of its range.
    """

    max_norm_ratio: float | None = 1000.0
    """A gradient longer than so many times the usual norm is refused; none for no such bound."""
    quarantine_after: int | None = 5
    """Refused pushes after which a replica is quarantined, if others are not refused as often;
    none for never."""

    def __post_init__(self) -> None:
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 1:
            raise BadConfiguration(
                f"max norm ratio is {self.max_norm_ratio}: give more than 1, or none"
            )
        if self.quarantine_after is not None and self.quarantine_after < 1:
            raise BadConfiguration(
                f"quarantine after is {self.quarantine_after}: give at least 1, or none"
            )

    def enormous(self, norm: float, usual: float, num_seen: int) -> bool:
        """Whether a gradient of this norm is too long to be one.

        Before `NORMS_SEEN` updates nothing is usual, and only what float32 cannot square is
        enormous.

        Args:
            norm: Of the whole gradient.
            usual: The recent mean norm.
            num_seen: Updates that this mean rests on.
        """
        if norm > MAX_NORM:
            return True
        if self.max_norm_ratio is None or num_seen < NORMS_SEEN:
            return False
        return norm > self.max_norm_ratio * usual

    def quarantines(
        self, *, refused: int, applied: int, others_refused: int, others_applied: int
    ) -> bool:
        """Whether a replica is quarantined, by its counts of pushes and those of all others.

        It is if it was refused `quarantine_after` times, and ten times as often as the others. So
        neither a poisoned example, which meets all replicas alike, nor a run that diverges
        quarantines anyone. A single replica has nobody to be compared with.
        """
        if self.quarantine_after is None or refused < self.quarantine_after:
            return False
        others = others_refused + others_applied
        if not others:
            return False
        return refused / (refused + applied) > 10 * (others_refused + 0.5) / others

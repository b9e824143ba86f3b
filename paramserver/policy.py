"""Staleness policies: what is done about a gradient that was computed on old weights.

A policy is a pure function of a push's staleness and of the mean staleness of late. It says at
which share of the learning rate the push is applied, or that it is not: a dropped mini-batch is
not settled, so it is lent again and computed anew on newer weights. Each partition decides by its
own versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from paramserver.errors import BadConfiguration

PolicyName = Literal["asynchronous", "drop", "scale"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is done with a push, and why."""

    scale: float
    """What the learning rate is multiplied by; 0 where the push is dropped."""
    reason: str

    @property
    def dropped(self) -> bool:
        """Whether the push is not to be applied."""
        return self.scale == 0


APPLY = Decision(scale=1.0, reason="asynchronous")


@dataclass(frozen=True, kw_only=True)
class StalenessPolicy:
    """How staleness is governed."""

    staleness_policy: PolicyName = "asynchronous"
    """`asynchronous` applies every push as it comes; `drop` has mini-batches beyond the bound
    computed again; `scale` lowers the rate of those that are staler than the mean."""
    staleness_bound: int = 200
    """For `drop`: the most versions between pull and push."""

    def __post_init__(self) -> None:
        if self.staleness_bound < 0:
            raise BadConfiguration(f"staleness bound is {self.staleness_bound}: give 0 or more")

    def decide(self, staleness: int, mean: float) -> Decision:
        """What to do with a push of this staleness, where `mean` is usual (both in versions).

        `scale` is relative, `min(1, (mean + 1) / (staleness + 1))`: with 50 steps in flight the
        mean is about 49, and dividing the rate by staleness outright would stop the training.
        """
        if self.staleness_policy == "drop" and staleness > self.staleness_bound:
            return Decision(
                scale=0.0, reason=f"staleness {staleness} is beyond {self.staleness_bound}"
            )
        if self.staleness_policy == "scale" and staleness > mean:
            scale = (mean + 1.0) / (staleness + 1.0)
            return Decision(scale=scale, reason=f"staleness {staleness}, mean {mean:.1f}")
        return APPLY

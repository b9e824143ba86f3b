"""What is learned in a virtual cluster: length, scorings, goals, and the settings compared.

A setting in words is `POLICY[:NUMBER][/auto|/all][@RATE]`: a staleness policy, its bound or the
pushes of its rounds, which steps are in flight, and the learning rate. What is left out is the
recipe's or the command line's.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.simulate.options import SimulateConfig
from downpour.paramserver.rules.policy import PolicyName

POLICIES: tuple[str, ...] = typing.get_args(PolicyName)
_NUMBERS = {
    "synchronous": "round_pushes",
    "bounded": "staleness_bound",
    "compensate": "staleness_bound",
    "drop": "staleness_bound",
}
"""What the number after a policy's name is."""
_SETTING = re.compile(r"([a-z]+)(?::(\d+))?(?:/(auto|all))?(?:@([0-9.e-]+))?")


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """What `--learn` computes."""

    epochs: int | None = None
    """Epochs to learn at the most; none for the run's."""
    learning_rate: float | None = None
    """The rate that decay starts from; none for the run's."""
    momentum: float | None = None
    """Of the update rule; none for the run's."""
    goal: tuple[float, ...] = (0.97, 0.975)
    """Accuracies whose time is told."""
    until: Literal["goal", "epochs"] = "goal"
    """When to end: at the highest goal, or after all epochs."""
    score_every_epochs: float | None = 0.25
    """Epochs' worth of examples between two scorings; none scores by virtual time alone."""
    score_every_s: float | None = None
    """Virtual seconds between two scorings; none scores by examples alone."""
    compare: tuple[str, ...] = field(default=())
    """Settings to compare, each `POLICY[:NUMBER][/auto|/all][@RATE]`: a staleness policy, its bound
    or the pushes of its rounds, the steps in flight, the learning rate. None learns one: the run's.
    """

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "score_every_epochs", "score_every_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name.replace('_', ' ')} is {value}: give more than 0, or none")
        if self.score_every_epochs is None and self.score_every_s is None:
            raise ValueError(
                "score every epochs and score every s are none: give one, or nothing is scored"
            )
        if not self.goal or not all(0 < goal <= 1 for goal in self.goal):
            raise ValueError(f"goal is {self.goal}: give accuracies above 0, and at most 1")
        for words in self.compare:
            LearningSetting.parse(words)


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """All options of `downpour simulate`."""

    simulate: SimulateConfig = field(default_factory=SimulateConfig)
    """What is simulated."""
    learn: LearningConfig = field(default_factory=LearningConfig)
    """What is learned, with `--learn`."""


@dataclass(frozen=True, kw_only=True)
class LearningSetting:
    """One of the runs that are compared."""

    name: str
    """As it was given."""
    policy: str | None = None
    """Staleness policy; none for the run's."""
    number: int | None = None
    """Its bound, or the pushes of its rounds; none for the run's."""
    in_flight: str | None = None
    """Which steps are in flight; none for the run's."""
    rate: float | None = None
    """Learning rate; none for the run's."""

    @classmethod
    def parse(cls, words: str) -> LearningSetting:
        """The setting in words.

        Raises:
            ValueError: it is none.
        """
        found = _SETTING.fullmatch(words)
        if found is None or found[1] not in POLICIES:
            raise ValueError(
                f"compare has {words!r}: give POLICY[:NUMBER][/auto|/all][@RATE], with a policy "
                f"out of {', '.join(POLICIES)}"
            )
        policy, number, in_flight, rate = found.groups()
        if number is not None and policy not in _NUMBERS:
            raise ValueError(f"compare has {words!r}: {policy} has no number; leave it out")
        try:
            as_rate = None if rate is None else float(rate)
        except ValueError:
            raise ValueError(f"compare has {words!r}: {rate!r} is no learning rate") from None
        return cls(
            name=words,
            policy=policy,
            number=None if number is None else int(number),
            in_flight=in_flight,
            rate=as_rate,
        )

    def given(self, given: SimulateConfig) -> SimulateConfig:
        """The options of a simulation, with this setting's in their place."""
        values: dict[str, Any] = {"staleness_policy": self.policy, "in_flight": self.in_flight}
        if self.number is not None and self.policy is not None:
            values[_NUMBERS[self.policy]] = self.number
        given_here = {name: value for name, value in values.items() if value is not None}
        return dataclasses.replace(given, **given_here)


def settings(learn: LearningConfig) -> list[LearningSetting]:
    """The settings that are to be compared; the run's own if none is named."""
    return [LearningSetting.parse(words) for words in learn.compare] or [
        LearningSetting(name="as configured")
    ]


def lasting(config: RunConfig, learn: LearningConfig, setting: LearningSetting) -> RunConfig:
    """`config` with the epochs and the rate of `learn`, or with the setting's own rate.

    Raises:
        UserError: they do not go together with the rest.
    """
    policy, server = config.policy, config.server
    rate = learn.learning_rate if setting.rate is None else setting.rate
    try:
        if learn.epochs is not None:
            policy = dataclasses.replace(policy, epochs=learn.epochs)
        if learn.momentum is not None:
            server = dataclasses.replace(server, momentum=learn.momentum)
        if rate is not None:
            schedule = dataclasses.replace(server.schedule, learning_rate=rate)
            server = dataclasses.replace(server, schedule=schedule)
        return dataclasses.replace(config, policy=policy, server=server)
    except ValueError as error:
        raise UserError(str(error)) from None

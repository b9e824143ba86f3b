"""Which update rule a run has, by its name, and the numbers that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.rules.adaptive import Adam, AdamW, RMSProp
from downpour.paramserver.rules.layerwise import LARS
from downpour.paramserver.rules.update import SGD, Adagrad, Momentum, Nesterov, Regulariser, Rule

RuleName = Literal["momentum", "nesterov", "sgd", "adagrad", "adam", "adamw", "rmsprop", "lars"]
RULES: dict[RuleName, Callable[..., Rule]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adagrad": Adagrad,
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RMSProp,
    "lars": LARS,
}
WITH_MOMENTUM = ("momentum", "nesterov", "rmsprop", "lars")
DECOUPLED = ("adamw", "lars")
"""Rules that decay weights by themselves: L2 is not added to their gradients."""
BY_LAYER = ("lars",)
"""Rules that need whole layers, so that partitions are cut between them."""

_TAKEN_BY = {
    "beta1": ("adam", "adamw"),
    "beta2": ("adam", "adamw"),
    "epsilon": ("adagrad", "adam", "adamw", "rmsprop"),
    "square_decay": ("rmsprop",),
    "trust": ("lars",),
}
_ARGUMENT = {"square_decay": "decay"}


@dataclass(frozen=True, kw_only=True)
class RuleNumbers:
    """Numbers that some rules have; none is what `torch.optim` and the papers have."""

    beta1: float | None = None
    """For `adam` and `adamw`: share of the first moment kept at each update; none is 0.9."""
    beta2: float | None = None
    """For `adam` and `adamw`: share of the second moment kept at each update; none is 0.999."""
    epsilon: float | None = None
    """Added to the root of the squares; none is 1e-8, and for `adagrad` 1e-10."""
    square_decay: float | None = None
    """For `rmsprop`: share of the mean square kept at each update; none is 0.99."""
    trust: float | None = None
    """For `lars`: how far a layer moves at rate 1, as a share of its length; none is 0.001."""


NO_NUMBERS = RuleNumbers()


def make_rule(
    name: str,
    momentum: float = 0.9,
    numbers: RuleNumbers = NO_NUMBERS,
    weight_decay: float = 0.0,
) -> Rule:
    """Return the rule called `name`.

    Args:
        name: A key of `RULES`.
        momentum: Reaches the rules that have one.
        numbers: Those that some rules have.
        weight_decay: Reaches the rules that decay by themselves.

    Raises:
        BadConfiguration: There is no such rule, a number is out of its range, or one is given that
            the rule does not have.
    """
    if name not in RULES:
        raise BadConfiguration(f"rule is {name!r}: give one of {', '.join(RULES)}")
    arguments: dict[str, float] = {}
    for field in fields(numbers):
        value = getattr(numbers, field.name)
        if value is None:
            continue
        takers = _TAKEN_BY[field.name]
        if name not in takers:
            raise BadConfiguration(
                f"{field.name.replace('_', ' ')} is {value}, and rule is {name}, which has none: "
                f"give none, or rule {' or '.join(takers)}"
            )
        arguments[_ARGUMENT.get(field.name, field.name)] = value
    if name in WITH_MOMENTUM:
        arguments["momentum"] = momentum
    if name in DECOUPLED:
        arguments["weight_decay"] = weight_decay
    return RULES[name](**arguments)


def make_regulariser(name: str, weight_decay: float, clip_norm: float | None) -> Regulariser:
    """Return what happens to a gradient before the rule called `name`.

    Raises:
        BadConfiguration: A number is out of its range.
    """
    Regulariser(weight_decay=weight_decay)  # whoever applies it
    return Regulariser(weight_decay=0.0 if name in DECOUPLED else weight_decay, clip_norm=clip_norm)

"""What the workers' actors are told and tell: plain frozen data."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Which weights the evaluator writes once it has scored them, and where."""

    best_path: str | None = None
    """Where weights go that beat `best`; none keeps none of them."""
    best: float | None = None
    """The figure to beat, turned so that more is better; none is beaten by any."""
    model_path: str | None = None
    """Where weights go that reach `goal`; none keeps none of them."""
    answers_path: str | None = None
    """Where the answers of the weights of `model_path` go; none keeps none of them."""
    goal: float = math.inf
    """The figure to reach, likewise; -inf is reached by any."""

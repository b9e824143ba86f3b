"""Seeds of random tests: a few for every day, many for the soak."""

from __future__ import annotations

from typing import Any

import pytest


def seeds(few: int, many: int) -> list[Any]:
    """Parameters [0, many), of which those from `few` on are for the soak."""
    soak = [pytest.param(seed, marks=pytest.mark.soak) for seed in range(few, many)]
    return [*range(few), *soak]

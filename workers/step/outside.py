"""What a step may decide by outside of PyTorch, where neither a recording nor a check sees it.

Those are values that modules keep, such as a counter of passes, and the generators of Python and
NumPy. PyTorch's own random numbers are kernels like others, and a recording draws them as the step
does.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from torch import nn

from downpour.models.conversion.history import plain_values
from downpour.models.conversion.randomness import RandomState


class Outside:
    """What there is before a pass, to be compared with what there is after it."""

    def __init__(self, *modules: object) -> None:
        """Look at these; those that are no modules, such as plain loss functions, keep nothing."""
        self._modules = [module for module in modules if isinstance(module, nn.Module)]
        self._values = self._look()
        self._random = RandomState.now()

    def _look(self) -> list[dict[str, Any]]:
        return [plain_values(module, _state) for module in self._modules]

    def changed(self) -> str | None:
        """What has changed since, for people; None if nothing has."""
        now = RandomState.now()
        if now.pythons != self._random.pythons:
            return "it draws from Python's generator"
        if now.numpys != self._random.numpys:
            return "it draws from NumPy's generator"
        for before, after in zip(self._values, self._look(), strict=True):
            names = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
            if names:
                return f"'{min(names)}' of the network changes with each pass"
        return None


def _state(value: object) -> Any:
    """Where a generator of the module's own is; None of anything else."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state(legacy=False))
    return None

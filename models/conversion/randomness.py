"""The random generators that a network of a user's may draw from: PyTorch's, NumPy's and Python's.

Here: seeding all three for the while of a call, and telling whether any was drawn from. Not here:
devices' generators, and those that a user makes.
"""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

NUMPYS_SEEDS = 2**32
"""NumPy's global generator takes no larger ones."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RandomState:
    """Where the three generators of a process are."""

    torchs: Tensor
    numpys: bytes
    pythons: Any

    @classmethod
    def now(cls) -> Self:
        """Where they are now."""
        return cls(
            torchs=torch.get_rng_state(),
            numpys=pickle.dumps(np.random.get_state(legacy=False)),  # noqa: NPY002
            pythons=random.getstate(),
        )

    def is_now(self) -> bool:
        """Whether nothing was drawn since."""
        now = type(self).now()
        return (
            torch.equal(self.torchs, now.torchs)
            and self.numpys == now.numpys
            and self.pythons == now.pythons
        )

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.torchs)
        np.random.set_state(pickle.loads(self.numpys))  # noqa: NPY002, S301
        random.setstate(self.pythons)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` in here, whichever generator is asked; then all go on as before.

    Args:
        seed: in [0, 2**64). NumPy's is its remainder.
    """
    before = RandomState.now()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % NUMPYS_SEEDS)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        before.restore()

"""The random numbers that a step draws: their state, to be put back.

Kernels on a processor draw from the process's generator, those on a GPU from the GPU's. Both states
are kept on the host, so nothing here waits for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

cuda: Any = torch.cuda  # much of it has no types


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """The state of all generators that a step on `device` may draw from, uint8 each."""
    if device.type == "cuda":
        return torch.get_rng_state(), cuda.get_rng_state(device)
    return (torch.get_rng_state(),)


def set_random_state(device: torch.device, state: tuple[Tensor, ...]) -> None:
    """Have them go on from what `random_state` gave."""
    torch.set_rng_state(state[0])
    for gpus in state[1:]:
        cuda.set_rng_state(gpus, device)


def same_random_state(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Whether nothing was drawn between the two."""
    return all(map(torch.equal, a, b))

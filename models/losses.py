"""Losses by name: of classes, of numbers, of several classes at once.

Each is a mean over the mini-batch, and adds those of auxiliary heads at their weight. Not here:
losses of the user's own, which get a network's outputs as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from downpour.models.outputs import (
    ONE_AUXILIARY,
    SEVERAL_AUXILIARY,
    OutputsError,
    cross_entropy,
    heads,
)

Loss = Callable[[Any, Tensor], Tensor]
"""`(outputs, targets) -> loss`: the mean over the mini-batch, a scalar. Outputs are what the
network gives, mostly a tensor."""


def aligned(answer: Tensor, targets: Tensor) -> Tensor:
    """An answer in the shape of the targets: `[m]` for `[m, 1]`, and the like.

    Without it, PyTorch would compare each answer with each target.

    Raises:
        OutputsError: it has another number of values.
    """
    if answer.shape == targets.shape:
        return answer
    if answer.numel() != targets.numel() or len(answer) != len(targets):
        raise OutputsError(
            f"the network gives {list(answer.shape)}, and the targets are {list(targets.shape)}: "
            f"give a network with {targets[0].numel()} outputs"
        )
    return answer.reshape(targets.shape)


def _of_numbers(function: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    def loss(outputs: Any, targets: Tensor) -> Tensor:
        main, auxiliary = heads(outputs)
        value = function(aligned(main, targets), targets)
        if auxiliary:
            weight = ONE_AUXILIARY if len(auxiliary) == 1 else SEVERAL_AUXILIARY
            others = [function(aligned(each, targets), targets) for each in auxiliary]
            value = value + weight * torch.stack(others).sum()
        return value

    return loss


IGNORED = 255
"""Class of pixels that do not count."""


def pixel_cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Mean cross-entropy over pixels, in nats, with that of auxiliary heads added at their weight.

    A mini-batch in which no pixel counts has the loss 0.

    Args:
        outputs: logits [m, classes, ...], or several as `heads` tells them apart.
        targets: int64 [m, ...], a class for each pixel; `IGNORED` does not count.
    """
    main, auxiliary = heads(outputs)
    count = (targets != IGNORED).sum().clamp(min=1)

    def loss(logits: Tensor) -> Tensor:
        summed = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return summed / count

    value = loss(main)
    if auxiliary:
        weight = ONE_AUXILIARY if len(auxiliary) == 1 else SEVERAL_AUXILIARY
        value = value + weight * torch.stack([loss(each) for each in auxiliary]).sum()
    return value


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "mse": _of_numbers(functional.mse_loss),
    "l1": _of_numbers(functional.l1_loss),
    "huber": _of_numbers(functional.smooth_l1_loss),
    "pixel_cross_entropy": pixel_cross_entropy,
    "bce": _of_numbers(functional.binary_cross_entropy_with_logits),
}
"""Losses by name. `mse`, `l1` and `huber` (with delta 1) are means over all numbers of the targets;
`bce` is binary cross-entropy of logits, a mean over all classes."""

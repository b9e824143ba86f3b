"""Loss and gradient of one mini-batch as autograd finds them, left in buffers of the caller's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from downpour.models.outputs import Loss
from downpour.workers.spec import Precision
from downpour.workers.step.precision import computing_in


def differentiate(
    loss: Loss,
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    parameters: Sequence[Tensor],
    places: Sequence[Tensor],
    gradient: Tensor,
    precision: Precision = "float32",
) -> Tensor:
    """Leave the gradient by each parameter in its place; gives the loss, a scalar.

    The places are views of `gradient` [P], which is 0 wherever nothing was found. All are on one
    device, and nothing here waits for it.
    """
    with computing_in(precision, gradient.device.type):
        value = loss(module(inputs), targets)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    with torch.no_grad():
        pairs = [
            (place, part)
            for place, part in zip(places, found, strict=True)
            if part is not None  # type: ignore[redundant-expr]
        ]
        if len(pairs) < len(found):
            gradient.zero_()  # what had no part in this step
        torch._foreach_copy_([place for place, _ in pairs], [part for _, part in pairs])
    return value.detach()

"""Loss and gradient of one mini-batch as autograd finds them, left in buffers of the caller's."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from downpour.models.outputs import Loss
from downpour.workers.spec import Precision
from downpour.workers.step.precision import computing_in

_reentrant: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""What the first pass of a module showed."""


def differentiate(
    loss: Loss,
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    parameters: Sequence[Tensor],
    places: Sequence[Tensor],
    gradient: Tensor,
    precision: Precision = "float32",
    scale: Tensor | None = None,
) -> Tensor:
    """Leave the gradient by each parameter in its place; gives the loss, a scalar.

    The places are views of `gradient` [P], which is 0 wherever nothing was found. With a `scale`, a
    scalar, the loss is multiplied by it before it is differentiated, and the gradient divided
    after. All are on one device, and nothing here waits for it.
    """
    with computing_in(precision, gradient.device.type):
        value = loss(module(inputs), targets)
    if module not in _reentrant:
        _reentrant[module] = is_reentrant(value)
    scaled = value if scale is None else value * scale
    found = gradients(scaled, parameters, reentrant=_reentrant[module])
    with torch.no_grad():
        pairs = [
            (place, part) for place, part in zip(places, found, strict=True) if part is not None
        ]
        if len(pairs) < len(found):
            gradient.zero_()  # what had no part in this step
        if pairs:
            torch._foreach_copy_([place for place, _ in pairs], [part for _, part in pairs])
        if scale is not None:
            gradient.div_(scale)
    return value.detach()


def gradients(
    value: Tensor, parameters: Sequence[Tensor], *, reentrant: bool | None = None
) -> Sequence[Tensor | None]:
    """The gradient of a scalar by each parameter; None of one that it does not depend on.

    Args:
        value: of a forward pass.
        parameters: leaves.
        reentrant: as `is_reentrant` tells of the pass; None asks it.
    """
    if not (is_reentrant(value) if reentrant is None else reentrant):
        return torch.autograd.grad(value, parameters, allow_unused=True)
    for parameter in parameters:
        parameter.grad = None
    value.backward()  # type: ignore[no-untyped-call]
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def is_reentrant(value: Tensor) -> bool:
    """Whether a forward pass used activation checkpointing of PyTorch's reentrant kind.

    Its parameters are not in the pass's graph: they get their gradients while the part is computed
    again, and only if all gradients are left with the parameters.
    """
    seen: set[Any] = set()
    ahead: list[Any] = [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        ahead.extend(following for following, _ in node.next_functions)
    return False

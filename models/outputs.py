"""What networks give: a tensor, or several with auxiliary heads among them; and losses by name.

Here: which tensor is the answer, which ones are auxiliary heads, and the losses over them. Not
here: losses of the user's own, which get a network's outputs as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.models.errors import ModelError

MAIN = ("logits", "out", "output", "outputs", "main", "prediction", "predictions")
"""Names of the answer in outputs that have names: Hugging Face's first, then torchvision's."""
ONE_AUXILIARY, SEVERAL_AUXILIARY = 0.4, 0.3
"""What an auxiliary classifier's loss is multiplied by: 0.3 for each of GoogLeNet's two (Szegedy et
al. 2014, section 5); 0.4 for Inception v3's one, as its authors' published code has it."""


Loss = Callable[[Any, Tensor], Tensor]
"""`(outputs, targets) -> loss`: the mean over the mini-batch, a scalar. Outputs are what the
network gives, mostly a tensor."""


class OutputsError(ModelError):
    """A network gives something in which no answer is found."""


def main_output(outputs: Any) -> Tensor:
    """The answer in what a network gives.

    A tensor is itself. Of a tuple or list (named or not) it is the first tensor, or the answer in
    the first item if that is a tuple, a list or a mapping. Of a mapping or a dataclass it is the
    one called as in `MAIN`, or else the only one.

    Raises:
        OutputsError: there is none.
    """
    return heads(outputs)[0]


def heads(outputs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The answer, and the auxiliary answers: the other tensors of its shape.

    Raises:
        OutputsError: there is no answer.
    """
    if isinstance(outputs, Tensor):
        return outputs, ()
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        outputs = {f.name: getattr(outputs, f.name) for f in dataclasses.fields(outputs)}
    if isinstance(outputs, Mapping):
        named = {k: v for k, v in outputs.items() if isinstance(v, Tensor)}
        key = next((k for k in MAIN if k in named), None)
        if key is None and len(named) == 1:
            (key,) = named
        if key is None:
            raise OutputsError(
                f"the network gives a mapping with {_listed(outputs)}: call its answer "
                f"'{MAIN[0]}', or give the tensor alone"
            )
        main = named.pop(key)
        return main, _alike(main, named.values())
    if isinstance(outputs, list | tuple):
        if outputs and isinstance(outputs[0], list | tuple | Mapping):
            main, auxiliary = heads(outputs[0])
            return main, auxiliary + _alike(main, [v for v in outputs[1:] if isinstance(v, Tensor)])
        tensors = [v for v in outputs if isinstance(v, Tensor)]
        if tensors:
            return tensors[0], _alike(tensors[0], tensors[1:])
    raise OutputsError(
        f"the network gives {type(outputs).__name__}, with no tensor in it that is its answer: "
        "return a tensor, a tuple whose first is the answer, or a mapping"
    )


def tells_classes(answer: Tensor, num_classes: int) -> bool:
    """Whether an answer has a number for each class, `[m, classes]`; if not, it is numbers."""
    return answer.ndim == 2 and answer.shape[1] == num_classes


def _alike(main: Tensor, others: Any) -> tuple[Tensor, ...]:
    return tuple(v for v in others if v.shape == main.shape and v.is_floating_point())


def _listed(outputs: Mapping[Any, Any]) -> str:
    return ", ".join(f"'{k}' ({type(v).__name__})" for k, v in outputs.items()) or "nothing"


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, with that of auxiliary classifiers added at their weight.

    Args:
        outputs: logits [m, classes], or several as `heads` tells them apart.
        targets: int64 [m].
    """
    if isinstance(outputs, Tensor):
        return functional.cross_entropy(outputs, targets)
    return _with_auxiliary(outputs, lambda each: functional.cross_entropy(each, targets))


def _with_auxiliary(outputs: Any, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The answer's loss, with those of auxiliary heads added at their weight."""
    main, auxiliary = heads(outputs)
    value = loss(main)
    if auxiliary:
        weight = ONE_AUXILIARY if len(auxiliary) == 1 else SEVERAL_AUXILIARY
        value = value + weight * torch.stack([loss(each) for each in auxiliary]).sum()
    return value


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
        return _with_auxiliary(outputs, lambda each: function(aligned(each, targets), targets))

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
    count = (targets != IGNORED).sum().clamp(min=1)

    def loss(logits: Tensor) -> Tensor:
        summed = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return summed / count

    return _with_auxiliary(outputs, loss)


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


class MainOutput(nn.Module):
    """A network that gives its answer alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """`[m, ...]`, whatever the network's own answer is."""
        return main_output(self.network(x))

"""Parts of a network that are not trained, chosen by the names of their parameters."""

from __future__ import annotations

import fnmatch
import types
from collections.abc import Sequence

from torch import nn

from downpour.models.batchnorm import BatchNorm
from downpour.models.errors import ModelError

SHOWN = 3
"""Names that an error shows."""


def freeze(module: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """Take parts of a network out of training, in place; gives the network.

    A pattern is matched with the names of parameters, as a shell matches file names: `layer1.*`,
    `*.bias`. The name of a module stands for all in it: `layer1`. A batch normalization layer
    whose gamma and beta are frozen, or that has neither and lies in a module that a pattern names,
    stays in inference mode: it normalizes with the statistics that it has, and they do not change.

    Args:
        module: the network.
        patterns: any number.

    Raises:
        ModelError: a pattern matches nothing, or nothing is left to train.
    """
    if not patterns:
        return module
    named = dict(module.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in named):
            some = ", ".join(repr(name) for name in list(named)[:SHOWN])
            raise ModelError(
                f"freeze is {pattern!r}, which names no parameter: give names or patterns of "
                f"parameters or modules; the first are {some}"
            )
    for name, parameter in named.items():
        if any(_matches(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ModelError(
            f"freeze is {','.join(patterns)}, which leaves nothing to train: give fewer patterns"
        )
    for name, layer in module.named_modules():
        if isinstance(layer, BatchNorm) and _is_frozen(name, layer, patterns):
            layer.train = types.MethodType(_stay, layer)  # type: ignore[method-assign]
            layer.train()
    return module


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _is_frozen(name: str, layer: BatchNorm, patterns: Sequence[str]) -> bool:
    own = list(layer.parameters())
    if own:
        return not any(parameter.requires_grad for parameter in own)
    return any(_matches(f"{name}.weight", pattern) for pattern in patterns)


def _stay(layer: nn.Module, mode: bool = True) -> nn.Module:
    """In place of a layer's `train`: whatever the network is in, the layer is in inference mode."""
    return nn.Module.train(layer, False)

"""Spectral normalization: state of a model that follows from its weights.

Not here: other state (`history`), and BN statistics (`batchnorm`, `flat`).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

POWER_ITERATIONS = 100
"""From random vectors to the largest singular value, unless the next is as large."""


def spectral_buffers(module: nn.Module) -> set[str]:
    """Names of the vectors by which spectral normalization finds a module's weights' norm."""
    names = {"_u", "_v"} if isinstance(module, _SpectralNorm) else set()
    for hook in _spectral_hooks(module):
        names |= {hook.name, f"{hook.name}_u", f"{hook.name}_v"}
    return names


def _spectral_hooks(module: nn.Module) -> list[SpectralNorm]:
    """The hooks of the older `nn.utils.spectral_norm`."""
    return [h for h in module._forward_pre_hooks.values() if isinstance(h, SpectralNorm)]


def has_spectral_norm(model: nn.Module) -> bool:
    """Whether some weights of a model are normalized by their spectral norm."""
    return any(spectral_buffers(module) for module in model.modules())


def settle_spectral_norm(model: nn.Module) -> None:
    """Have spectral normalization find the norms of the weights as they are now.

    Its vectors follow from the weights, by a step of power iteration in each training forward. Here
    are as many steps as find them from anywhere.
    """
    with torch.no_grad():
        for module in model.modules():
            for hook in _spectral_hooks(module):
                for _ in range(POWER_ITERATIONS):
                    hook.compute_weight(module, do_power_iteration=True)
            if not isinstance(module, parametrize.ParametrizationList):
                continue
            parts = [part for part in module.modules() if isinstance(part, _SpectralNorm)]
            were_training = [part.training for part in parts]
            for part in parts:
                part.training = True
            for _ in range(POWER_ITERATIONS if parts else 0):
                module()
            for part, training in zip(parts, were_training, strict=True):
                part.training = training

"""What a model keeps beside its parameters and BN statistics, and what of it training changes.

The parameter server has the weights and the BN statistics. Buffers that stay as they were made are
the same in every process, since each builds the model itself. A buffer that training forwards
change would be another one in each replica, and none of them the run's: such a model is refused.

Not here: BN statistics (`batchnorm`, `flat`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from downpour.models.batchnorm import BatchNorm
from downpour.models.conversion.copies import detached_copy
from downpour.models.errors import ModelError

log = logging.getLogger(__name__)

POWER_ITERATIONS = 100
"""From random vectors to the largest singular value, unless the next is as large."""


class StateError(ModelError):
    """A model changes state in training that the parameter server does not keep."""


def check_state(model: nn.Module, inputs: Tensor) -> None:
    """Run one forward of a copy of `model` in training mode, and see what it changes.

    A forward that fails says nothing of the state, and is not this function's to tell of.

    Args:
        model: in any mode; it is left as it is.
        inputs: a mini-batch, `[m, ...]`.

    Raises:
        StateError: a tensor that the model keeps has changed; names it.
    """
    changed = changed_state(model, inputs)
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise StateError(
            f"'{changed[0]}'{others} changes in a training forward, and is no BN statistic: each "
            "replica would keep its own. Compute it anew in each forward, or keep it outside of "
            "the network"
        )


def changed_state(model: nn.Module, inputs: Tensor) -> list[str]:
    """Names of the tensors that a training forward changes, but for what follows from weights.

    None if the forward fails.
    """
    try:
        copied = detached_copy(model).train()
        before = {name: tensor.clone() for name, tensor in _kept(copied)}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            copied(inputs)
    except Exception as error:
        log.info("a trial forward fails: %s: %s", type(error).__name__, error)
        return []
    after = dict(_kept(copied))
    return [
        name
        for name, tensor in before.items()
        if name not in after or not _same(tensor, after[name])
    ]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def _kept(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a model keeps, by name; not BN's, and none that follows from weights."""
    for path, module in model.named_modules():
        if isinstance(module, BatchNorm | _SpectralNorm):
            tensors = dict(module._parameters)
        else:
            tensors = {**module._parameters, **module._buffers}
            tensors |= {
                k: v for k, v in vars(module).items() if isinstance(v, Tensor) and v.is_leaf
            }
        followed = spectral_buffers(module)
        for name, tensor in tensors.items():
            if tensor is not None and name not in followed:
                yield (f"{path}.{name}" if path else name), tensor


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

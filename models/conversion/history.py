"""What a model keeps beside its parameters and BN statistics, and what of it training changes.

The parameter server has the weights and the BN statistics. Buffers that stay as they were made are
the same in every process, since each builds the model itself. State that depends on the forwards
before would be another one in each replica, and none of them the run's: such a model is refused.
What a forward writes anew each time is no state. A factory that makes another network each time is
refused, too.

Not here: BN statistics (`batchnorm`, `flat`), and spectral normalization (`state`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._pytree import tree_leaves

from downpour.models.batchnorm import BatchNorm
from downpour.models.conversion.convert import InterceptedBatchNorm
from downpour.models.conversion.copies import detached_copy
from downpour.models.conversion.randomness import seeded
from downpour.models.conversion.state import settle_spectral_norm, spectral_buffers
from downpour.models.errors import ModelError

log = logging.getLogger(__name__)

MODULES_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
MOST_ITEMS = 64
"""Items of a list that are looked at, the last ones."""
PLAIN = (bool, int, float, complex, str, bytes, type(None))
EARLIER, LATER = 1, 2
"""Seeds of the two forwards."""


class StateError(ModelError):
    """A model changes state in training that the parameter server does not keep."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen:
    """A model after its last forward."""

    tensors: Mapping[str, Tensor]
    """Parameters and buffers. To write one anew in each forward changes it for all others, too."""
    attributes: Mapping[str, Tensor]
    """Plain tensors."""
    values: Mapping[str, Any]
    outputs: Sequence[Tensor]


def check_state(model: nn.Module, inputs: Tensor) -> str | None:
    """See whether a forward in training mode depends on those before it, by copies of `model`.

    One copy makes a forward. Another makes one on other inputs first. Both draw the same random
    numbers. A forward that fails says nothing of the state, and is not this function's to tell of.

    Args:
        model: in any mode; it is left as it is.
        inputs: a mini-batch, `[m, ...]`.

    Returns:
        A line to tell of a Python value that counts forwards, and that the outputs do not seem to
        depend on; None if there is none.

    Raises:
        StateError: the model keeps a tensor, or a value that its outputs depend on, that differs;
            it makes a parameter in a forward; or a BN layer that is trained normalizes with its
            statistics. Names it.
    """
    try:
        fresh = detached_copy(model).train()
        before = _seen(fresh)
        with _Modes(fresh) as switched:
            once = _after(fresh, inputs)
        other = detached_copy(model).train()
        _after(other, inputs * 0.5, EARLIER)
        twice = _after(other, inputs)
    except Exception as error:
        log.info("a trial forward fails: %s: %s", type(error).__name__, error)
        return None
    if made := [name for name, _ in fresh.named_parameters() if name not in before.tensors]:
        raise StateError(
            f"parameter '{made[0]}' is made in a forward, and would not be trained: make it in "
            "__init__; nn.LazyLinear and the like find their sizes by themselves"
        )
    if switched:
        raise StateError(
            f"batch normalization '{switched[0]}' is switched to inference mode in a training "
            "forward, where the moving averages of the run are not at hand: leave its mode alone, "
            "or freeze it"
        )
    changed = [n for n, t in before.tensors.items() if not _same(t, once.tensors.get(n))]
    changed += [n for n, t in once.attributes.items() if not _same(t, twice.attributes.get(n))]
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise StateError(
            f"'{changed[0]}'{others} changes in a training forward, and is no BN statistic: each "
            "replica would keep its own. Compute it anew in each forward, or keep it outside of "
            "the network"
        )
    return _check_values(once, twice)


def _check_values(once: _Seen, twice: _Seen) -> str | None:
    """Python values that differ: refused if the outputs do so too."""
    changed = [n for n, value in once.values.items() if value != twice.values.get(n)]
    if not changed:
        return None
    if len(once.outputs) == len(twice.outputs) and all(map(_close, once.outputs, twice.outputs)):
        return (
            f"'{changed[0]}' of the network changes with each forward: every model copy counts by "
            "itself, and inference begins anew"
        )
    raise StateError(
        f"the outputs depend on '{changed[0]}', which changes with each training forward: each "
        "replica would keep its own, and inference would begin anew. Make it an argument that stays"
    )


def _after(model: nn.Module, inputs: Tensor, seed: int = LATER) -> _Seen:
    """Make a forward in training mode, and look."""
    settle_spectral_norm(model)
    with seeded(seed), torch.no_grad():
        return _seen(model, model(inputs))


def _seen(model: nn.Module, outputs: object = None) -> _Seen:
    return _Seen(
        tensors={name: tensor.detach().clone() for name, tensor in _tensors(model)},
        attributes={name: tensor.detach().clone() for name, tensor in _attributes(model)},
        values=plain_values(model),
        outputs=[leaf.clone() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)],
    )


def check_repeats(model: nn.Module, make: Callable[[], nn.Module]) -> None:
    """See whether a factory makes the same network again, if that has state of its own.

    Parameters and BN statistics are the run's, and every process gets them. All else is as each
    process makes it.

    Args:
        model: that was made, and has not been used.
        make: makes it again.

    Raises:
        StateError: a tensor or an array differs; names it.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    first = _constants(model, parameters)
    if not first:
        return
    second = _constants(make(), parameters)
    changed = [n for n, value in first.items() if n not in second or not _same(value, second[n])]
    if changed:
        raise StateError(
            f"'{changed[0]}' is another one each time that the network is made, so each process "
            "would have its own: draw it by PyTorch's, NumPy's or Python's global generator, which "
            "are seeded, or from a seed of its own"
        )


def _constants(model: nn.Module, parameters: Set[str]) -> dict[str, Tensor]:
    found = {n: t for n, t in (*_tensors(model), *_attributes(model)) if n not in parameters}
    arrays = ((n, v) for n, v in _values(model) if isinstance(v, np.ndarray))
    return found | {n: torch.from_numpy(v) for n, v in arrays if v.dtype.kind in "biuf"}


class _Modes:
    """Names of the BN layers that are in training mode before a forward, and are not in it."""

    def __init__(self, model: nn.Module) -> None:
        self._found: list[str] = []
        self._hooks = [
            layer.register_forward_pre_hook(self._looker(name))
            for name, layer in model.named_modules()
            if isinstance(layer, BatchNorm) and layer.training
        ]

    def _looker(self, name: str) -> Any:
        def look(layer: nn.Module, _: object) -> None:
            if not layer.training:
                self._found.append(name)

        return look

    def __enter__(self) -> list[str]:
        return self._found

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def _same(a: Tensor, b: Tensor | None) -> bool:
    if b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether outputs differ by rounding alone."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name; not BN's buffers, and none that follows from weights."""
    for path, module in model.named_modules():
        tensors: dict[str, Any] = dict(module._parameters)
        if isinstance(module, InterceptedBatchNorm):  # which may do anything with its own
            tensors |= {k: module._buffers[k] for k in ("running_mean", "running_var")}
        elif not isinstance(module, BatchNorm | _SpectralNorm):
            tensors |= module._buffers
        followed = spectral_buffers(module)
        for name, tensor in tensors.items():
            if tensor is not None and name not in followed:
                yield (f"{path}.{name}" if path else name), tensor


def _attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are plain attributes, by name, but for those that follow from weights."""
    for path, module in model.named_modules():
        followed = spectral_buffers(module)
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_leaf and name not in followed:
                yield (f"{path}.{name}" if path else name), value


def _values(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every other value that a user's module keeps, by name."""
    for path, module in model.named_modules():
        if isinstance(module, BatchNorm):
            continue
        for name, value in vars(module).items():
            if name not in MODULES_OWN and not isinstance(value, Tensor):
                yield (f"{path}.{name}" if path else name), value


def plain_values(
    model: nn.Module, more: Callable[[object], Any] = lambda _: None
) -> dict[str, Any]:
    """All values but tensors that a model's modules keep, by name, as what can be compared.

    Args:
        model: with modules of any kind; those of BN layers are left out.
        more: gives what stands for a value, or None for what stands for it anyway.
    """
    found = {}
    for name, value in _values(model):
        known = more(value)
        found[name] = _plain(value) if known is None else known
    return found


def _plain(value: Any, depth: int = 3) -> Any:
    """A value by which it can be compared; what is not looked into is its type alone."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, np.ndarray):
        return (value.shape, value.ravel()[:MOST_ITEMS].tolist())
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.detach().flatten()[:MOST_ITEMS].tolist())
    if not depth:
        return type(value).__name__
    if isinstance(value, Mapping):
        return [(repr(k), _plain(v, depth - 1)) for k, v in list(value.items())[-MOST_ITEMS:]]
    if isinstance(value, Set):
        return sorted(map(repr, value))
    if isinstance(value, nn.Module | type):
        return type(value).__name__
    if isinstance(value, Sequence) or hasattr(value, "maxlen"):  # a deque
        return [len(value), *(_plain(each, depth - 1) for each in list(value)[-MOST_ITEMS:])]
    return type(value).__name__

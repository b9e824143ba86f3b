"""A model or a loss from its name: one of ours, or a user's own as `package.module:function`.

Here: the tables of names and the errors of a wrong one. Not here: the models.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.models.errors import ModelError, RegistryError

KNOWN = {
    "inception": "downpour.models.inception:Inception",
    "mnist": "downpour.models.mlp:MnistNet",
}
"""Name -> where its factory is. Imported when asked for."""


Loss = Callable[[Tensor, Tensor], Tensor]
"""`(outputs, targets) -> loss`: the mean over the mini-batch, a scalar."""

LOSSES: dict[str, Loss] = {
    "cross_entropy": functional.cross_entropy,
}
"""Losses by name."""


def find_loss(name: str) -> Loss:
    """The loss called `name`: a key of `LOSSES`, or the user's own as `package.module:function`.

    Raises `RegistryError` for an unknown name or one that leads to nothing that can be called.
    """
    if name in LOSSES:
        return LOSSES[name]
    return _find("loss", name, LOSSES)  # type: ignore[return-value]


def build(
    name: str, seed: int, *, offered: Mapping[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
    """The model called `name`, initialized from `seed`, on the CPU.

    `name` is a key of `KNOWN` or `package.module:function` for a factory of the user's own: a
    callable that returns an `nn.Module`. It gets `kwargs`; `seed` if it takes an argument of that
    name; and of `offered` what its signature names and `kwargs` lacks. PyTorch's global CPU
    generator is seeded around the call and then put back, so that a factory which relies on
    PyTorch's default initialization repeats as well.

    Raises `RegistryError` for an unknown name (lists the known ones), arguments that the factory
    does not take, a factory that fails (names it and its error) or does not return a module;
    `ModelError` for values that one of our models refuses.
    """
    if not 0 <= seed < 2**64:
        raise RegistryError(f"seed is {seed}: give an integer of 64 bits, 0 or more")
    factory = _find("model", KNOWN.get(name, name), KNOWN)
    taken = inspect.signature(factory).parameters
    kwargs = {k: v for k, v in (offered or {}).items() if k in taken} | kwargs
    arguments = _arguments(name, factory, seed, kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model = factory(**arguments)
        except ModelError:
            raise
        except Exception as error:
            raise RegistryError(
                f"the factory of model '{name}' failed: {_one_line(error)}"
            ) from error
    if not isinstance(model, nn.Module):
        raise RegistryError(
            f"the factory of model '{name}' returned {type(model).__name__}, not a module: "
            "return a torch.nn.Module"
        )
    return model


_WANTED = {
    "model": "a function that returns a torch.nn.Module",
    "loss": "a function of outputs and targets that returns their mean loss",
}


def _find(kind: str, name: str, known: Mapping[str, object]) -> Callable[..., object]:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise RegistryError(
            f"there is no {kind} '{name}': use one of {', '.join(sorted(known))}, "
            "or 'package.module:function' for your own"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RegistryError(
            f"{kind} '{name}': '{module_name}' cannot be imported: {_one_line(error)}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        problem = "does not exist" if function is None else "cannot be called"
        raise RegistryError(
            f"{kind} '{name}': '{attribute}' in '{module_name}' {problem}: name {_WANTED[kind]}"
        )
    return function  # type: ignore[no-any-return]


def _arguments(
    name: str, factory: Callable[..., object], seed: int, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What to call the factory with, once it is known to fit."""
    signature = inspect.signature(factory)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if "seed" in signature.parameters or takes_any:
        kwargs = {**kwargs, "seed": seed}
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        takes = ", ".join(p for p in signature.parameters if p != "seed") or "none"
        raise RegistryError(f"model '{name}': {error}: its arguments are {takes}") from error
    return kwargs


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())

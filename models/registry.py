"""A model from its name: one of ours, or a user's own as `package.module:function`.

Here: the table of names and the errors of a wrong one. Not here: the models.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.errors import ModelError, RegistryError

KNOWN = {
    "inception": "models.inception:Inception",
    "mnist": "models.mlp:MnistNet",
}
"""Name -> where its factory is. Imported when asked for."""


def build(name: str, seed: int, **kwargs: Any) -> nn.Module:
    """The model called `name`, initialized from `seed`, on the CPU.

    `name` is a key of `KNOWN` or `package.module:function` for a factory of the user's own: a
    callable that returns an `nn.Module`. It gets `kwargs`, and `seed` if it takes an argument of
    that name. PyTorch's global CPU generator is seeded around the call and then put back, so
    that a factory which relies on PyTorch's default initialization repeats as well.

    Raises `RegistryError` for an unknown name (lists the known ones), arguments that the factory
    does not take, a factory that fails (names it and its error) or does not return a module;
    `ModelError` for values that one of our models refuses.
    """
    if not 0 <= seed < 2**64:
        raise RegistryError(f"seed is {seed}: give an integer of 64 bits, 0 or more")
    factory = _find(name)
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


def _find(name: str) -> Callable[..., object]:
    target = KNOWN.get(name, name)
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise RegistryError(
            f"there is no model '{name}': use one of {', '.join(sorted(KNOWN))}, "
            "or 'package.module:function' for your own"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RegistryError(
            f"model '{name}': '{module_name}' cannot be imported: {_one_line(error)}"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        problem = "does not exist" if factory is None else "cannot be called"
        raise RegistryError(
            f"model '{name}': '{attribute}' in '{module_name}' {problem}: "
            "name a function that returns a torch.nn.Module"
        )
    return factory  # type: ignore[no-any-return]


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

"""A model or a loss from its name: one of ours, or a user's own as `package.module:function`.

What has no such name travels by value (`by_value`).

Here: the tables of names and the errors of a wrong one. Not here: the models.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from downpour.models import by_value
from downpour.models.conversion.randomness import seeded
from downpour.models.errors import ModelError, RegistryError
from downpour.models.lookup import import_named, place_of
from downpour.models.outputs import LOSSES, Loss

KNOWN = {
    "inception": "downpour.models.inception:Inception",
    "mnist": "downpour.models.mlp:MnistNet",
}
"""Name -> where its factory is. Imported when asked for."""

CLASSES = "num_classes"
CHANNELS = ("in_chans", "in_channels", "input_channels")
"""What factories call the channels of their input; timm the first."""


def find_loss(name: str) -> Loss:
    """The loss called `name`: a key of `LOSSES`, or the user's own as `package.module:function`.

    Raises `RegistryError` for an unknown name or one that leads to nothing that can be called.
    """
    if name in LOSSES:
        return LOSSES[name]
    return _find("loss", name, LOSSES)  # type: ignore[return-value]


def build(
    name: str, seed: int, /, *, offered: Mapping[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
    """The model called `name`, initialized from `seed`, on the CPU.

    `name` is a key of `KNOWN` or `package.module:function` for a factory of the user's own: a
    callable that returns an `nn.Module`. It gets `kwargs`; `seed` if it names an argument so; and
    of `offered` what it names and `kwargs` lacks. A factory that takes any keyword gets
    `num_classes` besides, and one of timm's `in_chans`, if those are offered. If it then refuses
    the number of classes it is called without. The global generators of PyTorch, NumPy and Python
    are seeded around the call and then put back, so that a factory which relies on PyTorch's
    default initialization repeats as well.

    Raises `RegistryError` for an unknown name (lists the known ones), arguments that the factory
    does not take, a factory that fails (names it and its error) or does not return a module;
    `ModelError` for values that one of our models refuses.
    """
    if not 0 <= seed < 2**64:
        raise RegistryError(f"seed is {seed}: give an integer of 64 bits, 0 or more")
    factory = _find("model", KNOWN.get(name, name), KNOWN)
    signature = _signature(name, factory)
    seeds = {"seed": seed} if "seed" in signature.parameters else {}
    for attempt in _attempts(name, signature, offered or {}, kwargs):
        arguments = seeds | attempt
        _check_arguments(name, signature, arguments)
        with seeded(seed):
            try:
                model = _called(factory, signature, arguments)
            except ModelError:
                raise
            except Exception as error:
                if _refuses_classes(error) and CLASSES not in {*kwargs, *signature.parameters}:
                    continue
                raise RegistryError(
                    f"the factory of model '{name}' failed: {described(error)}"
                ) from error
        if not isinstance(model, nn.Module):
            raise RegistryError(
                f"the factory of model '{name}' returned {type(model).__name__}, not a module: "
                "return a torch.nn.Module"
            )
        return model
    raise AssertionError("the last attempt returns or raises")


def takes(name: str, argument: str) -> bool:
    """Whether the factory of the model called `name` has an argument of that name.

    Raises:
        RegistryError: there is no such model.
    """
    factory = _find("model", KNOWN.get(name, name), KNOWN)
    return argument in _signature(name, factory).parameters


def takes_channels(name: str) -> bool:
    """Whether the factory of the model called `name` can be told the channels of its input.

    Raises:
        RegistryError: there is no such model.
    """
    return any(takes(name, argument) for argument in CHANNELS) or _is_timm(name)


def _attempts(
    name: str, signature: inspect.Signature, offered: Mapping[str, Any], given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The arguments to call a factory with, `seed` aside: the first that it does not refuse."""
    named = {k: v for k, v in offered.items() if k in signature.parameters}
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    taken = {k: v for k, v in offered.items() if any_keyword and _is_taken_unnamed(name, k)}
    first, second = {**named, **taken, **given}, {**named, **given}
    if CLASSES not in first or CLASSES in second:
        return [first]
    return [first, {k: v for k, v in first.items() if k != CLASSES}]


def _is_taken_unnamed(name: str, argument: str) -> bool:
    return argument == CLASSES or (argument == CHANNELS[0] and _is_timm(name))


def _is_timm(name: str) -> bool:
    return re.match(r"timm\b", name) is not None


def _refuses_classes(error: Exception) -> bool:
    return isinstance(error, TypeError) and f"unexpected keyword argument '{CLASSES}'" in str(error)


def described(error: BaseException) -> str:
    """An error on one line: its class, its text, and the user's file and line that raised it."""
    place = place_of(error)
    told = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{told} ({place})" if place else told


_WANTED = {
    "model": "a function that returns a torch.nn.Module",
    "loss": "a function of outputs and targets that returns their mean loss",
}


def _find(kind: str, name: str, known: Mapping[str, object]) -> Callable[..., object]:
    if by_value.is_by_value(name):
        return by_value.find(kind, name)  # type: ignore[no-any-return]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise RegistryError(
            f"there is no {kind} '{name}': use one of {', '.join(sorted(known))}, "
            "or 'package.module:function' for your own"
        )
    try:
        module = import_named(module_name)
    except Exception as error:
        raise RegistryError(
            f"{kind} '{name}': '{module_name}' cannot be imported: {described(error)}"
            f"{_how_to_install(error)}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        problem = "does not exist" if function is None else "cannot be called"
        raise RegistryError(
            f"{kind} '{name}': '{attribute}' in '{module_name}' {problem}: name {_WANTED[kind]}"
        )
    return function  # type: ignore[no-any-return]


LIBRARIES = ("torchvision", "timm")
"""What `pip install downpour[nets]` brings along."""


def _how_to_install(error: Exception) -> str:
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing in LIBRARIES:
        return f"; install it with `pip install {missing}`, or Downpour with its extra 'nets'"
    return ""


def _signature(name: str, factory: Callable[..., object]) -> inspect.Signature:
    try:
        return inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise RegistryError(
            f"model '{name}' does not tell its arguments: name a function that calls it"
        ) from error


def _called(
    factory: Callable[..., object], signature: inspect.Signature, arguments: dict[str, Any]
) -> object:
    """What a factory returns; those of its arguments that have no keyword go by place."""
    by_place, by_name = _split(signature, arguments)
    return factory(*by_place, **by_name)


def _split(
    signature: inspect.Signature, arguments: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    by_place: list[Any] = []
    by_name = dict(arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is not parameter.POSITIONAL_ONLY or parameter.name not in by_name:
            break
        by_place.append(by_name.pop(parameter.name))
    return by_place, by_name


def _check_arguments(name: str, signature: inspect.Signature, arguments: dict[str, Any]) -> None:
    by_place, by_name = _split(signature, arguments)
    try:
        signature.bind(*by_place, **by_name)
    except TypeError as error:
        known = ", ".join(p for p in signature.parameters if p != "seed") or "none"
        raise RegistryError(f"model '{name}': {error}: its arguments are {known}") from error

"""Objects that other processes cannot import, such as a function of a notebook's cell.

They travel pickled, and bear a name with the digest of their bytes: `by-value:net.0123456789abcdef`
stands wherever `package.module:function` may. Here: the names, and from a name to its object. An
object is unpickled when it is asked for, which runs code. Who admits bytes answers for where they
come from (`cluster.run.sealed` does for a run's folder). Not here: pickling.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from downpour.models.errors import RegistryError

PREFIX = "by-value:"
DIGITS = 16
"""Hexadecimal digits of the SHA-256 that a name bears."""

Carried = Mapping[str, bytes | str]
"""By name: an object's pickled bytes, or why they cannot be used."""

_admitted: dict[str, bytes | str] = {}
_objects: dict[str, Any] = {}
"""What has been unpickled. A name has its bytes' digest in it, so nothing here grows stale."""


def blank_parameter(given: object) -> tuple[Any, ...] | None:
    """How a pickler writes a parameter without its values; None for anything else."""
    if not isinstance(given, nn.Parameter) or isinstance(given, nn.UninitializedParameter):
        return None
    return _blank, (tuple(given.shape), given.dtype, given.requires_grad)


def _blank(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=requires_grad)


class InstanceFactory:
    """A factory that gives copies of one module, whose parameters are zeros: they go apart."""

    def __init__(self, pickled: bytes) -> None:
        """`pickled` is the module."""
        self._pickled = pickled

    def __call__(self) -> nn.Module:
        """A copy."""
        return pickle.loads(self._pickled)  # type: ignore[no-any-return]  # noqa: S301


def is_by_value(name: str) -> bool:
    """Whether `name` stands for an object that travels by value."""
    return name.startswith(PREFIX)


def name_of(label: str, pickled: bytes) -> str:
    """The name of an object.

    Args:
        label: what people know it as.
        pickled: the object's bytes.
    """
    return f"{PREFIX}{label}.{hashlib.sha256(pickled).hexdigest()[:DIGITS]}"


def admit(carried: Carried) -> None:
    """Have `find` know these objects, in this process.

    Raises:
        RegistryError: bytes are not those that the name says.
    """
    for name, pickled in carried.items():
        if isinstance(pickled, bytes):
            label = name.removeprefix(PREFIX).rpartition(".")[0]
            if name != name_of(label, pickled):
                raise RegistryError(f"{name!r} does not have the bytes that its name says")
        _admitted[name] = pickled


def find(kind: str, name: str) -> Any:
    """The object called `name`.

    Args:
        kind: what it is for, in a word.
        name: what `name_of` gave.

    Raises:
        RegistryError: it is not at hand, or cannot be unpickled.
    """
    if name in _objects:
        return _objects[name]
    pickled = _admitted.get(name, "it is not in the run's folder")
    if isinstance(pickled, str):
        raise RegistryError(f"{kind} {name!r} cannot be used: {pickled}")
    try:
        found = _objects[name] = pickle.loads(pickled)  # noqa: S301
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RegistryError(
            f"{kind} {name!r} cannot be unpickled here ({reason}): put it into a module that can "
            "be imported here, and train a new run"
        ) from error
    return found

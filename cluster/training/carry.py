"""What a caller hands over, as a configuration can hold it: a name, and what travels by value.

A factory or a loss that other processes can import goes by its name, `module:function`. What they
cannot (from a script, a notebook's cell, a `functools.partial`) is pickled by value, as Ray does
with a remote function. Of a module that is handed over, the pickle holds the structure and the
buffers; its parameters go apart, as tensors.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError, one_line
from downpour.cluster.training.session import before_ray, ray_address

if TYPE_CHECKING:
    from torch import Tensor

LARGE_BYTES = 64 << 20
"""More than this, by value, is a mistake: every process gets a copy of its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HandedOver:
    """A model or a loss as a configuration can hold it."""

    name: str
    """What stands in the configuration."""
    label: str
    """What people may know it as."""
    carried: Mapping[str, bytes] = field(default_factory=dict)
    """Its pickled bytes by `name`, if it has no name that others can import."""
    state: Mapping[str, Tensor] | None = None
    """The initial weights and BN statistics, if a module was handed over."""


MAIN = "__main__:"


def from_main(config: RunConfig) -> RunConfig:
    """The configuration, with what it names in the script that runs carried by value.

    Raises:
        UserError: the script has nothing of that name.
    """
    changes: dict[str, Any] = {}
    carried = dict(config.model.carried)
    for kind, hand_over in (("model", model), ("loss", loss)):
        if getattr(config.model, kind).startswith(MAIN):
            handed = hand_over(getattr(config.model, kind))
            changes[kind] = handed.name
            carried |= handed.carried
    if not changes:
        return config
    changed = dataclasses.replace(config.model, **changes, carried=carried)
    return dataclasses.replace(config, model=changed)


def model(given: object) -> HandedOver:
    """A model: a name, a factory, or a module whose weights are the initial ones.

    Raises:
        UserError: it is none of these, or other processes cannot get it.
    """
    if isinstance(given, str) and given.startswith(MAIN):
        given = _in_main("model", given)
    if isinstance(given, str):
        return HandedOver(name=given, label=_label(given.rpartition(":")[2]))
    module_class = _module_class()
    if module_class is not None and isinstance(given, module_class):
        return _instance(given)
    if callable(given):
        return _callable("model", given)
    raise UserError(
        f"model is {_shown(given)}: give a torch.nn.Module, a function or class that makes one, or "
        "module:function"
    )


def loss(given: object) -> HandedOver:
    """A loss: a name, or a function of outputs and targets.

    Raises:
        UserError: it is neither, or other processes cannot get it.
    """
    if isinstance(given, str) and given.startswith(MAIN):
        given = _in_main("loss", given)
    if isinstance(given, str):
        return HandedOver(name=given, label=_label(given.rpartition(":")[2]))
    if isinstance(given, type):
        raise UserError(f"loss is the class {given.__name__}: give an instance, {given.__name__}()")
    if callable(given):
        return _callable("loss", given)
    raise UserError(
        f"loss is {_shown(given)}: give a function of outputs and targets, or module:function"
    )


def importable_name(given: object) -> str | None:
    """`module:name`, if other processes find this very object under it; None if not."""
    module, name = getattr(given, "__module__", None), getattr(given, "__qualname__", "")
    if not module or not name.isidentifier() or module in ("__main__", "__mp_main__"):
        return None
    if getattr(sys.modules.get(module), name, None) is not given:
        return None
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return f"{module}:{name}" if found is not None else None


def _in_main(kind: str, name: str) -> object:
    found = getattr(sys.modules["__main__"], name.removeprefix(MAIN), None)
    if not callable(found):
        raise UserError(
            f"{kind} {name!r}: the script that runs has no such function: define it before this, "
            "or put it into a module, and name it module:function"
        )
    return found


def _callable(kind: str, given: Callable[..., Any]) -> HandedOver:
    bare = getattr(given, "func", given)  # of a functools.partial
    label = _label(getattr(bare, "__name__", type(bare).__name__))
    name = importable_name(given)
    if name is not None:
        return HandedOver(name=name, label=label)
    return _by_value(kind, label, _pickled(kind, given))


def _instance(given: Any) -> HandedOver:
    from downpour.models.by_value import InstanceFactory

    label = _label(type(given).__name__)
    pickled = _pickled("model", given)
    state = {k: v.detach().cpu().clone().contiguous() for k, v in given.state_dict().items()}
    made = _by_value("model", label, _pickled("model", InstanceFactory(pickled)))
    return HandedOver(name=made.name, label=label, carried=made.carried, state=state)


def _by_value(kind: str, label: str, pickled: bytes) -> HandedOver:
    from downpour.models.by_value import name_of

    if len(pickled) > LARGE_BYTES:
        raise UserError(
            f"the {kind} {label} has {len(pickled) >> 20} MiB of its own besides parameters, and "
            "every process would get a copy: leave out data that it only refers to"
        )
    name = name_of(label, pickled)
    return HandedOver(name=name, label=label, carried={name: pickled})


def _pickled(kind: str, given: object) -> bytes:
    before_ray(ray_address(None))
    cloudpickle: Any = importlib.import_module("ray.cloudpickle")  # which has no types
    from downpour.models.by_value import blank_parameter

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if (blank := blank_parameter(obj)) is not None:
                return blank
            return super().reducer_override(obj)

    module = sys.modules.get(getattr(given, "__module__", None) or "")
    hidden = module is not None and module.__name__ != "__main__" and not _found(module.__name__)
    buffer = io.BytesIO()
    if hidden:
        cloudpickle.register_pickle_by_value(module)
    try:
        Pickler(buffer).dump(given)
    except Exception as error:
        raise UserError(
            f"the {kind} {_shown(given)} cannot be sent to other processes "
            f"({type(error).__name__}: {one_line(error)}): give a function that makes it, and "
            "leave out what holds files, locks or connections"
        ) from error
    finally:
        if hidden:
            cloudpickle.unregister_pickle_by_value(module)
    return buffer.getvalue()


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def _module_class() -> type | None:
    """`torch.nn.Module`, if PyTorch has been imported: else nobody can have made one."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.nn.Module


def _label(name: str) -> str:
    """A name as it can stand in a folder's."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_") or "model"


def _shown(given: object) -> str:
    text = " ".join(repr(given).split())
    return text if len(text) <= 60 else f"{text[:57]}..."

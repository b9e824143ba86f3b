"""Configurations as plain data, for JSON, and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError, one_line
from downpour.models.lookup import import_named

ConfigT = TypeVar("ConfigT")

CLASS = "class"
"""Key of the name of a class of the user's own; no field can be called so."""


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dicts, for JSON, without what travels by value.

    A part of it whose class is the user's own, such as a subclass of `Schedule`, has the name of
    that class with it.

    Raises:
        UserError: such a class cannot be imported by its name, or keeps values that are no fields.
    """
    plain = dataclasses.asdict(config)
    del plain["model"]["carried"]
    for path, part in own_parts(config):
        place = plain
        for name in path:
            place = place[name]
        place[CLASS] = _name_of(part)
    return plain


def own_parts(config: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the parts of a configuration whose class is not the one declared, with their paths."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(typing.cast("Any", config)):
        part = getattr(config, field.name)
        if not dataclasses.is_dataclass(part) or isinstance(part, type):
            continue
        here = (*path, field.name)
        if dataclasses.is_dataclass(hints[field.name]) and type(part) is not hints[field.name]:
            yield here, part
        yield from own_parts(part, here)


def _name_of(part: Any) -> str:
    """The name that the class of a part is imported by."""
    own = type(part)
    name = f"{own.__module__}:{own.__qualname__}"
    if own.__module__ == "__main__" or "<locals>" in name:
        raise UserError(
            f"the class {name} is in the script that runs or in a function, where other processes "
            "cannot import it: put it into a module"
        )
    fields = {field.name for field in dataclasses.fields(part)}
    others = sorted(getattr(part, "__dict__", {}).keys() - fields)
    if others:
        raise UserError(
            f"{name} keeps {', '.join(others)}, which is no field of it and would be lost: make it "
            "one with @dataclass(frozen=True, kw_only=True)"
        )
    return name


def _own_class(name: str, declared: type) -> type:
    """The class of the user's own that is called `name`."""
    module_name, _, qualified = str(name).partition(":")
    try:
        found: Any = import_named(module_name)
        for attribute in qualified.split("."):
            found = getattr(found, attribute)
    except Exception as error:
        raise UserError(
            f"the saved configuration has a {declared.__name__} of the class {name}, which cannot "
            f"be imported: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, declared)):
        raise UserError(
            f"the saved configuration has {name}, which is no {declared.__name__}: use the module "
            "that it was written with"
        )
    return found


def upgraded(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved run configuration as this version would have written it, so that it goes on as it
    began.

    - A run from before `in_flight` had all of its steps in flight and one mini-batch a push. Its
      leases are cut that way.
    - A run from before `orientation` saw images as they are stored: not turned, and the colours
      that transparency hides.
    - What `wire` says was called `wire_dtype`.
    - A run from before `plan_version` had the plan of version 1, which says which rows its
      mini-batches hold.
    """
    replicas, model = plain.get("replicas", {}), plain.get("model", {})
    steps, image = replicas.get("steps", {}), model.get("image", {})
    if "in_flight" not in steps:
        steps = {**steps, "in_flight": "all"}
    if "orientation" not in image and "shape" not in image:
        image = {**image, "orientation": "ignore", "transparency": "drop"}
    data = {"plan_version": 1, **plain.get("data", {})}
    server = dict(plain.get("server", {}))
    network = dict(server.get("network", {}))
    if "wire_dtype" in network:
        network["wire"] = network.pop("wire_dtype")
        server["network"] = network
        plain = {**plain, "server": server}
    return {
        **plain,
        "data": data,
        "replicas": {**replicas, "steps": steps},
        "model": {**model, "image": image},
    }


def from_plain(config_class: type[ConfigT], plain: Mapping[str, Any]) -> ConfigT:
    """The configuration that `to_plain` gave. Values that are missing have their defaults.

    Raises:
        UserError: a name is unknown, or a value cannot be used.
    """
    hints = typing.get_type_hints(config_class)
    names = {f.name for f in dataclasses.fields(typing.cast("Any", config_class))}
    unknown = set(plain) - names
    if unknown:
        raise UserError(
            f"the saved configuration has {', '.join(sorted(unknown))}, which this version does "
            "not know: use the version that wrote it"
        )
    values = {name: _value(hints[name], value) for name, value in plain.items()}
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"the saved configuration is not usable: {error}") from None


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        declared = typing.cast("type[Any]", hint)
        values = {k: v for k, v in value.items() if k != CLASS}
        return from_plain(
            _own_class(value[CLASS], declared) if CLASS in value else declared, values
        )
    if isinstance(value, list) and typing.get_origin(hint) is tuple:
        return tuple(value)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if isinstance(value, Mapping):  # one of several classes: the one that has these fields
            kinds = [kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)]
            for kind in kinds:
                if set(value) <= {field.name for field in dataclasses.fields(kind)}:
                    return from_plain(typing.cast("type[Any]", kind), value)
        return value
    return value

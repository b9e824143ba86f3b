"""Configurations as plain data, for JSON, and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError

ConfigT = TypeVar("ConfigT")


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dicts, for JSON, without what travels by value."""
    plain = dataclasses.asdict(config)
    del plain["model"]["carried"]
    return plain


def upgraded(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved run configuration as this version would have written it, so that it goes on as it
    began.

    - A run from before `in_flight` had all of its steps in flight and one mini-batch a push. Its
      leases are cut that way.
    - A run from before `orientation` saw images as they are stored: not turned, and the colours
      that transparency hides.
    - A run from before `plan_version` had the plan of version 1, which says which rows its
      mini-batches hold.
    """
    replicas, model = plain.get("replicas", {}), plain.get("model", {})
    steps, image = replicas.get("steps", {}), model.get("image", {})
    if "in_flight" not in steps:
        steps = {**steps, "in_flight": "all"}
    if "orientation" not in image:
        image = {**image, "orientation": "ignore", "transparency": "drop"}
    data = {"plan_version": 1, **plain.get("data", {})}
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
        return from_plain(typing.cast("type[Any]", hint), value)
    if isinstance(value, list) and typing.get_origin(hint) is tuple:
        return tuple(value)
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and value is None:
        return None
    return value

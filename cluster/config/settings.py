"""The settings of a configuration: the fields of its dataclasses, whatever their depth.

Each setting has a name, a help text (the docstring under the field) and a type with a form on the
command line. Not here: options of commands, and values that were given (`options`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

import click

_SCALARS: dict[type, click.ParamType[Any]] = {int: click.INT, float: click.FLOAT, str: click.STRING}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of a configuration as an option."""

    name: str
    """Name in snake case, unique in the configuration: the key in what `apply` is given."""

    path: tuple[str, ...]
    """Names of the fields that lead to it, from the outermost dataclass."""

    owner: type
    """The dataclass that has the field."""

    param_type: click.ParamType[Any]
    """How its text becomes a value."""

    is_flag: bool
    """Whether it is a pair of switches, `--x / --no-x`."""

    is_mapping: bool
    """Whether it is given as often as there are entries, `--x name=value`."""

    default: object
    """The field's default; `dataclasses.MISSING` if it has none."""

    help: str
    """The docstring under the field, on one line; empty if it has none."""

    only_with: tuple[str, tuple[object, ...]] | None = None
    """A field beside it, and the values of that field with which this one means something."""

    formerly: str | None = None
    """The option's earlier name in snake case, which is still understood."""

    @property
    def option(self) -> str:
        """The option as a user types it."""
        return "--" + self.name.replace("_", "-")

    @property
    def off_option(self) -> str | None:
        """The switch that turns a flag off; None for what is not a flag."""
        return "--no-" + self.option[2:] if self.is_flag else None

    def spelled(self, value: object) -> str:
        """Returns the option with a value, as a user would have typed it."""
        if self.off_option is not None:
            return self.option if value else self.off_option
        if isinstance(value, Mapping):
            return " ".join(f"{self.option} {as_text({k: v})}" for k, v in value.items())
        return f"{self.option} {as_text(value)}"

    def shown(self, value: object) -> str | None:
        """Returns how the help shows a value; None for `dataclasses.MISSING`."""
        if value is MISSING:
            return None
        if self.off_option is not None:
            return (self.option if value else self.off_option)[2:]
        return as_text(value)

    def value_in(self, config: object) -> object:
        """Returns the value that `config`, an instance of the outermost dataclass, has for it."""
        return functools.reduce(getattr, self.path, config)


class OptionalValue(click.ParamType[Any]):
    """A value of another type, or `none`."""

    def __init__(self, inner: click.ParamType[Any]) -> None:
        self.inner = inner
        self.name = f"{inner.name}|none"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        """Returns None for `none`, and otherwise what the inner type makes of `value`."""
        if isinstance(value, str) and value.lower() == "none":
            return None
        return self.inner.convert(value, param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Returns the inner type's form with `none` beside it."""
        inner = self.inner.get_metavar(param, ctx) or self.inner.name.upper()
        return f"{inner[:-1]}|none]" if inner.endswith("]") else f"{inner}|none"


class TupleValue(click.ParamType[Any]):
    """Values of one scalar type with commas between them."""

    def __init__(self, inner: click.ParamType[Any]) -> None:
        self.inner = inner
        self.name = f"{inner.name},..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[object, ...]:
        """Returns the values; none at all for an empty text."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")] if str(value).strip() else []
        return tuple(self.inner.convert(part, param, ctx) for part in parts)


class EntryValue(click.ParamType[Any]):
    """An entry of a mapping: `name=value`, the value as Python or JSON would have it, or a text."""

    name = "name=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, object]:
        """Returns the name and the value."""
        if isinstance(value, tuple):
            return value[0], value[1]
        name, equals, text = str(value).partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"{value!r} is no name=value, such as depth=18", param, ctx)
        return name, _literal(text)


def _literal(text: str) -> object:
    """Returns what a text says as JSON or as Python, tuples as lists; else the text."""
    for read in (json.loads, ast.literal_eval):
        try:
            found: object = read(text)
        except (ValueError, SyntaxError):
            continue
        return json.loads(json.dumps(found)) if _is_plain(found) else text
    return text


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)


@functools.cache
def settings_of(config_class: type) -> tuple[Setting, ...]:
    """Returns the settings of a configuration dataclass, in the order of its fields, flattened.

    Raises:
        TypeError: two fields share an option, or a field's type has no form on the command line;
            the message names both fields, or the field, and the remedy.
    """
    settings = tuple(_walk(config_class, ()))
    taken: dict[str, Setting] = {}
    for setting in settings:
        for option in filter(None, (setting.option, setting.off_option)):
            other = taken.setdefault(option, setting)
            if other is not setting:
                raise TypeError(
                    f"{config_class.__name__}: {'.'.join(other.path)} and "
                    f"{'.'.join(setting.path)} both give {option}; rename one with "
                    "field(metadata={'cli': 'other-name'})"
                )
    return settings


def _walk(config_class: type, path: tuple[str, ...]) -> typing.Iterator[Setting]:
    if not dataclasses.is_dataclass(config_class):
        raise TypeError(f"{config_class!r} is not a dataclass: options come from dataclasses only")
    annotations = typing.get_type_hints(config_class)
    docstrings = field_docstrings(config_class)
    for field in dataclasses.fields(config_class):
        cli = field.metadata.get("cli", True)
        if cli is False or not field.init:
            continue
        annotation = annotations[field.name]
        here = (*path, field.name)
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            yield from _walk(annotation, here)
            continue
        param_type = _param_type(annotation)
        if param_type is None:
            raise TypeError(
                f"{config_class.__name__}.{field.name}: {annotation} has no form on the command "
                "line; leave it out with field(metadata={'cli': False})"
            )
        yield Setting(
            name=cli.replace("-", "_") if isinstance(cli, str) else field.name,
            path=here,
            owner=config_class,
            param_type=param_type,
            is_flag=annotation is bool,
            is_mapping=isinstance(param_type, EntryValue),
            default=_default(field),
            help=docstrings.get(field.name, ""),
            only_with=field.metadata.get("only_with"),
            formerly=_snake(field.metadata.get("formerly")),
        )


def _snake(option: str | None) -> str | None:
    return None if option is None else option.replace("-", "_")


def _param_type(annotation: Any) -> click.ParamType[Any] | None:
    """Returns how an annotation's values are read; None for a type without such a form."""
    if annotation is bool:
        return click.BOOL
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return click.Choice(list(arguments))
    if origin is Mapping and arguments[0] is str:
        return EntryValue()
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        inner = _SCALARS.get(arguments[0])
        return None if inner is None else TupleValue(inner)
    if origin in (typing.Union, types.UnionType) and len(arguments) == 2:
        rest = [argument for argument in arguments if argument is not type(None)]
        inner = _param_type(rest[0]) if len(rest) == 1 else None
        return None if inner is None else OptionalValue(inner)
    return None


@functools.cache
def field_docstrings(config_class: type) -> Mapping[str, str]:
    """Returns the docstring under each field of a dataclass and its bases, each on one line.

    Python does not keep them, so they are read from the source; without a source (a class made in
    a shell) there are none.
    """
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        body = definition.body
        for statement, following in itertools.pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                found[statement.target.id] = " ".join(following.value.value.split())
    return types.MappingProxyType(found)


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def as_text(value: object) -> str:
    """Returns a value as a user would type it."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, Mapping):
        return " ".join(f"{name}={item}" for name, item in value.items()) or "none"
    return str(value)

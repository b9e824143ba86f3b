"""Command-line options derived from configuration dataclasses.

A configuration is a frozen keyword-only dataclass, possibly with others inside it, and a docstring
under each field. `config_options` gives a click command one option for each field, whatever its
depth; `apply` returns the recipe's configuration with just those fields replaced that were given
on the command line. The fields themselves, their defaults and their checks (`__post_init__`) stay
with the dataclasses; nothing about a value is said twice.

    learning_rate: float          --learning-rate FLOAT
    num_epochs: int | None        --num-epochs INTEGER|none
    warm_start: bool              --warm-start / --no-warm-start
    rule: Literal["sgd", "adam"]  --rule [sgd|adam]
    hidden: tuple[int, ...]       --hidden INTEGER,INTEGER,...
    server: ServerConfig          the options of its fields

A field opts out with `field(metadata={"cli": False})`, and takes another name on the command line
with `field(metadata={"cli": "server-seed"})`. Two fields that would have the same option, and
a type that has no form on the command line, are errors as soon as the options are derived, which
is at import.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from click.core import ParameterSource

from downpour.cluster.errors import UserError, one_line, user_message

if TYPE_CHECKING:
    from click.types import OptionHelpExtra

ConfigT = TypeVar("ConfigT")
CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_SCALARS: dict[type, click.ParamType[Any]] = {int: click.INT, float: click.FLOAT, str: click.STRING}


class OptionError(UserError):
    """A value given on the command line that the configuration refuses."""


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

    default: object
    """The field's default; `dataclasses.MISSING` if it has none."""

    help: str
    """The docstring under the field, on one line; empty if it has none."""

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
        return f"{self.option} {_as_text(value)}"


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


class SettingOption(click.Option):
    """The click option of a `Setting`; it says to which section of the help it belongs."""

    def __init__(self, setting: Setting) -> None:
        declaration = setting.option
        if setting.off_option is not None:
            declaration = f"{setting.option}/{setting.off_option}"
        self.section = _title(setting.owner)
        super().__init__(
            [setting.name, declaration],
            # The value only tells click that there is one: what counts for `apply` is what was
            # given, and the default that is shown is the dataclass's.
            default=None,
            type=None if setting.is_flag else setting.param_type,
            is_flag=setting.is_flag or None,
            help=setting.help,
        )
        self._shown_default = _shown_default(setting)

    def get_help_extra(self, ctx: click.Context) -> OptionHelpExtra:
        """Returns what stands in brackets after the help: the dataclass's default."""
        extra = super().get_help_extra(ctx)
        if self._shown_default is not None:
            extra["default"] = self._shown_default
        return extra


class ConfigCommand(click.Command):
    """A command whose help lists the options of each configuration dataclass in a section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the command's own options first, then a section for each dataclass."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            # An argument without help of its own already stands in the usage line.
            if record is not None and (record[1] or isinstance(param, click.Option)):
                section = param.section if isinstance(param, SettingOption) else "Options"
                sections.setdefault(section, []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


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


def config_options(config_class: type) -> Callable[[CommandT], CommandT]:
    """Decorates a click command's function with an option for each setting of `config_class`.

    The function is called with `given`, a dict from the names of those settings that the user
    gave to their values: the argument for `apply`. Use it below `@click.command(cls=ConfigCommand)`
    and above the command's own options.

    Raises:
        TypeError: see `settings_of`; or an option of the command's own has a setting's name.
    """
    settings = settings_of(config_class)

    def decorate(function: CommandT) -> CommandT:
        own: list[click.Parameter] = list(getattr(function, "__click_params__", []))
        for setting in settings:
            clash = {setting.option, setting.off_option} & {o for p in own for o in _opts(p)}
            if clash or any(param.name == setting.name for param in own):
                raise TypeError(
                    f"the command {function.__name__} has {setting.option} of its own; rename it, "
                    f"or {'.'.join(setting.path)} of {config_class.__name__} with "
                    "field(metadata={'cli': 'other-name'})"
                )

        @functools.wraps(function)
        def command(*args: Any, **kwargs: Any) -> Any:
            context = click.get_current_context()
            for setting in settings:
                del kwargs[setting.name]
            return function(*args, given=given_in(context, config_class), **kwargs)

        # click reads the list from the back, so that decorators read from top to bottom.
        command.__click_params__ = own + [  # type: ignore[attr-defined]
            SettingOption(setting) for setting in reversed(settings)
        ]
        return typing.cast("CommandT", command)

    return decorate


def given_in(context: click.Context, config_class: type) -> dict[str, object]:
    """Returns the settings of `config_class` that the user gave in a command line, for `apply`."""
    return {
        setting.name: context.params[setting.name]
        for setting in settings_of(config_class)
        if context.get_parameter_source(setting.name) is ParameterSource.COMMANDLINE
    }


def apply(config: ConfigT, given: Mapping[str, object]) -> ConfigT:
    """Returns `config` with the given settings replaced, through nested dataclasses.

    Args:
        config: an instance of a configuration dataclass, usually a recipe's.
        given: names of settings (snake case) to values, as `config_options` collects them.

    Raises:
        OptionError: the configuration refuses a value; names the option, the value and the reason.
        KeyError: `given` names a setting that the configuration does not have.
    """
    config_class: type = type(config)
    paths = {setting.name: setting for setting in settings_of(config_class)}
    changes = [(paths[name], value) for name, value in given.items()]
    if not changes:
        return config
    try:
        return _replaced(config, [(setting.path, value) for setting, value in changes])
    except Exception as error:
        if not _is_refusal(error):
            raise
        blamed, reason = _blame(config, changes, error)
        options = " ".join(setting.spelled(value) for setting, value in blamed)
        raise OptionError(f"{options}: {one_line(reason)}") from error


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, ValueError) or user_message(error) is not None


def _blame(
    config: object, changes: list[tuple[Setting, object]], error: Exception
) -> tuple[list[tuple[Setting, object]], Exception]:
    """Finds which change is refused, and why: the first that is refused by itself, else all."""
    for change in changes:
        try:
            _replaced(config, [(change[0].path, change[1])])
        except Exception as alone:
            # Some values are good only together; then the joint error tells more.
            if str(alone) == str(error):
                return [change], alone
    return changes, error


def _replaced(config: ConfigT, changes: list[tuple[tuple[str, ...], object]]) -> ConfigT:
    """Rebuilds each dataclass on the way once, so that its checks see all of its new values."""
    values: dict[str, object] = {}
    deeper: dict[str, list[tuple[tuple[str, ...], object]]] = {}
    for path, value in changes:
        if len(path) == 1:
            values[path[0]] = value
        else:
            deeper.setdefault(path[0], []).append((path[1:], value))
    for name, inner in deeper.items():
        values[name] = _replaced(getattr(config, name), inner)
    return dataclasses.replace(typing.cast("Any", config), **values)  # type: ignore[no-any-return]


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
            default=_default(field),
            help=docstrings.get(field.name, ""),
        )


def _param_type(annotation: Any) -> click.ParamType[Any] | None:
    """Returns how an annotation's values are read; None for a type without such a form."""
    if annotation is bool:
        return click.BOOL
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return click.Choice(list(arguments))
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


def _shown_default(setting: Setting) -> str | None:
    if setting.default is MISSING:
        return None
    if setting.off_option is not None:
        return (setting.option if setting.default else setting.off_option)[2:]
    return _as_text(setting.default)


def _as_text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def _title(owner: type) -> str:
    """Returns the heading of a dataclass's options: `ParameterServerConfig` -> parameter server."""
    words = "".join(f" {c}" if c.isupper() else c for c in owner.__name__).lower().split()
    kept = [word for word in words if word not in ("config", "options", "settings")]
    return f"{' '.join(kept or ['configuration']).capitalize()} options"


def _opts(param: click.Parameter) -> list[str]:
    return [*param.opts, *param.secondary_opts]

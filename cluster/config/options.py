"""Command-line options derived from configuration dataclasses.

A configuration is a frozen keyword-only dataclass, possibly with others inside it, and a docstring
under each field. `config_options` gives a click command one option for each field, whatever its
depth. `apply` returns a configuration with just those fields replaced that the command line gave.
Fields, defaults and checks (`__post_init__`) stay with the dataclasses. Not here: how fields become
settings (`settings`).

    learning_rate: float          --learning-rate FLOAT
    num_epochs: int | None        --num-epochs INTEGER|none
    warm_start: bool              --warm-start / --no-warm-start
    rule: Literal["sgd", "adam"]  --rule [sgd|adam]
    hidden: tuple[int, ...]       --hidden INTEGER,INTEGER,...
    arguments: Mapping[str, Any]  --arguments NAME=VALUE, for each entry
    server: ServerConfig          the options of its fields

A field opts out with `field(metadata={"cli": False})`, and takes another name on the command line
with `field(metadata={"cli": "server-seed"})`. `{"formerly": "server-port"}` is an earlier name
that stays beside the new one. With `{"only_with": ("rule", ("sgd",))}` the option is refused unless
the field `rule` beside it has one of these values. Two fields with one option, or a type that has
no form on the command line, are errors at import.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from downpour.cluster.config.settings import Setting, settings_of
from downpour.cluster.errors import UserError, one_line, user_message

if TYPE_CHECKING:
    from click.types import OptionHelpExtra

ConfigT = TypeVar("ConfigT")
CommandT = TypeVar("CommandT", bound=Callable[..., Any])


_NAMED = "downpour.named_configuration"
"""Key of a click context's `meta`: the configuration whose values the help shows."""
_OF_DATA = "downpour.of_data"
"""Key of a click context's `meta`: the settings whose values that configuration takes from the
data."""


class OptionError(UserError):
    """A value given on the command line that the configuration refuses."""


class SettingOption(click.Option):
    """The click option of a `Setting`; it says to which section of the help it belongs."""

    def __init__(self, setting: Setting) -> None:
        declaration = setting.option
        if setting.off_option is not None:
            declaration = f"{setting.option}/{setting.off_option}"
        self.section = _title(setting.owner)
        self._setting = setting
        earlier = [] if setting.formerly is None else [f"--{setting.formerly.replace('_', '-')}"]
        super().__init__(
            [setting.name, declaration, *earlier],
            # The value only tells click that there is one: what counts for `apply` is what was
            # given, and the default that is shown is the configuration's.
            default=None,
            type=None if setting.is_flag else setting.param_type,
            is_flag=setting.is_flag or None,
            multiple=setting.is_mapping,
            help=setting.help,
        )

    def get_help_extra(self, ctx: click.Context) -> OptionHelpExtra:
        """Returns what stands in brackets after the help: the value without this option.

        That is the value of the configuration that the command line names (see `ConfigCommand`),
        or the dataclass's default.
        """
        extra = super().get_help_extra(ctx)
        named = ctx.meta.get(_NAMED, MISSING)
        setting = self._setting
        default = setting.default if named is MISSING else setting.value_in(named)
        if setting.name in ctx.meta.get(_OF_DATA, ()):
            extra["default"] = "the data's"
        elif (shown := setting.shown(default)) is not None:
            extra["default"] = shown
        return extra


class ConfigCommand(click.Command):
    """A command whose help lists the options of each configuration dataclass in a section."""

    def __init__(
        self,
        *args: Any,
        named_by: str | None = None,
        find: Callable[[str], object] | None = None,
        of_data: Callable[[str], Collection[str]] = lambda _: (),
        **kwargs: Any,
    ) -> None:
        """A click command, as ever.

        Args:
            args: click's.
            named_by: the argument that names a configuration, such as `recipe`; if the command
                line has it, the help shows that configuration's values as defaults.
            find: gives the configuration of that name.
            of_data: gives the names of its settings whose values come from the data.
            kwargs: click's.
        """
        super().__init__(*args, **kwargs)
        self._named_by, self._find, self._of_data = named_by, find, of_data

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses the command line; looks for the named configuration if help is asked for."""
        # Click shows the help before it looks at any argument.
        if self._named_by and self._find and not set(ctx.help_option_names).isdisjoint(args):
            values, _, _ = self.make_parser(ctx).parse_args(list(args))
            if isinstance(name := values.get(self._named_by), str):
                ctx.meta[_NAMED] = self._find(name)
                ctx.meta[_OF_DATA] = self._of_data(name)
        return super().parse_args(ctx, args)

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
        setting.name: dict(value) if setting.is_mapping else value
        for setting in settings_of(config_class)
        if context.get_parameter_source(setting.name) is ParameterSource.COMMANDLINE
        for value in (context.params[setting.name],)
    }


def apply(config: ConfigT, given: Mapping[str, object]) -> ConfigT:
    """Returns `config` with the given settings replaced, through nested dataclasses.

    Args:
        config: an instance of a configuration dataclass, usually a recipe's.
        given: names of settings (snake case) to values, as `config_options` collects them. A
            mapping is added to the one that is there.

    Raises:
        OptionError: the configuration refuses a value; names the option, the value and the reason.
        KeyError: `given` names a setting that the configuration does not have.
    """
    config_class: type = type(config)
    paths = {setting.name: setting for setting in settings_of(config_class)}
    paths |= {s.formerly: s for s in settings_of(config_class) if s.formerly is not None}
    changes = [(paths[name], value) for name, value in given.items()]
    if not changes:
        return config
    try:
        changed = _replaced(config, [(setting.path, value) for setting, value in changes])
    except Exception as error:
        if not _is_refusal(error):
            raise
        blamed, reason = _blame(config, changes, error)
        options = " ".join(setting.spelled(value) for setting, value in blamed)
        raise OptionError(f"{options}: {one_line(reason)}") from error
    _check_meant(changed, changes)
    return changed


def _check_meant(config: object, changes: list[tuple[Setting, object]]) -> None:
    """Refuse what was given and would be passed over, since it belongs to another choice."""
    config_class: type = type(config)
    chosen_by = {setting.path: setting for setting in settings_of(config_class)}
    for setting, value in changes:
        if setting.only_with is None:
            continue
        name, meant = setting.only_with
        other = chosen_by[(*setting.path[:-1], name)]
        chosen = other.value_in(config)
        if chosen not in meant:
            wanted = " or ".join(other.spelled(each) for each in meant)
            raise OptionError(
                f"{setting.spelled(value)}: it says nothing with {other.spelled(chosen)}: leave it "
                f"out, or give {wanted}"
            )


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
            values[path[0]] = _joined(getattr(config, path[0]), value)
        else:
            deeper.setdefault(path[0], []).append((path[1:], value))
    for name, inner in deeper.items():
        values[name] = _replaced(getattr(config, name), inner)
    return dataclasses.replace(typing.cast("Any", config), **values)  # type: ignore[no-any-return]


def _joined(before: object, value: object) -> object:
    """Returns the value that replaces one; a mapping is added to the one before."""
    if isinstance(before, Mapping) and isinstance(value, Mapping):
        return {**before, **value}
    return value


def _title(owner: type) -> str:
    """Returns the heading of a dataclass's options: `ParameterServerConfig` -> parameter server."""
    words = "".join(f" {c}" if c.isupper() else c for c in owner.__name__).lower().split()
    kept = [word for word in words if word not in ("config", "options", "settings")]
    return f"{' '.join(kept or ['configuration']).capitalize()} options"


def _opts(param: click.Parameter) -> list[str]:
    return [*param.opts, *param.secondary_opts]

"""Options derived from configuration dataclasses."""

from dataclasses import MISSING, dataclass, field
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from downpour.cluster.config.options import (
    ConfigCommand,
    OptionError,
    apply,
    config_options,
    field_docstrings,
    settings_of,
)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The server."""

    num_partitions: int = 2
    """Partitions of the
    parameters."""

    rule: Literal["momentum", "adagrad"] = "momentum"
    """Update rule."""

    max_norm: float | None = None
    """Largest gradient norm."""

    def __post_init__(self):
        if self.num_partitions < 1:
            raise ValueError(f"num_partitions must be at least 1, got {self.num_partitions}")
        if self.rule == "adagrad" and self.max_norm is not None:
            raise ValueError(f"adagrad takes no max_norm, got {self.max_norm}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run."""

    name: str
    """Name of the run."""

    concurrent_steps: int = 5
    """Steps in flight."""

    warm_start: bool = True
    """Ramp up."""

    hidden: tuple[int, ...] = (100, 100)
    """Units of each layer."""

    server: ServerConfig = field(default_factory=ServerConfig)
    """The server's part."""

    secret: bytes = field(default=b"", metadata={"cli": False})
    """Not for the command line."""

    def __post_init__(self):
        if self.concurrent_steps < self.server.num_partitions:
            raise ValueError(
                f"concurrent_steps ({self.concurrent_steps}) must be at least num_partitions "
                f"({self.server.num_partitions})"
            )


BASE = RunConfig(name="base")


@click.command(cls=ConfigCommand)
@config_options(RunConfig)
@click.argument("recipe")
@click.option("--dry-run", is_flag=True, help="Only check.")
def train(recipe, dry_run, given):
    """Trains."""
    click.echo(repr((recipe, dry_run, given)))


def given_by(*argv):
    result = CliRunner().invoke(train, ["mnist", *argv], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    recipe, dry_run, given = eval(result.output)
    assert (recipe, dry_run) == ("mnist", False)
    return given


def test_nested_fields_are_flattened_in_order_and_may_opt_out():
    assert [(s.option, s.path) for s in settings_of(RunConfig)] == [
        ("--name", ("name",)),
        ("--concurrent-steps", ("concurrent_steps",)),
        ("--warm-start", ("warm_start",)),
        ("--hidden", ("hidden",)),
        ("--num-partitions", ("server", "num_partitions")),
        ("--rule", ("server", "rule")),
        ("--max-norm", ("server", "max_norm")),
    ]
    assert settings_of(RunConfig)[0].default is MISSING


def test_help_is_the_docstring_under_each_field():
    assert field_docstrings(ServerConfig)["num_partitions"] == "Partitions of the parameters."
    assert set(field_docstrings(ServerConfig)) == {"num_partitions", "rule", "max_norm"}

    class Plain:
        x: int = 1
        """Not a dataclass."""

    assert field_docstrings(Plain) == {}


def test_docstrings_are_inherited():
    @dataclass(frozen=True, kw_only=True)
    class Derived(ServerConfig):
        rule: Literal["momentum", "adagrad"] = "adagrad"
        """Another rule."""

    docs = field_docstrings(Derived)
    assert docs["rule"] == "Another rule."
    assert docs["max_norm"] == "Largest gradient norm."


def test_help_shows_sections_types_and_defaults():
    text = CliRunner().invoke(train, ["--help"]).output
    assert "Run options:" in text
    assert "Server options:" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "--concurrent-steps INTEGER Steps in flight. [default: 5]" in lines
    assert "--warm-start / --no-warm-start Ramp up. [default: warm-start]" in lines
    assert "--hidden INTEGER,... Units of each layer. [default: 100,100]" in lines
    assert "--rule [momentum|adagrad] Update rule. [default: momentum]" in lines
    assert "--max-norm FLOAT|none Largest gradient norm. [default: none]" in lines
    assert "--name TEXT Name of the run." in lines
    assert "secret" not in text


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        ([], {}),
        (["--concurrent-steps", "5"], {"concurrent_steps": 5}),  # given, though it is the default
        (["--no-warm-start"], {"warm_start": False}),
        (["--warm-start"], {"warm_start": True}),
        (["--max-norm", "1.5"], {"max_norm": 1.5}),
        (["--max-norm", "none"], {"max_norm": None}),
        (["--hidden", "10, 20"], {"hidden": (10, 20)}),
        (["--hidden", ""], {"hidden": ()}),
        (["--rule", "adagrad", "--name", "x"], {"rule": "adagrad", "name": "x"}),
    ],
)
def test_only_what_was_given_is_collected(argv, given):
    assert given_by(*argv) == given


@pytest.mark.parametrize(
    "argv", [["--rule", "sgd"], ["--hidden", "1,x"], ["--max-norm", "big"], ["--secret", "x"]]
)
def test_text_that_does_not_fit_the_type_is_a_usage_error(argv):
    with pytest.raises(click.UsageError):
        given_by(*argv)


def test_apply_replaces_through_nesting_and_leaves_the_rest():
    recipe = RunConfig(name="r", server=ServerConfig(max_norm=3.0, num_partitions=4))
    changed = apply(recipe, {"num_partitions": 5, "hidden": (7,)})
    assert changed == RunConfig(
        name="r", hidden=(7,), server=ServerConfig(max_norm=3.0, num_partitions=5)
    )
    assert recipe.server.num_partitions == 4
    assert apply(recipe, {}) is recipe


def test_values_that_are_good_only_together_are_applied_together():
    changed = apply(BASE, {"num_partitions": 8, "concurrent_steps": 8})
    assert (changed.server.num_partitions, changed.concurrent_steps) == (8, 8)


def test_a_refused_value_is_named_with_its_option():
    with pytest.raises(OptionError) as caught:
        apply(BASE, {"concurrent_steps": 7, "num_partitions": 0})
    assert str(caught.value) == "--num-partitions 0: num_partitions must be at least 1, got 0"


def test_values_refused_only_together_are_all_named():
    with pytest.raises(OptionError) as caught:
        apply(BASE, {"rule": "adagrad", "max_norm": 2.0})
    assert str(caught.value) == "--rule adagrad --max-norm 2.0: adagrad takes no max_norm, got 2.0"


def test_a_value_is_blamed_for_a_check_of_the_outer_dataclass():
    with pytest.raises(OptionError, match=r"^--num-partitions 9: concurrent_steps \(5\) must"):
        apply(BASE, {"num_partitions": 9, "warm_start": False})


def test_a_defect_in_a_check_stays_a_defect():
    @dataclass(frozen=True, kw_only=True)
    class Broken:
        x: int = 1

        def __post_init__(self):
            assert self.x == 1

    with pytest.raises(AssertionError):
        apply(Broken(), {"x": 2})


def test_an_unknown_setting_is_a_key_error():
    with pytest.raises(KeyError):
        apply(BASE, {"nonsense": 1})


def test_two_fields_with_one_option_are_an_error_that_names_both():
    @dataclass(frozen=True, kw_only=True)
    class Clash:
        rule: str = ""
        server: ServerConfig = field(default_factory=ServerConfig)

    # get_type_hints needs no help here: annotations are evaluated in this module.
    with pytest.raises(TypeError, match=r"rule and server\.rule both give --rule"):
        settings_of(Clash)


def test_a_flag_that_is_turned_off_clashes_too():
    @dataclass(frozen=True, kw_only=True)
    class Clash:
        shuffle: bool = True
        no_shuffle: int = 1

    with pytest.raises(TypeError, match="both give --no-shuffle"):
        settings_of(Clash)


def test_a_field_may_take_another_name():
    @dataclass(frozen=True, kw_only=True)
    class Renamed:
        rule: str = field(default="a", metadata={"cli": "outer-rule"})
        server: ServerConfig = field(default_factory=ServerConfig)

    assert settings_of(Renamed)[0].option == "--outer-rule"
    assert apply(Renamed(), {"outer_rule": "b"}) == Renamed(rule="b")


def test_a_type_without_a_form_is_an_error_that_names_the_field():
    @dataclass(frozen=True, kw_only=True)
    class Bytes:
        key: bytes = b""

    with pytest.raises(TypeError, match=r"Bytes\.key: .*bytes.* has no form.*cli"):
        settings_of(Bytes)


def test_an_option_of_the_commands_own_must_not_take_a_settings_name():
    with pytest.raises(TypeError, match="has --name of its own"):

        @config_options(RunConfig)
        @click.option("--name")
        def command(name, given):
            """Never runs."""

"""Options derived from configuration dataclasses."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import click
import pytest
from click.testing import CliRunner

from downpour.cluster.cli.training import train as real_train
from downpour.cluster.config import recipes
from downpour.cluster.config.options import ConfigCommand, OptionError, apply, config_options
from downpour.cluster.errors import UserError
from tests.helpers.settings import RunConfig, ServerConfig

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


def test_help_shows_the_values_of_the_configuration_that_is_named():
    server = ServerConfig(rule="adagrad", num_partitions=1)
    other = replace(BASE, name="other", warm_start=False, hidden=(3,), server=server)

    @click.command(cls=ConfigCommand, named_by="recipe", find={"other": other}.__getitem__)
    @config_options(RunConfig)
    @click.argument("recipe", required=False)
    def command(recipe, given):
        """Trains."""

    def shown(*argv):
        text = CliRunner().invoke(command, argv).output
        return re.findall(r"\[default: (.*?)\]", " ".join(text.split()))

    defaults = ["5", "warm-start", "100,100", "2", "momentum", "none"]
    assert shown("--help") == defaults
    values = ["other", "5", "no-warm-start", "3", "1", "adagrad", "none"]
    assert shown("other", "--help") == shown("--rule", "momentum", "other", "--help") == values
    assert shown("--help", "other") == values


def test_help_of_a_recipe_shows_its_values():
    text = " ".join(CliRunner().invoke(real_train, ["mnist-bn", "--help"]).output.split())
    assert re.search(r"--learning-rate FLOAT .{,80}?\[default: 0.4\]", text)
    text = " ".join(CliRunner().invoke(real_train, ["mnist", "--help"]).output.split())
    assert re.search(r"--learning-rate FLOAT .{,80}?\[default: 0.02\]", text)
    text = " ".join(CliRunner().invoke(real_train, ["bn-x5", "--help"]).output.split())
    assert re.search(r"--ramp-epochs FLOAT .{,80}?\[default: 0.9\]", text)
    unknown = CliRunner().invoke(real_train, ["mnsit", "--help"])
    assert isinstance(unknown.exception, UserError)
    assert "did you mean mnist?" in str(unknown.exception)


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


def test_an_option_of_the_commands_own_must_not_take_a_settings_name():
    with pytest.raises(TypeError, match="has --name of its own"):

        @config_options(RunConfig)
        @click.option("--name")
        def command(name, given):
            """Never runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keyed:
    """A configuration with a mapping."""

    arguments: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"depth": 18}, metadata={"cli": "arg"}
    )
    """An argument."""


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([], {"depth": 18}),
        (["--arg", "depth=34"], {"depth": 34}),
        (["--arg", "name=dla34", "--arg", "rate=0.5"], {"depth": 18, "name": "dla34", "rate": 0.5}),
        (["--arg", "pretrained=False"], {"depth": 18, "pretrained": False}),
        (["--arg", "size=(3, 4)", "--arg", "a=b=c"], {"depth": 18, "size": [3, 4], "a": "b=c"}),
        (["--arg", "x=null", "--arg", "y=None"], {"depth": 18, "x": None, "y": None}),
    ],
)
def test_entries_are_added_to_a_mapping(given: list[str], found: dict[str, object]) -> None:
    seen = list[object]()

    @click.command(cls=ConfigCommand)
    @config_options(Keyed)
    def command(given: dict[str, object]) -> None:
        seen.append(apply(Keyed(), given).arguments)

    command.main(given, standalone_mode=False)
    assert seen == [found]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rule": "adam", "momentum": 0.5}, "--momentum 0.5: it says nothing with --rule adam"),
        ({"shape": "cosine", "decay_factor": 0.5}, "or give --schedule exponential or --schedule"),
        ({"peak_share": 0.2}, "--peak-share 0.2: it says nothing with --schedule exponential"),
    ],
)
def test_what_would_be_passed_over_is_refused(given: dict[str, object], told: str) -> None:
    recipe = recipes.mnist_bn()
    named = {("schedule" if name == "shape" else name): value for name, value in given.items()}
    with pytest.raises(OptionError, match=re.escape(told)):
        apply(recipe, named)
    # A recipe's own values of another choice are no mistake.
    assert (
        apply(recipe, {"rule": "adam", "schedule": "cosine"}).server.schedule.decay_factor
        == recipe.server.schedule.decay_factor
    )


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """A configuration whose option had another name."""

    new_name: int = dataclasses.field(default=1, metadata={"formerly": "old-name"})
    """A number."""


@pytest.mark.parametrize("option", ["--new-name", "--old-name"])
def test_an_earlier_name_is_still_understood(option: str) -> None:
    found: list[dict[str, object]] = []

    @click.command(cls=ConfigCommand)
    @config_options(Renamed)
    def command(given: dict[str, object]) -> None:
        """Collects."""
        found.append(given)

    assert CliRunner().invoke(command, [option, "3"]).exit_code == 0
    assert found == [{"new_name": 3}]
    assert "--new-name, --old-name" in CliRunner().invoke(command, ["--help"]).output
    assert apply(Renamed(), {"old_name": 4}) == apply(Renamed(), {"new_name": 4})

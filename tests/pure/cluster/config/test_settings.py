"""Settings: the fields of nested configuration dataclasses."""

from dataclasses import MISSING, dataclass, field
from typing import Literal

import pytest

from downpour.cluster.config.options import apply
from downpour.cluster.config.settings import field_docstrings, settings_of
from tests.helpers.settings import RunConfig, ServerConfig


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

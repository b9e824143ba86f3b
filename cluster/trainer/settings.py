"""Values of the configuration as a caller of `Trainer` gives them, by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import click

from downpour.cluster.config.run import RunConfig
from downpour.cluster.config.settings import OptionalValue, Setting, settings_of
from downpour.cluster.errors import UserError, one_line

ELSEWHERE = {
    "scaling_config": "scaling=",
    "run_config": "name= and runs=, and other values by their names",
    "storage_path": "runs=, the folder for runs",
    "train_loop_per_worker": "model=, loss= and data=; the loop is Downpour's",
    "train_loop_config": "each value by its name",
    "datasets": "data=, a dataset with both splits",
    "train_dataset": "data=, a dataset with both splits",
    "optimizer": "rule= and learning_rate=, such as rule='adamw'",
    "lr": "learning_rate=",
    "num_epochs": "epochs=",
    "max_epochs": "epochs=",
    "num_workers": "replicas=",
    "scheduler": "schedule=, such as schedule='cosine'",
}
"""What other libraries call it, and what it is called here."""


def checked_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings, those given as texts read as on the command line.

    Raises:
        UserError: there is no such setting, or its value is of another type.
    """
    known = {setting.name: setting for setting in settings_of(RunConfig)}
    found = {}
    for name, value in settings.items():
        if name in ELSEWHERE:
            raise UserError(f"there is no setting {name!r}: give {ELSEWHERE[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, [*known, "arguments", "callbacks"], n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"there is no setting {name!r}: {hint}`downpour train --help` lists them"
            )
        found[name] = _read(known[name], value)
    return found


def _read(setting: Setting, value: Any) -> object:
    """A value as the command line would have given it."""
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, list):
        value = tuple(value)
    if setting.is_mapping:
        raise UserError(f"{setting.name} is for the command line: give arguments={{...}}")
    if setting.is_flag is not isinstance(value, bool):
        wanted = "True or False" if setting.is_flag else "a value of another type"
        raise UserError(f"{setting.name} is {value!r}: give {wanted}")
    if setting.is_flag:
        return value
    if value is None and not isinstance(setting.param_type, OptionalValue):
        raise UserError(f"{setting.name} is None: give a value")
    try:
        read = setting.param_type.convert("none" if value is None else value, None, None)
    except (click.BadParameter, TypeError) as error:
        raise UserError(f"{setting.name} is {value!r}: {one_line(error)}") from None
    if isinstance(value, float) and isinstance(read, int) and read != value:
        raise UserError(f"{setting.name} is {value!r}: give an integer")
    return read

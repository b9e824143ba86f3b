"""How many classes a run tells apart: as many as its data has, or what the user says if that fits.

A recipe's own number stands for the data that it was written for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from downpour.cluster.config.recipes import RECIPES
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.shuffler.dataset.labels import highest_label
from downpour.shuffler.dataset.own import open_split
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.holdings import Inventory


def with_classes(
    config: RunConfig, *, chosen: bool, say: Callable[[str], object] = lambda _: None
) -> RunConfig:
    """Return the configuration with the data's number of classes.

    If the data names its classes, they are as many as names. Otherwise the highest label counts,
    for recipes that come with Downpour; one's own recipe keeps its number, if it is enough.

    Args:
        config: of a run that has not begun.
        chosen: whether the user has chosen the number, which the data may contradict then.
        say: gets a line if the number is another one than the recipe's.

    Raises:
        UserError: the data contradicts the number that was chosen, or has a single class.
        DatasetError: the data cannot be read.
    """
    if config.model.columns.kind != "label":
        return config
    found, named = _of_data(config, by_label=not chosen)
    wanted = config.model.num_classes
    data = config.data.data
    if chosen:
        if named and found != wanted:
            raise UserError(
                f"{data} has {found} classes ({named}), and num classes is {wanted}: leave "
                f"--num-classes out, or give {found}"
            )
        return config
    if found == wanted or not found or (not named and not _must_fit(config, found)):
        return config
    if found < 2:
        raise UserError(
            f"{data} has a single class{f' ({named})' if named else ''}, so there is nothing to "
            "tell apart: give data of 2 or more"
        )
    say(f"{found} classes, as the data has ({wanted} are the recipe's)")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=found))


def _must_fit(config: RunConfig, found: int) -> bool:
    """Whether a number that follows from the highest label is taken."""
    return config.recipe in RECIPES or found > config.model.num_classes


def _of_data(config: RunConfig, *, by_label: bool) -> tuple[int, str]:
    """Return how many classes the data has, 0 if it does not say, and words for their names.

    Raises:
        UserError: the two splits name different classes.
    """
    data = config.data
    columns = config.model.columns
    scored = open_split(data.data, data.eval_split, columns)
    train: Dataset | Inventory
    if data.node_folder is None:
        train = open_split(data.data, data.train_split, columns)
    else:
        train = Inventory.read(data.data, data.train_split)
    if train.class_names and scored.class_names and train.class_names != scored.class_names:
        raise UserError(
            f"splits {data.train_split!r} and {data.eval_split!r} of {data.data} name different "
            f"classes ({_shown(train.class_names)}; {_shown(scored.class_names)}): ingest them "
            "together from one source"
        )
    if names := train.class_names or scored.class_names:
        return len(names), _shown(names)
    if not by_label or not isinstance(train, Dataset):
        return 0, ""
    return 1 + max(highest_label(train), highest_label(scored)), ""


def _shown(names: tuple[str, ...]) -> str:
    shown = ", ".join(name.replace("\n", " ") for name in names[:3])
    return f"{shown}, ..." if len(names) > 3 else shown

"""The data says how many classes there are; what contradicts it is refused before Ray starts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from downpour.cluster.config import recipes
from downpour.cluster.config.options import apply
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.training.classes import with_classes
from tests.helpers.tiny import write_split


def config(
    folder: Path,
    names: Sequence[str] = (),
    labels: Sequence[int] = (0, 3, 1, 2),
    *,
    recipe: str = "inception",
    scored_names: Sequence[str] | None = None,
) -> RunConfig:
    pixels = np.zeros((len(labels), 8, 8, 3), np.uint8)
    scored = names if scored_names is None else scored_names
    for split, some in (("train", names), ("test", scored)):
        write_split(folder, split, pixels, np.array(labels), shards=1, class_names=some)
    return apply(recipes.find(recipe), {"data": str(folder), "eval_split": "test"})


NAMES = ("ant", "bee", "cat", "dog")


def test_names_count_and_then_labels(tmp_path: Path) -> None:
    told: list[str] = []
    named = with_classes(config(tmp_path / "a", NAMES, (0, 1)), chosen=False, say=told.append)
    assert named.model.num_classes == 4
    assert told == ["4 classes, as the data has (1000 are the recipe's)"]
    plain = with_classes(config(tmp_path / "b"), chosen=False)
    assert plain.model.num_classes == 4
    only_scored = config(tmp_path / "c", (), scored_names=NAMES)
    assert with_classes(only_scored, chosen=False).model.num_classes == 4


def test_a_contradiction_is_refused(tmp_path: Path) -> None:
    begun = config(tmp_path / "a", NAMES)
    for count in (3, 5, 1000):
        given = apply(begun, {"num_classes": count})
        with pytest.raises(
            UserError, match=rf"4 classes \(ant, bee, cat, ...\).*is {count}: leave"
        ):
            with_classes(given, chosen=True)
    assert with_classes(apply(begun, {"num_classes": 4}), chosen=True).model.num_classes == 4
    # Without names nobody knows better than the user.
    more = apply(config(tmp_path / "b"), {"num_classes": 9})
    assert with_classes(more, chosen=True).model.num_classes == 9


def test_names_of_both_splits_must_be_the_same(tmp_path: Path) -> None:
    begun = config(tmp_path, NAMES, scored_names=("dog", "cat", "bee", "ant"))
    with pytest.raises(UserError, match="name different classes"):
        with_classes(begun, chosen=False)


def test_a_single_class_is_nothing_to_learn(tmp_path: Path) -> None:
    for number, names in enumerate((("only",), ())):
        begun = config(tmp_path / str(number), names, (0, 0))
        with pytest.raises(UserError, match="a single class"):
            with_classes(begun, chosen=False)


def test_a_recipe_of_ones_own_keeps_a_number_that_is_enough(tmp_path: Path) -> None:
    own = dataclasses.replace(config(tmp_path), recipe="mine")
    assert with_classes(own, chosen=False).model.num_classes == 1000
    few = apply(own, {"num_classes": 2})
    assert with_classes(few, chosen=False).model.num_classes == 4

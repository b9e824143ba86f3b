"""The recipes of section 4.2: every difference that the paper names, and no other."""

import types
from typing import Any

import pytest

from downpour.cluster.config import inception_recipes, recipes
from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.options import apply
from downpour.cluster.config.plain import to_plain
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError


def _flat(value: object, path: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, object] = {}
    for name, inner in value.items():
        found |= _flat(inner, f"{path}.{name}" if path else name)
    return found


def _differences(one: str, other: str) -> dict[str, tuple[object, object]]:
    a, b = (_flat(to_plain(recipes.find(name))) for name in (one, other))
    changed = {key: (a.get(key), b.get(key)) for key in a.keys() | b.keys()}
    return {k: v for k, v in changed.items() if v[0] != v[1] and k != "recipe"}


def test_bn_baseline_is_inception_with_batch_norm() -> None:
    assert _differences("inception", "bn-baseline") == {"model.arguments.batch_norm": (False, True)}


def test_bn_x5_is_section_4_2_1() -> None:
    assert _differences("bn-baseline", "bn-x5") == {
        "server.schedule.learning_rate": (0.0015, 0.0075),
        "model.arguments.dropout": (0.4, 0.0),
        "data.strategy": ("none", "pairwise"),
        "data.augment.distortion": ("full", "reduced"),
        "server.weight_decay": (4e-5, 8e-6),
        "server.schedule.decay_epochs": (8.0, 8 / 6),
        "model.arguments.lrn": (True, False),
    }


def test_the_others_differ_from_bn_x5_in_one_thing() -> None:
    assert _differences("bn-x5", "bn-x30") == {"server.schedule.learning_rate": (0.0075, 0.045)}
    assert _differences("bn-x5", "bn-x5-sigmoid") == {
        "model.arguments.activation": (None, "sigmoid")
    }


def test_the_ensemble_is_six_changed_bn_x30() -> None:
    allowed = {"model.arguments.init_scale", "model.arguments.dropout", "policy.seed"}
    allowed |= {"model.arguments.per_activation"}
    found = [_differences("bn-x30", f"ensemble-{i}") for i in range(1, 7)]
    assert all(set(changes) <= allowed and len(changes) >= 2 for changes in found)
    assert len({str(changes) for changes in found}) == 6
    dropped = {c["model.arguments.dropout"][1] for c in found if "model.arguments.dropout" in c}
    assert dropped == {0.05, 0.1}
    assert len({changes["policy.seed"] for changes in found}) == 6


def test_smaller_networks_by_options() -> None:
    given = {"width": 0.25, "image_size": 32, "stem_stride": 4, "num_classes": 10}
    spec = model_spec(apply(recipes.find("bn-x5"), given))
    assert spec.image.input_shape == (3, 32, 32)
    model = spec.build_flat()
    assert model.layout.num_parameters == 641_938


def test_every_recipe_builds_its_network() -> None:
    for name in ("inception", "bn-x5-sigmoid", "ensemble-6"):
        config = apply(recipes.find(name), {"width": 0.0625, "image_size": 32})
        assert model_spec(config).build_flat().layout.num_parameters > 0


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with recipes of a user's own."""
    module = types.ModuleType("own_recipes")
    monkeypatch.setitem(__import__("sys").modules, "own_recipes", module)
    monkeypatch.setattr(recipes, "add_working_directory", lambda: None)
    return module


def test_a_recipe_of_the_users_own(own: Any) -> None:
    own.small = inception_recipes.bn_x5
    assert isinstance(recipes.find("own_recipes:small"), RunConfig)
    own.wrong = lambda: 3
    for name, words in (
        ("own_recipes:wrong", "returned int"),
        ("own_recipes:none", "has no function 'none'"),
        ("there_is_no_such:x", "cannot be imported: ModuleNotFoundError"),
    ):
        with pytest.raises(UserError, match=words):
            recipes.find(name)

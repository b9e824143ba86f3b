"""Configuration: recipes hold together, values are refused with a remedy, pure decisions."""

import json
from dataclasses import replace

import pytest

from downpour.cluster.config import classifier, recipes
from downpour.cluster.config.derive import make_plan, step_config, update_config
from downpour.cluster.config.options import OptionError, apply
from downpour.cluster.config.plain import from_plain, to_plain
from downpour.cluster.config.run import RunConfig
from downpour.cluster.config.settings import settings_of
from downpour.cluster.errors import UserError
from downpour.workers.config import ReplicaConfig


def test_the_paper_recipes_train_as_the_paper_did() -> None:
    for name in recipes.RECIPES.keys() - {classifier.NAME}:
        config = recipes.find(name)
        assert config.recipe == name
        assert config.replicas.replicas == 10
        assert config.replicas.steps.concurrent_steps == 5
        assert config.data.batch_size == 32
        rule = "nesterov" if name == "mnist-bn" else "momentum"  # section 4.1 names no optimizer
        assert config.server.rule == rule


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="did you mean mnist-bn") as caught:
        recipes.find("mnist_bn")
    assert "mnist" in str(caught.value)


def test_every_value_has_one_option() -> None:
    names = [setting.name for setting in settings_of(RunConfig)]
    assert len(names) == len(set(names))
    assert {"replicas", "concurrent_steps", "n_push", "learning_rate", "statistics_decay"} <= {
        *names
    }


def test_options_reach_through_the_nesting() -> None:
    config = apply(recipes.find("mnist-bn"), {"replicas": 3, "learning_rate": 0.5, "epochs": 2})
    assert config.replicas.replicas == 3
    assert config.server.schedule.learning_rate == 0.5
    assert config.policy.epochs == 2
    assert config.data == recipes.find("mnist-bn").data


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learning_rate": -1.0}, "--learning-rate -1.0: learning rate is -1.0"),
        ({"replicas": 0}, "--replicas 0: replicas is 0: give at least 1"),
        ({"momentum": 1.0}, "--momentum 1.0: momentum is 1.0"),
        ({"epochs": 0}, "--epochs 0: epochs is 0"),
        ({"concurrent_steps": 0}, "--concurrent-steps 0: concurrent steps is 0"),
        ({"partitions": 0}, "--partitions 0: partitions is 0"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1: weight decay is -0.1"),
        ({"seed": -1}, "--seed -1: seed is -1"),
    ],
)
def test_a_bad_value_is_named_with_its_option(given: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError) as caught:
        apply(recipes.find("mnist-bn"), given)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_bounded_staleness_is_told_to_the_replicas_and_needs_a_version_for_each_push() -> None:
    config = apply(recipes.find("mnist-bn"), {"staleness_policy": "bounded"})
    assert step_config(config).by_permit
    assert not step_config(recipes.find("mnist-bn")).by_permit
    with pytest.raises(OptionError, match="n fetch 1 and n push 2: give both the same value"):
        apply(config, {"n_push": 2})


@pytest.mark.parametrize("factor", [1.0, 0.5, float("nan"), float("inf")])
def test_a_ramp_guard_that_guards_nothing_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=r"ramp guard is .*: give more than 1, or none"):
        ReplicaConfig(ramp_guard=factor)


def test_the_ramp_guard_survives_json() -> None:
    config = apply(recipes.find("mnist-bn"), {"ramp_guard": 2.0})
    assert from_plain(RunConfig, json.loads(json.dumps(to_plain(config)))) == config
    assert recipes.find("mnist-bn").replicas.ramp_guard is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"n_push": 2},
            "policy is compensate, n fetch 1 and n push 2: give both the same",
        ),
        ({"wire": "bfloat16"}, "wire is bfloat16.*: give wire float32"),
        ({"wire": "int8"}, "wire is int8.*: give wire float32"),
        ({"staleness_bound": 49}, "staleness bound is 49, with 50 steps in flight: give at least"),
    ],
)
def test_what_cannot_be_compensated_is_refused_in_a_line(
    given: dict[str, object], words: str
) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        apply(recipes.find("mnist-bn"), {"staleness_policy": "compensate", **given})
    assert "\n" not in str(caught.value)


def test_compensation_is_configured_and_survives_json() -> None:
    options = {
        "staleness_policy": "compensate",
        "compensation": "constant",
        "compensation_lambda": 0.1,
        "n_push": 3,
        "n_fetch": 3,
    }
    config = apply(recipes.find("mnist-bn"), options)
    assert from_plain(RunConfig, json.loads(json.dumps(to_plain(config)))) == config
    assert update_config(config, make_plan(config, 60_000)).policy.strength == 0.1
    assert step_config(config).by_push
    assert not step_config(config).by_permit
    assert not step_config(recipes.find("mnist-bn")).by_push


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n_push": 2, "n_fetch": 2}, "n fetch 2 and n push 2: give 1 for both, and as many more"),
        (
            {"round_pushes": 51},
            "round pushes is 51, and there are 50 steps in flight: give",
        ),
        ({"round_pushes": 0}, "round pushes is 0: give at least 1, or none"),
        ({"record_pushes": True}, "record pushes is on, and .*: give round pushes 50"),
    ],
)
def test_rounds_that_cannot_be_are_refused_in_a_line(given: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        apply(recipes.find("mnist-bn"), {"staleness_policy": "synchronous", **given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("pushes", "expected"), [(None, 50), (45, 45)])
def test_rounds_are_configured_and_survive_json(pushes: int | None, expected: int) -> None:
    given = {"staleness_policy": "synchronous", "round_pushes": pushes}
    config = apply(recipes.find("mnist-bn"), given)
    assert from_plain(RunConfig, json.loads(json.dumps(to_plain(config)))) == config
    update = update_config(config, make_plan(config, 60_000))
    assert (update.policy.round_pushes, update.policy.round_steps) == (expected, 50)
    assert update.epochs == config.policy.epochs
    assert step_config(config).by_permit


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"record_pushes": True}, "record pushes is on, and replica device is cuda, .*: give repl"),
        ({"spares": "replicas"}, "spares is replicas, and replica device is cuda, .*: give spares"),
        ({"spares": "all"}, "spares is all, and replica device is cuda, .*: give spares none"),
        ({"gpus_per_process": 2.0}, "gpus per process is 2: give more than 0 and at most 1"),
        ({"gpus_per_process": 0.0}, "gpus per process is 0: give more than 0 and at most 1"),
    ],
)
def test_what_a_device_cannot_do_is_refused_in_a_line(given: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        apply(recipes.find("mnist-bn"), {"replica_device": "cuda", **given})
    assert "\n" not in str(caught.value)


def test_float16_is_for_gpus() -> None:
    with pytest.raises(OptionError, match="precision is float16, and replica device is cpu"):
        apply(recipes.find("mnist-bn"), {"precision": "float16"})
    given = {"precision": "float16", "replica_device": "cuda", "record_steps": "on"}
    assert step_config(apply(recipes.find("mnist-bn"), given)).precision == "float16"


def test_on_a_device_weights_are_fresh_if_steps_are_computed_together() -> None:
    steps = step_config(apply(recipes.find("mnist-bn"), {"replica_device": "cuda"}))
    assert (steps.fresh, steps.batches_per_push) == (False, 1)
    together = replace(steps, steps_together=5)
    assert (together.fresh, together.batches_per_push) == (True, 5)
    assert not replace(together, in_flight="all").fresh


def test_a_device_is_told_to_the_replicas_and_survives_json() -> None:
    given = {"replica_device": "cuda", "gpus_per_process": 0.25}
    config = apply(recipes.find("mnist-bn"), given)
    assert from_plain(RunConfig, json.loads(json.dumps(to_plain(config)))) == config
    assert step_config(config).device == "cuda"
    assert config.replicas.gpu_share == 0.25
    assert recipes.find("mnist-bn").replicas.gpu_share is None

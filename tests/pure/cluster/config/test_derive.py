"""What a configuration says to each part of a run."""

import dataclasses

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.config.derive import (
    make_decoder,
    make_plan,
    model_spec,
    spares,
    step_config,
    update_config,
    window_that_fits,
)
from downpour.cluster.config.options import apply
from downpour.paramserver.rules.update import Adagrad, Nesterov
from downpour.shuffler.config import WINDOW_BYTES, DataConfig
from downpour.shuffler.errors import PlanError


def test_rules_by_name() -> None:
    config = apply(recipes.find("mnist-bn"), {"rule": "adagrad"})
    plan = make_plan(config, 60_000)
    assert update_config(config, plan).rule == Adagrad()
    assert update_config(recipes.find("mnist-bn"), plan).rule == Nesterov(momentum=0.9)
    assert update_config(config, plan).batches_per_epoch == 1877


def test_a_run_with_hot_standby_keeps_a_process_of_replicas_ready() -> None:
    plain = recipes.find("mnist-bn")
    assert spares(plain) == "none"
    assert spares(apply(plain, {"hot_standby": True})) == "replicas"
    assert spares(apply(plain, {"hot_standby": True, "spares": "none"})) == "none"
    assert spares(apply(plain, {"spares": "all"})) == "all"
    assert spares(apply(plain, {"hot_standby": True, "replica_device": "cuda"})) == "none"


def test_the_initial_weights_depend_on_the_seed_alone() -> None:
    config = recipes.find("mnist-bn")
    assert model_spec(config).seed == model_spec(config).seed
    other = apply(config, {"seed": 1})
    assert model_spec(other).seed != model_spec(config).seed


def test_a_plan_that_is_too_short_for_the_run_is_refused() -> None:
    config = apply(recipes.find("mnist-bn"), {"epochs": 1 << 20, "past_bound": "error"})
    with pytest.raises(PlanError, match="epochs"):
        make_plan(config, 60_000)
    make_plan(apply(config, {"past_bound": "rekey"}), 60_000)


def test_shards_matter_to_one_strategy_only() -> None:
    config = recipes.find("mnist-bn")
    assert make_plan(config, 60_000, (30_000, 30_000)).shard_rows == ()
    within = apply(config, {"strategy": "within_shard"})
    assert make_plan(within, 640, (320, 320)).shard_rows == (320, 320)


def test_only_training_rows_are_varied_and_by_the_seed_of_the_run() -> None:
    config = apply(recipes.find("bn-x5"), {"seed": 3, "on_bad_image": "skip"})
    decoder = make_decoder(config)
    assert decoder.augment == config.data.augment
    assert (decoder.seed, decoder.on_bad_image) == (3, "skip")
    assert decoder.spec == model_spec(config).image == config.model.input


@pytest.mark.parametrize(
    ("policy", "by_permit", "by_push"),
    [
        ("apply", False, False),
        ("bounded", True, False),
        ("synchronous", True, False),
        ("compensate", False, True),
    ],
)
def test_the_staleness_policy_decides_when_a_step_fetches(
    policy: str, by_permit: bool, by_push: bool
) -> None:
    config = apply(recipes.find("mnist-bn"), {"staleness_policy": policy})
    told = step_config(config)
    assert (told.by_permit, told.by_push) == (by_permit, by_push)
    assert dataclasses.replace(told, by_permit=False, by_push=False) == config.replicas.steps


def test_windows_of_large_images_have_fewer_mini_batches():
    data = DataConfig(batch_size=32, window_batches=64)
    assert window_that_fits(data, 100_000) == 64
    assert window_that_fits(data, 4_000_000) == 2
    assert window_that_fits(data, 1_100_000) * 32 * 1_100_000 <= WINDOW_BYTES
    assert window_that_fits(data, 10e9) == 1
    assert window_that_fits(data, 0) == 64
    config = recipes.find("mnist-bn")
    assert make_plan(config, 60_000, window_batches=7).window_batches == 7

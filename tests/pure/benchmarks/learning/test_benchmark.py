"""What `bench learning` tells of several runs, and how it trains this system."""

import pytest

from downpour.benchmarks.harness import BadSettings, Settings
from downpour.benchmarks.learning import benchmark
from downpour.benchmarks.learning.peers import SYSTEM, peers
from downpour.benchmarks.learning.train import configure
from tests.helpers.learning_curves import FAST, NEVER, SLOW


def test_one_that_never_arrives_is_later_than_all() -> None:
    found = benchmark.arrivals([SLOW, FAST, NEVER], 0.5, 16.0, 4.0)
    assert found["arrived"] == 2
    assert (found["training_s"], found["training_s_min"], found["training_s_max"]) == (8, 3, None)
    assert found["wall_s"] == 10
    assert found["examples"] == 8000
    assert (found["ratio_to_plain"], found["ratio_to_averaged"]) == (0.5, 2)
    lost = benchmark.arrivals([SLOW, NEVER, NEVER], 0.5, 16.0, 4.0)
    assert lost["training_s"] is None
    assert lost["ratio_to_plain"] is None
    found = benchmark.arrivals([FAST], 0.5, float("inf"), 3.0)
    assert (found["ratio_to_plain"], found["ratio_to_averaged"]) == (None, 1)


def test_this_system_trains_its_recipe_as_it_is_but_for_what_the_search_sets() -> None:
    peer = peers(2)[SYSTEM]
    first, *_, setting = benchmark.FULL.grid(peer).settings(peer.shapes[0])
    assert (setting.nesterov, configure(first, seed=7, bounds=benchmark.FULL).server.rule) == (
        False,
        "nesterov",
    )
    config = configure(setting, seed=7, bounds=benchmark.FULL)
    assert config.server.schedule.learning_rate == setting.learning_rate
    assert config.server.schedule.decay_factor == setting.decay
    assert (config.server.ema, config.server.momentum) == (setting.average, setting.momentum)
    assert config.server.rule == "momentum"
    assert (config.replicas.replicas, config.replicas.steps.concurrent_steps) == (10, 5)
    assert (config.data.batch_size, config.policy.seed) == (32, 7)


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(BadSettings, match="there is no peer 'horovod'"):
        benchmark.run(Settings(only=("horovod",)), print)

"""Frozen weights and averages through a partition's one door, against a partition without them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.ranges import Partition, split
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Version
from downpour.paramserver.rules.averaging import Averaging
from downpour.paramserver.rules.choice import RULES, make_regulariser, make_rule
from downpour.paramserver.rules.policy import StalenessPolicy
from downpour.paramserver.rules.schedule import Schedule
from tests.helpers.arrivals import ROUGH, Bench, by_way_of_json
from tests.helpers.close import assert_close

torch.set_num_threads(1)

P, T, F, Q = 96, 70, 3, 8


def config_of(rule: str, **options: Any) -> UpdateConfig:
    return UpdateConfig(
        rule=make_rule(rule, 0.9, weight_decay=0.01),
        regulariser=make_regulariser(rule, 0.01, None),
        schedule=Schedule(learning_rate=0.1),
        batches_per_epoch=Q,
        epoch_examples=4 * Q,
        **options,
    )


def parts_of(rule: str, num: int, frozen: int) -> tuple[Partition, ...]:
    stops = (30, 50, T, 80, P) if rule == "lars" else ()
    return split(
        num_parameters=P, num_features=F, num_decayed=50, num_partitions=num, num_frozen=frozen,
        stops=stops,
    )  # fmt: skip


def begun(part: Partition, config: UpdateConfig, weights: Tensor) -> Bench:
    bench = Bench(config, part)
    bench.slots[0].weights.copy_(weights[part.start : part.stop])
    bench.state = PartitionState(part, config, bench.slots[0])
    return bench


def run(benches: list[Bench], num: int, seen: Callable[[], None] = lambda: None) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(num):
        gradient = torch.randn(P, generator=generator)
        gradient[T:] = 0.0
        moments = torch.rand(1, 3, F, generator=generator) + 5
        for bench in benches:
            state = bench.state
            part = state.partition
            push = Push(
                mailbox=0, replica=0, epoch=step // Q, batches=(step % Q,), examples=4,
                version=state.version, loss=1.0, gradient_norm=float(gradient.norm()),
            )  # fmt: skip
            own = moments[:, :, part.feature_start : part.feature_stop]
            assert bench.apply(push, gradient[part.trained].clone(), own) is Outcome.APPLIED
        seen()


def whole(benches: list[Bench]) -> Tensor:
    return torch.cat([bench.state.current.weights for bench in benches])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num", [1, 3])
def test_what_is_trained_moves_as_ever_and_what_is_frozen_stays(rule: str, num: int) -> None:
    start = torch.randn(P, generator=torch.Generator().manual_seed(0))
    config = config_of(rule)
    frozen = [begun(p, config, start) for p in parts_of(rule, num, P - T)]
    run(frozen, 12)
    (plain,) = parts_of(rule, 1, 0)
    free = [begun(plain, config, start)]
    run(free, 12)
    assert torch.equal(whole(frozen)[T:], start[T:])
    assert not torch.equal(whole(frozen)[:T], start[:T])
    assert_close(whole(frozen)[:T], whole(free)[:T], rtol=1e-5, atol=1e-6)
    for bench in frozen:
        part = bench.state.partition
        for name, vector in bench.state.vectors.rule_state.items():
            assert name == "updates" or len(vector) == part.num_trained
        bench.state.check()


@pytest.mark.parametrize("policy", ["asynchronous", "compensate", "synchronous"])
def test_averages_follow_the_weights_and_go_through_a_snapshot(policy: Any) -> None:
    staleness = StalenessPolicy(staleness_policy=policy, staleness_bound=50, round_pushes=4)
    config = config_of("adam", average_decay=0.9, policy=staleness)
    start = torch.randn(P, generator=torch.Generator().manual_seed(0))
    (part,) = parts_of("adam", 1, P - T)
    bench = begun(part, config, start)
    oracle = Averaging(decay=0.9)
    followed = oracle.init(start[:T], torch.zeros(2, F))
    versions = [0]

    def seen() -> None:
        state = bench.state
        if state.weights_version > versions[-1]:
            current, k = state.current, state.weights_version - versions[-1]
            oracle.update(followed, current.weights[:T], current.statistics, k)
            versions.append(state.weights_version)

    run([bench], 12, seen)
    scored = bench.state.vectors.scored
    assert torch.equal(scored.weights[:T], followed["average"])
    assert torch.equal(scored.weights[T:], start[T:])
    assert torch.equal(scored.statistics, followed["average_statistics"])
    assert not torch.equal(scored.weights[:T], bench.state.current.weights[:T])

    meta, tensors = bench.state.dump()
    again = begun(part, config, torch.zeros(P))
    again.state.load(meta, {name: tensor.clone() for name, tensor in tensors.items()})
    for name, tensor in again.state.dump()[1].items():
        assert torch.equal(tensor, tensors[name]), name


def test_without_either_a_partition_has_the_plain_vectors() -> None:
    bench = Bench(ROUGH)
    assert type(bench.state.vectors).__name__ == "Vectors"
    assert bench.state.vectors.scored is bench.state.current
    averaged = Bench(replace(ROUGH, average_decay=0.5))
    again = by_way_of_json(averaged.state, averaged.state.config)
    assert again.state.dump()[0] == averaged.state.dump()[0]


def test_the_average_before_any_update_is_the_weights() -> None:
    (part,) = parts_of("sgd", 1, 0)
    current = Version(weights=torch.randn(P), statistics=torch.ones(2, F))
    state = PartitionState(part, config_of("sgd", average_decay=0.9), current)
    assert torch.equal(state.vectors.scored.weights, current.weights)
    assert torch.equal(state.vectors.scored.statistics, current.statistics)

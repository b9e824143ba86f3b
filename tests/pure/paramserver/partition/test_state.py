"""Exactly once: any sequence of pushes, against an oracle that applies the distinct ones."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.messages import Outcome
from downpour.paramserver.partition.applied_set import APPLIED, REFUSED, WAITING
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Version
from downpour.paramserver.rules.policy import StalenessPolicy
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import SGD, Adagrad, Momentum, Nesterov, Regulariser, Rule
from tests.helpers.arrivals import (
    EPOCHS,
    EXACT,
    PARTITION,
    RATE,
    ROUGH,
    Bench,
    Event,
    F,
    Oracle,
    P,
    Q,
    arrival_of,
    by_way_of_json,
    deliver,
    events,
    everything,
)
from tests.helpers.close import assert_close

torch.set_num_threads(1)


@given(st.lists(events, max_size=30))
def test_each_mini_batch_counts_once_whatever_arrives(arrivals: list[Event]) -> None:
    bench, oracle = Bench(EXACT), Oracle()
    state = bench.state
    for event in arrivals:
        before, held = everything(state), state.current
        held_weights = held.weights.clone()
        expected = oracle.expect(event)
        assert deliver(bench, event) is expected

        assert torch.equal(held.weights, held_weights), "readers' version was written to"
        if expected is not Outcome.APPLIED:
            assert state.current is held
            after = everything(state)
            may_change = {"outcomes"}
            if expected in (Outcome.REFUSED_LOSS, Outcome.REFUSED_GRADIENT):
                may_change |= {"applied", f"applied.{event.epoch}", "refusals"}
            changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
            assert changed <= may_change
        assert torch.equal(state.current.weights, oracle.weights)
        assert state.version == oracle.version
        for epoch in range(EPOCHS):
            expected_flags = [oracle.settled.get((epoch, b), WAITING) for b in range(Q)]
            assert state.ledger.applied.flags(epoch).tolist() == expected_flags
        state.check()
    settled = list(oracle.settled.values())
    assert state.ledger.examples == 4 * settled.count(APPLIED)
    assert state.ledger.counts()["batches_applied"] == settled.count(APPLIED)
    assert state.ledger.counts()["refused"] == settled.count(REFUSED)
    assert sum(state.ledger.outcomes.values()) == len(arrivals)


@pytest.mark.parametrize("rule", [SGD(), Momentum(), Nesterov(), Adagrad()])
@given(arrivals=st.lists(events, max_size=25))
def test_noise_leaves_the_very_bits_of_a_run_without_it(rule: Rule, arrivals: list[Event]) -> None:
    config = replace(ROUGH, rule=rule)
    noisy, quiet = Bench(config), Bench(config)
    for event in arrivals:
        if deliver(noisy, event) is Outcome.APPLIED:
            assert deliver(quiet, event) is Outcome.APPLIED
    ours, clean = everything(noisy.state), everything(quiet.state)
    kept = {"weights", "statistics", "ledger", "version", "examples"}
    for name in ours:
        if name in kept or name.startswith("rule."):
            assert ours[name] == clean[name], name
    noisy.state.check()
    quiet.state.check()


@pytest.mark.parametrize("rule", [SGD(), Momentum(), Nesterov(), Adagrad()])
@given(groups=st.lists(st.lists(events, min_size=1, max_size=5), max_size=6))
@example(groups=[[Event(e, (b,), "none", 0, 0) for b in range(Q)] for e in range(EPOCHS)])
def test_pushes_taken_together_come_out_as_one_after_the_other(
    rule: Rule, groups: list[list[Event]]
) -> None:
    config = replace(ROUGH, rule=rule, policy=StalenessPolicy(staleness_policy="scale"))
    together, single = Bench(config), Bench(config)
    for group in groups:
        version, held = single.state.version, together.state.current
        held_weights = held.weights.clone()
        outcomes = [single.apply(*arrival_of(event, version)) for event in group]
        assert together.apply_all([arrival_of(event, version) for event in group]) == outcomes
        assert everything(together.state) == everything(single.state)
        assert torch.equal(held.weights, held_weights), "readers' version was written to"
        assert (together.state.current is not held) == (Outcome.APPLIED in outcomes)
    together.state.check()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(EXACT)
    yield bench
    bench.state.check()


def test_a_push_of_several_mini_batches_is_one_version(bench: Bench) -> None:
    event = Event(0, (4, 0, 2), "none", 0, 0)
    assert deliver(bench, event) is Outcome.APPLIED
    assert (bench.state.version, bench.state.ledger.examples) == (1, 12)
    assert torch.equal(bench.state.current.weights, -RATE * event.gradient)
    # Of its moments, all three count: the plain average, as no average has decayed yet.
    expected = event.moments[:, 1:].mean(0)
    assert_close(bench.state.current.statistics, expected)
    assert bench.state.vectors.statistics.recent.pooled().count.tolist() == [12.0] * F


def test_a_unit_partly_held_is_refused_whole_and_its_rest_still_waits(bench: Bench) -> None:
    assert deliver(bench, Event(0, (1,), "none", 0, 0)) is Outcome.APPLIED
    assert deliver(bench, Event(0, (0, 1, 2), "none", 0, 0)) is Outcome.REFUSED_MIXED
    assert bench.state.ledger.applied.flags(0).tolist() == [0, APPLIED, 0, 0, 0, 0]
    assert deliver(bench, Event(0, (0, 2), "none", 0, 0)) is Outcome.APPLIED


def test_a_refusal_settles_so_that_a_sound_repeat_comes_too_late(bench: Bench) -> None:
    assert deliver(bench, Event(0, (1,), "gradient", 0, 2)) is Outcome.REFUSED_GRADIENT
    assert deliver(bench, Event(0, (1,), "none", 0, 0)) is Outcome.DUPLICATE
    assert bench.state.ledger.refusals == {2: 1}
    assert bench.state.version == 0


def test_a_repeat_is_a_duplicate_even_where_it_is_not_finite(bench: Bench) -> None:
    deliver(bench, Event(0, (1,), "none", 0, 0))
    assert deliver(bench, Event(0, (1,), "loss", 0, 0)) is Outcome.DUPLICATE
    assert bench.state.ledger.refusals == {}


def test_the_same_index_in_another_epoch_is_another_mini_batch(bench: Bench) -> None:
    assert deliver(bench, Event(0, (1,), "none", 0, 0)) is Outcome.APPLIED
    assert deliver(bench, Event(1, (1,), "none", 0, 0)) is Outcome.APPLIED


def test_a_gradient_whose_sum_overflows_is_an_outlier(bench: Bench) -> None:
    event = Event(0, (1,), "none", 0, 0)
    push = replace(event.push, version=0)
    huge = torch.full((P,), 3e38)
    assert bench.apply(push, huge, event.moments) is Outcome.REFUSED_GRADIENT


def test_the_rate_follows_examples_applied_and_clipping_the_norm_pushed() -> None:
    config = replace(
        EXACT,
        schedule=Schedule(learning_rate=1.0, decay_factor=0.5, decay_epochs=1 / Q),
        regulariser=Regulariser(clip_norm=1.5),
    )
    bench = Bench(config)
    for n, batch in enumerate((3, 1)):
        before = bench.state.current.weights.clone()
        assert bench.state.ledger.rate() == 0.5**n
        event = Event(0, (batch,), "none", 0, 0)  # a norm of 3, as pushed
        deliver(bench, event)
        step = bench.state.current.weights - before
        assert torch.equal(step, -(0.5**n) * 0.5 * event.gradient)


@pytest.mark.parametrize("num_partitions", [2, 3])
def test_cut_into_partitions_the_weights_are_those_of_one(num_partitions: int) -> None:
    total, features = 64, 5
    model = {"num_parameters": total, "num_features": features, "num_decayed": 40}
    generator = torch.Generator().manual_seed(3)
    benches = {
        part: Bench(ROUGH, part)
        for n in (1, num_partitions)
        for part in split(**model, num_partitions=n)
    }
    for batch in range(Q):
        gradient = torch.randn(total, generator=generator)
        moments = torch.rand(1, 3, features, generator=generator) + 4
        push = replace(Event(0, (batch,), "none", 0, 0).push, version=batch)
        for part, bench in benches.items():
            mine = gradient[part.start : part.stop].clone()
            seen = moments[..., part.feature_start : part.feature_stop]
            assert bench.apply(push, mine, seen) is Outcome.APPLIED
    whole, *parts = (bench.state.current for bench in benches.values())
    assert torch.equal(torch.cat([p.weights for p in parts]), whole.weights)
    assert torch.equal(torch.cat([p.statistics for p in parts], 1), whole.statistics)


def test_a_model_without_batch_normalization() -> None:
    (partition,) = split(num_parameters=P, num_features=0, num_decayed=0, num_partitions=1)
    bench = Bench(EXACT, partition)
    push = Event(0, (0,), "none", 0, 0).push
    assert bench.apply(push, torch.ones(P), torch.zeros(1, 3, 0)) is Outcome.APPLIED
    assert torch.equal(bench.state.current.weights, torch.full((P,), -RATE))
    assert everything(by_way_of_json(bench.state, EXACT).state) == everything(bench.state)


@pytest.mark.parametrize(("batches", "examples"), [(0, 5), (5, 0), (-1, 5)])
def test_an_epoch_of_nothing(batches: int, examples: int) -> None:
    with pytest.raises(BadConfiguration, match="give at least 1"):
        UpdateConfig(batches_per_epoch=batches, epoch_examples=examples)


def test_weights_of_another_length() -> None:
    short = Version(weights=torch.zeros(P - 1), statistics=torch.zeros(2, F))
    with pytest.raises(BadConfiguration, match="16 parameters"):
        PartitionState(PARTITION, EXACT, short)

"""Exactly once: any sequence of pushes, against an oracle that applies the distinct ones."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from downpour.paramserver.errors import BadConfiguration, BadSnapshot
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.applied_set import APPLIED, REFUSED, WAITING
from downpour.paramserver.partition.ranges import Partition, split
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Arrival, Version
from downpour.paramserver.rules.policy import StalenessPolicy
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.statistics import StatisticsRule
from downpour.paramserver.rules.update import SGD, Adagrad, Momentum, Nesterov, Regulariser, Rule

torch.set_num_threads(1)

P, F, Q, EPOCHS = 16, 3, 6, 2
RATE = 0.5
NAN, INF = math.nan, math.inf

(PARTITION,) = split(num_parameters=P, num_features=F, num_decayed=10, num_partitions=1)
# With this rate and gradients of small integers, every weight is exact in float32.
EXACT = UpdateConfig(
    rule=SGD(),
    schedule=Schedule(learning_rate=RATE),
    statistics=StatisticsRule(window=8),
    batches_per_epoch=Q,
    epoch_examples=4 * Q,
)
# And with this one, any change of order or state anywhere shows in the last bits.
ROUGH = UpdateConfig(
    rule=Momentum(momentum=0.9),
    regulariser=Regulariser(weight_decay=0.01, clip_norm=2.0),
    schedule=Schedule(learning_rate=0.1, decay_factor=0.9, warmup_epochs=1.0),
    statistics=StatisticsRule(decay=0.7, window=8),
    batches_per_epoch=Q,
    epoch_examples=4 * Q,
)


class Bench:
    """A state over a ring of slots, as the server keeps it, but in plain memory."""

    def __init__(self, config: UpdateConfig, partition: Partition = PARTITION) -> None:
        self.slots = [
            Version(
                weights=torch.zeros(partition.num_parameters),
                statistics=torch.zeros(2, partition.num_features),
            )
            for _ in range(3)
        ]
        self.state = PartitionState(partition, config, self.slots[0])

    def apply(self, push: Push, gradient: Tensor, moments: Tensor) -> Outcome:
        return self.apply_all([(push, gradient, moments)])[0]

    def apply_all(self, arrivals: list[Arrival]) -> list[Outcome]:
        at = next(i for i, slot in enumerate(self.slots) if slot is self.state.current)
        return self.state.apply_all(arrivals, lambda: self.slots[(at + 1) % 3])


def by_way_of_json(state: PartitionState, config: UpdateConfig) -> Bench:
    """A new bench that goes on from a snapshot of `state`."""
    meta, tensors = state.dump()
    bench = Bench(config, state.partition)
    bench.state.load(json.loads(json.dumps(meta)), {n: t.clone() for n, t in tensors.items()})
    return bench


def everything(state: PartitionState) -> dict[str, object]:
    """All that a snapshot holds, comparable."""
    meta, tensors = state.dump()
    return {**copy.deepcopy(meta), **{n: t.tolist() for n, t in tensors.items()}}


@dataclass(frozen=True)
class Event:
    """A push that arrives, and what is wrong with it."""

    epoch: int
    batches: tuple[int, ...]
    fault: str
    behind: int
    replica: int

    @property
    def push(self) -> Push:
        return Push(
            mailbox=0,
            replica=self.replica,
            epoch=self.epoch,
            batches=self.batches,
            examples=4 * len(self.batches),
            version=0,
            loss={"loss": NAN, "infinite loss": INF}.get(self.fault, 1.0),
            gradient_norm=NAN if self.fault == "norm" else 3.0,
        )

    @property
    def gradient(self) -> Tensor:
        return sum((gradient_of(self.epoch, b) for b in self.batches), torch.zeros(P))

    @property
    def moments(self) -> Tensor:
        return torch.stack([moments_of(self.epoch, b) for b in self.batches])

    def spoilt(self) -> tuple[Tensor, Tensor]:
        gradient, moments = self.gradient, self.moments
        if self.fault == "gradient":
            gradient[-1] = NAN
        elif self.fault == "opposite infinities":
            gradient[0], gradient[1] = INF, -INF
        elif self.fault == "moments":
            moments[-1, 2, -1] = INF
        return gradient, moments


def gradient_of(epoch: int, batch: int) -> Tensor:
    return (torch.arange(P) * (batch + 1) + 7 * epoch).remainder(5).float() - 2


def moments_of(epoch: int, batch: int) -> Tensor:
    row = torch.arange(F, dtype=torch.float32)
    return torch.stack([torch.full((F,), 4.0), row + batch - epoch, row * 0.5 + batch + 1])


FAULTS = ["loss", "infinite loss", "norm", "gradient", "opposite infinities", "moments"]
events = st.builds(
    Event,
    epoch=st.integers(0, EPOCHS - 1),
    batches=st.lists(st.integers(0, Q - 1), min_size=1, max_size=3, unique=True).map(tuple),
    fault=st.sampled_from(["none"] * 8 + FAULTS + ["of the future", "no such batch"]),
    behind=st.integers(0, 3),
    replica=st.integers(0, 2),
)


class Oracle:
    """What a sequential run would have made of the mini-batches that count."""

    def __init__(self) -> None:
        self.settled: dict[tuple[int, int], int] = {}
        self.weights = torch.zeros(P)
        self.version = 0

    def expect(self, event: Event) -> Outcome:
        if event.fault in ("of the future", "no such batch"):
            return Outcome.REFUSED_UNKNOWN
        names = [(event.epoch, b) for b in event.batches]
        held = [n for n in names if n in self.settled]
        if held:
            return Outcome.DUPLICATE if len(held) == len(names) else Outcome.REFUSED_MIXED
        if event.fault in FAULTS:
            self.settled |= dict.fromkeys(names, REFUSED)
            return Outcome.REFUSED_LOSS if "loss" in event.fault else Outcome.REFUSED_GRADIENT
        self.settled |= dict.fromkeys(names, APPLIED)
        for name in names:
            self.weights -= RATE * gradient_of(*name)
        self.version += 1
        return Outcome.APPLIED


def arrival_of(event: Event, version: int) -> Arrival:
    """What arrives at a partition that is at `version`, or a little beyond."""
    push = replace(event.push, version=max(0, version - event.behind))
    if event.fault == "of the future":
        push = replace(push, version=version + 1)
    if event.fault == "no such batch":
        push = replace(push, batches=(*push.batches[1:], Q))
    return push, *event.spoilt()


def deliver(bench: Bench, event: Event) -> Outcome:
    return bench.apply(*arrival_of(event, bench.state.version))


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


@pytest.mark.parametrize("rule", [SGD(), Momentum(), Nesterov(), Adagrad()])
@given(arrivals=st.lists(events, min_size=1, max_size=25), cut=st.integers(0, 25))
@example(arrivals=[Event(0, (b,), "none", 0, 0) for b in range(Q)], cut=Q)
def test_a_restart_from_a_snapshot_changes_no_bit(
    rule: Rule, arrivals: list[Event], cut: int
) -> None:
    config = replace(ROUGH, rule=rule)
    whole, first = Bench(config), Bench(config)
    outcomes = [deliver(whole, event) for event in arrivals]
    for event in arrivals[:cut]:
        deliver(first, event)
    second = by_way_of_json(first.state, config)
    assert everything(second.state) == everything(first.state)
    assert [deliver(second, event) for event in arrivals[cut:]] == outcomes[cut:]
    assert everything(second.state) == everything(whole.state)
    second.state.check()


@given(st.permutations([(0, b) for b in range(Q)]), st.integers(0, Q))
def test_a_restored_partition_takes_just_what_it_lost(
    order: list[tuple[int, int]], kept: int
) -> None:
    # The snapshot is older than the crash; afterwards everything is sent once more.
    bench = Bench(EXACT)
    for epoch, batch in order[:kept]:
        deliver(bench, Event(epoch, (batch,), "none", 0, 0))
    restored = by_way_of_json(bench.state, EXACT)
    outcomes = [deliver(restored, Event(e, (b,), "none", 0, 1)) for e, b in order]
    assert outcomes == [Outcome.DUPLICATE] * kept + [Outcome.APPLIED] * (Q - kept)
    total = sum((gradient_of(*name) for name in order), torch.zeros(P))
    assert torch.equal(restored.state.current.weights, -RATE * total)
    assert restored.state.ledger.applied.complete_epochs == (0,)


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
    torch.testing.assert_close(bench.state.current.statistics, expected)
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


class TestLoading:
    def used(self, config: UpdateConfig = ROUGH) -> PartitionState:
        bench = Bench(config)
        for batch in range(3):
            deliver(bench, Event(0, (batch,), "none", 0, 0))
        return bench.state

    def load(self, meta: dict[str, object], tensors: dict[str, Tensor]) -> str:
        """The message of the error that loading this gives."""
        with pytest.raises(BadSnapshot) as caught:
            Bench(ROUGH).state.load(meta, tensors)
        message = str(caught.value)
        assert "\n" not in message
        return message

    @pytest.mark.parametrize("rule", [SGD(), Adagrad()])
    def test_another_rule(self, rule: Rule) -> None:
        message = self.load(*self.used(replace(ROUGH, rule=rule)).dump())
        assert "resume with the rule" in message

    def test_another_batch_size(self) -> None:
        message = self.load(*self.used(replace(ROUGH, batches_per_epoch=Q + 1)).dump())
        assert f"{Q + 1} mini-batches, not {Q}" in message

    def test_anything_missing(self) -> None:
        meta, tensors = self.used().dump()
        for name in meta:
            assert "damaged" in self.load({k: v for k, v in meta.items() if k != name}, tensors)
        for name in tensors:
            if not name.startswith("rule."):
                self.load(meta, {k: t for k, t in tensors.items() if k != name})

    @pytest.mark.parametrize("value", [None, "x", -1, 1, [], {}, {"0": 1}, {"x": []}])
    def test_anything_of_another_kind(self, value: object) -> None:
        meta, tensors = self.used().dump()
        for name in meta:
            possible = {
                "refusals": [{}, {"0": 1}],
                "examples": [1],
                "mean_staleness": [1],
                "mean_norm": [1],
            }.get(name, [meta[name]])
            if value not in possible:
                self.load({**meta, name: value}, tensors)

    def test_tensors_of_another_shape_or_type(self) -> None:
        meta, tensors = self.used().dump()
        for name, tensor in tensors.items():
            self.load(meta, {**tensors, name: tensor.flatten()[:1]})
            if name not in ("applied.0", "ledger"):
                self.load(meta, {**tensors, name: tensor.double()})

    def test_weights_that_are_not_finite(self) -> None:
        meta, tensors = self.used().dump()
        tensors["weights"][3] = NAN
        assert "damaged" in self.load(meta, tensors)


@pytest.mark.parametrize(("batches", "examples"), [(0, 5), (5, 0), (-1, 5)])
def test_an_epoch_of_nothing(batches: int, examples: int) -> None:
    with pytest.raises(BadConfiguration, match="give at least 1"):
        UpdateConfig(batches_per_epoch=batches, epoch_examples=examples)


def test_weights_of_another_length() -> None:
    short = Version(weights=torch.zeros(P - 1), statistics=torch.zeros(2, F))
    with pytest.raises(BadConfiguration, match="16 parameters"):
        PartitionState(PARTITION, EXACT, short)

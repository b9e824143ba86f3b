"""Dumps and loads of a state: a restart changes no bit, and what no dump gave is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from downpour.paramserver.errors import BadSnapshot
from downpour.paramserver.messages import Outcome
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.rules.update import SGD, Adagrad, Momentum, Nesterov, Rule
from tests.helpers.arrivals import (
    EXACT,
    NAN,
    RATE,
    ROUGH,
    Bench,
    Event,
    P,
    Q,
    by_way_of_json,
    deliver,
    events,
    everything,
    gradient_of,
)

torch.set_num_threads(1)


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
            if name != "witness":  # which earlier releases had not
                assert "damaged" in self.load({k: v for k, v in meta.items() if k != name}, tensors)
        for name in tensors:
            if not name.startswith("rule.") and name != "by_feature":  # an older one lacks it
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
            if name not in ("applied.0", "ledger", "by_feature"):
                self.load(meta, {**tensors, name: tensor.double()})

    def test_weights_that_are_not_finite(self) -> None:
        meta, tensors = self.used().dump()
        tensors["weights"][3] = NAN
        assert "damaged" in self.load(meta, tensors)

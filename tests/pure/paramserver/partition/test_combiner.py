"""Synchronous rounds: what is added up, what is late, and when a round ends."""

import json
import math

import pytest
import torch
from torch import Tensor

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.messages import Outcome
from downpour.paramserver.rules.policy import StalenessPolicy
from downpour.paramserver.rules.statistics import BatchStatistics
from downpour.paramserver.rules.update import Momentum
from tests.helpers.close import assert_close
from tests.helpers.rounds import Bench, F, P, Q, config, moments_of, new_version, push

torch.set_num_threads(1)


def test_rounds_are_steps_on_the_mean_over_their_examples() -> None:
    bench = Bench(config(4))
    weights, rule = torch.zeros(P), Momentum(momentum=0.9)
    velocity, examples = rule.init(P), 0
    for batches in ([3, 1, 4, 0], [5, 9, 2, 6], [8, 7]):  # the last is closed by the epoch's end
        for n, batch in enumerate(batches):
            assert bench.state.weights_version == bench.state.version - n
            assert torch.equal(bench.state.current.weights, weights)
            assert bench.take(batch) is Outcome.APPLIED
        count = sum(bench.examples[b] for b in batches)
        total = sum(bench.examples[b] * bench.gradients[b] for b in batches)
        assert isinstance(total, Tensor)
        mean = total / count
        mean[:5] += 0.01 * weights[:5]
        rate = bench.config.schedule.rate(examples, bench.config.epoch_examples)
        new = torch.empty(P)
        rule.update(weights, mean, velocity, rate, new)
        weights, examples = new, examples + count
        assert_close(bench.state.current.weights, weights)
        assert bench.state.weights_version == bench.state.version
        weights = bench.state.current.weights.clone()  # so that roundings do not add up
        bench.state.check()
    assert bench.state.ledger.staleness.dump() == {0: [10]}


def test_moments_are_merged_when_the_round_ends_in_the_order_of_the_pushes() -> None:
    bench, order = Bench(config(3)), [2, 0, 7, 5, 1, 3]
    oracle = BatchStatistics(F, bench.config.statistics)
    found = new_version().statistics
    for n, batch in enumerate(order):
        before = bench.state.current.statistics.clone()
        bench.take(batch)
        oracle.update(found, moments_of(batch)[0], found)
        expected = found if n % 3 == 2 else before
        assert torch.equal(bench.state.current.statistics, expected)


def test_what_is_late_is_dropped_and_may_come_again() -> None:
    bench = Bench(config(2))
    assert [bench.take(b, 0) for b in (0, 1)] == [Outcome.APPLIED] * 2
    assert bench.take(2, 0) is Outcome.REFUSED_STALE
    assert bench.state.version == bench.state.weights_version == 2
    assert bench.take(2, 2) is Outcome.APPLIED
    assert bench.take(2, 2) is Outcome.DUPLICATE
    assert bench.state.version == 3
    assert bench.state.ledger.counts()["dropped"] == 1


def test_in_one_packet_what_comes_after_the_round_is_late() -> None:
    bench = Bench(config(2))
    arrivals = []
    for batch in range(5):
        gradient = bench.gradients[batch].clone()
        arrivals.append((push(batch, 0, gradient), gradient, moments_of(batch)))
    outcomes = bench.state.apply_all(arrivals, new_version)
    assert outcomes == [Outcome.APPLIED] * 2 + [Outcome.REFUSED_STALE] * 3


@pytest.mark.parametrize("last_is_refused", [False, True])
def test_the_last_round_is_closed_as_it_is(last_is_refused: bool) -> None:
    bench = Bench(config(4))
    for batch in range(Q - 1):
        bench.take(batch)
    before = bench.state.current.weights.clone()
    assert bench.state.weights_version == 8
    outcome = bench.take(Q - 1, loss=math.nan if last_is_refused else 1.0)
    assert (outcome is Outcome.REFUSED_LOSS) == last_is_refused
    assert bench.state.weights_version == bench.state.version == Q - last_is_refused
    assert not torch.equal(bench.state.current.weights, before)
    bench.state.check()


def test_a_restored_state_goes_on_in_the_middle_of_a_round_to_the_bit() -> None:
    bench = Bench(config(4))
    for batch in range(6):
        bench.take(batch)
    again = Bench(config(4))
    meta, tensors = bench.state.dump(bench.state.room())
    again.state.load(json.loads(json.dumps(meta)), {n: t.clone() for n, t in tensors.items()})
    assert (again.state.version, again.state.weights_version) == (6, 4)
    for batch in range(6, Q):
        assert bench.take(batch) is again.take(batch) is Outcome.APPLIED
    other = again.state.dump()[1]
    for name, tensor in bench.state.dump()[1].items():
        assert torch.equal(tensor, other[name]), name


def test_a_round_that_is_longer_than_rounds_are_now_is_closed() -> None:
    """The run is resumed with fewer slots."""
    bench = Bench(config(6))
    for batch in range(5):
        bench.take(batch)
    shorter = Bench(config(3))
    shorter.state.load(*bench.state.dump())
    assert shorter.state.weights_version == shorter.state.version == 5
    bench.state.close_round()
    assert torch.equal(shorter.state.current.weights, bench.state.current.weights)
    longer = Bench(config(9))
    longer.state.load(*bench.state.dump())
    for batch in range(5, Q):
        assert longer.take(batch) is Outcome.APPLIED
    assert longer.state.weights_version == Q


def test_a_round_has_at_least_one_push() -> None:
    with pytest.raises(BadConfiguration, match="round pushes is 0: give at least 1, or none"):
        StalenessPolicy(staleness_policy="synchronous", round_pushes=0)

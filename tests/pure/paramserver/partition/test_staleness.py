"""Staleness: exact counts, percentiles as numpy has them, and scripted orders of arrival."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.staleness import (
    EXACT,
    PER_OCTAVE,
    Histogram,
    StalenessRecord,
    bin_of,
    lower_edge,
)
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Version

torch.set_num_threads(1)

observations = st.lists(st.integers(0, 60), max_size=80)


def histogram(values: list[int]) -> Histogram:
    found = Histogram()
    for value in values:
        found.add(value)
    return found


class TestHistogram:
    @given(observations.filter(bool), st.sampled_from([0.01, 0.15, 0.5, 0.85, 0.99, 1.0]))
    def test_percentiles_are_numpys_inverse_of_the_distribution(
        self, values: list[int], share: float
    ) -> None:
        expected = np.percentile(values, 100 * share, method="inverted_cdf")
        assert histogram(values).percentile(share) == expected

    @given(observations.filter(bool))
    def test_summary(self, values: list[int]) -> None:
        summary = histogram(values).summary()
        assert summary["mean"] == pytest.approx(np.mean(values))
        assert summary["max"] == max(values)
        assert summary["p50"] == np.percentile(values, 50, method="inverted_cdf")
        assert summary["p99"] == np.percentile(values, 99, method="inverted_cdf")

    @given(observations, observations)
    def test_merge_is_the_histogram_of_both(self, a: list[int], b: list[int]) -> None:
        left, right = histogram(a), histogram(b)
        merged = left.merge(right)
        assert merged.counts.tolist() == np.bincount(a + b, minlength=0).tolist()
        assert merged.total == len(a) + len(b)
        assert (left.total, right.total) == (len(a), len(b)), "an operand was changed"

    def test_empty(self) -> None:
        assert Histogram().summary() == {"mean": 0, "p50": 0, "p99": 0, "max": 0}
        assert Histogram().percentile(0.5) == 0
        assert Histogram().total == 0

    def test_no_staleness_is_negative(self) -> None:
        with pytest.raises(AssertionError):
            Histogram([1]).add(-1)


class TestBins:
    @given(st.integers(0, 2**62))
    def test_a_value_lies_in_its_bin(self, value: int) -> None:
        index = bin_of(value)
        assert lower_edge(index) <= value < lower_edge(index + 1)

    def test_they_follow_on_each_other_and_are_narrow(self) -> None:
        edges = [lower_edge(i) for i in range(bin_of(1 << 40))]
        assert edges[: EXACT + 1] == list(range(EXACT + 1))
        widths = np.diff(edges)
        assert (widths > 0).all()
        assert (widths[EXACT:] * PER_OCTAVE <= edges[EXACT:-1]).all()

    def test_a_pause_of_an_hour_costs_a_bin_and_not_a_list_of_its_length(self) -> None:
        record = StalenessRecord()
        for _ in range(100):
            record.add(0, 3)
        record.add(0, 3_600_000)
        dumped = json.dumps(record.dump())
        assert len(dumped) < 10_000
        summary = record.of(0).summary()
        assert summary["p50"] == summary["p99"] == 3
        assert summary["max"] == pytest.approx(3_600_000, rel=1 / PER_OCTAVE)
        assert summary["mean"] == pytest.approx((300 + 3_600_000) / 101, rel=1 / PER_OCTAVE)
        assert record.of(0).bars[0] == (3, 100)
        assert record.of(0).total == 101

    @given(st.lists(st.integers(0, 10**7), min_size=1, max_size=50), st.sampled_from([0.5, 0.99]))
    def test_percentiles_are_true_to_a_bin(self, values: list[int], share: float) -> None:
        exact = np.percentile(values, 100 * share, method="inverted_cdf")
        found = histogram(values).percentile(share)
        assert exact <= found <= exact * (1 + 1 / PER_OCTAVE)

    def test_counts_of_each_value_as_old_snapshots_hold_them_are_taken(self) -> None:
        values = [0, 1, 1, EXACT - 1, EXACT, 5000, 5001, 70_000]
        old = np.bincount(values).tolist()
        record = StalenessRecord()
        record.load_values({2: old})
        assert record.dump() == {2: histogram(values).counts.tolist()}


class Script:
    """Replicas that pull and push in an order that a test writes down."""

    def __init__(self) -> None:
        (partition,) = split(num_parameters=16, num_features=0, num_decayed=0, num_partitions=1)
        self.slots = [
            Version(weights=torch.zeros(16), statistics=torch.zeros(2, 0)) for _ in range(2)
        ]
        config = UpdateConfig(batches_per_epoch=1000, epoch_examples=1000)
        self.state = PartitionState(partition, config, self.slots[0])
        self.pulled: dict[tuple[int, int], int] = {}
        self.batch = 0

    def pull(self, replica: int, slot: int = 0) -> None:
        self.pulled[replica, slot] = self.state.version

    def push(self, replica: int, slot: int = 0, loss: float = 1.0) -> Outcome:
        push = Push(
            mailbox=0,
            replica=replica,
            epoch=0,
            batches=(self.batch,),
            examples=1,
            version=self.pulled[replica, slot],
            loss=loss,
            gradient_norm=1.0,
        )
        self.batch += 1
        into = self.slots[(self.state.version + 1) % 2]
        outcome = self.state.apply(push, torch.zeros(16), torch.zeros(1, 3, 0), lambda: into)
        self.state.check()
        return outcome

    def counts(self) -> dict[int, list[int]]:
        return self.state.ledger.staleness.dump()


class TestArrivals:
    def test_one_replica_one_step_is_never_stale(self) -> None:
        script = Script()
        for _ in range(5):
            script.pull(0)
            script.push(0)
        assert script.counts() == {0: [5]}

    def test_a_script(self) -> None:
        script = Script()
        for replica in (0, 1, 2):
            script.pull(replica)  # all pull version 0
        script.push(2)  # 0 -> 1: staleness 0
        script.pull(2)  # 1
        script.push(0)  # 1 -> 2: staleness 1
        script.push(2)  # 2 -> 3: pulled 1, staleness 1
        script.push(1)  # 3 -> 4: pulled 0, staleness 3
        script.pull(0)  # 4
        script.push(0)  # 4 -> 5: staleness 0
        script.push(1)  # 5 -> 6: pulled 0 still, staleness 5
        assert script.counts() == {0: [1, 1], 1: [0, 0, 0, 1, 0, 1], 2: [1, 1]}
        assert script.state.ledger.staleness.all().counts.tolist() == [2, 2, 0, 1, 0, 1]
        assert script.state.ledger.staleness.of(1).summary()["mean"] == 4
        assert script.state.ledger.staleness.of(9).total == 0

    def test_refusals_make_nobody_staler(self) -> None:
        script = Script()
        script.pull(0)
        script.pull(1)
        assert script.push(1, loss=float("nan")) is Outcome.REFUSED_LOSS
        assert script.push(0) is Outcome.APPLIED
        assert script.counts() == {0: [1]}

    def test_ten_replicas_of_five_slots_in_turn_settle_at_49(self) -> None:
        script = Script()
        turns = [(replica, slot) for slot in range(5) for replica in range(10)]
        for turn in turns:
            script.pull(*turn)
        for _ in range(4):
            for turn in turns:
                script.push(*turn)
                script.pull(*turn)
        whole = script.state.ledger.staleness.all()
        # The first round finds 0, 1, ... 49 pushes before it; from then on there are 49 always.
        assert whole.counts.tolist() == [1] * 49 + [1 + 3 * 50]


def test_dump_and_restore() -> None:
    record = StalenessRecord()
    for replica, staleness in ((3, 0), (3, 2), (1, 5), (3, 2)):
        record.add(replica, staleness)
    plain = json.loads(json.dumps(record.dump()))
    again = StalenessRecord({int(r): c for r, c in plain.items()})
    again.add(1, 5)
    record.add(1, 5)
    assert again.dump() == record.dump() == {1: [0, 0, 0, 0, 0, 2], 3: [1, 0, 2]}

"""The plan: each row once an epoch, no pair twice, windows in a row, the same in every version."""

from __future__ import annotations

import dataclasses
import time
import tracemalloc

import numpy as np
import pytest

from downpour.shuffler.errors import PlanError
from downpour.shuffler.plan import orders
from downpour.shuffler.plan.draws import uniforms
from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.pairs import count_pairs
from downpour.shuffler.plan.permutation import Permutation
from downpour.shuffler.plan.plan import Plan
from tests.helpers.plans import repeats


def epoch_rows(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    return plan.rows_of(epoch, np.arange(plan.num_batches))


def assert_each_row_once(plan: Plan, epoch: int) -> None:
    rows, lengths = epoch_rows(plan, epoch)
    assert (np.bincount(rows, minlength=plan.num_rows) == 1).all(), plan
    assert np.ptp(lengths) <= 1, plan
    assert lengths.max() == plan.num_groups <= plan.batch_size
    assert lengths.sum() == plan.num_rows
    least = -(-plan.num_rows // plan.batch_size)
    assert least <= plan.num_batches <= least + least // 6


def neighbours_bound(num_rows: int, batch_size: int) -> int:
    """The largest bound of the numbers of rows that differ by at most a tenth."""
    tenth, step = num_rows // 10, batch_size // 4
    near = range(max(batch_size, num_rows - tenth), num_rows + tenth + 1, step)
    return max(Plan(num_rows=n, batch_size=batch_size).max_epochs for n in near)


@pytest.mark.parametrize(
    "sizes",
    [
        range(32, 200),
        np.random.default_rng(0).integers(200, 2500, 200).tolist(),
        pytest.param(range(200, 2500), marks=pytest.mark.soak),
    ],
    ids=["few", "drawn", "all"],
)
def test_each_row_once_for_every_size_to_some_thousands(sizes):
    for num_rows in sizes:
        plan = Plan(num_rows=num_rows, seed=num_rows)
        assert_each_row_once(plan, plan.max_epochs - 1)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 60])
@pytest.mark.parametrize("past_bound", ["error", "rekey"])
def test_each_row_once_for_other_batch_sizes(batch_size, past_bound):
    for num_rows in range(batch_size, 400, 37 if past_bound == "rekey" else 3):
        plan = Plan(num_rows=num_rows, batch_size=batch_size, past_bound=past_bound)
        last = plan.max_epochs if past_bound == "rekey" else (plan.max_epochs or 1) - 1
        assert_each_row_once(plan, last or 0)


@pytest.mark.parametrize("power", [10, 14, 17])
@pytest.mark.parametrize("delta", [-1, 0, 1])
def test_each_row_once_around_powers_of_two(power, delta):
    for num_rows in (2**power + delta, 32 * (2 ** (power - 6) + delta)):
        plan = Plan(num_rows=num_rows, seed=1)
        assert_each_row_once(plan, plan.max_epochs - 1)


@pytest.mark.parametrize(
    ("num_rows", "batch_size"),
    [(12, 4), (13, 4), (45, 4), (47, 5), (50, 5), (52, 4), (60, 3), (99, 8), (100, 7), (150, 6)],
)
def test_no_pair_meets_twice(num_rows, batch_size):
    plan = Plan(num_rows=num_rows, batch_size=batch_size, seed=3)
    assert repeats(plan, plan.max_epochs) == 0


def meets_twice(q: int, batch_size: int, num_slopes: int) -> bool:
    """Whether some pair meets twice under the slopes [0, num_slopes), tried one by one."""
    groups = np.arange(batch_size)
    met = np.zeros((q * batch_size, q * batch_size), dtype=np.int64)
    for slope in range(num_slopes):
        for b in range(q):
            rows = groups * q + (b + slope * groups) % q
            met[np.ix_(rows, rows)] += 1
    np.fill_diagonal(met, 0)
    return bool(met.max() > 1)


@pytest.mark.parametrize("batch_size", [2, 3, 4, 6])
def test_the_bound_of_any_number_of_groups_is_exact(batch_size):
    """One epoch more repeats a pair, whatever q is; and it is never less than q / (B - 1)."""
    for q in range(1, 17):
        plan = Plan(num_rows=q * batch_size, batch_size=batch_size, version=1)
        bound = plan.max_epochs
        assert bound >= q / (batch_size - 1)
        assert not meets_twice(q, batch_size, bound)
        assert meets_twice(q, batch_size, bound + 1)


@pytest.mark.parametrize(
    "sizes",
    [
        [*range(32, 200, 10), *range(199, 1400, 298)],
        pytest.param(range(32, 1500), marks=pytest.mark.soak),
    ],
    ids=["some", "all"],
)
def test_no_pair_meets_twice_within_the_bound_and_one_does_past_it(sizes):
    """Counted row by row for batches of 8, whatever number of rows there is."""
    for num_rows in sizes:
        plan = Plan(num_rows=num_rows, batch_size=8, seed=num_rows, past_bound="error")
        found = count_pairs(plan, min(plan.max_epochs, 40))
        assert found.repeats == 0, num_rows
        assert found.meetings > 0
        if plan.max_epochs < 40:
            past = dataclasses.replace(plan, past_bound="rekey")
            assert count_pairs(past, 2 * plan.max_epochs).repeats > 0


@pytest.mark.parametrize("batch_size", [32, 128])
@pytest.mark.parametrize(
    "sizes",
    [range(500, 5001, 83), pytest.param(range(500, 5001), marks=pytest.mark.soak)],
    ids=["some", "all"],
)
def test_any_number_of_rows_has_about_the_bound_of_its_neighbours(sizes, batch_size):
    """Where B mini-batches can be had at all: before them no two epochs are free of repeats."""
    for rows in sizes:
        num_rows = rows * batch_size**2 // 1024
        plan = Plan(num_rows=num_rows, batch_size=batch_size)
        if num_rows >= batch_size**2:
            assert plan.max_epochs == plan.num_batches
            assert plan.max_epochs >= 0.75 * neighbours_bound(num_rows, batch_size)
            assert plan.num_groups >= 0.84 * batch_size
        assert plan.max_epochs >= Plan(num_rows=num_rows, version=1).max_epochs or batch_size > 32


def test_the_sizes_that_bear_the_recipes_50_epochs():
    """All from 1,505 rows on; counting alone rules out any below 1,500 or so."""
    bears = [Plan(num_rows=n).max_epochs >= 50 for n in range(500, 5001)]
    assert bears.index(True) == 1005
    assert all(bears[1005:])
    old = [Plan(num_rows=n, version=1).max_epochs >= 50 for n in range(500, 5001)]
    assert sum(old) < 0.25 * len(old)


@pytest.mark.parametrize("strategy", ["random", "within_shard", "buffer", "none"])
@pytest.mark.parametrize("num_rows", [32, 97, 500, 1001])
def test_every_strategy_has_each_row_once(strategy, num_rows):
    shards = (num_rows // 3, num_rows // 5, num_rows - num_rows // 3 - num_rows // 5)
    plan = Plan(
        num_rows=num_rows, batch_size=16, strategy=strategy, shard_rows=shards, buffer_rows=40
    )
    orders = []
    for epoch in (0, 1, 7):
        rows, lengths = epoch_rows(plan, epoch)
        assert (np.bincount(rows, minlength=num_rows) == 1).all()
        assert lengths.sum() == num_rows
        assert np.ptp(lengths) <= 1
        assert lengths.max() <= 16
        at = plan.num_batches // 2
        assert (plan.rows(epoch, at) == np.split(rows, np.cumsum(lengths))[at]).all()
        orders.append(rows.tolist())
        assert plan.window_order(epoch).tolist() == list(range(plan.num_windows))
    assert plan.max_epochs is None
    assert (orders[0] == orders[1]) == (strategy == "none")


def test_within_shard_keeps_shards_whole():
    plan = Plan(num_rows=90, batch_size=9, strategy="within_shard", shard_rows=(30, 40, 20))
    rows, _ = epoch_rows(plan, 3)
    shards = np.searchsorted([30, 70, 90], rows, side="right")
    assert (np.diff(shards) != 0).sum() == 2
    assert (np.diff(rows) != 1).sum() > 60


def test_a_buffer_holds_rows_back_as_a_queue_does():
    """Against the algorithm told one row at a time, with the same draws."""
    num_rows, capacity = 300, 17
    plan = Plan(num_rows=num_rows, batch_size=20, strategy="buffer", buffer_rows=capacity, seed=4)
    rows, _ = epoch_rows(plan, 2)
    key = stream_key(4, "buffer", 2)
    buffer, out = list(range(capacity)), []
    for step in range(num_rows - capacity):
        slot = int(uniforms(key, np.array([step]), 1)[0, 0] * capacity)
        out.append(buffer[slot])
        buffer[slot] = capacity + step
    assert rows[: len(out)].tolist() == out
    assert sorted(rows[len(out) :].tolist()) == sorted(buffer)


def test_next_windows_are_those_that_run_next():
    for strategy in ("pairwise", "random"):
        plan = Plan(num_rows=3200, batch_size=8, window_batches=30, strategy=strategy)
        order = [(e, w) for e in range(3) for w in plan.window_order(e).tolist()]
        for at in (0, 5, 13, 20):
            assert plan.next_windows(*order[at], 4) == order[at + 1 : at + 5]
    # One epoch of two windows.
    last = Plan(num_rows=64, batch_size=32, window_batches=1, past_bound="error")
    assert last.max_epochs == 1
    first, second = last.window_order(0).tolist()
    assert last.next_windows(0, first, 5) == [(0, second)]


def test_rekeyed_blocks_repeat_about_as_often_as_chance():
    plan = Plan(num_rows=240, batch_size=6, seed=5, past_bound="rekey")
    bound = plan.max_epochs
    seen = repeats(plan, 2 * bound)
    met_in_a_block = bound * plan.num_batches * 6 * 5 // 2
    pairs_in_different_groups = 40 * 40 * 6 * 5 // 2
    chance = met_in_a_block**2 / pairs_in_different_groups
    assert 0.8 * chance < seen < 1.2 * chance
    assert repeats(Plan(num_rows=240, batch_size=6, strategy="none"), 2) == 40 * 15


def test_slopes_of_a_block_are_all_different():
    plan = Plan(num_rows=3200, seed=8, past_bound="rekey")
    bound = plan.max_epochs
    assert bound == plan.num_batches == 101
    for block in range(3):
        slopes = [plan.slope(block * bound + i) for i in range(bound)]
        assert sorted(slopes) == list(range(bound))


def test_holes_are_the_end_of_the_last_group():
    plan = Plan(num_rows=103, batch_size=8, seed=1)  # q = 13: one hole, row 12 of group 7
    _, lengths = epoch_rows(plan, 1)
    assert (lengths == 7).sum() == 1
    short = plan.rows(1, int(np.flatnonzero(lengths == 7)[0]))
    assert (short // 13).tolist() == list(range(7))


def test_few_rows_spread_their_holes():
    plan = Plan(num_rows=33, batch_size=32)  # q = 2 and 31 holes
    _, lengths = epoch_rows(plan, 0)
    assert lengths.tolist() == [17, 16]
    assert Plan(num_rows=1, batch_size=1).rows(0, 0).tolist() == [0]
    assert Plan(num_rows=5, batch_size=5).rows(0, 0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_window_is_a_contiguous_run_in_each_group(epoch):
    plan = Plan(num_rows=3213, batch_size=32, seed=2, window_batches=16)
    q = plan.num_batches
    for window in range(plan.num_windows):
        batches = plan.window_batches_order(epoch, window)
        size = min(16, q - 16 * window)
        assert sorted(batches) == list(range(16 * window, 16 * window + size))
        rows, _ = plan.rows_of(epoch, batches)
        for group in range(31):
            offsets = np.sort(rows[rows // q == group] % q)
            gaps = np.diff(offsets, append=offsets[0] + q)
            assert len(offsets) == size
            assert (gaps != 1).sum() <= 1


def test_windows_and_batches_run_in_a_new_order_each_epoch():
    plan = Plan(num_rows=32 * 641, window_batches=65)
    orders = [plan.window_order(epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    insides = [plan.window_batches_order(epoch, 0).tolist() for epoch in range(2)]
    assert insides[0] != insides[1]
    assert insides[0] != sorted(insides[0])


def test_rows_of_agrees_with_rows():
    plan = Plan(num_rows=501, batch_size=8, seed=4, past_bound="rekey")
    for epoch in (0, 3, plan.max_epochs + 2):
        indices = [5, 0, 62, 62]
        rows, lengths = plan.rows_of(epoch, indices)
        parts = np.split(rows, np.cumsum(lengths)[:-1])
        for index, part in zip(indices, parts, strict=True):
            assert (plan.rows(epoch, index) == part).all()
            assert (np.diff(part) > 0).all()
    rows, lengths = plan.rows_of(0, [])
    assert rows.size == lengths.size == 0


def test_imagenet():
    plan = Plan(num_rows=1_281_167)
    assert plan.num_batches == 40_037  # a prime
    assert plan.max_epochs == 40_037
    assert Plan(num_rows=50_000).max_epochs == 1567  # CIFAR-10
    assert Plan(num_rows=50_000, version=1).max_epochs == 521
    assert Plan(num_rows=60_000).max_epochs == 1877  # MNIST


def test_a_billion_rows_take_no_memory():
    plan = Plan(num_rows=10**9)
    tracemalloc.start()
    plan.rows_of(5, plan.window_batches_order(5, 1234))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    assert len(plan.window_order(5)) == 488_282
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_golden_values():
    """Pinned: a changed plan would break the resumption of every run begun before."""
    options = {"num_rows": 103, "batch_size": 8, "seed": 11, "window_batches": 5}
    plan = Plan(**options, past_bound="rekey", version=1)
    assert [plan.slope(epoch) for epoch in range(4)] == [3, 4, 8, 2]
    assert plan.rows(1, 4).tolist() == [4, 21, 38, 42, 59, 76, 80, 97]
    assert plan.rows(15, 4).tolist() == [8, 23, 36, 45, 55, 75, 89, 96]
    assert plan.window_order(2).tolist() == [0, 1, 2]
    assert plan.window_batches_order(2, 1).tolist() == [6, 8, 7, 9, 5]


def test_golden_values_of_new_plans():
    plan = Plan(num_rows=1000, batch_size=8, seed=11, window_batches=5, past_bound="rekey")
    assert (plan.num_batches, plan.num_groups, plan.max_epochs) == (127, 8, 127)
    assert [plan.slope(epoch) for epoch in range(4)] == [65, 101, 105, 104]
    assert plan.rows(1, 4).tolist() == [4, 232, 333, 434, 535, 636, 864, 965]
    assert plan.rows(plan.max_epochs, 4).tolist() == [101, 218, 308, 473, 545, 748, 869, 914]


@pytest.mark.parametrize("version", [1, 2])
def test_rows_past_the_bound_are_taken_from_one_table_a_block(version, monkeypatch):
    """However many windows are asked for, each group is put in its order once a block."""
    plan = Plan(num_rows=2000, batch_size=50, seed=3, version=version, past_bound="rekey")
    plan.rows_of(plan.max_epochs, [0])

    def never(*_: object) -> None:
        raise AssertionError("a permutation was made again")

    monkeypatch.setattr(Permutation, "_walk", never)
    monkeypatch.setattr(orders, "mix64", never)
    monkeypatch.setattr(Plan, "slope", lambda self, epoch: 1)
    rows, _ = epoch_rows(plan, plan.max_epochs)
    assert (np.bincount(rows) == 1).all()


@pytest.mark.soak
@pytest.mark.parametrize(("num_rows", "batch_size"), [(10_000, 128), (60_000, 128), (60_000, 32)])
def test_rows_past_the_bound_take_at_most_twice_as_long(num_rows, batch_size):
    plan = Plan(num_rows=num_rows, batch_size=batch_size, past_bound="rekey")
    windows = np.array_split(np.arange(plan.num_batches), max(1, plan.num_batches // 64))

    def epoch_s(epoch: int) -> float:
        began_s = time.perf_counter()
        for batches in windows:
            plan.rows_of(epoch, batches)
        return time.perf_counter() - began_s

    own_s = min(epoch_s(0) for _ in range(9))
    assert min(epoch_s(block * plan.max_epochs) for block in range(1, 10)) < 2.2 * own_s


def test_what_is_told_of_a_run_past_the_bound():
    assert Plan(num_rows=1000).past_bound_line(37) is None
    assert Plan(num_rows=1000, past_bound="error").past_bound_line(50) is None
    told = Plan(num_rows=1000).past_bound_line(50)
    assert told.startswith("1,000 rows in mini-batches of 32 can be put together for 37 of the 50")
    assert "every 37 epochs the rows are re-randomised" in told
    assert "every epoch the rows" in Plan(num_rows=500).past_bound_line(2)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: Plan(num_rows=0), "num_rows=0"),
        (lambda: Plan(num_rows=10, batch_size=0), "batch_size=0"),
        (lambda: Plan(num_rows=10), "batch_size of 10 or less"),
        (lambda: Plan(num_rows=99, window_batches=0), "window_batches=0"),
        (lambda: Plan(num_rows=99, strategy="best"), "strategy='best'"),
        (lambda: Plan(num_rows=99, past_bound="stop"), "past_bound='stop'"),
        (lambda: Plan(num_rows=99, strategy="buffer", buffer_rows=0), "buffer_rows=0"),
        (lambda: Plan(num_rows=99, strategy="within_shard", shard_rows=(9, 9)), "shards of 18"),
        (lambda: Plan(num_rows=99).rows(0, 4), "an epoch of 99 rows has 4 mini-batches"),
        (lambda: Plan(num_rows=99).rows(-1, 0), "epoch=-1"),
        (lambda: Plan(num_rows=99, past_bound="error").rows(1, 0), "bound of 1 epochs"),
        (lambda: Plan(num_rows=99, past_bound="error").check_epochs(2), "--past-bound rekey"),
        (lambda: Plan(num_rows=10**6 + 1, batch_size=5000).check_epochs(2), "bound of 1 epochs"),
        (lambda: Plan(num_rows=99, version=3), "version=3"),
        (lambda: Plan(num_rows=99).check_epochs(-2), "epochs=-2"),
        (lambda: Plan(num_rows=99).window_batches_order(0, 1), "has 1 windows"),
    ],
)
def test_errors_name_the_value(action, message):
    with pytest.raises(PlanError, match=message) as error:
        action()
    assert "\n" not in str(error.value)


def test_no_bound_where_no_pair_is_promised_anything():
    Plan(num_rows=9, batch_size=1).check_epochs(10**6)
    Plan(num_rows=99, strategy="none").check_epochs(10**6)

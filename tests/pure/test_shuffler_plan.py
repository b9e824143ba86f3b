"""The plan: each row once an epoch, no pair twice, windows in a row, the same in every version."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from shuffler.errors import PlanError
from shuffler.plan import Plan


def epoch_rows(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    return plan.rows_of(epoch, np.arange(plan.num_batches))


def assert_each_row_once(plan: Plan, epoch: int) -> None:
    rows, lengths = epoch_rows(plan, epoch)
    assert (np.bincount(rows, minlength=plan.num_rows) == 1).all(), plan
    holes = plan.batch_size * plan.num_batches - plan.num_rows
    assert 0 <= holes < plan.batch_size
    if plan.num_batches >= holes:
        assert lengths.min() >= plan.batch_size - 1, plan
    assert lengths.max() <= plan.batch_size
    assert lengths.sum() == plan.num_rows


def repeats(plan: Plan, epochs: int) -> int:
    """Count the meetings of pairs that had met before, by brute force."""
    met = np.zeros((plan.num_rows, plan.num_rows), dtype=np.int64)
    for epoch in range(epochs):
        for index in range(plan.num_batches):
            rows = plan.rows(epoch, index)
            met[np.ix_(rows, rows)] += 1
    np.fill_diagonal(met, 0)
    return int(np.maximum(met - 1, 0).sum()) // 2


def test_each_row_once_for_every_size_to_some_thousands():
    for num_rows in range(32, 2500):
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


@pytest.mark.parametrize(("num_rows", "batch_size"), [(36, 4), (48, 4), (100, 5), (252, 7)])
def test_the_bound_is_met_where_the_arithmetic_allows(num_rows, batch_size):
    """With G the largest divisor of q below B, slopes 0 and q / G bring groups 0 and G together."""
    kwargs = {"num_rows": num_rows, "batch_size": batch_size, "seed": 3}
    q = Plan(**kwargs).num_batches
    divisor = max(d for d in range(1, batch_size) if q % d == 0)
    bound = Plan(**kwargs).max_epochs
    assert q // divisor == bound  # the sizes above are such that the two bounds agree
    slopes_past_bound = range(bound + 1)
    groups = np.arange(batch_size)
    met = np.zeros((q * batch_size, q * batch_size), dtype=np.int64)
    for slope in slopes_past_bound:
        for b in range(q):
            rows = groups * q + (b + slope * groups) % q
            met[np.ix_(rows, rows)] += 1
    np.fill_diagonal(met, 0)
    assert met.max() == 2
    assert repeats(Plan(**kwargs, past_bound="rekey"), bound) == 0


def test_rekeyed_blocks_repeat_about_as_often_as_chance():
    plan = Plan(num_rows=240, batch_size=6, seed=5, past_bound="rekey")
    bound = plan.max_epochs
    seen = repeats(plan, 2 * bound)
    met_in_a_block = bound * plan.num_batches * 6 * 5 // 2
    pairs_in_different_groups = 40 * 40 * 6 * 5 // 2
    chance = met_in_a_block**2 / pairs_in_different_groups
    assert 0.8 * chance < seen < 1.2 * chance
    assert repeats(Plan(num_rows=240, batch_size=6, strategy="fixed"), 2) == 40 * 15


def test_slopes_of_a_block_are_all_different():
    plan = Plan(num_rows=3200, seed=8, past_bound="rekey")
    bound = plan.max_epochs
    assert bound == 99 // 31 + 1 == 4
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
    plan = Plan(num_rows=32 * 640, window_batches=64)
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
    assert plan.num_batches == 40_037
    assert plan.max_epochs == 1_292


def test_a_billion_rows_take_no_memory():
    plan = Plan(num_rows=10**9)
    tracemalloc.start()
    plan.rows_of(5, plan.window_batches_order(5, 1234))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_golden_values():
    """Pinned: a changed plan would break the resumption of every run begun before."""
    plan = Plan(num_rows=103, batch_size=8, seed=11, window_batches=5, past_bound="rekey")
    assert [plan.slope(epoch) for epoch in range(4)] == [0, 1, 0, 1]
    assert plan.rows(1, 4).tolist() == [4, 18, 32, 46, 60, 74, 88, 102]
    assert plan.rows(5, 4).tolist() == [6, 13, 29, 40, 56, 66, 79, 94]
    assert plan.window_order(2).tolist() == [0, 1, 2]
    assert plan.window_batches_order(2, 1).tolist() == [6, 8, 7, 9, 5]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: Plan(num_rows=0), "num_rows=0"),
        (lambda: Plan(num_rows=10, batch_size=0), "batch_size=0"),
        (lambda: Plan(num_rows=10), "batch_size of 10 or less"),
        (lambda: Plan(num_rows=99, window_batches=0), "window_batches=0"),
        (lambda: Plan(num_rows=99, strategy="best"), "strategy='best'"),
        (lambda: Plan(num_rows=99, past_bound="stop"), "past_bound='stop'"),
        (lambda: Plan(num_rows=99).rows(0, 4), "an epoch of 99 rows has 4 mini-batches"),
        (lambda: Plan(num_rows=99).rows(-1, 0), "epoch=-1"),
        (lambda: Plan(num_rows=99).rows(1, 0), "bound of 1 epochs"),
        (lambda: Plan(num_rows=99).check_epochs(2), "past_bound='rekey'"),
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
    Plan(num_rows=99, strategy="fixed").check_epochs(10**6)

"""Pairs are counted right: against brute force, and for plans whose repeats are known."""

from __future__ import annotations

import numpy as np
import pytest

from downpour.shuffler.plan.pairs import count_pairs
from downpour.shuffler.plan.plan import Plan
from tests.helpers.plans import meetings, repeats


@pytest.mark.parametrize("strategy", ["pairwise", "random", "within_shard", "buffer", "none"])
def test_counts_equal_brute_force(strategy):
    plan = Plan(
        num_rows=203,
        batch_size=7,
        strategy=strategy,
        shard_rows=(50, 100, 53),
        buffer_rows=30,
        past_bound="rekey",
    )
    steps = []
    found = count_pairs(plan, 9, progress=lambda done, total: steps.append((done, total)))
    assert found.meetings == int(meetings(plan, 9).sum()) // 2
    assert found.repeats == repeats(plan, 9)
    assert steps[-1][0] == steps[-1][1] == len(steps)
    assert (found.repeats == 0) == (strategy == "pairwise")


def test_a_sample_of_rows_tells_about_all():
    plan = Plan(num_rows=2000, batch_size=20, strategy="random")
    whole, part = count_pairs(plan, 20), count_pairs(plan, 20, max_rows=800)
    assert part.rows == 800
    assert part.repeats / part.meetings == pytest.approx(whole.repeats / whole.meetings, rel=0.1)
    assert 0.95 < whole.times_chance < 1.05
    assert 0.9 < part.times_chance < 1.1


def test_no_pair_repeats_at_the_size_of_cifar10_for_50_epochs():
    """Of the rows that are drawn; all of them are counted by `downpour bench shuffle`."""
    found = count_pairs(Plan(num_rows=50_000, seed=9), 50, max_rows=2000)
    assert found.repeats == 0
    assert found.meetings > 50 * 2000 * 30
    assert found.chance > 30_000


def test_no_pair_repeats_at_the_size_of_imagenet_for_100_epochs():
    """The company of 600 rows in 100 epochs, through the arithmetic that says where a row is."""
    plan, epochs = Plan(num_rows=1_281_167, seed=4), 100
    q = plan.num_batches
    chosen = np.random.default_rng(0).choice(plan.num_rows, 600, replace=False)
    company = np.full((len(chosen), epochs, plan.batch_size), -1, dtype=np.int64)
    for epoch in range(epochs):
        batches = (chosen % q - plan.slope(epoch) * (chosen // q)) % q
        rows, lengths = plan.rows_of(epoch, batches)
        company[:, epoch][np.arange(plan.batch_size) < lengths[:, None]] = rows
    own = company == chosen[:, None, None]
    assert (own.sum(axis=2) == 1).all()  # each row is where it should be, once an epoch
    company[own] = -1
    others = np.sort(company.reshape(len(chosen), -1), axis=1)
    assert (others >= 0).sum() > 600 * 100 * 30
    assert not ((others[:, 1:] == others[:, :-1]) & (others[:, 1:] >= 0)).any()


def test_other_loaders_repeat_many_times_more_than_chance():
    shards = (1000,) * 20
    kwargs = {"num_rows": 20_000, "shard_rows": shards}
    times = {
        strategy: count_pairs(Plan(**kwargs, strategy=strategy), 6, max_rows=2000).times_chance
        for strategy in ("within_shard", "buffer", "random")
    }
    assert times["within_shard"] > 10
    assert times["buffer"] > 3
    assert 0.8 < times["random"] < 1.2

"""Every row once, for every size: too many of them for the pure tier."""

from __future__ import annotations

import numpy as np
import pytest

from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.permutation import Permutation
from downpour.shuffler.plan.plan import STRATEGIES, Plan

IMAGENET = 1_281_167
AROUND_POWERS = [2**k + d for k in range(2, 21) for d in (-1, 0, 1)]


def assert_once(values: np.ndarray, n: int) -> None:
    assert values.shape == (n,)
    assert (np.bincount(values, minlength=n) == 1).all(), n


def test_permutations():
    for n in [*range(1, 5001), *AROUND_POWERS, IMAGENET]:
        assert_once(Permutation(n, stream_key(7, "bijection", n)).order(), n)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_epochs(strategy):
    sizes = range(32, 5001) if strategy == "pairwise" else range(32, 5001, 61)
    for n in [*sizes, *(n for n in AROUND_POWERS if n >= 32), IMAGENET]:
        shards = (n // 2, n - n // 2) if strategy == "within_shard" else ()
        plan = Plan(num_rows=n, seed=n, strategy=strategy, shard_rows=shards)
        last = (plan.max_epochs or 10) - 1
        assert_once(plan.rows_of(last, np.arange(plan.num_batches))[0], n)

"""Across keys, ingest and plan together treat all rows alike: nothing is likelier than by chance.

Each test is at a level of 1 in 10,000: that often a perfect shuffle would fail it, over all keys.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.permutation import Permutation
from downpour.shuffler.plan.plan import Plan

ROWS, BATCH, KEYS = 203, 7, 1500
CLASS_ROWS = 60


def chi_squared_bound(degrees: int) -> float:
    """The 0.9999 quantile, by Wilson and Hilferty's cube (1931): right to a percent from 5 up."""
    z = 3.719
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.fixture(scope="module")
def epochs() -> list[tuple[np.ndarray, np.ndarray]]:
    """For each key, an epoch of source rows as mini-batches run, and the batches' lengths."""
    found = []
    for seed in range(KEYS):
        ingest = Permutation(ROWS, stream_key(seed, "ingest", "train"))
        plan = Plan(num_rows=ROWS, batch_size=BATCH, window_batches=4, seed=seed)
        epoch = seed % plan.max_epochs
        order = [
            batch
            for window in plan.window_order(epoch).tolist()
            for batch in plan.window_batches_order(epoch, window).tolist()
        ]
        rows, lengths = plan.rows_of(epoch, order)
        found.append((ingest.inverse(rows), lengths))
    return found


def test_a_rows_place_in_the_epoch(epochs):
    places = np.array([np.repeat(np.arange(len(n)), n)[np.argsort(rows)] for rows, n in epochs])
    num_batches = -(-ROWS // BATCH)
    expected = KEYS / num_batches
    for row in (0, 1, 100, ROWS - 1):
        counts = np.bincount(places[:, row], minlength=num_batches)
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < chi_squared_bound(num_batches - 1), row


def test_how_often_a_given_pair_meets(epochs):
    places = np.array([np.repeat(np.arange(len(n)), n)[np.argsort(rows)] for rows, n in epochs])
    lengths = epochs[0][1]
    share = (lengths * (lengths - 1)).sum() / (ROWS * (ROWS - 1))
    pairs = [(0, 1), (0, 202), (5, 34), (10, 39), (50, 51), (77, 150), (100, 101), (28, 29)]
    for a, b in pairs:  # neighbours, those a group apart, and others
        meetings = (places[:, a] == places[:, b]).sum()
        deviation = math.sqrt(KEYS * share * (1 - share))
        assert abs(meetings - KEYS * share) < 4.3 * deviation, (a, b)  # 8 pairs at 1 in 60,000
    sample = np.random.default_rng(0).integers(0, ROWS, (400, 2))
    sample = sample[sample[:, 0] != sample[:, 1]]
    meetings = (places[:, sample[:, 0]] == places[:, sample[:, 1]]).sum(axis=0)
    spread = ((meetings - KEYS * share) ** 2 / (KEYS * share * (1 - share))).sum()
    assert spread < chi_squared_bound(len(sample))


def test_class_counts_of_a_mini_batch(epochs):
    """The first CLASS_ROWS source rows are one class, as they lie in folders before ingest."""
    counts = np.zeros(BATCH + 1)
    for rows, lengths in epochs:
        whole = np.flatnonzero(lengths == BATCH)[:1]  # one of each key: they are independent
        start = int(lengths[: int(whole[0])].sum())
        counts[(rows[start : start + BATCH] < CLASS_ROWS).sum()] += 1
    expected = np.array(
        [
            KEYS
            * math.comb(CLASS_ROWS, k)
            * math.comb(ROWS - CLASS_ROWS, BATCH - k)
            / math.comb(ROWS, BATCH)
            for k in range(BATCH + 1)
        ]
    )
    kept = expected > 5
    counts = np.append(counts[kept], counts[~kept].sum())
    expected = np.append(expected[kept], expected[~kept].sum())
    assert ((counts - expected) ** 2 / expected).sum() < chi_squared_bound(len(counts) - 1)

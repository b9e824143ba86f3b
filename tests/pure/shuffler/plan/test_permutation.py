"""Permutations are bijections, uniform enough, invertible, and the same in every version."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from downpour.shuffler.errors import PlanError, ShufflerError
from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.permutation import Permutation

AROUND_POWERS = [2**k + d for k in (12, 15) for d in (-1, 0, 1)] + [2**18 + 1]


def is_bijection(order: np.ndarray, n: int) -> bool:
    return bool((np.bincount(order, minlength=n) == 1).all()) and order.shape == (n,)


@pytest.mark.parametrize(
    "sizes",
    [
        range(1, 140),
        np.random.default_rng(0).integers(140, 5000, 60).tolist(),
        AROUND_POWERS,
        pytest.param(range(140, 5000), marks=pytest.mark.soak),
    ],
    ids=["few", "drawn", "powers", "all"],
)
def test_bijection_and_inverse(sizes):
    for n in sizes:
        permutation = Permutation(n, stream_key(0, "test", n))
        order = permutation.order()
        assert is_bijection(order, n), n
        assert (permutation.inverse(order) == np.arange(n)).all(), n


@pytest.mark.parametrize("n", [2, 3, 64, 65, 128, 129, 1024, 1025])
def test_bijection_under_many_keys(n):
    assert all(is_bijection(Permutation(n, stream_key(n, "key", i)).order(), n) for i in range(40))


def test_any_shape_and_any_integers():
    permutation = Permutation(1000, 9)
    grid = np.array([[1, 2], [3, 999]], dtype=np.int32)
    assert (permutation.inverse(permutation.forward(grid)) == grid).all()
    assert permutation.forward(np.array([], dtype=np.int64)).shape == (0,)


def test_a_billion_rows_need_no_table():
    values = np.array([0, 1, 2**40 - 1])
    permutation = Permutation(2**40, 3)
    assert (permutation.inverse(permutation.forward(values)) == values).all()


def z_score(counts: np.ndarray, expected: float) -> float:
    """How many standard deviations chi-square lies above its mean."""
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return (chi_square - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("n", "samples"),
    [(4, 500), (5, 600), *(pytest.param(n, 12_000, marks=pytest.mark.soak) for n in (4, 5))],
)
def test_every_order_of_few_values_is_equally_likely(n, samples):
    seen = Counter(
        tuple(Permutation(n, stream_key(1, "uniform", i)).order().tolist()) for i in range(samples)
    )
    counts = np.array([seen[order] for order in itertools.permutations(range(n))])
    assert abs(z_score(counts, samples / len(counts))) < 4


@pytest.mark.parametrize("samples", [200, pytest.param(4000, marks=pytest.mark.soak)])
def test_distances_are_uniform(samples):
    """Neighbours land at every distance alike; three rounds fail this."""
    n = 80
    orders = [Permutation(n, stream_key(2, "pairs", i)).order() for i in range(samples)]
    pairs = np.stack(orders).reshape(-1, 2)  # no value is in two of them
    counts = np.bincount((pairs[:, 1] - pairs[:, 0]) % n, minlength=n)
    assert counts[0] == 0
    assert abs(z_score(counts[1:], len(pairs) / (n - 1))) < 4


def test_golden_values():
    """Pinned: a changed order would break the resumption of every run begun before."""
    assert Permutation(10, 1).order().tolist() == [1, 8, 9, 4, 5, 7, 2, 6, 3, 0]
    assert Permutation(100, 2**64 - 1).forward(np.arange(5)).tolist() == [32, 0, 40, 6, 68]
    assert Permutation(10**9, 7).forward(np.arange(3)).tolist() == [559375614, 491900190, 860155992]
    assert stream_key(0, "x") == 11285953847397826303
    assert stream_key(1, "windows", 2, "a") == 1885355121953717633


def test_stream_keys_differ_where_sums_collide():
    keys = {stream_key(seed, "epoch", epoch) for seed in range(30) for epoch in range(30)}
    assert len(keys) == 900
    assert stream_key(0, "a", "b1") != stream_key(0, "a", "b", 1)
    assert stream_key(0, "a", "1") != stream_key(0, "a", 1)
    assert stream_key(3, "a", np.int64(4)) == stream_key(3, "a", 4)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: Permutation(0, 0), "n=0"),
        (lambda: Permutation(2**62 + 1, 0), "cannot be permuted"),
        (lambda: Permutation(5, -1), "key=-1"),
        (lambda: Permutation(5, 0).forward(np.array([5])), r"not all in \[0, 5\)"),
        (lambda: Permutation(5, 0).inverse(np.array([-1])), r"not all in \[0, 5\)"),
    ],
)
def test_errors_name_the_value(action, message):
    with pytest.raises(PlanError, match=message):
        action()


def test_a_stream_needs_a_purpose_and_exact_parts():
    with pytest.raises(ShufflerError, match="purpose"):
        stream_key(0, "")
    with pytest.raises(ShufflerError, match="neither an integer nor a string"):
        stream_key(0, "a", 1.5)  # type: ignore[arg-type]

"""The two monoids of statistics, against NumPy over the values themselves."""

from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from downpour.models.batchnorm import BatchNorm
from downpour.models.errors import MomentsError
from downpour.models.moments import Moments, Population
from tests.helpers.close import assert_close

torch.set_num_threads(1)

FEATURES = 2
Batch = NDArray[np.float64]


def batches(min_rows: int, min_batches: int = 1) -> st.SearchStrategy[list[Batch]]:
    values = st.floats(-1e3, 1e3, width=32)
    batch = st.integers(min_rows, 6).flatmap(
        lambda m: hnp.arrays(np.float64, (m, FEATURES), elements=values)
    )
    return st.lists(batch, min_size=min_batches, max_size=5)


def moments_of(x: Batch) -> Moments:
    t = torch.from_numpy(x)
    variance = t.var(0) if len(x) > 1 else torch.full((FEATURES,), torch.nan)
    return Moments.from_batch(torch.full((FEATURES,), float(len(x))), t.mean(0), variance)


def population_of(x: Batch) -> Population:
    t = torch.from_numpy(x)
    return Population.from_batch(torch.full((FEATURES,), float(len(x))), t.mean(0), t.var(0))


def close(a: Moments, b: Moments) -> None:
    assert_close((a.count, a.mean, a.m2), (b.count, b.mean, b.m2), atol=1e-6, rtol=0)


class TestMoments:
    @given(batches(min_rows=1))
    def test_merged_are_those_of_the_concatenation(self, parts: list[Batch]) -> None:
        merged = reduce(Moments.merge, map(moments_of, parts), Moments.empty(FEATURES))
        everything = np.concatenate(parts)
        if len(everything) < 2:
            with pytest.raises(MomentsError, match="has 1 values"):
                merged.compute()
            return
        mean, variance = merged.compute()
        np.testing.assert_allclose(mean, everything.mean(0), atol=1e-9)
        np.testing.assert_allclose(variance, everything.var(0, ddof=1), atol=1e-6)

    @given(batches(min_rows=1, min_batches=3))
    def test_merge_is_associative_and_commutative(self, parts: list[Batch]) -> None:
        a, b, c = map(moments_of, parts[:3])
        close(a.merge(b).merge(c), a.merge(b.merge(c)))
        close(a.merge(b), b.merge(a))

    def test_empty_is_the_identity_to_the_bit(self) -> None:
        a = moments_of(np.random.default_rng(0).normal(3, 7, (5, FEATURES)))
        for b in (Moments.empty(FEATURES).merge(a), a.merge(Moments.empty(FEATURES))):
            assert torch.equal(b.mean, a.mean)
            assert torch.equal(b.m2, a.m2)
            assert torch.equal(b.count, a.count)

    def test_of_values_are_those_of_mini_batches_of_one(self) -> None:
        generator = torch.Generator().manual_seed(9)
        values = torch.rand(6, 3, generator=generator) + 1000
        there = torch.rand(6, 3, generator=generator) < 0.7
        there[:, 2] = False
        zeros = torch.zeros(3)
        one_by_one = reduce(
            Moments.merge,
            (Moments.from_batch(n.float(), x, zeros) for x, n in zip(values, there, strict=True)),
        )
        close(Moments.of_values(values, there), one_by_one)

    def test_does_not_cancel_far_from_zero(self) -> None:
        """E[x^2] - E[x]^2 has no correct digit left here."""
        x = 1e9 + np.random.default_rng(0).normal(size=(1000, FEATURES))
        merged = reduce(Moments.merge, map(moments_of, np.split(x, 10)))
        np.testing.assert_allclose(merged.compute()[1], x.var(0, ddof=1), rtol=1e-6)

    def test_takes_the_rows_of_a_layers_buffer(self) -> None:
        layer, buffer = BatchNorm(3), torch.full((3, 3), torch.nan)
        layer.bind(moments=buffer, statistics=torch.zeros(2, 3))
        x = torch.randn(4, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        merged = Moments.empty(3)
        for batch in x:
            layer(batch)
            merged = merged.merge(Moments.from_batch(*buffer))
        mean, variance = merged.compute()
        by_feature = x.double().permute(2, 0, 1, 3, 4).flatten(1)
        assert_close(mean, by_feature.mean(1), atol=1e-6, rtol=0)
        assert_close(variance, by_feature.var(1), atol=1e-6, rtol=0)

    def test_does_not_alias_its_source(self) -> None:
        mean = torch.ones(FEATURES, dtype=torch.float64)
        moments = Moments.from_batch(2 * mean, mean, mean)
        mean.zero_()
        assert moments.mean.all()

    def test_no_values_have_no_variance(self) -> None:
        with pytest.raises(MomentsError, match="merge a mini-batch first"):
            Moments.empty(FEATURES).compute()

    def test_other_number_of_features(self) -> None:
        with pytest.raises(MomentsError, match="2 and 3 features"):
            Moments.empty(2).merge(Moments.empty(3))


class TestPopulation:
    @given(batches(min_rows=2))
    def test_is_algorithm_2_for_each_mini_batch_alike(self, parts: list[Batch]) -> None:
        merged = reduce(Population.merge, map(population_of, parts), Population.empty(FEATURES))
        mean, variance = merged.compute()
        np.testing.assert_allclose(mean, np.mean([x.mean(0) for x in parts], 0), atol=1e-6)
        unbiased = [len(x) / (len(x) - 1) * x.var(0) for x in parts]
        np.testing.assert_allclose(variance, np.mean(unbiased, 0), atol=1e-6)

    def test_the_papers_correction_with_one_batch_size(self) -> None:
        """m/(m-1) * E_B[var_B], with biased variances, as Algorithm 2 writes it."""
        m, parts = 4, np.random.default_rng(0).normal(2, 3, (6, 4, FEATURES))
        variance = reduce(Population.merge, map(population_of, parts)).compute()[1]
        np.testing.assert_allclose(variance, m / (m - 1) * parts.var(1).mean(0))

    def test_merge_is_associative(self) -> None:
        a, b, c = map(population_of, np.random.default_rng(0).normal(2, 3, (3, 4, FEATURES)))
        left, right = a.merge(b).merge(c), a.merge(b.merge(c))
        assert_close(left.compute(), right.compute())
        assert left.num_batches == 3

    def test_leaves_out_the_variance_between_means_which_pooling_contains(self) -> None:
        k, m = 3, 4
        parts = np.random.default_rng(0).normal(size=(k, m, FEATURES))
        parts += np.arange(k)[:, None, None] * 10
        average = reduce(Population.merge, map(population_of, parts)).compute()[1]
        pooled = reduce(Moments.merge, map(moments_of, parts)).compute()[1]
        means = parts.mean(1)
        between = m * np.square(means - means.mean(0)).sum(0)
        np.testing.assert_allclose(
            pooled * (k * m - 1), average.numpy() * k * (m - 1) + between, rtol=1e-9
        )

    def test_of_several_at_once_are_one_after_the_other(self) -> None:
        generator = torch.Generator().manual_seed(8)
        moments = torch.rand(5, 3, 4, generator=generator)
        moments[:, 0] = torch.tensor([[8, 8, 0, 0], [3, 0, 0, 2], [4, 4, 4, 0], [2] * 4, [9] * 4])
        one_by_one = reduce(Population.merge, (Population.from_batch(*each) for each in moments))
        at_once = Population.from_batches(moments)
        assert at_once.num_batches == one_by_one.num_batches
        assert torch.equal(at_once.seen, one_by_one.seen)
        torch.testing.assert_close(at_once.mean, one_by_one.mean)
        torch.testing.assert_close(at_once.variance, one_by_one.variance)
        moments[2, 0, 1] = 1
        with pytest.raises(MomentsError, match="1 value"):
            Population.from_batches(moments)

    def test_errors(self) -> None:
        with pytest.raises(MomentsError, match="merge at least one"):
            Population.empty(FEATURES).compute()
        with pytest.raises(MomentsError, match="1 value in the mini-batch"):
            Population.from_batch(torch.ones(2), torch.ones(2), torch.ones(2))
        with pytest.raises(MomentsError, match="take both from the same model"):
            Population.empty(2).merge(Population.empty(3))

"""Statistics of activations over many mini-batches, as monoids: `empty`, `merge`, `compute`.

Two estimators of the population that differ in what they call its variance:

- `Moments` pools: it is exactly the mean and variance of all values seen, as if of one batch.
- `Population` averages: Algorithm 2's `E_B[mu_B]` and `E_B[m/(m-1)*var_B]`.

The pooled variance contains the variance *between* the means of the mini-batches, and the
average leaves it out. For k mini-batches of m values, with sums of squares::

    pooled = (sum_B m2_B + m*sum_B (mu_B - mean)^2) / (k*m - 1)
    Algorithm 2 = (sum_B m2_B) / (k*(m - 1))

For independent values both are unbiased and estimate the same number. They part where the means
of mini-batches vary by more than `variance/m`: values that are correlated, as positions of one
image are (section 3.2), mini-batches that are not shuffled well, or moments gathered while the
weights change. Then pooled is the larger; with the weights frozen it is also the more accurate.

Not here: moving averages by applied updates, which the server keeps.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from downpour.models.errors import MomentsError


def _row(values: Tensor) -> Tensor:
    """A float64 copy, detached, on the CPU."""
    return values.detach().to("cpu", torch.float64, copy=True)


def _same_length(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise MomentsError(
            f"statistics of {a.shape[0]} and {b.shape[0]} features cannot be merged: "
            "take both from the same model"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations per feature: pooled statistics.

    float64 and merged by Chan's formula (Chan, Golub & LeVeque 1979), so that nothing cancels
    as `E[x^2] - E[x]^2` does. `merge` is associative and commutative to rounding, and `empty` is
    its identity exactly.
    """

    count: Tensor
    """`[F]`: the values seen of each feature."""
    mean: Tensor
    """`[F]`: their mean, 0 where there are none."""
    m2: Tensor
    """`[F]`: their sum of `(x - mean)^2`."""

    @classmethod
    def empty(cls, num_features: int) -> Self:
        """Of no values at all."""
        zeros = torch.zeros(num_features, dtype=torch.float64)
        return cls(count=zeros, mean=zeros, m2=zeros)

    @classmethod
    def from_batch(cls, count: Tensor, mean: Tensor, unbiased_variance: Tensor) -> Self:
        """Of one mini-batch; each argument is `[F]`.

        The rows of a moments buffer come in this order: `Moments.from_batch(*buffer)`. Where the
        count is 0 the mean is not read, nor the variance where it is 0 or 1.
        """
        n, zero = _row(count), torch.zeros((), dtype=torch.float64)
        return cls(
            count=n,
            mean=torch.where(n > 0, _row(mean), zero),
            m2=torch.where(n > 1, _row(unbiased_variance) * (n - 1), zero),
        )

    @classmethod
    def of_values(cls, values: Tensor, there: Tensor) -> Self:
        """Of k values of each feature, `[k, F]`; those that are not `there`, bool, are not read."""
        x = torch.where(there, _row(values), torch.zeros((), dtype=torch.float64))
        count = there.sum(0).double()
        mean = x.sum(0) / count.clamp(min=1)
        deviations = torch.where(there, x - mean, torch.zeros((), dtype=torch.float64))
        return cls(count=count, mean=mean, m2=deviations.square().sum(0))

    def merge(self, other: "Moments") -> "Moments":
        """Of the values of both, by Chan's formula.

        ::

        n    = n_a + n_b                delta = mean_b - mean_a
        mean = mean_a + delta*n_b/n     m2    = m2_a + m2_b + delta^2*n_a*n_b/n
        """
        _same_length(self.count, other.count)
        n = self.count + other.count
        share = other.count / n.clamp(min=1)
        delta = other.mean - self.mean
        return Moments(
            count=n,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta.square() * self.count * share,
        )

    def compute(self) -> tuple[Tensor, Tensor]:
        """`(mean, unbiased variance)`, each float64 `[F]`; the variance is `m2/(count - 1)`.

        Raises `MomentsError` if a feature has fewer than 2 values.
        """
        if bool((self.count < 2).any()):
            raise MomentsError(
                f"a feature has {int(self.count.min())} values: "
                "a variance takes 2 or more, merge a mini-batch first"
            )
        return self.mean.clone(), self.m2 / (self.count - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Population:
    """Algorithm 2's population statistics: plain averages over training mini-batches.

    `E[x] = E_B[mu_B]` and `Var[x] = m/(m-1) * E_B[var_B]`, with the network frozen. Each
    mini-batch weighs the same. m/(m-1) times the biased variance is the unbiased one, so the
    average is over unbiased variances; this also says what to do where m varies, which the
    paper leaves open. See the module's docstring for how it differs from `Moments`.
    """

    num_batches: int
    """The mini-batches averaged over."""
    seen: Tensor
    """float64 `[F]`: of these, those that had values of the feature."""
    mean: Tensor
    """float64 `[F]`: the average of their means."""
    variance: Tensor
    """float64 `[F]`: the average of their unbiased variances."""

    @classmethod
    def empty(cls, num_features: int) -> Self:
        """Of no mini-batches."""
        zeros = torch.zeros(num_features, dtype=torch.float64)
        return cls(num_batches=0, seen=zeros, mean=zeros, variance=zeros)

    @classmethod
    def from_batch(cls, count: Tensor, mean: Tensor, unbiased_variance: Tensor) -> Self:
        """Of one mini-batch; each argument is `[F]`, so `Population.from_batch(*buffer)`.

        Where the count is 0 the mini-batch says nothing of the feature: a layer was skipped, or it
        is frozen. Raises `MomentsError` where it is 1, since one value has no variance to average.
        """
        return cls.from_batches(torch.stack([count, mean, unbiased_variance])[None])

    @classmethod
    def from_batches(cls, moments: Tensor) -> Self:
        """Of k mini-batches' moments, `[k, 3, F]`; as one after the other, merged."""
        count, mean, unbiased_variance = _row(moments).unbind(1)
        if bool((count == 1).any()):
            raise MomentsError(
                "a feature has 1 value in the mini-batch: Algorithm 2 takes mini-batches of 2 or "
                "more"
            )
        there = count > 0
        seen = there.sum(0).double()
        zero, least = torch.zeros((), dtype=torch.float64), seen.clamp(min=1)
        return cls(
            num_batches=len(moments),
            seen=seen,
            mean=torch.where(there, mean, zero).sum(0) / least,
            variance=torch.where(there, unbiased_variance, zero).sum(0) / least,
        )

    def merge(self, other: "Population") -> "Population":
        """Over the mini-batches of both."""
        _same_length(self.mean, other.mean)
        seen = self.seen + other.seen
        share = other.seen / seen.clamp(min=1)
        return Population(
            num_batches=self.num_batches + other.num_batches,
            seen=seen,
            mean=self.mean + (other.mean - self.mean) * share,
            variance=self.variance + (other.variance - self.variance) * share,
        )

    def compute(self, otherwise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`(E[x], Var[x])`, each float64 `[F]`.

        `otherwise`, `[2, F]`, holds for features that no mini-batch had values of. Raises
        `MomentsError` if there was no mini-batch, or, without `otherwise`, none for a feature.

        `torch.stack(population.compute()).float()` is a `statistics` buffer, `[2, F]`.
        """
        if self.num_batches == 0:
            raise MomentsError("no mini-batch was averaged: merge at least one")
        missing = self.seen == 0
        if not bool(missing.any()):
            return self.mean.clone(), self.variance.clone()
        if otherwise is None:
            raise MomentsError(
                f"{int(missing.sum())} features had no values in {self.num_batches} mini-batches: "
                "merge one in which every layer takes part"
            )
        mean, variance = otherwise.to(self.mean)
        return torch.where(missing, mean, self.mean), torch.where(missing, variance, self.variance)

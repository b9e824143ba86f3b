"""Algorithm 2 against PyTorch's own batch normalization, and when it has seen enough."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from downpour.models.errors import MomentsError
from downpour.models.flat import FlatModel
from downpour.models.moments import Moments, Population
from downpour.workers.evaluation.disagreement import disagreement
from downpour.workers.evaluation.evaluator import (
    LEAST_BATCHES,
    estimate_population,
    population_statistics,
    standard_error,
)
from downpour.workers.evaluation.joint_moments import MOST_TOGETHER
from tests.helpers import networks
from tests.helpers.close import assert_close


def torchs_own(module: nn.Module) -> nn.Module:
    """The network with PyTorch's batch normalization in place of ours, and the same weights."""
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if type(child).__name__ == "BatchNorm":
                planes = any(isinstance(m, nn.Conv2d) for m in owner.children())
                kind = nn.BatchNorm2d if planes else nn.BatchNorm1d
                theirs = kind(child.num_features, eps=child.eps, momentum=None)
                theirs.weight, theirs.bias = child.weight, child.bias  # type: ignore[assignment]
                setattr(owner, name, theirs)
    return module


@pytest.mark.parametrize("name", ["mnist-bn", "images"])
def test_recomputed_statistics_are_torchs_over_the_same_mini_batches(name: str) -> None:
    """Of `momentum=None`: the plain mean over mini-batches, of unbiased variances."""
    batches = networks.batches(name, (6, 6, 9, 4, 6))
    model = FlatModel(networks.build(name))
    found = population_statistics(model, batches)
    theirs = torchs_own(networks.build(name)).train()
    with torch.no_grad():
        for inputs, _ in batches:
            theirs(inputs)
    layers = [m for m in theirs.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert layers
    mean = torch.cat([layer.running_mean for layer in layers])  # type: ignore[misc]
    variance = torch.cat([layer.running_var for layer in layers])  # type: ignore[misc]
    assert_close(found, torch.stack([mean, variance]), rtol=1e-5, atol=1e-6)
    assert not model.module.training


def endless(model: FlatModel, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    while True:
        yield torch.randn(size, 6, generator=generator), torch.zeros(size, dtype=torch.int64)


def test_it_ends_once_the_estimate_is_good_enough() -> None:
    model = FlatModel(networks.build("mnist-bn"))
    rough = estimate_population(model, endless(model), precision=0.05)
    fine = estimate_population(model, endless(model), precision=0.02)
    assert LEAST_BATCHES <= rough.num_batches < fine.num_batches
    assert rough.standard_error <= 0.05
    assert fine.standard_error <= 0.02
    # A standard error falls with the square root of the number of mini-batches.
    assert fine.num_batches == pytest.approx(6.25 * rough.num_batches, rel=0.5)
    whole = population_statistics(model, itertools.islice(endless(model), 400))
    assert disagreement(fine.statistics, whole) < 3 * 0.02
    assert disagreement(rough.statistics, whole) < 3 * 0.05


def test_it_ends_when_its_time_is_over() -> None:
    model = FlatModel(networks.build("mnist-bn"))
    clock = itertools.count(0.0, 1.0)
    found = estimate_population(model, endless(model), most_s=20.0, clock=lambda: next(clock))
    # It looks once a pass from the least on, and the 20th look is the first that is too late.
    assert found.num_batches == LEAST_BATCHES + 19 * MOST_TOGETHER


def test_the_standard_error_is_what_independent_values_have() -> None:
    """m standard normal values a mini-batch: means vary by 1/m, variances by 2/(m - 1)."""
    k, m, eps = 1000, 32, 1e-5
    values = torch.randn(k, m, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    population, between = Population.empty(3), Moments.empty(6)
    for batch in values:
        mean, variance = batch.mean(0), batch.var(0)
        population = population.merge(
            Population.from_batch(torch.full((3,), float(m)), mean, variance)
        )
        both = torch.cat([mean, variance])
        between = between.merge(Moments.from_batch(torch.ones(6), both, torch.zeros(6)))
    expected = math.sqrt((1 / m + 2 / (m - 1) / 4) / k)
    assert standard_error(population, between, eps) == pytest.approx(expected, rel=0.06)


def test_mini_batches_that_are_not_finite_are_left_out() -> None:
    batches = networks.batches("mnist-bn", (6, 6, 6))
    poisoned = (torch.full((6, 6), math.nan), batches[0][1])
    model = FlatModel(networks.build("mnist-bn"))
    clean = population_statistics(model, batches)
    found = population_statistics(model, [batches[0], poisoned, *batches[1:]])
    torch.testing.assert_close(found, clean, rtol=1e-5, atol=1e-6)
    with pytest.raises(MomentsError, match="no mini-batch"):
        population_statistics(model, [poisoned] * 10)

"""Moments of mini-batches that go through a network together: those of each by itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from downpour.models.flat import FlatModel
from downpour.models.layers import LinearBN
from downpour.workers.evaluation.joint_moments import JOINED_BYTES, MOST_TOGETHER, JointMoments
from downpour.workers.evaluation.joint_moments import groups as groups_of
from tests.helpers import networks


class Mixing(nn.Module):
    """Looks at other rows of the mini-batch, in a way that is not batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LinearBN(6, 5)
        self.second = LinearBN(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z: Tensor = self.second(y * y.amax(0))
        return z


class Noisy(nn.Module):
    """Draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LinearBN(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x + torch.rand(()))
        return y


class Counting(nn.Module):
    """Counts how often its network is run."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        y: Tensor = self.inner(x)
        return y


def one_by_one(model: FlatModel, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Float32 [number, 3, F]."""
    found = []
    for inputs, _ in batches:
        model.module(inputs)
        found.append(model.moments.clone())
    return torch.stack(found)


SIZES = (8,) * (2 * MOST_TOGETHER + 3) + (5, 5, 9)


@torch.no_grad()
def test_moments_are_those_of_each_mini_batch_by_itself() -> None:
    batches = networks.batches("mnist-bn", SIZES)
    module = Counting(networks.build("mnist-bn"))
    model = FlatModel(module)
    model.module.train()
    expected = one_by_one(model, batches)
    before, buffer, statistics = module.runs, model.moments, model.statistics
    passes = JointMoments(model)
    found = list(passes.of(batches))
    assert [len(part) for part in found] == [MOST_TOGETHER, MOST_TOGETHER, 3, 2, 1]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5)
    # The first are run one by one, too, to see whether joining is right.
    assert module.runs - before == MOST_TOGETHER + 5
    assert model.moments is buffer
    assert model.statistics is statistics
    again = list(passes.of(batches))
    torch.testing.assert_close(torch.cat(again), expected, rtol=1e-4, atol=1e-5)
    assert module.runs - before == MOST_TOGETHER + 10


@torch.no_grad()
@pytest.mark.parametrize("network", [Mixing, Noisy])
def test_a_network_that_sees_more_than_one_mini_batch_is_run_one_by_one(
    network: type[nn.Module],
) -> None:
    torch.manual_seed(3)
    batches = networks.batches("mnist-bn", SIZES)
    model = FlatModel(network())
    model.module.train()
    torch.manual_seed(5)
    expected = one_by_one(model, batches)
    torch.manual_seed(5)
    found = torch.cat(list(JointMoments(model).of(batches)))
    assert torch.equal(found, expected)


@torch.no_grad()
def test_what_is_not_finite_stays_in_its_mini_batch() -> None:
    batches = networks.batches("mnist-bn", (8,) * (2 * MOST_TOGETHER))
    for place in (1, MOST_TOGETHER + 2):
        batches[place] = (torch.full((8, 6), math.nan), batches[place][1])
    model = FlatModel(networks.build("mnist-bn"))
    model.module.train()
    expected = one_by_one(model, batches)
    found = list(JointMoments(model).of(batches))
    assert len(found) == 2
    assert torch.isnan(found[0][1, 1:]).any()
    assert torch.isnan(found[1][2, 1:]).any()
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@torch.no_grad()
def test_a_model_is_bound_as_it_was_when_its_reader_has_enough() -> None:
    model = FlatModel(networks.build("mnist-bn"))
    model.module.train()
    buffer = model.moments
    reader = JointMoments(model).of(networks.batches("mnist-bn", SIZES))
    assert [len(next(reader)) for _ in range(2)] == [MOST_TOGETHER] * 2
    reader.close()
    assert model.moments is buffer
    model.module(torch.randn(8, 6))
    assert (buffer[0] == 8).all()


def test_large_inputs_are_not_joined() -> None:
    half = JOINED_BYTES // 8
    assert [len(group) for group in groups_of([torch.zeros(2, half)] * 3)] == [1, 1, 1]
    assert [len(group) for group in groups_of([torch.zeros(1, half)] * 3)] == [2, 1]
    assert [len(group) for group in groups_of([torch.zeros(2, 3), torch.zeros(3, 3)])] == [1, 1]

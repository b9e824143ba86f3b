"""A BN layer that a step uses twice, leaves out or has frozen: PyTorch's own is the oracle."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.models.conversion.convert import convert
from downpour.models.flat import FlatModel
from downpour.workers.evaluation.evaluator import population_statistics
from downpour.workers.step.joining import can_join
from downpour.workers.step.model_copy import ModelCopy, StepContext
from tests.helpers.close import assert_close
from tests.helpers.networks import mailboxes


class Twice(nn.Module):
    """One layer on two distributions, and on maps of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        y, z = self.bn(h), self.bn(10 * h[:, :, :2] + 5)
        both = torch.cat([y.mean((2, 3)), z.square().mean((2, 3))], 1)
        scores: Tensor = self.out(both)
        return scores


class Skips(nn.Module):
    """Leaves a block out of some forwards, as told."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = (
            nn.BatchNorm1d(3),
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
        )
        self.out = nn.Linear(3, 2)
        self.skipping = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        scores: Tensor = self.out(y if self.skipping else y + self.block(y))
        return scores


class Random(Skips):
    """Decides by random numbers, as stochastic depth does."""

    def __init__(self, draw: Callable[[], float] = lambda: float(torch.rand(()))) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        self.skipping = self.training and self.draw() < 0.5
        return super().forward(x)


def averages(module: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Mean and variance, [2, F], that PyTorch's own layers keep of mini-batches."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.momentum = None
    with torch.no_grad():
        for x in batches:
            module.train()(x)
    means = [layer.running_mean for layer in layers]
    variances = [layer.running_var for layer in layers]
    return torch.stack([torch.cat(means), torch.cat(variances)])  # type: ignore[arg-type]


def images(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.rand(6, 3, 4, 4, generator=generator) for _ in range(count)]


def rows(count: int) -> list[Tensor]:
    return [x.mean((2, 3)) for x in images(count)]


def test_each_use_of_a_layer_counts_as_a_mini_batch() -> None:
    theirs = Twice()
    model = FlatModel(convert(copy.deepcopy(theirs)))
    x = images(1)[0]
    y = model.module(x)
    assert model.moments[0].tolist() == [6 * 4 * 4 + 6 * 2 * 4] * 4
    assert_close(model.moments[1:], averages(copy.deepcopy(theirs), [x]))
    found = torch.autograd.grad(y.square().sum(), model.parameters)
    expected = torch.autograd.grad(theirs(x).square().sum(), list(theirs.parameters()))
    by_name = dict(zip([e.name for e in model.layout.entries], found, strict=True))
    for (name, _), gradient in zip(theirs.named_parameters(), expected, strict=True):
        assert torch.equal(by_name[name], gradient)


def test_algorithm_2_over_a_layer_used_twice_is_torchs() -> None:
    theirs, batches = Twice(), images(7)
    model = FlatModel(convert(copy.deepcopy(theirs)))
    found = population_statistics(model, [(x, x) for x in batches])
    assert_close(found, averages(theirs, batches), rtol=1e-5, atol=1e-5)


def test_algorithm_2_over_a_layer_that_some_forwards_skip_is_torchs() -> None:
    torch.manual_seed(1)
    theirs, batches = Random(), rows(12)
    model = FlatModel(convert(copy.deepcopy(theirs)))
    torch.manual_seed(9)
    found = population_statistics(model, [(x, x) for x in batches])
    torch.manual_seed(9)
    assert_close(found, averages(theirs, batches), rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_always_skipped_keeps_its_statistics() -> None:
    model = FlatModel(convert(Skips()))
    model.module.skipping = True  # type: ignore[assignment]
    model.statistics[:, 3:] = 7.0
    found = population_statistics(model, [(x, x) for x in rows(3)])
    assert (found[:, 3:] == 7).all()
    assert not (found[:, :3] == 7).any()


def copies(module: nn.Module, **options: object) -> tuple[ModelCopy, StepContext, FlatModel]:
    model = FlatModel(convert(module))
    weights = model.weights.clone()
    context = StepContext(model.layout, **options)  # type: ignore[arg-type]
    made = ModelCopy(model, context)
    made.weights[:] = weights.numpy()
    return made, context, model


@pytest.mark.parametrize("recorded", [False, True])
def test_a_step_pushes_no_moments_of_a_layer_that_it_skips(recorded: bool) -> None:
    module = Skips()
    step, context, model = copies(module, recorded=recorded)
    box, targets = mailboxes(model.layout, 1)[0], torch.zeros(6, dtype=torch.int64)
    counts = []
    for x, skipping in zip(rows(6), (False, True, True, False, True, False), strict=True):
        module.skipping = skipping and not recorded
        step.step(x, targets, box, 0)
        counts.append(box.moments[0, 0].tolist())
        expected = averages(copy.deepcopy(module), [])  # as they were, for layers that are skipped
        assert expected.shape == (2, 6)
    there, skipped = [6.0] * 6, [6.0] * 3 + [0.0] * 3
    if recorded:
        assert counts == [there] * 6
        assert any(context.recordings.values())
    else:
        assert counts == [there, skipped, skipped, there, skipped, there]


def test_a_step_that_skips_a_layer_is_not_recorded() -> None:
    module = Skips()
    module.skipping = True
    step, context, model = copies(module, recorded=True)
    box, targets = mailboxes(model.layout, 1)[0], torch.zeros(6, dtype=torch.int64)
    for x in rows(4):
        step.step(x, targets, box, 0)
    assert list(context.recordings.values()) == [None]


def test_mini_batches_of_a_layer_used_twice_are_joined_and_counted_by_themselves() -> None:
    step, context, model = copies(Twice(), recorded=False, depth=3)
    x, targets = torch.cat(images(3)), torch.arange(18) % 2
    joined, separate = mailboxes(model.layout, 1)[0], mailboxes(model.layout, 1)[0]
    step.step(x, targets, joined, 0, together=3)
    assert context.joinable
    for j in range(3):
        step.step(x[j::3].contiguous(), targets[j::3].contiguous(), separate, j)
    assert_close(joined.moments, separate.moments, rtol=1e-5, atol=1e-5)
    assert_close(joined.gradient, separate.gradient, rtol=1e-4, atol=1e-6)


DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.rand()),  # noqa: NPY002
    "python": random.random,
}


@pytest.mark.parametrize("generator", DRAWS)
def test_mini_batches_of_a_model_that_draws_for_itself_are_not_joined(
    generator: str, caplog: pytest.LogCaptureFixture
) -> None:
    step, context, model = copies(Random(DRAWS[generator]), recorded=False, depth=2)
    x, targets = torch.cat(rows(2)), torch.arange(12) % 2
    before = torch.get_rng_state()
    assert not can_join(model.module, context.loss, x, targets, 2)
    assert torch.equal(torch.get_rng_state(), before)
    step.step(x, targets, mailboxes(model.layout, 1)[0], 0, together=2)
    assert context.joinable is False
    assert "draws random numbers of its own" in caplog.text


class Frozen(nn.Sequential):
    """Statistics of an earlier training, frozen as detection networks freeze them."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))
        state = self.state_dict()
        state["1.running_mean"].fill_(5.0)
        state["1.running_var"].fill_(4.0)
        state["1.num_batches_tracked"].fill_(100)
        self.load_state_dict(state)
        self[1].weight.requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("together", [1, 2])
def test_a_frozen_layer_normalizes_with_its_statistics_in_every_step(
    recorded: bool, together: int
) -> None:
    theirs = Frozen().train()
    step, _, model = copies(copy.deepcopy(theirs), recorded=recorded, depth=2)
    box = mailboxes(model.layout, 1)[0]
    for x in rows(5):
        targets = torch.arange(6) % 2
        result = step.step(x, targets, box, 0, together=together)
        parts = [(x[j::together], targets[j::together]) for j in range(together)]
        losses = [functional.cross_entropy(theirs(a), b) for a, b in parts]
        theirs.zero_grad()
        torch.stack(losses).sum().backward()
        expected = dict(theirs.named_parameters())
        for entry in model.layout.entries:
            gradient = expected[entry.name].grad
            if gradient is None:
                continue  # it is frozen, and not pushed
            got = box.gradient[entry.start : entry.stop].view(entry.shape)
            assert_close(got, gradient, rtol=1e-4, atol=1e-5)
        assert result.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        assert not box.moments[:together, 0, :3].any(), "nothing is pushed of it"
        assert (box.moments[:together, 0, 3:] == 6 / together).all()


def test_the_runs_statistics_take_the_place_of_the_factorys() -> None:
    module = Frozen()
    model = FlatModel(convert(module))
    context = StepContext(model.layout, recorded=False)
    context.statistics = torch.stack([torch.full((5,), 2.0), torch.full((5,), 9.0)])
    ModelCopy(model, context)
    assert model.module.train()[1].running_mean.tolist() == [2.0] * 3  # type: ignore[index]
    assert model.has_frozen_norms


def test_what_a_network_brings_along_is_what_its_statistics_begin_with() -> None:
    model = FlatModel(convert(Frozen()))
    initial = model.initial
    assert initial.statistics[:, 0].tolist() == [5.0, 4.0]
    assert initial.seen.tolist() == [100.0] * 3 + [0.0] * 2
    assert initial.momentum.tolist() == [0.1] * 5
    others = model.statistics.clone()
    others[0, 4] = 1.0
    assert initial.table(others)[2].tolist() == [100.0] * 3 + [0.0, float("inf")]

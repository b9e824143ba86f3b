"""Nets that are trained together, against PyTorch's own layers one net at a time."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.cluster.reproduce.choices.choice import CHOICES, Choice
from downpour.cluster.reproduce.choices.joint_nets import CLASSES, INPUTS, LAYERS, UNITS, JointNets
from downpour.models.mlp import MnistNet

SEED = 5
STEPS = 4
NAMED = {choice.name: choice for choice in CHOICES}
TOGETHER = [
    NAMED["bn-after"],
    NAMED["default"],
    NAMED["gain-3"],
    NAMED["std-fan-in"],
    NAMED["output-0"],
    NAMED["momentum"],
    NAMED["logistic"],
    dataclasses.replace(NAMED["quadratic"], momentum=0.5),
    NAMED["without-bn"],
]


def _mini_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            (torch.rand(12, INPUTS, generator=generator) < 0.2).float(),
            torch.randint(CLASSES, (12,), generator=generator),
        )
        for _ in range(STEPS)
    ]


class _Alone(nn.Module):
    """One net of PyTorch's layers."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        like = MnistNet(batch_norm=True, seed=SEED, init_std=choice.init_std)
        self.choice = choice
        self.linear = nn.ModuleList()
        for layer, inputs in enumerate((INPUTS, UNITS, UNITS)):
            linear = nn.Linear(inputs, UNITS)
            linear.weight.data.copy_(like.get_parameter(f"hidden.{layer}.linear.weight").data)
            linear.bias.data.zero_()
            self.linear.append(linear)
        self.norms = [nn.BatchNorm1d(UNITS) for _ in range(LAYERS)]
        self.bn = nn.ModuleList(self.norms)
        for bn in self.norms:
            nn.init.constant_(bn.weight, choice.gain)
        self.output = like.output
        if choice.output_std == 0:
            nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor) -> Tensor:
        for linear, bn in zip(self.linear, self.bn, strict=True):
            x = linear(x)
            if self.choice.normalized == "before":
                x = torch.sigmoid(bn(x))
            else:
                x = torch.sigmoid(x)
                x = bn(x) if self.choice.normalized == "after" else x
        logits: Tensor = self.output(x)
        return logits

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        logits, targets = self(x), functional.one_hot(labels, CLASSES).float()
        if self.choice.loss == "softmax":
            return functional.cross_entropy(logits, labels)
        p = logits.sigmoid()
        if self.choice.loss == "quadratic":
            return (p - targets).square().sum(1).mean() / 2
        return -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1).mean()


def test_each_is_what_it_would_be_alone() -> None:
    nets = JointNets(TOGETHER, SEED)
    alone = [_Alone(choice) for choice in TOGETHER]
    rates = torch.tensor([choice.learning_rate for choice in TOGETHER])
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=c.learning_rate, momentum=c.momentum)
        for net, c in zip(alone, TOGETHER, strict=True)
    ]
    for number, (x, labels) in enumerate(_mini_batches()):
        share = 1 / (number + 1)
        nets.step(x, labels, rates, share)
        for net, optimizer in zip(alone, optimizers, strict=True):
            for bn in net.norms:
                bn.momentum = share
            optimizer.zero_grad()
            net.loss(x, labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    x, labels = _mini_batches()[0]
    with torch.no_grad():
        found = nets.logits(x, nets.statistics)
        for row, net in zip(found, alone, strict=True):
            assert torch.allclose(row, net.eval()(x), atol=2e-4, rtol=2e-4), net.choice.name
        moved = (found - JointNets(TOGETHER, SEED).logits(x, nets.statistics)).abs().amax((1, 2))
    assert bool((moved > 1e-3).all()), "every net has learned something"
    hits = [int((net(x).argmax(1) == labels).sum()) for net in alone]
    assert nets.hits(x, labels, nets.statistics, None).tolist() == hits


def test_population_statistics_by_hand() -> None:
    nets = JointNets(TOGETHER[1:3], SEED)
    batches = [x for x, _ in _mini_batches()]
    found = nets.population(batches)
    first = MnistNet(batch_norm=True, seed=SEED, init_std=0.05).get_parameter(
        "hidden.0.linear.weight"
    )
    sums = [x @ first.detach().t() for x in batches]
    mean = torch.stack([s.mean(0) for s in sums]).mean(0)
    variance = torch.stack([s.var(0, unbiased=True) for s in sums]).mean(0)
    assert torch.allclose(found[0, 0, :UNITS], mean, atol=1e-5)
    assert torch.allclose(found[0, 1, :UNITS], variance, atol=1e-5)
    assert torch.equal(nets.statistics, nets.no_statistics())


@pytest.mark.parametrize("rows", [4, 5])
def test_by_the_statistics_of_what_is_scored(rows: int) -> None:
    (x, labels), *_ = _mini_batches()
    nets = JointNets(TOGETHER[1:2], SEED)
    net = _Alone(TOGETHER[1]).train()
    parts = zip(x.tensor_split(12 // rows), labels.tensor_split(12 // rows), strict=True)
    expected = sum(int((net(some).argmax(1) == theirs).sum()) for some, theirs in parts)
    assert nets.hits(x, labels, nets.statistics, rows).tolist() == [expected]

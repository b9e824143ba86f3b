"""What a network keeps from one training forward to the next is found, and refused by name."""

from __future__ import annotations

import functools
import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm

from downpour.models.conversion.convert import convert
from downpour.models.conversion.history import StateError, check_repeats, check_state

WIDTH = 4


class Net(nn.Module):
    """A small network whose forward is given: `forward(net, inputs)`."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
        self.target = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("mean", torch.tensor([0.5]))
        self.register_buffer("scratch", torch.arange(4.0), persistent=False)
        self.plain = torch.ones(1)
        self.given = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.given(self, x)


def check(forward: Callable[[Any, Tensor], Tensor], **attributes: Any) -> str | None:
    return check_state(convert(Net(forward, **attributes)), torch.rand(6, WIDTH))


def halved(name: str) -> Callable[[Any, Tensor], Tensor]:
    def forward(net: Any, x: Tensor) -> Tensor:
        if net.training:
            with torch.no_grad():
                getattr(net, name).mul_(0.5)
        y: Tensor = net.body(x - net.mean + net.scratch * net.plain)
        return y

    return forward


@pytest.mark.parametrize("name", ["mean", "scratch", "plain", "target"])
def test_a_tensor_that_training_changes_is_refused_by_name(name: str) -> None:
    model = convert(Net(halved(name)))
    with pytest.raises(StateError, match=f"'{name}' changes in a training forward"):
        check_state(model, torch.rand(6, WIDTH))
    assert torch.equal(model.state_dict()["mean"], torch.tensor([0.5])), "a copy was tried"


def warmed(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    y: Tensor = net.body(x) * min(1.0, net.calls / 10)
    return y


def banked(net: Any, x: Tensor) -> Tensor:
    y: Tensor = net.body(x)
    net.bank.append(y.detach().mean(0))
    return y - torch.stack(list(net.bank)).mean(0)


def averaged(net: Any, x: Tensor) -> Tensor:
    y: Tensor = net.body(x)
    mean = y.detach().mean(0)
    net.average = mean if net.average is None else net.average.lerp(mean, 0.1)
    return y - net.average


def made(net: Any, x: Tensor) -> Tensor:
    if net.head is None:
        net.head = nn.Linear(x.shape[1], 2)
    y: Tensor = net.head(net.body(x))
    return y


def switched(net: Any, x: Tensor) -> Tensor:
    y: Tensor = net.body(x)
    if net.training:
        net.body.eval()
        y = y + net.body(x).detach()
        net.body.train()
    return y


@pytest.mark.parametrize(
    ("forward", "attributes", "why"),
    [
        (warmed, {"calls": 0}, "the outputs depend on 'calls'"),
        (banked, {"bank": deque([torch.zeros(WIDTH)], maxlen=3)}, "the outputs depend on 'bank'"),
        (averaged, {"average": None}, "'average' changes in a training forward"),
        (made, {"head": None}, "parameter 'head.weight' is made in a forward"),
        (switched, {}, "'body.1' is switched to inference mode in a training forward"),
    ],
)
def test_what_depends_on_the_forwards_before_is_refused_by_name(
    forward: Callable[[Any, Tensor], Tensor], attributes: dict[str, Any], why: str
) -> None:
    with pytest.raises(StateError, match=why):
        check(forward, **attributes)


def counted(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    y: Tensor = net.body(x)
    return y


def test_a_count_that_nothing_depends_on_is_told_of() -> None:
    line = check(counted, calls=0)
    assert line is not None
    assert line.startswith("'calls' of the network changes with each forward")


def noted(net: Any, x: Tensor) -> Tensor:
    net.shape, net.features = x.shape, functional.dropout(x, 0.5).detach()
    y: Tensor = net.body(net.features * random.random())
    return y


def test_what_a_forward_writes_anew_each_time_is_no_state() -> None:
    assert check(noted, shape=None, features=None) is None


def test_constants_batch_norm_and_spectral_norm_are_not_refused() -> None:
    x = torch.rand(3, WIDTH)
    assert check(lambda net, x: net.body(x - net.mean + net.scratch * net.plain)) is None
    for norm in (parametrizations.spectral_norm, spectral_norm):
        assert check_state(norm(nn.Linear(WIDTH, WIDTH)), x) is None  # type: ignore[operator]
    assert check_state(nn.Linear(3, 3), torch.ones(2, 5)) is None, "a forward that fails"


class ByHand(nn.BatchNorm1d):
    """Normalizes, and averages, in a way of its own."""

    def forward(self, input: Tensor) -> Tensor:
        mean = input.mean(0)
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)  # type: ignore[union-attr]
        return input - mean


def test_a_layer_that_averages_by_hand_is_refused_by_name() -> None:
    with pytest.raises(StateError, match=r"'1.running_mean' changes in a training forward"):
        check_state(convert(nn.Sequential(nn.ReLU(), ByHand(WIDTH))), torch.rand(6, WIDTH))


def test_a_network_that_is_another_one_each_time_is_refused_by_name() -> None:
    made = itertools.count()

    def make(*, buffer: bool = False, array: bool = False) -> nn.Module:
        net = Net(counted, calls=0, order=np.arange(3) + (next(made) if array else 0))
        if buffer:
            net.register_buffer("mean", torch.tensor([0.5 + next(made)]))
        return convert(net)

    check_repeats(make(), make)
    for options, name in (({"buffer": True}, "mean"), ({"array": True}, "order")):
        again = functools.partial(make, **options)
        with pytest.raises(StateError, match=f"'{name}' is another one each time"):
            check_repeats(again(), again)

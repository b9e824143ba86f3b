"""Layers that are computed together, against PyTorch's own modules, one by one."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.benchmarks.models import with_pytorchs_norms
from downpour.models.batchnorm import BatchNorm
from downpour.models.inception import Inception
from downpour.models.layers import (
    SeparableConvBN,
    composed,
    concatenated,
    is_cheaper_composed,
    is_pointwise,
    may_join,
    pointwise,
)

torch.set_num_threads(1)


def _net(**options: object) -> Inception:
    arguments = {"seed": 1, "num_classes": 5, "image_size": 16, "width": 0.0625, "stem_stride": 2}
    net = Inception(**(arguments | options)).double().train()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    for layer in net.modules():
        if isinstance(layer, BatchNorm):
            layer.unbind(1)
            assert layer.weight is not None
            # Some gammas below 0: the largest of a window is then not the convolution's largest.
            nn.init.uniform_(layer.weight, -1, 1, generator=generator)
    return net


def _loss_and_gradients(net: nn.Module) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 16, 16, dtype=torch.float64, generator=generator)
    loss = functional.cross_entropy(net(x), torch.arange(8) % 5)
    return loss, *torch.autograd.grad(loss, list(net.parameters()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"separable": False},
        {"lrn": True},
        {"activation": "sigmoid"},
        {"per_activation": True},
        {"stem_stride": 4},
    ],
)
def test_a_joined_network_is_pytorchs_layer_by_layer(options: dict[str, object]) -> None:
    net = _net(**options)
    if options.get("per_activation"):  # of which PyTorch has no layer: a hook keeps layers apart
        plain: nn.Module = copy.deepcopy(net)
        for module in plain.modules():
            if module is not plain:
                module.register_forward_hook(lambda *_: None)
    else:
        plain = with_pytorchs_norms(copy.deepcopy(net)).double()
        ours = dict(net.named_parameters())
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(ours[name])
    x = torch.empty(1, 3, 16, 16)
    assert may_join(net, x)
    assert not may_join(plain, x)
    for found, expected in zip(_loss_and_gradients(net), _loss_and_gradients(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_names_of_parameters_are_those_of_the_layers() -> None:
    names = set(_net().state_dict())
    assert {
        "stages.conv1.depthwise.weight",
        "stages.conv1.pointwise.conv.weight",
        "stages.conv2.0.conv.weight",
        "stages.conv2.1.bn.running_var",
        "stages.3a.branches.3.1.conv.weight",
    } <= names


def test_layers_are_called_one_by_one_if_there_is_a_hook_or_no_training() -> None:
    net, x = _net(), torch.rand(4, 3, 16, 16, dtype=torch.float64)
    assert not may_join(copy.deepcopy(net).eval(), x)
    assert not may_join(net, x.to("meta"))
    seen: list[tuple[int, ...]] = []
    conv = net.get_submodule("stages.3a.branches.0.conv")
    conv.register_forward_hook(lambda _module, _inputs, y: seen.append(tuple(y.shape)))
    net(x)
    assert seen == [(4, 4, 8, 8)]


def _parts(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 4, dtype=dtype, generator=generator)
    weights = [torch.randn(c, 6, 1, 1, dtype=dtype, generator=generator) for c in (3, 1, 4)]
    return x.requires_grad_(), [w.requires_grad_() for w in weights]


@pytest.mark.parametrize("count", [1, 3])
def test_pointwise_convolutions_of_one_input(count: int) -> None:
    x, weights = _parts()
    weights = weights[:count]
    found, expected = pointwise(x, weights), [functional.conv2d(x, w) for w in weights]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert a.is_contiguous(memory_format=torch.channels_last)
    gradients = [
        torch.autograd.grad(concatenated(ys).sin().sum(), [x, *weights], retain_graph=True)
        for ys in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_a_pointwise_convolution() -> None:
    assert is_pointwise(nn.Conv2d(4, 2, 1, bias=False))
    for other in (
        nn.Conv2d(4, 2, 1),
        nn.Conv2d(4, 2, 3, bias=False),
        nn.Conv2d(4, 2, 1, stride=2, bias=False),
        nn.Conv2d(4, 2, 1, groups=2, bias=False),
        nn.Conv2d(4, 2, 1, padding=1, bias=False),
    ):
        assert not is_pointwise(other)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (7, 2)])
def test_two_convolutions_as_one(size: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first = nn.Conv2d(3, 24, size, stride=stride, padding=size // 2, groups=3, bias=False).double()
    second = nn.Conv2d(24, 5, 1).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=generator)
    weights = [first.weight, second.weight, second.bias]
    results = [
        (y, *torch.autograd.grad(y.sin().sum(), weights))
        for y in (composed(x, first, second), second(first(x)))
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_composed_only_if_that_multiplies_no_more() -> None:
    with torch.device("meta"):
        small, paper = _separable(3, 16), _separable(7, 64)
    assert is_cheaper_composed(small.depthwise, small.pointwise.conv)
    assert not is_cheaper_composed(paper.depthwise, paper.pointwise.conv)


def _separable(size: int, filters: int) -> SeparableConvBN:
    return SeparableConvBN(
        3,
        filters,
        size,
        stride=1,
        multiplier=8,
        batch_norm=True,
        activation=torch.relu,
        eps=1e-5,
    )

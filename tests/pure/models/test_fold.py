"""Any network's batch normalization at inference: folded where it can be, else a linear map."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from downpour.models.batchnorm import BatchNorm
from downpour.models.conversion.convert import convert
from downpour.models.conversion.copies import detached_copy
from downpour.models.fold import ChannelAffine, fold
from tests.helpers.close import assert_close
from tests.pure.models.conversion.test_convert import BatchNormAct


class Basic(nn.Module):
    """torchvision's block: pairs are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(x + y)


class PreActivation(Basic):
    """BN and activation come before the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.bn1(x)))
        return x + self.conv2(torch.relu(self.bn2(y)))


class Dense(nn.Module):
    """BN after a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(torch.relu(self.bn(torch.cat([x, -x], 1))))
        return y


class UsedElsewhere(Basic):
    """What the first convolution gives goes somewhere else, too; the second is used twice."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = self.bn2(self.conv2(self.bn1(y)))
        return torch.relu(y + z) + self.conv2(z)


class Untraceable(nn.Module):
    """Decides by a value, around blocks that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Basic()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y if float(y.detach().sum()) > 0 else -y


class LinearOverPlaces(nn.Module):
    """The features of the linear layer are not those of the normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 6), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.linear(x.flatten(2)[:, :, :4]))
        return y


NETS = {
    "basic": (lambda: Basic(), 0),
    "pre-activation": (lambda: PreActivation(), 1),
    "dense": (lambda: Dense(), 1),
    "used elsewhere": (lambda: UsedElsewhere(), 2),
    "untraceable": (lambda: Untraceable(), 0),
    "linear over places": (lambda: LinearOverPlaces(), 1),
    "first": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), 1),
    "after the activation": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        1,
    ),
    "with activation": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), BatchNormAct(4)), 0),
    "alone with activation": (lambda: nn.Sequential(nn.ReLU(), BatchNormAct(4)), 1),
    "sequences": (
        lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4, affine=False)),
        0,
    ),
    "volumes": (
        lambda: nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv3d(4, 6, 1), nn.BatchNorm3d(6)),
        0,
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)),
        0,
    ),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)),
        1,
    ),
    "shared": (lambda: shared(), 2),
}


def shared() -> nn.Module:
    conv = nn.Conv2d(4, 4, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4))


def trained(net: nn.Module) -> nn.Module:
    """With values that are not initial."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                size = (module.num_features,)
                module.running_mean.copy_(torch.randn(size, generator=generator))  # type: ignore[union-attr]
                module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)  # type: ignore[union-attr]
                if module.affine:
                    module.weight.copy_(torch.randn(size, generator=generator))
                    module.bias.copy_(torch.randn(size, generator=generator))
    return net.eval()


@pytest.mark.parametrize("name", NETS)
def test_a_folded_network_is_torchs(name: str) -> None:
    make, left = NETS[name]
    theirs = trained(make())
    folded = fold(convert(copy.deepcopy(theirs)))
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(5))
    assert_close(folded(x), theirs(x), rtol=1e-4, atol=1e-4)
    maps = [m for m in folded.modules() if isinstance(m, ChannelAffine)]
    assert len(maps) == left
    plain = fold(convert(copy.deepcopy(theirs)), pairs=False)
    assert_close(plain(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_the_older_weight_norm_can_be_copied_and_folded() -> None:
    with pytest.warns(FutureWarning):
        conv = weight_norm(nn.Conv2d(4, 4, 1))
    net = trained(nn.Sequential(conv, BatchNorm(4)))
    x = torch.randn(3, 4, 6, 6)
    expected = net(x)
    assert torch.equal(detached_copy(net)(x), expected)
    assert_close(fold(net)(x), expected)


def test_a_sequence_keeps_its_length_and_numbers() -> None:
    net = trained(nn.Sequential(nn.Conv2d(4, 4, 1), BatchNorm(4), nn.ReLU()))
    folded = fold(net)
    assert isinstance(folded, nn.Sequential)
    assert [type(m) for m in folded] == [nn.Conv2d, nn.Identity, nn.ReLU]


def test_a_layer_with_hooks_stays_with_them() -> None:
    bn = BatchNorm(4)
    bn.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3 + 1,))
    net = trained(nn.Sequential(nn.Conv2d(4, 4, 1), bn))
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(5))
    assert_close(fold(net)(x), net(x))


def test_a_layer_is_called_by_keyword_as_pytorchs_is() -> None:
    net = convert(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))).eval()
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(5))
    bn = net.get_submodule("1")
    assert_close(fold(net).get_submodule("1")(input=x), bn(input=x))


class Scaled(nn.BatchNorm2d):
    """Does something before it normalizes."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2) + input


def test_a_layer_that_does_more_with_its_input_is_folded_into_none_before() -> None:
    net = trained(nn.Sequential(nn.Conv2d(4, 4, 1), Scaled(4)))
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(5))
    assert_close(fold(convert(copy.deepcopy(net)))(x), net(x), rtol=1e-4, atol=1e-4)

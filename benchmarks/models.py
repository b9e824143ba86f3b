"""Networks that the benchmarks train: a plain PyTorch one, and one that is bound by computing.

Not here: the network of section 4.1 as this system trains it (`models.mlp`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from downpour.models.batchnorm import BatchNorm
from downpour.models.layers import ConvBN

SIDE, CLASSES = 28, 10


def plain_mnist(*, seed: int) -> nn.Module:
    """Section 4.1's net with BN, of PyTorch's own layers: what runs without this system.

    Three layers of 100 sigmoids, `sigmoid(BN(Wu))`, and a linear output; inputs [m, 784].
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    width = SIDE * SIDE
    for _ in range(3):
        layers += [nn.Linear(width, 100, bias=False), nn.BatchNorm1d(100), nn.Sigmoid()]
        width = 100
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


class ConvNet(nn.Module):
    """Convolutions on 28x28 images, [m, 1, 28, 28] -> [m, 10]: some 10 ms a step and core."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvBN(1, width, 3),
            ConvBN(width, 2 * width, 3, stride=2),
            ConvBN(2 * width, 2 * width, 3),
            ConvBN(2 * width, 4 * width, 3, stride=2),
            ConvBN(4 * width, 4 * width, 3),
        )
        self.output = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [m, 10]."""
        images = x.view(len(x), 1, SIDE, SIDE)
        y: Tensor = self.output(self.features(images).mean((2, 3)))
        return y


def convnet(*, seed: int, width: int = 16) -> nn.Module:
    """A `ConvNet` with PyTorch's default initialization."""
    torch.manual_seed(seed)
    return ConvNet(width)


def with_pytorchs_norms(module: nn.Module) -> nn.Module:
    """The same network with PyTorch's batch normalization in place of ours."""
    for name, part in module.named_children():
        if isinstance(part, BatchNorm):
            setattr(module, name, nn.BatchNorm2d(part.num_features, eps=part.eps))
        else:
            with_pytorchs_norms(part)
    return module


FACTORIES: dict[str, Callable[..., nn.Module]] = {"mnist": plain_mnist, "convnet": convnet}
"""What the plain loops can train, by name."""

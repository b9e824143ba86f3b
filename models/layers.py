"""Blocks `z = g(BN(Wu))`: a linear map, batch normalization, a nonlinearity.

Here: the blocks that networks are made of, and the protocol by which a block says which of its
layers belong together, for `fold`. Not here: the normalization itself, or whole networks.

Ioffe & Szegedy 2015, section 3.2: BN stands right before the nonlinearity, and the layer's own
bias is dropped, since subtracting the mean would undo it; beta takes its place.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from downpour.models.batchnorm import DEFAULT_EPS, BatchNorm

Activation = Callable[[Tensor], Tensor]
"""An elementwise nonlinearity, such as `torch.relu` or `torch.sigmoid`."""


@runtime_checkable
class NormalizedBlock(Protocol):
    """A module that knows which of its children are a linear map followed by its normalization.

    Declare it on a block of your own to have it folded.
    """

    def normalized_pairs(self) -> Iterable[tuple[str, str]]:
        """Names of children, `(layer, bn)`, where nothing but `bn` gets what `layer` gives."""
        ...


class ActivationBatchNorm(nn.Module):
    """BN of `[m, C, h, w]` by activation: a mean and variance for each of the C*h*w of them.

    The fully connected form (Algorithm 1) on a convolutional layer, as the last hidden layers of
    the paper's ensemble have it (section 4.2.3); m values of each activation, not m*h*w.
    """

    def __init__(self, channels: int, height: int, width: int, *, eps: float = DEFAULT_EPS) -> None:
        super().__init__()
        self.shape = (channels, height, width)
        self.bn = BatchNorm(channels * height * width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """`[m, C, h, w]`, normalized."""
        y: Tensor = self.bn(x.flatten(1))
        return y.reshape(-1, *self.shape)


class LinearBN(nn.Module):
    """`g(BN(Wu))`, fully connected: `[m, inputs] -> [m, outputs]`; without BN, `g(Wu + b)`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        batch_norm: bool = True,
        activation: Activation = torch.relu,
        eps: float = DEFAULT_EPS,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=not batch_norm)
        self.bn = BatchNorm(outputs, eps=eps) if batch_norm else nn.Identity()
        self.activation = activation

    def normalized_pairs(self) -> Iterable[tuple[str, str]]:
        """See `NormalizedBlock`."""
        return (("linear", "bn"),)

    def preactivation(self, x: Tensor) -> Tensor:
        """What the nonlinearity gets: `[m, inputs] -> [m, outputs]`."""
        y: Tensor = self.bn(self.linear(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """`[m, inputs] -> [m, outputs]`."""
        return self.activation(self.preactivation(x))


class ConvBN(nn.Module):
    """`g(BN(Wu))`, convolutional: `[m, C_in, h, w] -> [m, C_out, p, q]`; without BN, `g(Wu + b)`.

    `padding=None` keeps the size at stride 1: `(kernel_size - 1)/2`, so the kernel must be odd.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        batch_norm: bool = True,
        activation: Activation = torch.relu,
        eps: float = DEFAULT_EPS,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=(kernel_size - 1) // 2 if padding is None else padding,
            groups=groups,
            bias=not batch_norm,
        )
        self.bn: nn.Module = BatchNorm(out_channels, eps=eps) if batch_norm else nn.Identity()
        self.activation = activation

    def normalized_pairs(self) -> Iterable[tuple[str, str]]:
        """See `NormalizedBlock`."""
        return (("conv", "bn"),)

    def preactivation(self, x: Tensor) -> Tensor:
        """What the nonlinearity gets: `[m, C_in, h, w] -> [m, C_out, p, q]`."""
        y: Tensor = self.bn(self.conv(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """`[m, C_in, h, w] -> [m, C_out, p, q]`."""
        return self.activation(self.preactivation(x))

"""The MNIST network of section 4.1, with and without batch normalization.

Not here: its data, its loss (softmax with cross-entropy over the logits) and its training.

Ioffe & Szegedy 2015, section 4.1 and Figure 1.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from downpour.models.batchnorm import DEFAULT_EPS
from downpour.models.errors import BatchError, ModelError
from downpour.models.layers import LinearBN


class MnistNet(nn.Module):
    """Three fully connected layers of 100 sigmoid units and a 10-way linear output.

    With `batch_norm`, every hidden layer is `sigmoid(BN(Wu))` and has no bias of its own; the
    output layer is linear with a bias in both. Weights are Gaussian with mean 0 and standard
    deviation `init_std`, or `1/sqrt(inputs of the layer)` where that is None; biases are 0. They
    depend on `seed` alone, and the weights are the same with batch normalization and without, so
    that Figure 1 compares two networks that start alike.

    `seed` is best derived from a hash of the run's seed and the purpose.
    """

    def __init__(
        self,
        *,
        batch_norm: bool,
        seed: int,
        hidden: Sequence[int] = (100, 100, 100),
        inputs: int = 784,
        classes: int = 10,
        init_std: float | None = None,
        eps: float = DEFAULT_EPS,
    ) -> None:
        super().__init__()
        widths = (inputs, *hidden, classes)
        if not hidden or min(widths) < 1:
            raise ModelError(
                f"inputs, hidden and classes are {inputs}, {list(hidden)} and {classes}: "
                "give at least one hidden layer, and every width at least 1"
            )
        if init_std is not None and not init_std > 0:
            raise ModelError(
                f"init_std is {init_std}: give a positive number, or None for 1/sqrt(fan in)"
            )
        self.hidden = nn.Sequential(
            *(
                LinearBN(fan_in, fan_out, batch_norm=batch_norm, activation=torch.sigmoid, eps=eps)
                for fan_in, fan_out in pairwise(widths[:-1])
            )
        )
        self.output = nn.Linear(widths[-2], classes)
        self._initialize(torch.Generator().manual_seed(seed), init_std)

    def _initialize(self, generator: torch.Generator, init_std: float | None) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = 1 / math.sqrt(module.in_features) if init_std is None else init_std
                nn.init.normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, `[m, classes]`, of `x`, `[m, inputs]` or an image shape that flattens to it."""
        y: Tensor = self.output(self.hidden(self._rows(x)))
        return y

    def preactivation(self, x: Tensor, layer: int = -1) -> Tensor:
        """The inputs of a hidden layer's sigmoids, `[m, units]`: what Figure 1(b, c) plots.

        `layer` counts hidden layers from 0, or from -1 backwards. With batch normalization these
        are the normalized values, `BN(Wu)`. In training mode this writes moments, as `forward`
        does.
        """
        num_layers = len(self.hidden)
        if not -num_layers <= layer < num_layers:
            raise ModelError(
                f"there is no hidden layer {layer}: give one in [{-num_layers}, {num_layers})"
            )
        blocks = list(self.hidden)[: layer % num_layers + 1]
        u = self._rows(x)
        for block in blocks[:-1]:
            u = block(u)
        last = blocks[-1]
        assert isinstance(last, LinearBN)
        return last.preactivation(u)

    def _rows(self, x: Tensor) -> Tensor:
        first = self.hidden[0]
        assert isinstance(first, LinearBN)
        rows = x.flatten(1) if x.ndim > 1 else x
        if rows.ndim != 2 or rows.shape[1] != first.linear.in_features:
            raise BatchError(
                f"the network got an input of shape {list(x.shape)}: "
                f"it takes [m, {first.linear.in_features}], or images of as many pixels"
            )
        return rows

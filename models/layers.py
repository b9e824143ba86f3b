"""Blocks `z = g(BN(Wu))`: a linear map, batch normalization, a nonlinearity.

Here: the blocks that networks are made of, and the protocol by which a block says which of its
layers belong together, for `fold`. And layers that are computed together in training: 1x1
convolutions of one input, two convolutions in a row, the concatenation of branches. These give what
the layers give one by one, up to rounding, and autograd finds the gradient by each layer's own
weights. Not here: the normalization itself, or whole networks.

Ioffe & Szegedy 2015, section 3.2: BN stands right before the nonlinearity, and the layer's own
bias is dropped, since subtracting the mean would undo it; beta takes its place.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

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


def may_join(module: nn.Module, x: Tensor) -> bool:
    """Whether layers of `module` may be computed together in a pass over `x`.

    They are in training on a processor, if the module has batch normalization of this project's.
    One with PyTorch's own layers is computed as PyTorch has it. If a layer has a hook, the layers
    are called one by one, so that the hook is called too.
    """
    if not module.training or x.device.type != "cpu":
        return False
    layers = [m for m in module.modules() if m is not module]
    hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in layers)
    return not hooked and any(isinstance(m, BatchNorm) for m in layers)


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether this is a plain 1x1 convolution: of stride 1, without groups, padding or bias."""
    plain = type(conv) is nn.Conv2d and conv.bias is None and conv.groups == 1
    return plain and conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0)


def pointwise(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """1x1 convolutions of one input, `[m, C, h, w]`, as one product of matrices.

    Args:
        x: in channels-last order, or it is copied to that.
        weights: of each convolution, `[C_i, C, 1, 1]`.

    Returns:
        What each gives, `[m, C_i, h, w]`, in channels-last order.
    """
    joined = torch.cat([w.flatten(1) for w in weights]) if len(weights) > 1 else weights[0]
    y = functional.linear(x.permute(0, 2, 3, 1), joined.flatten(1)).permute(0, 3, 1, 2)
    if len(weights) == 1:
        return (y,)
    parts: tuple[Tensor, ...] = _Split.apply(y, [len(w) for w in weights])  # type: ignore[no-untyped-call]
    return parts


def composed(x: Tensor, depthwise: nn.Conv2d, following: nn.Conv2d) -> Tensor:
    """A depthwise convolution and the 1x1 one that follows it, as one dense convolution of `x`.

    With `D` `[C*t, 1, k, l]` and `P` `[O, C*t, 1, 1]` its weight is
    `W[o, c] = sum_s P[o, c*t + s] * D[c*t + s]`. It is composed in float32 in each pass, so the
    gradients by `D` and `P` follow from that by `W`.
    """
    channels, size = depthwise.groups, depthwise.weight.shape[2:]
    with torch.autocast(x.device.type, enabled=False):
        first = depthwise.weight.view(channels, -1, size.numel())
        second = following.weight.view(len(following.weight), channels, -1).transpose(0, 1)
        weight = torch.bmm(second, first).transpose(0, 1).reshape(-1, channels, *size)
    return functional.conv2d(
        x, weight, following.bias, depthwise.stride, depthwise.padding, depthwise.dilation
    )


def is_cheaper_composed(depthwise: nn.Conv2d, following: nn.Conv2d) -> bool:
    """Whether the dense convolution multiplies little more than the two do."""
    dense = following.out_channels * depthwise.groups * depthwise.weight[0, 0].numel()
    return dense <= depthwise.weight.numel() + following.weight.numel()


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """`[m, C_i, h, w]` along the channels; the gradient of each part is contiguous.

    PyTorch's own `cat` gives views of the whole gradient, for which many kernels are slow.
    """
    y: Tensor = _Concatenate.apply(*parts)  # type: ignore[no-untyped-call]
    return y


class SeparableConvBN(nn.Module):
    """`g(BN(W2 W1 u))`: W1 is `multiplier` filters for each channel by itself, W2 1x1 over them.

    `[m, C_in, h, w] -> [m, C_out, p, q]`. Nothing stands between the two maps, so BN follows the
    second alone.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int,
        multiplier: int,
        batch_norm: bool,
        activation: Activation,
        eps: float,
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels,
            in_channels * multiplier,
            kernel_size,
            stride=stride,
            padding=(kernel_size - 1) // 2,
            groups=in_channels,
            bias=False,
        )
        self.pointwise = ConvBN(
            in_channels * multiplier,
            out_channels,
            1,
            batch_norm=batch_norm,
            activation=activation,
            eps=eps,
        )

    @property
    def activation(self) -> Activation:
        """The nonlinearity."""
        return self.pointwise.activation

    def preactivation(self, x: Tensor) -> Tensor:
        """What the nonlinearity gets: `[m, C_in, h, w] -> [m, C_out, p, q]`."""
        second = self.pointwise.conv
        if may_join(self, x) and is_cheaper_composed(self.depthwise, second):
            y: Tensor = self.pointwise.bn(composed(x, self.depthwise, second))
            return y
        return self.pointwise.preactivation(self.depthwise(x))

    def forward(self, x: Tensor) -> Tensor:
        """`[m, C_in, h, w] -> [m, C_out, p, q]`."""
        return self.activation(self.preactivation(x))


class ReducedConvBN(nn.Sequential):
    """A 1x1 `ConvBN` and the larger one behind it: `[m, C_in, h, w] -> [m, C_out, p, q]`."""

    @property
    def activation(self) -> Activation:
        """The last nonlinearity."""
        return cast(ConvBN, self[1]).activation

    def preactivation(self, x: Tensor) -> Tensor:
        """What the last nonlinearity gets: `[m, C_in, h, w] -> [m, C_out, p, q]`."""
        reduce, conv = (cast(ConvBN, block) for block in self)
        if may_join(self, x) and is_pointwise(reduce.conv):
            (y,) = pointwise(x, [reduce.conv.weight])
            y = reduce.activation(reduce.bn(y))
        else:
            y = reduce(x)
        return conv.preactivation(y)


def _parts(whole: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Copies of channels of `[m, C, h, w]`, in channels-last order."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        whole.narrow(1, start, size).contiguous(memory_format=torch.channels_last)
        for start, size in zip(starts, sizes, strict=True)
    ]


class _Split(torch.autograd.Function):
    """Channels of `[m, C, h, w]` apart, each part in memory of its own."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(_parts(whole, sizes))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return torch.cat(gradients, 1), None


class _Concatenate(torch.autograd.Function):
    """The other way."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.sizes = [p.shape[1] for p in parts]
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(_parts(gradients[0], ctx.sizes))

"""The Inception network of the paper's Figure 5, as a table of stages and the module made of it.

Here: `STAGES`, the table as it stands in the paper; `plan`, the channels and sizes that follow from
it for any width and input; `Inception`, the network. Not here: the variants that the paper trains,
which are recipes, and the loss.

Ioffe & Szegedy 2015, section 4.2 and Figure 5; dropout and local response normalization are those
of GoogLeNet (Szegedy et al. 2014), which the paper's "Inception" baseline keeps.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from downpour.models.batchnorm import DEFAULT_EPS
from downpour.models.errors import BatchError, ModelError
from downpour.models.layers import (
    Activation,
    ActivationBatchNorm,
    ConvBN,
    ReducedConvBN,
    SeparableConvBN,
    concatenated,
    is_pointwise,
    may_join,
    pointwise,
)

ACTIVATIONS: dict[str, Activation] = {"relu": torch.relu, "sigmoid": torch.sigmoid}
DEPTH_MULTIPLIER = 8
"""Of the separable first convolution: filters for each input channel."""


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A row "convolution": `reduce` 1x1 filters first where it has them, then `filters`."""

    name: str
    size: int
    stride: int
    filters: int
    reduce: int | None = None


@dataclass(frozen=True, kw_only=True)
class MaxPool:
    """A row "max pool", 3x3 with stride 2."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Module:
    """A row "inception": branches side by side, joined along the channels.

    `ones` is None and `projection` None (the pooled input passes through) in modules of stride 2;
    `pool` is "average" or "max".
    `double` is the branch of two 3x3 convolutions in a row, which stands for GoogLeNet's 5x5.
    """

    name: str
    ones: int | None
    reduce: int
    threes: int
    double_reduce: int
    double: int
    pool: str
    projection: int | None
    stride: int = 1


Stage = Convolution | MaxPool | Module

STAGES: tuple[Stage, ...] = (
    Convolution(name="conv1", size=7, stride=2, filters=64),
    MaxPool(name="pool1"),
    Convolution(name="conv2", size=3, stride=1, reduce=64, filters=192),
    MaxPool(name="pool2"),
    *(
        Module(
            name=name,
            ones=ones,
            reduce=reduce,
            threes=threes,
            double_reduce=double_reduce,
            double=double,
            pool=pool,
            projection=projection,
            stride=1 if ones else 2,
        )
        for name, ones, reduce, threes, double_reduce, double, pool, projection in (
            ("3a", 64, 64, 64, 64, 96, "average", 32),
            ("3b", 64, 64, 96, 64, 96, "average", 64),
            ("3c", None, 128, 160, 64, 96, "max", None),
            ("4a", 224, 64, 96, 96, 128, "average", 128),
            ("4b", 192, 96, 128, 96, 128, "average", 128),
            ("4c", 160, 128, 160, 128, 160, "average", 96),
            ("4d", 96, 128, 192, 160, 192, "average", 96),
            ("4e", None, 128, 192, 192, 256, "max", None),
            ("5a", 352, 192, 320, 160, 224, "average", 128),
            ("5b", 352, 192, 320, 192, 224, "max", 128),
        )
    ),
)
"""Figure 5, from the input to the last module. A 7x7 average pool and the softmax follow."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A stage with its numbers for one width and input."""

    stage: Stage
    in_channels: int
    channels: int
    """What it puts out."""
    size: int
    """Height and width of what it puts out."""


def scaled(filters: int, width: float) -> int:
    """So many filters at a width: to the nearest multiple of 4, and at least 4."""
    return max(4, 4 * round(filters * width / 4))


def plan(
    *, image_size: int = 224, width: float = 1.0, stem_stride: int | None = None
) -> tuple[Planned, ...]:
    """Channels and sizes of every stage for square inputs of `image_size`.

    `stem_stride` is what the stages before 3a shrink the input by. 8 is the paper's. Small images
    would be gone before the last module, so 4 makes the first convolution 3x3 with stride 1, and 2
    drops the first pooling as well. None is the largest that leaves the last module 2x2 or more,
    so 8 from 64 pixels on. Raises `ModelError` for values that make no network.
    """
    if stem_stride is None:
        stem_stride = next((s for s in (8, 4) if image_size >= 8 * s), 2)
    if not 0 < width <= 16:
        raise ModelError(f"width is {width}: give a number above 0 and up to 16")
    if stem_stride not in (2, 4, 8):
        raise ModelError(f"stem stride is {stem_stride}: give 8 (the paper's), 4 or 2")
    if image_size < 4 * stem_stride:
        raise ModelError(
            f"image size is {image_size}: with a stem stride of {stem_stride} give at least "
            f"{4 * stem_stride}, or a smaller stem stride"
        )
    channels, size, planned = 3, image_size, []
    for stage in _stages(stem_stride):
        before = channels
        if isinstance(stage, Convolution):
            channels, stride = scaled(stage.filters, width), stage.stride
        elif isinstance(stage, MaxPool):
            stride = 2
        else:
            branches = (stage.ones, stage.threes, stage.double, stage.projection)
            channels = sum(scaled(b, width) for b in branches if b is not None)
            channels += before if stage.projection is None else 0
            stride = stage.stride
        size = (size - 1) // stride + 1
        planned.append(Planned(stage=stage, in_channels=before, channels=channels, size=size))
    return tuple(planned)


def _stages(stem_stride: int) -> Iterable[Stage]:
    for stage in STAGES:
        if stage.name == "conv1" and stem_stride < 8:
            yield Convolution(name="conv1", size=3, stride=1, filters=64)
        elif stage.name != "pool1" or stem_stride > 2:
            yield stage


@dataclass(frozen=True, kw_only=True)
class _Style:
    """What all convolutions of a network have in common."""

    width: float
    batch_norm: bool
    activation: Activation
    eps: float

    def conv(
        self,
        in_channels: int,
        filters: int,
        size: int,
        *,
        stride: int = 1,
        activation_size: int | None = None,
    ) -> ConvBN:
        """A convolution of the table; `activation_size` asks for BN by activation, not by map."""
        out = scaled(filters, self.width)
        block = ConvBN(
            in_channels,
            out,
            size,
            stride=stride,
            batch_norm=self.batch_norm,
            activation=self.activation,
            eps=self.eps,
        )
        if activation_size is not None and self.batch_norm:
            block.bn = ActivationBatchNorm(out, activation_size, activation_size, eps=self.eps)
        return block


class InceptionModule(nn.Module):
    """A module of Figure 5: `[m, C_in, s, s] -> [m, C_out, s/stride, s/stride]`."""

    def __init__(self, planned: Planned, style: _Style, *, per_activation: bool) -> None:
        super().__init__()
        stage, into = planned.stage, planned.in_channels
        assert isinstance(stage, Module)
        last = planned.size if per_activation else None
        reduce, double = scaled(stage.reduce, style.width), scaled(stage.double, style.width)
        double_reduce, stride = scaled(stage.double_reduce, style.width), stage.stride
        branches: list[nn.Module] = []
        if stage.ones is not None:
            branches.append(style.conv(into, stage.ones, 1, activation_size=last))
        branches.append(
            nn.Sequential(
                style.conv(into, stage.reduce, 1),
                style.conv(reduce, stage.threes, 3, stride=stride, activation_size=last),
            )
        )
        branches.append(
            nn.Sequential(
                style.conv(into, stage.double_reduce, 1),
                style.conv(double_reduce, stage.double, 3),
                style.conv(double, stage.double, 3, stride=stride, activation_size=last),
            )
        )
        pool: nn.Module = nn.MaxPool2d(3, stride, 1)
        if stage.pool == "average":
            pool = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        if stage.projection is not None:
            projection = style.conv(into, stage.projection, 1, activation_size=last)
            pool = nn.Sequential(pool, projection)
        branches.append(pool)
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """`[m, C_in, s, s] -> [m, C_out, s/stride, s/stride]`."""
        if may_join(self, x):
            return self._joined(x)
        return torch.cat([branch(x) for branch in self.branches], dim=1)

    def _joined(self, x: Tensor) -> Tensor:
        """As `forward`, with the 1x1 convolutions of `x` computed as one.

        A projection is computed before its average pooling, not after it: both are linear maps,
        one over channels and one over places, and fewer channels come out of it than go in.
        """
        chains = [list(b) if isinstance(b, nn.Sequential) else [b] for b in self.branches]
        heads = [c[-1] if isinstance(c[0], nn.AvgPool2d) else c[0] for c in chains]
        joined = [h for h in heads if isinstance(h, ConvBN) and is_pointwise(h.conv)]
        found = dict(zip(joined, pointwise(x, [h.conv.weight for h in joined]), strict=True))
        outputs = []
        for chain, head in zip(chains, heads, strict=True):
            y, rest = x, chain
            if head in found:
                y = found[head] if chain[0] is head else chain[0](found[head])
                y = head.activation(head.bn(y))
                rest = chain[1:] if chain[0] is head else []
            for layer in rest:
                y = layer(y)
            outputs.append(y)
        return concatenated(outputs)


class Inception(nn.Module):
    """Figure 5's network: `[m, 3, image_size, image_size]` in [0, 1] to logits `[m, num_classes]`.

    Pixels are brought to [-1, 1] first, and convolutions run in channels-last order. With
    `batch_norm` every convolution is `g(BN(Wu))` without a bias; without, `g(Wu + b)`.

    `width` multiplies every channel count of the table; `image_size` and `stem_stride` as in
    `plan`. `separable` is the paper's first convolution; False makes it a plain one. `lrn` puts
    GoogLeNet's local response normalization after the first pooling and the second convolution.
    `dropout` is the share dropped before the softmax. `per_activation` normalizes the last module's
    outputs by activation instead of by feature map (section 4.2.3). Weights are Gaussian with
    standard deviation `init_scale*sqrt(2/fan in)`, the softmax's `1/sqrt(fan in)`; biases are 0.
    They depend on `seed` alone.

    Raises `ModelError` for a value out of range.
    """

    def __init__(
        self,
        *,
        seed: int,
        num_classes: int = 1000,
        image_size: int = 224,
        width: float = 1.0,
        stem_stride: int | None = None,
        separable: bool = True,
        batch_norm: bool = True,
        activation: str = "relu",
        lrn: bool = False,
        dropout: float = 0.0,
        per_activation: bool = False,
        init_scale: float = 1.0,
        eps: float = DEFAULT_EPS,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ModelError(f"activation is {activation!r}: give {' or '.join(ACTIVATIONS)}")
        if not 0 <= dropout < 1:
            raise ModelError(f"dropout is {dropout}: give a share of at least 0 and below 1")
        if not 0 < init_scale < math.inf:
            raise ModelError(f"init scale is {init_scale}: give a number above 0")
        if num_classes < 2:
            raise ModelError(f"num classes is {num_classes}: give at least 2")
        self.image_size = image_size
        self.plan = plan(image_size=image_size, width=width, stem_stride=stem_stride)
        style = _Style(
            width=width, batch_norm=batch_norm, activation=ACTIVATIONS[activation], eps=eps
        )
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        for planned in self.plan:
            name = planned.stage.name
            last = planned is self.plan[-1]
            stages[name] = _stage(
                planned, style, separable=separable, per_activation=per_activation and last
            )
            if lrn and name in ("pool1", "conv2"):
                stages[f"{name}_lrn"] = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        self.stages = nn.Sequential(stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(self.plan[-1].channels, num_classes)
        self._initialize(torch.Generator().manual_seed(seed), init_scale)

    def _initialize(self, generator: torch.Generator, init_scale: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                std = init_scale * math.sqrt(2 / fan_in)
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif isinstance(module, nn.Linear):
                std = 1 / math.sqrt(module.in_features)
                nn.init.normal_(module.weight, std=std, generator=generator)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, `[m, num_classes]`. Raises `BatchError` for images of another size."""
        if x.ndim != 4 or x.shape[1:] != (3, self.image_size, self.image_size):
            raise BatchError(
                f"the network got an input of shape {list(x.shape)}: "
                f"it takes [m, 3, {self.image_size}, {self.image_size}]"
            )
        x = (2 * x - 1).contiguous(memory_format=torch.channels_last)
        maps = self._maps(x) if may_join(self, x) else self.stages(x)
        y: Tensor = self.output(self.dropout(self.pool(maps).flatten(1)))
        return y

    def _maps(self, x: Tensor) -> Tensor:
        """What the stages give. A nonlinearity before a max pooling is computed after it.

        Both nonlinearities rise, so the largest value of a window stays the largest, and there are
        fewer values to compute.
        """
        late: Activation | None = None
        for stage, following in pairwise([*self.stages, None]):
            if late is not None:
                x, late = late(stage(x)), None
            elif isinstance(stage, ConvBN | SeparableConvBN | ReducedConvBN) and isinstance(
                following, nn.MaxPool2d
            ):
                x, late = stage.preactivation(x), stage.activation
            else:
                x = stage(x)
        return x


def _stage(planned: Planned, style: _Style, *, separable: bool, per_activation: bool) -> nn.Module:
    stage, into = planned.stage, planned.in_channels
    if isinstance(stage, MaxPool):
        return nn.MaxPool2d(3, 2, 1)
    if isinstance(stage, Module):
        return InceptionModule(planned, style, per_activation=per_activation)
    if stage.reduce is not None:
        return ReducedConvBN(
            style.conv(into, stage.reduce, 1),
            style.conv(scaled(stage.reduce, style.width), stage.filters, stage.size),
        )
    if separable:
        return SeparableConvBN(
            into,
            planned.channels,
            stage.size,
            stride=stage.stride,
            multiplier=DEPTH_MULTIPLIER,
            batch_norm=style.batch_norm,
            activation=style.activation,
            eps=style.eps,
        )
    return style.conv(into, stage.filters, stage.size, stride=stage.stride)

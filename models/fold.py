"""Batch normalization folded into the layer before it: a network for inference without BN.

Here: folding a pair, and finding the pairs of a model. Not here: the statistics, which the
layers already hold (`FlatModel.bind` with the run's), and export formats.

Ioffe & Szegedy 2015, section 3.1 and Algorithm 2: with its statistics fixed, the normalization is
a linear map of each feature, and the layer before it can be that map's as well.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from downpour.models.batchnorm import BatchNorm, inference_map
from downpour.models.errors import FoldError
from downpour.models.layers import ActivationBatchNorm, NormalizedBlock

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d)


def fold_pair(layer: Layer, bn: BatchNorm) -> Layer:
    """A new layer that computes `bn(layer(x))` in inference, exact to the rounding of its weights.

    With `(scale, shift)` of Algorithm 2's map, `W' = scale*W` by output feature and
    `b' = scale*b + shift`. Computed in float64 and rounded once. Neither argument is changed.
    Raises `FoldError` if `bn` normalizes another number of features than `layer` puts out.
    """
    num_outputs = layer.weight.shape[0]
    if num_outputs != bn.num_features:
        raise FoldError(
            f"{type(layer).__name__} puts out {num_outputs} features and the batch normalization "
            f"after it takes {bn.num_features}: they are not a pair"
        )
    with torch.no_grad():
        scale, shift = inference_map(
            bn.weight.double(),
            bn.bias.double(),
            bn.running_mean.double(),
            bn.running_var.double(),
            bn.eps,
        )
        weight = layer.weight.double() * scale.reshape(-1, *(1 for _ in layer.weight.shape[1:]))
        own_bias = dict(layer.named_parameters()).get("bias")
        bias = shift if own_bias is None else own_bias.double() * scale + shift
        folded = _detached_copy(layer)
        folded.weight = nn.Parameter(weight.to(layer.weight.dtype))
        folded.bias = nn.Parameter(bias.to(layer.weight.dtype))
    return folded


class Affine(nn.Module):
    """`scale*x + shift` by activation, both `[C, h, w]`: what is left of BN by activation."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """`[m, C, h, w]`, mapped."""
        return x * self.scale + self.shift


def fold(model: nn.Module) -> nn.Module:
    """A copy of `model`, in inference mode and on memory of its own, without BN layers.

    A BN layer is folded where it directly follows a `Linear` or `Conv2d` in an `nn.Sequential`,
    which then has one child less, or where a block declares the pair (`layers.NormalizedBlock`,
    as `ConvBN`, `LinearBN` and so every network here does), in which an `nn.Identity` takes its
    place. BN by activation (`layers.ActivationBatchNorm`) has no convolution that could take it in,
    since a convolution is the same at every place: it becomes its linear map, `Affine`. Raises
    `FoldError`, naming the layer, if any other is left.
    """
    folded = _detached_copy(model)
    for path, module in list(folded.named_modules()):
        if isinstance(module, ActivationBatchNorm):
            folded.set_submodule(path, _affine(module))
    for path, module in list(folded.named_modules()):
        if isinstance(module, NormalizedBlock):
            _fold_block(path, module)
        elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            _fold_sequential(module)
    for path, module in folded.named_modules():
        if isinstance(module, BatchNorm):
            raise FoldError(
                f"batch normalization '{path}' does not directly follow a Linear or Conv2d in an "
                "nn.Sequential: put it there, or declare the pair with normalized_pairs()"
            )
    return folded.eval()


def _affine(layer: ActivationBatchNorm) -> Affine:
    bn = layer.bn
    tensors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    with torch.no_grad():
        gamma, beta, mean, variance = (tensor.double() for tensor in tensors)
        scale, shift = inference_map(gamma, beta, mean, variance, bn.eps)
    return Affine(scale.float().view(layer.shape), shift.float().view(layer.shape))


def _fold_block(path: str, block: NormalizedBlock) -> None:
    assert isinstance(block, nn.Module)
    for layer_name, bn_name in block.normalized_pairs():
        layer, bn = block.get_submodule(layer_name), block.get_submodule(bn_name)
        if not isinstance(bn, BatchNorm):
            continue
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise FoldError(
                f"'{path}' pairs '{bn_name}' with '{layer_name}', a {type(layer).__name__}: "
                "only a Linear or Conv2d can take it in"
            )
        block.set_submodule(layer_name, fold_pair(layer, bn))
        block.set_submodule(bn_name, nn.Identity())


def _fold_sequential(sequence: nn.Sequential) -> None:
    previous: tuple[str, nn.Module] | None = None
    for name, child in list(sequence._modules.items()):
        assert child is not None
        if (
            previous is not None
            and isinstance(child, BatchNorm)
            and isinstance(previous[1], (nn.Linear, nn.Conv2d))
        ):
            sequence._modules[previous[0]] = fold_pair(previous[1], child)
            del sequence._modules[name]
            # What follows BN is not a pair with the layer before it.
            previous = None
        else:
            previous = (name, child)


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def _detached_copy(module: ModuleT) -> ModuleT:
    """A deep copy whose tensors own their memory.

    Plain `deepcopy` would copy the whole flat buffer that a parameter is a view of, and its
    gradient as well.
    """
    memo: dict[int, Tensor] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(
            parameter.detach().clone(), requires_grad=parameter.requires_grad
        )
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    return copy.deepcopy(module, memo)

"""Batch normalization folded into the layer before it: a network for inference without BN.

Here: folding a pair, finding the pairs of a model, and the linear map of a layer that is in none.
Not here: the statistics, which the layers already hold (`FlatModel.bind` with the run's), and
export formats.

Ioffe & Szegedy 2015, section 3.1 and Algorithm 2: with its statistics fixed, the normalization is
a linear map of each feature, and the layer before it can be that map's as well.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from downpour.models.batchnorm import BatchNorm, inference_map
from downpour.models.conversion.convert import InterceptedBatchNorm, TracedBatchNorm
from downpour.models.conversion.copies import detached_copy
from downpour.models.errors import FoldError
from downpour.models.layers import ActivationBatchNorm, NormalizedBlock

LINEAR = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Layers that take in a normalization after them. Subclasses may compute their weights anew."""

Layer = TypeVar("Layer", bound=nn.Linear | _ConvNd)


def fold_pair(layer: Layer, bn: BatchNorm) -> Layer:
    """A new layer that computes `bn(layer(x))` in inference, exact to the rounding of its weights.

    With `(scale, shift)` of Algorithm 2's map, `W' = scale*W` by output feature and
    `b' = scale*b + shift`. Computed in float64 and rounded once. Neither argument is changed.
    Raises `FoldError` if `bn` normalizes another number of features than `layer` puts out.
    """
    num_outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if num_outputs != bn.num_features:
        raise FoldError(
            f"{type(layer).__name__} puts out {num_outputs} features and the batch normalization "
            f"after it takes {bn.num_features}: they are not a pair"
        )
    with torch.no_grad():
        scale, shift = _map_of(bn)
        own_bias = dict(layer.named_parameters()).get("bias")
        bias = shift if own_bias is None else own_bias.double() * scale + shift
        folded = detached_copy(layer)
        folded.weight = nn.Parameter(_scaled(layer, scale).to(layer.weight.dtype))
        folded.bias = nn.Parameter(bias.to(layer.weight.dtype))
    return folded


def _scaled(layer: nn.Linear | _ConvNd, scale: Tensor) -> Tensor:
    """The weights with each output feature scaled, float64."""
    weight = layer.weight.double()
    if isinstance(layer, _ConvTransposeNd):  # [inputs, outputs of a group, ...]
        groups, tail = layer.groups, weight.shape[2:]
        grouped = weight.view(groups, weight.shape[0] // groups, -1, *tail)
        by_group = scale.view(groups, 1, -1, *(1 for _ in tail))
        return (grouped * by_group).view(weight.shape)
    return weight * scale.reshape(-1, *(1 for _ in weight.shape[1:]))


def _map_of(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """Algorithm 2's scale and shift, float64 `[C]`."""
    with torch.no_grad():
        gamma, beta = (None if p is None else p.double() for p in (bn.weight, bn.bias))
        mean, variance = bn.running_mean.double(), bn.running_var.double()
        return inference_map(gamma, beta, mean, variance, bn.eps)


class Affine(nn.Module):
    """`scale*x + shift`, both of a shape that fits `[m, C, ...]`: what is left of BN."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, input: Tensor) -> Tensor:
        """`[m, C, ...]`, mapped."""
        return input * self.scale + self.shift


class ChannelAffine(Affine):
    """`scale*x + shift` by feature, both `[C]`: what is left of a BN layer that no layer takes in.

    Inputs are `[m, C]`, or `[m, C, ...]` of any number of dimensions.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[m, C, ...]`, mapped; the argument is called as PyTorch's layers call it."""
        shape = (-1, *(1 for _ in input.shape[2:]))
        return input * self.scale.view(shape) + self.shift.view(shape)


def fold(model: nn.Module, *, pairs: bool = True) -> nn.Module:
    """A copy of `model`, in inference mode and on memory of its own, without BN layers.

    A BN layer is folded into the linear or convolutional layer before it if a block declares the
    two a pair (`layers.NormalizedBlock`, as `ConvBN`, `LinearBN` and so every network here does),
    or if tracing the model (torch.fx) shows that the layer's output goes nowhere else. What cannot
    be traced is traced part by part. An `nn.Identity` takes the BN layer's place.

    Any other BN layer becomes its linear map: `ChannelAffine`, or `Affine` for BN by activation
    (`layers.ActivationBatchNorm`), since a convolution is the same at every place. One with hooks,
    or whose own forward cannot be traced, stays as it is, in inference mode.

    With `pairs=False`, pairs are not looked for: only those that blocks declare are folded.

    Raises `FoldError` for a declared pair that is none.
    """
    folded = detached_copy(model).eval()
    for path, module in list(folded.named_modules()):
        if isinstance(module, ActivationBatchNorm):
            scale, shift = _map_of(module.bn)
            shape = module.shape
            affine = Affine(scale.float().view(shape), shift.float().view(shape))
            folded = _replaced(folded, path, affine)
    for path, module in folded.named_modules():
        if isinstance(module, NormalizedBlock):
            _fold_block(path, module)
    if pairs and any(isinstance(module, BatchNorm) for module in folded.modules()):
        _fold_traced(folded)
    for path, module in list(folded.named_modules(remove_duplicate=False)):
        if isinstance(module, BatchNorm) and not _stays(module):
            scale, shift = _map_of(module)
            rest = ChannelAffine(scale.float(), shift.float())
            folded = _normalized_by(folded, path, module, rest)
    return folded.eval()


def _replaced(model: nn.Module, path: str, by: nn.Module) -> nn.Module:
    """The model with another module at `path`, which may be its root."""
    if not path:
        return by
    model.set_submodule(path, by)
    return model


def _normalized_by(model: nn.Module, path: str, bn: BatchNorm, by: nn.Module) -> nn.Module:
    """The model with `by` in place of a layer's normalization; the layer's rest stays."""
    if not isinstance(bn, TracedBatchNorm):
        return _replaced(model, path, by)
    bn.replace(by)
    return model


def _stays(bn: BatchNorm) -> bool:
    """Whether a BN layer is no linear map alone, or is none any more."""
    if isinstance(bn, TracedBatchNorm) and bn.is_replaced:
        return True
    return isinstance(bn, InterceptedBatchNorm) or (
        not isinstance(bn, TracedBatchNorm) and _has_hooks(bn)
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _fold_block(path: str, block: NormalizedBlock) -> None:
    assert isinstance(block, nn.Module)
    for layer_name, bn_name in block.normalized_pairs():
        layer, bn = block.get_submodule(layer_name), block.get_submodule(bn_name)
        if not isinstance(bn, BatchNorm):
            continue
        if type(layer) not in LINEAR or not isinstance(layer, nn.Linear | _ConvNd):
            raise FoldError(
                f"'{path}' pairs '{bn_name}' with '{layer_name}', a {type(layer).__name__}: "
                "only a linear or convolutional layer can take it in"
            )
        block.set_submodule(layer_name, fold_pair(layer, bn))
        _normalized_by(block, bn_name, bn, nn.Identity())


class _LayerTracer(fx.Tracer):
    """Takes BN layers, and PyTorch's own, for one step each."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _fold_traced(model: nn.Module) -> None:
    """Fold the pairs that a trace shows; if `model` cannot be traced, those of its children."""
    if isinstance(model, BatchNorm):
        return
    try:
        graph = _LayerTracer().trace(model)
    except Exception:  # a model may do anything: what is not followed keeps its linear map
        for child in model.children():
            if any(isinstance(module, BatchNorm) for module in child.modules()):
                _fold_traced(child)
        return
    calls = [node for node in graph.nodes if node.op == "call_module"]
    modules = dict(model.named_modules(remove_duplicate=False))
    uses = Counter(id(modules[str(node.target)]) for node in calls)
    shared = Counter(id(module) for module in modules.values())
    for node in calls:
        before: Any = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        names = (str(before.target), str(node.target))
        layer, bn = modules[names[0]], modules[names[1]]
        once = all(uses[id(m)] == 1 and shared[id(m)] == 1 for m in (layer, bn))
        if once and len(before.users) == 1 and _fits(layer, bn):
            model.set_submodule(names[0], fold_pair(layer, bn))
            _normalized_by(model, names[1], bn, nn.Identity())


def _fits(layer: nn.Module, bn: nn.Module) -> bool:
    """Whether two layers, one after the other, are a pair."""
    if not isinstance(bn, BatchNorm) or type(layer) not in LINEAR:
        return False
    if isinstance(bn, InterceptedBatchNorm) or _has_hooks(layer) or _has_hooks(bn):
        return False
    if isinstance(bn, TracedBatchNorm) and not bn.begins_so:
        return False
    assert isinstance(layer, nn.Linear | _ConvNd)
    num_outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return num_outputs == bn.num_features

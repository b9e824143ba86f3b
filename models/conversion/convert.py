"""PyTorch's own batch normalization layers made into ours, in place.

A layer keeps its identity, names, parameters, hooks and children; only its class changes, to a
subclass of both its own and `BatchNorm`. So code of the user's that asks `isinstance(m,
nn.BatchNorm2d)`, such as a `train` that freezes batch normalization, goes on as before.

A subclass with a `forward` of its own (timm's normalization with activation) is traced, and its
call of `batch_norm` replaced; all else that it does, it still does. One that cannot be traced has
the call intercepted each time. Not here: the normalization.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from downpour.models.batchnorm import BatchNorm
from downpour.models.errors import ModelError

Forward = Callable[[Any, Tensor, Any], Tensor]
"""`(layer, input, layer) -> output`."""

PLAIN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
"""What only normalizes. With one process, SyncBatchNorm is BN."""
NORMALIZATION = "normalization"
"""The child that stands for a layer's normalization in inference."""
OF_NORMALIZATION = {
    *("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
    *("batch_count", "batch_mean", "batch_variance"),
}
"""Parameters and buffers of a layer that nothing reads once a child normalizes."""


class ConvertedBatchNorm(BatchNorm):
    """A layer that was PyTorch's."""

    own_momentum = True

    def forward(self, input: Tensor) -> Tensor:
        """As `BatchNorm`, with PyTorch's name for the argument."""
        return self._normalize(input, self.training)


class TracedBatchNorm(ConvertedBatchNorm):
    """A layer of a subclass of PyTorch's that does more than normalize."""

    traced: dict[bool, Forward]
    """Its forward, in training (True) and in inference, which calls `normalized`."""
    begins_so: bool
    """Whether it does nothing with its input but normalize it, so that a layer before may do so."""

    def forward(self, input: Tensor) -> Tensor:
        """What the layer's own class does, the normalization by `BatchNorm`."""
        return self.traced[self.training](self, input, self)

    def normalized(self, x: Tensor, by_batch: bool) -> Tensor:
        """`[m, C, ...]`, normalized by the mini-batch, or by the population's statistics."""
        if self.is_replaced:
            y: Tensor = self._modules[NORMALIZATION](x)  # type: ignore[misc]
            return y
        return self._normalize(x, by_batch)

    @property
    def is_replaced(self) -> bool:
        """Whether a child stands for the normalization."""
        return NORMALIZATION in self._modules

    def replace(self, by: nn.Module) -> None:
        """Have a child of this layer normalize from now on; the layer's statistics go."""
        for tensors in (self._parameters, self._buffers):
            tensors.update(dict.fromkeys(OF_NORMALIZATION & tensors.keys()))
        self.add_module(NORMALIZATION, by)


class InterceptedBatchNorm(ConvertedBatchNorm):
    """A layer of a subclass of PyTorch's whose forward is run as it is, and cannot be traced.

    Its call of `batch_norm` with the layer's statistics is `BatchNorm`'s, whatever weights it is
    given. It is never folded.
    """

    original: Any
    """Its class, as the user wrote it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own class does, the normalization by `BatchNorm`."""
        with _Interception(self):
            return self.original.forward(self, *args, **kwargs)


def convert(model: nn.Module, inputs: Sequence[int] | None = None, *, seed: int = 0) -> nn.Module:
    """Make every batch normalization layer of PyTorch's in `model` one of ours, in place.

    A layer that normalizes by the mini-batch in inference too (`track_running_stats=False`) has no
    statistics to keep, and is left as it is.

    Args:
        model: any module; lazy layers take their sizes from `inputs`.
        inputs: the shape of an input of `model`, without the mini-batch's length.
        seed: what values of lazy layers are drawn from.

    Returns:
        `model`, or the converted layer if `model` itself is one.

    Raises:
        ModelError: a layer cannot be converted; names it and says why.
    """
    if inputs is not None:
        materialize(model, inputs, seed)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.jit.ScriptModule) and "BatchNorm" in str(layer.original_name):
            raise ModelError(
                f"layer '{name}' is batch normalization compiled by torch.jit.script: "
                "give the network without compiling it"
            )
        if isinstance(layer, BatchNorm):
            continue
        if isinstance(layer, _BatchNorm):
            _convert(name, layer)
    return model


def materialize(model: nn.Module, inputs: Sequence[int], seed: int) -> None:
    """Give lazy layers their sizes, by a forward in inference, and values drawn from `seed`.

    Raises:
        ModelError: the forward fails.
    """
    if not any(is_lazy(p) for p in (*model.parameters(), *model.buffers())):
        return
    was_training = [(m, m.training) for m in model.modules()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        try:
            model.eval()(torch.zeros(2, *inputs))
        except Exception as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise ModelError(
                f"lazy layers get no sizes from an input of shape {list(inputs)}: {told}"
            ) from error
    for module, training in was_training:
        module.training = training


def _convert(name: str, layer: _BatchNorm) -> None:
    if isinstance(layer, LazyModuleMixin) and any(is_lazy(p) for p in layer.parameters()):
        raise ModelError(f"layer '{name}' has no size yet: use {type(layer).__name__[4:]} for it")
    if layer.running_mean is None or layer.running_var is None:
        return
    if layer.running_mean.dtype != torch.float32:
        raise ModelError(
            f"layer '{name}' keeps {layer.running_mean.dtype} statistics: make the model float32"
        )
    kind: Any = type(layer)
    ours: Any = layer
    if kind.forward in PLAIN_FORWARDS:
        ours.__class__ = _converted_class(kind, ConvertedBatchNorm)
    else:
        try:
            graphs = {training: _graph_of(layer, training) for training in (True, False)}
        except _CannotTrace:
            ours.__class__ = _converted_class(kind, InterceptedBatchNorm)
            ours.__dict__["original"] = kind
        else:
            ours.__class__ = _converted_class(kind, TracedBatchNorm)
            ours.__dict__["begins_so"] = _begins_so(graphs[False])
            ours.__dict__["traced"] = {k: _replaced(layer, graph) for k, graph in graphs.items()}
    if ours.num_batches_tracked is None:
        ours.num_batches_tracked = torch.tensor(0, device=layer.running_mean.device)
    ours._add_moments()


@functools.cache
def _converted_class(kind: Any, by: type[BatchNorm]) -> type[nn.Module]:
    """A class that is `kind` to whoever asks, and normalizes as ours does."""
    return type(kind.__name__, (by, kind), {"__module__": __name__})


class _NormalizingTracer(fx.Tracer):
    """Looks into one layer, and at none of its children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _CannotTrace(Exception):
    """A forward is not a normalization and what else it does, one after the other."""


def _graph_of(layer: _BatchNorm, training: bool) -> fx.Graph:
    """The layer's own forward, which calls `batch_norm` once.

    Raises:
        _CannotTrace: it decides anew each time, or does not normalize with its own weights.
    """
    seen = copy.copy(layer)
    seen.training = training
    # Tracing runs what does not depend on the input: the layer counts its mini-batches.
    seen._buffers = {k: None if b is None else b.clone() for k, b in layer._buffers.items()}
    seen.__dict__["_check_input_dim"] = seen.__dict__["_check_non_zero_input_channels"] = _nothing
    try:
        graph = _NormalizingTracer().trace(seen)
    except Exception as error:
        raise _CannotTrace from error
    calls, inputs = _calls_and_inputs(graph)
    fits = len(calls) == len(inputs) == 1 and _takes_its_own(calls[0])
    if not fits or _by_batch(calls[0]) not in {training, False}:
        raise _CannotTrace
    return graph


def _calls_and_inputs(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    calls = [n for n in graph.nodes if n.op == "call_function" and n.target in _OWN]
    return calls, [n for n in graph.nodes if n.op == "placeholder"]


def _begins_so(graph: fx.Graph) -> bool:
    (call,), (given,) = _calls_and_inputs(graph)
    others = given.users.keys() - {call}
    return call.args[0] is given and all(node.target in (getattr, "dim", "size") for node in others)


def _replaced(layer: _BatchNorm, graph: fx.Graph) -> Forward:
    """The forward of a graph, its normalization by `TracedBatchNorm`."""
    (call,), (given,) = _calls_and_inputs(graph)
    with graph.inserting_after(given):
        itself = graph.placeholder("layer")
    with graph.inserting_before(call):
        ours = graph.call_function(_normalized, (itself, call.args[0], _by_batch(call)))
    call.replace_all_uses_with(ours)
    graph.erase_node(call)
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(node)
    function: Forward = type(fx.GraphModule(layer, graph)).forward
    return function


def _nothing(_: object) -> None:
    """In place of a check of shapes, which a symbol does not pass; `BatchNorm` makes one."""


def _normalized(layer: TracedBatchNorm, x: Tensor, by_batch: bool) -> Tensor:
    return layer.normalized(x, by_batch)


class _Interception(TorchFunctionMode):
    """While a layer's own forward runs: `batch_norm` with its statistics is `BatchNorm`'s."""

    def __init__(self, layer: InterceptedBatchNorm) -> None:
        super().__init__()
        self._layer = layer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _OWN:
            return func(*args, **kwargs)
        given = dict(zip(_ARGUMENTS[func], args, strict=False)) | dict(kwargs)
        if not all(given.get(name) is getattr(self._layer, name) for name in _STATISTICS):
            return func(*args, **kwargs)
        weights = (given.get("weight"), given.get("bias"))
        return self._layer._normalize(given["input"], bool(given.get("training")), weights)


_OWN = {
    functional.batch_norm: ("input", "running_mean", "running_var", "weight", "bias"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var"),
}
"""Functions that normalize, with their first arguments, which a layer's attributes are called as
well."""
_ARGUMENTS = {
    functional.batch_norm: (*_OWN[functional.batch_norm], "training"),
    torch.batch_norm: (*_OWN[torch.batch_norm], "training"),
}
_STATISTICS = ("running_mean", "running_var")


def _by_batch(call: fx.Node) -> Any:
    """The argument `training` of a call of `batch_norm`; a frozen layer gives False for ever."""
    return call.args[5] if len(call.args) > 5 else call.kwargs.get("training", False)


def _takes_its_own(call: fx.Node) -> bool:
    """Whether a call of `batch_norm` is given the layer's weights and statistics, or None."""
    names = _OWN[call.target]  # type: ignore[index]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    attributes = [(name, given.get(name)) for name in names if name != "input"]
    return bool(call.args) and all(
        value is None or (isinstance(value, fx.Node) and value.target == name)
        for name, value in attributes
    )

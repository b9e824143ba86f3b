"""A training step recorded once, and run from then on without what modules and autograd cost.

On a small net most of a step's time is not arithmetic: it is Python walking through modules, and
autograd building a graph that is the same every time. `record` runs one step while it notes every
kernel that PyTorch calls, forwards and backwards, and makes a plain function of the list. That
function calls the same kernels on the same shapes, so its results are the same to the bit (the
caller makes sure, see `workers.step.model_copy`), and it leaves the gradient where it is wanted.

What depends on the mini-batch's values and not just on its shape cannot be recorded: `record`
raises `CannotRecord` where it sees that. What it cannot see is Python's own randomness and other
decisions that a module takes anew for every mini-batch. So of models of users it also looks at what
they may decide by (`workers.step.outside`), and a recording is compared with the step again as the
run goes.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

from downpour.models.flat import FlatModel
from downpour.models.outputs import Loss
from downpour.workers.spec import Precision
from downpour.workers.step.interpreter import CannotInterpret, interpreted
from downpour.workers.step.outside import Outside
from downpour.workers.step.precision import computing_in

aten = torch.ops.aten
log = logging.getLogger(__name__)

_ALIASES = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}
_READS_VALUES = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default}
_SHAPED_BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_RANDOM = torch.Tag.nondeterministic_seeded
# The same kernels behind a thinner Python binding.
_THINNER: dict[Any, Callable[..., Any]] = {
    aten.mm.default: torch.mm,
    aten.mm.out: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.sigmoid.default: torch.sigmoid,
    aten.relu.default: torch.relu,
    aten.t.default: torch.t,
    aten.native_batch_norm.default: torch.native_batch_norm,
}


class CannotRecord(RuntimeError):
    """The step does something that a recording would not repeat."""


@dataclass(frozen=True, kw_only=True)
class _Window:
    """A strided view of one of a slot's buffers."""

    buffer: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def make(self, buffers: dict[str, Tensor], made: list[Tensor]) -> Tensor:
        return buffers[self.buffer].as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True, kw_only=True)
class _Constant:
    """A tensor of the model's that no step changes."""

    tensor: Tensor

    def make(self, buffers: dict[str, Tensor], made: list[Tensor]) -> Tensor:
        return self.tensor


@dataclass(frozen=True, kw_only=True)
class _View:
    """A view of another static tensor, made once in place of at every step."""

    operator: Callable[..., Tensor]
    base: int
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def make(self, buffers: dict[str, Tensor], made: list[Tensor]) -> Tensor:
        return self.operator(made[self.base], *self.arguments, **self.keywords)


Static = _Window | _Constant | _View


class Recording:
    """A step as a function of its mini-batch and of where weights, moments and gradient lie."""

    def __init__(
        self, function: Callable[..., Tensor], statics: Sequence[Static], *, by_python: bool
    ) -> None:
        """See `record`."""
        self.by_python = by_python
        """Whether Python makes the calls, and not PyTorch's interpreter."""
        self._function = function
        self._statics = tuple(statics)

    def bind(self, weights: Tensor, moments: Tensor) -> tuple[Tensor, ...]:
        """What `run` takes for a slot with these buffers, float32 [P] and [3, F]."""
        buffers = {"weights": weights.detach(), "moments": moments}
        made: list[Tensor] = []
        for static in self._statics:
            made.append(static.make(buffers, made))
        return tuple(made)

    def run(
        self,
        inputs: Tensor,
        targets: Tensor,
        statics: tuple[Tensor, ...],
        gradients: tuple[Tensor, ...],
    ) -> Tensor:
        """One step; the loss. `gradients` are overwritten, one for each trained parameter."""
        with torch.no_grad():
            return self._function(inputs, targets, *statics, *gradients)


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every kernel called below autograd, and keeps all tensors, so that ids stay theirs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to import the compiler takes a second

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


def record(
    model: FlatModel,
    loss_function: Loss,
    inputs: Tensor,
    targets: Tensor,
    precision: Precision = "float32",
    *,
    watched: bool = False,
) -> Recording:
    """Run one step of `model`, in training mode and bound, and give it as a recording.

    Writes the mini-batch's moments, as every step does, and no gradient. If it is `watched`, what
    modules keep outside of tensors must not change, nor may they draw from generators other than
    PyTorch's.

    Raises:
        CannotRecord: the step does what a recording would not repeat.
    """
    parameters = [p for p in model.parameters if p.requires_grad]
    outside = Outside(model.module, loss_function) if watched else None
    tape, loss, gradients = _taped(model, loss_function, inputs, targets, parameters, precision)
    if outside is not None and (changed := outside.changed()) is not None:
        raise CannotRecord(changed)
    return _Script(model, inputs, targets).write(tape, loss, parameters, gradients)


def check_repeatable(
    model: FlatModel, loss_function: Loss, inputs: Tensor, targets: Tensor, precision: Precision
) -> None:
    """Run one step as `record` does, for what it raises. Waits for the device, if there is one.

    Raises:
        CannotRecord: the step does what neither a recording nor a graph on a device would repeat.
    """
    parameters = [p for p in model.parameters if p.requires_grad]
    tape, _, _ = _taped(model, loss_function, inputs, targets, parameters, precision)
    _Script(model, inputs, targets).read(tape)


def _taped(
    model: FlatModel,
    loss_function: Loss,
    inputs: Tensor,
    targets: Tensor,
    parameters: Sequence[nn.Parameter],
    precision: Precision,
) -> tuple[_Tape, Tensor, tuple[Tensor | None, ...]]:
    """All calls of a step, its loss, and its gradients by parameter."""
    with _Tape() as tape:
        with computing_in(precision, inputs.device.type):
            loss = loss_function(model.module(inputs), targets)
        if skipped := model.left_out():
            raise CannotRecord(f"the step leaves out batch normalization '{skipped[0]}'")
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return tape, loss, gradients


class _Script:
    """Makes a function of a tape."""

    def __init__(self, model: FlatModel, inputs: Tensor, targets: Tensor) -> None:
        self._buffers = {"weights": model.weights, "moments": model.moments}
        self._graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {
            id(inputs): self._graph.placeholder("inputs"),
            id(targets): self._graph.placeholder("targets"),
        }
        self._last_input = self._nodes[id(targets)]
        self._varying = {_address(inputs), _address(targets)}
        self._statics: list[Static] = []
        self._static_index: dict[fx.Node, int] = {}
        self._made: set[int] = set()
        """Storages that the step itself allocates."""

    def write(
        self,
        tape: _Tape,
        loss: Tensor,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor | None],
    ) -> Recording:
        self.read(tape)
        places = [self._placeholder(f"gradient_{i}") for i in range(len(parameters))]
        found = [None if g is None else self._node(g) for g in gradients]
        loss_node = self._node(loss)
        _drop_unused(self._graph, {loss_node, *found})
        self._leave(places, found, loss_node)
        self._graph.output(loss_node)
        try:
            return Recording(interpreted(self._graph), self._statics, by_python=False)
        except CannotInterpret as error:
            log.info("Python makes the calls of a recorded step: %s", error)
        for node in self._graph.nodes:
            node.target = _THINNER.get(node.target, node.target)
        module = fx.GraphModule(nn.Module(), self._graph)
        return Recording(module.forward, self._statics, by_python=True)

    def read(self, tape: _Tape) -> None:
        """Take in all calls. Raises `CannotRecord` for one that cannot be repeated."""
        for call in tape.calls:
            self._add(*call)

    def _placeholder(self, name: str) -> fx.Node:
        with self._graph.inserting_after(self._last_input):
            self._last_input = self._graph.placeholder(name)
        return self._last_input

    def _static(self, static: Static) -> fx.Node:
        node = self._placeholder(f"static_{len(self._statics)}")
        self._static_index[node] = len(self._statics)
        self._statics.append(static)
        return node

    def _node(self, value: Any) -> Any:
        """The node that stands for a tensor; anything else stands for itself."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            self._nodes[id(value)] = self._found_outside(value)
        return self._nodes[id(value)]

    def _found_outside(self, tensor: Tensor) -> fx.Node:
        address = _address(tensor)
        if address in self._varying or address in self._made:
            raise CannotRecord("a tensor changes hands in a way that cannot be followed")
        for name, buffer in self._buffers.items():
            if address == _address(buffer) and buffer.numel():
                return self._static(
                    _Window(
                        buffer=name,
                        offset=int(tensor.storage_offset()),
                        shape=tuple(tensor.shape),
                        stride=tensor.stride(),
                    )
                )
        return self._static(_Constant(tensor=tensor.detach()))

    def _add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func in _READS_VALUES:
            raise CannotRecord("the step looks at a value")
        if not _SHAPED_BY_VALUES.isdisjoint(func.tags) and not _takes_by_number(func, args):
            raise CannotRecord(f"the shape of what {func} gives depends on values")
        nodes = map_aggregate(args, self._node)
        keywords = map_aggregate(kwargs, self._node)
        if func in _ALIASES:
            self._nodes[id(result)] = nodes[0]
        elif func is aten.t.default and nodes[0].target is func:
            self._nodes[id(result)] = nodes[0].args[0]
        elif self._is_static_view(func, nodes, keywords):
            base = self._static_index[nodes[0]]
            self._nodes[id(result)] = self._static(
                _View(operator=func, base=base, arguments=tuple(nodes[1:]), keywords=keywords)
            )
        else:
            self._refuse_to_change_constants(func, nodes, keywords)
            self._keep(self._graph.call_function(func, nodes, keywords), args, result)

    def _is_static_view(self, func: Any, nodes: Any, keywords: Any) -> bool:
        used: list[fx.Node] = []
        map_aggregate((nodes, keywords), lambda v: used.append(v) if isinstance(v, fx.Node) else v)
        return bool(func.is_view and used == [nodes[0]] and nodes[0] in self._static_index)

    def _refuse_to_change_constants(self, func: Any, nodes: Any, keywords: Any) -> None:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            target = nodes[i] if i < len(nodes) else keywords.get(argument.name)
            for node in target if isinstance(target, list | tuple) else [target]:
                index = self._static_index.get(node)
                while index is not None and isinstance(view := self._statics[index], _View):
                    index = view.base
                if index is None:
                    continue
                static = self._statics[index]
                if not (isinstance(static, _Window) and static.buffer == "moments"):
                    raise CannotRecord(f"{func} changes a tensor that outlives the step")

    def _keep(self, node: fx.Node, args: tuple[Any, ...], result: Any) -> None:
        if isinstance(result, Tensor):
            if not any(result is a for a in args):  # in place: the name that it has still holds
                self._nodes[id(result)] = node
                self._made.add(_address(result))
        elif isinstance(result, list | tuple):
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    item = self._graph.call_function(operator.getitem, (node, i))
                    self._nodes[id(part)] = item
                    self._made.add(_address(part))
        elif result is not None:
            raise CannotRecord(f"{node.target} gives a {type(result).__name__}")

    def _leave(
        self, places: Sequence[fx.Node], found: Sequence[fx.Node | None], loss: fx.Node
    ) -> None:
        """Have every gradient end up in its place."""
        copied: list[fx.Node] = []
        to: list[fx.Node] = []
        for place, node in zip(places, found, strict=True):
            if node is None:
                self._graph.call_function(aten.zero_.default, (place,))
            elif (
                node.target is aten.mm.default
                and not node.users
                and node is not loss
                and found.count(node) == 1
            ):
                node.target, node.kwargs = aten.mm.out, {"out": place}
            else:
                copied.append(node)
                to.append(place)
        if copied:
            self._graph.call_function(aten._foreach_copy_.default, (to, copied))


def _takes_by_number(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is indexing by integers, whose result has the shape of its indices."""
    if func is not aten.index.Tensor:
        return False
    return all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1])


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _drop_unused(graph: fx.Graph, wanted: set[fx.Node | None]) -> None:
    for node in reversed(list(graph.nodes)):
        unused = node.op == "call_function" and not node.users and node not in wanted
        if unused and not _has_effects(node):
            graph.erase_node(node)


def _has_effects(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return True  # nothing is known of it
    # Leaving out a random one would change what the next one draws.
    return target._schema.is_mutable or _RANDOM in target.tags

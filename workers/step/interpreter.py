"""A recorded step for PyTorch's own interpreter, which calls its kernels without Python.

For a small net the calls of a recording cost as much as their arithmetic when Python makes them:
each goes through a binding that looks at every argument anew. TorchScript's interpreter calls the
same kernels from a list with all of that looked up, and lets go of Python's lock meanwhile. The
list is run as it stands: the optimizations that TorchScript would make are not made, since some
replace kernels by others that round otherwise, and one drops `_foreach_copy_` altogether.

TorchScript's builder of graphs is not documented. Where it is not what it was in the version that
this was written for, or a call has an argument of a kind that is not known here, `interpreted`
says so and the recording stays Python's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# As `at::MemoryFormat` numbers them.
_MEMORY_FORMATS = {
    torch.contiguous_format: 0,
    torch.preserve_format: 1,
    torch.channels_last: 2,
    torch.channels_last_3d: 3,
}


class CannotInterpret(RuntimeError):
    """A recording has something that cannot be said to the interpreter."""


def interpreted(graph: fx.Graph) -> Callable[..., Tensor]:
    """A function that does what `graph` does: overloads of `torch.ops` with one tensor as result.

    Raises `CannotInterpret`.
    """
    try:
        function = torch._C._create_function_from_graph("step", _Translation().of(graph))
        choose = torch._C._set_graph_executor_optimize
    except (AttributeError, TypeError, RuntimeError) as error:
        raise CannotInterpret(str(error).strip().split("\n")[0]) from error

    def run(*arguments: Tensor) -> Tensor:
        # A choice of the thread's: it holds for other functions of TorchScript too.
        before = torch._C._get_graph_executor_optimize()
        choose(False)
        try:
            return function(*arguments)  # type: ignore[no-any-return]
        finally:
            choose(before)

    return run


class _Translation:
    """Says a graph of `torch.fx` in TorchScript's terms."""

    def __init__(self) -> None:
        self._graph: Any = torch._C.Graph()
        self._values: dict[fx.Node, Any] = {}
        self._several: dict[fx.Node, list[Any]] = {}
        """Of nodes that give more than one tensor."""

    def of(self, graph: fx.Graph) -> Any:
        """TorchScript's graph."""
        for node in graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._graph.addInput()
            elif node.op == "output":
                self._graph.registerOutput(self._values[node.args[0]])
            elif node.target is operator.getitem:
                whole, index = node.args
                self._values[node] = self._several[whole][index]
            elif node.target is aten._foreach_copy_.default:
                for to, what in zip(*node.args, strict=True):
                    self._call(aten.copy_.default, (to, what), {})
            else:
                self._add(node)
        return self._graph

    def _add(self, node: fx.Node) -> None:
        given = self._call(node.target, node.args, node.kwargs)
        if len(given) == 1:
            self._values[node] = given[0]
        else:
            self._several[node] = given

    def _call(self, function: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> list[Any]:
        if not isinstance(function, torch._ops.OpOverload):
            raise CannotInterpret(f"{function} is no kernel of PyTorch's")
        schema = function._schema
        inputs = []
        for i, argument in enumerate(schema.arguments):
            if i < len(args):
                value = args[i]
            elif argument.name in keywords:
                value = keywords[argument.name]
            else:
                value = argument.default_value
            inputs.append(self._value(value, argument.type))
        call = self._graph.create(schema.name, inputs, len(schema.returns))
        outputs = list(call.outputs())
        for output, returned in zip(outputs, schema.returns, strict=True):
            output.setType(returned.type)
        self._graph.appendNode(call)
        return outputs

    def _value(self, value: Any, kind: Any) -> Any:
        """What stands for an argument of the type `kind` of a schema."""
        if isinstance(value, fx.Node):
            return self._values[value]
        if isinstance(kind, torch._C.OptionalType):
            if value is None:
                return self._graph.insertConstant(None)
            kind = kind.getElementType()
        if isinstance(value, list | tuple):
            if not isinstance(kind, torch._C.ListType):
                raise CannotInterpret(f"{value} is given where {kind} is wanted")
            element = kind.getElementType()
            items = [self._value(item, element) for item in value]
            made = self._graph.create("prim::ListConstruct", items, 1)
            made.output().setType(torch._C.ListType(element))
            self._graph.appendNode(made)
            return made.output()
        if isinstance(value, torch.memory_format):
            value = _MEMORY_FORMATS[value]
        if kind.kind() == "FloatType":
            value = float(value)  # the interpreter does not make a float of an integer
        return self._graph.insertConstant(value)

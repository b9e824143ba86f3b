"""TorchScript's interpreter calls the kernels that a graph names, with the arguments it gives."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from downpour.workers.step.interpreter import CannotInterpret, interpreted

aten = torch.ops.aten
X, KERNEL = torch.arange(96.0).reshape(2, 3, 4, 4), torch.arange(54.0).reshape(2, 3, 3, 3)


def graph_of(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> fx.Graph:
    """One call; "x" and "y" stand for the two inputs."""
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in ("x", "y")}

    def stands_for(argument: Any) -> Any:
        return inputs.get(argument, argument) if isinstance(argument, str) else argument

    args = fx.node.map_aggregate(arguments, stands_for)
    graph.output(graph.call_function(function, args, keywords))  # type: ignore[arg-type]
    return graph


@pytest.mark.parametrize(
    ("function", "arguments", "keywords"),
    [
        (aten.add.Tensor, ("x", "x"), {"alpha": 3}),
        (aten.mul.Scalar, ("x", 2), {}),
        (aten.sum.dim_IntList, ("x", [0, 2]), {"dtype": torch.float64}),
        (aten.mean.dim, ("x", [-1], True), {}),
        (aten.cat.default, (["x", "x"], 1), {}),
        (aten.leaky_relu.default, ("x", 1), {}),
        (aten.ones_like.default, ("x",), {"memory_format": torch.preserve_format}),
        (aten.clone.default, ("x",), {"memory_format": torch.channels_last}),
        (aten.zeros.default, ([2, 2],), {"device": torch.device("cpu"), "dtype": torch.int64}),
        (aten.avg_pool2d.default, ("x", [2, 2]), {"divisor_override": None}),
        (aten.avg_pool2d.default, ("x", [2, 2], []), {}),
        (
            aten.convolution.default,
            ("x", "y", None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
            {},
        ),
    ],
)
def test_a_call_is_the_same_call(
    function: Callable[..., Tensor], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    def given(argument: Any) -> Any:
        if isinstance(argument, list):
            return [given(item) for item in argument]
        return {"x": X, "y": KERNEL}[argument] if isinstance(argument, str) else argument

    expected = function(*map(given, arguments), **keywords)
    found = interpreted(graph_of(function, *arguments, **keywords))(X, KERNEL)
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    assert torch.equal(found, expected)


def test_what_is_only_written_to_is_written_at_every_call() -> None:
    graph = fx.Graph()
    x, to, also_to = (graph.placeholder(name) for name in ("x", "to", "also_to"))
    doubled = graph.call_function(aten.add.Tensor, (x, x))
    graph.call_function(aten._foreach_copy_.default, ([to, also_to], [doubled, x]))
    graph.call_function(aten.mm.out, (x, x), {"out": to})
    largest = graph.call_function(aten.max.dim, (x, 0))
    graph.output(graph.call_function(operator.getitem, (largest, 1)))
    run = interpreted(graph)
    for i in range(4):
        a, b, c = torch.full((2, 2), float(i + 1)), torch.zeros(2, 2), torch.zeros(2, 2)
        assert torch.equal(run(a, b, c), torch.zeros(2, dtype=torch.int64))
        assert torch.equal(b, a @ a)
        assert torch.equal(c, a)


def test_what_it_cannot_say_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CannotInterpret, match="no kernel"):
        interpreted(graph_of(operator.add, "x", "x"))
    monkeypatch.delattr(torch._C, "_create_function_from_graph")
    with pytest.raises(CannotInterpret, match="_create_function_from_graph"):
        interpreted(graph_of(aten.add.Tensor, "x", "x"))


@pytest.mark.parametrize("optimize", [False, True])
def test_other_functions_of_torchscript_are_optimized_as_before(optimize: bool) -> None:
    run = interpreted(graph_of(aten.mm.default, "x", "y"))
    before = torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(optimize)
    try:
        run(torch.eye(2), torch.eye(2))
        assert torch._C._get_graph_executor_optimize() is optimize
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            run(torch.ones(2, 3), torch.ones(2, 3))
        assert torch._C._get_graph_executor_optimize() is optimize
    finally:
        torch._C._set_graph_executor_optimize(before)

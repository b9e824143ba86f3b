"""The floor of a training step on this machine: what it multiplies and moves, and how fast that is.

Multiply-adds are those of convolutions and matrix products, forwards and backwards. Bytes are what
convolutions, batch normalizations, poolings and the loss take and give, each tensor once a kernel:
activation functions count as part of the normalization before them, and neither copies nor changes
of layout count. Speeds are those of a large matrix product and of a copy of memory, measured on all
processors at once, as steps run. Kernels whose tensors stay in a cache may be faster than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from downpour.benchmarks.baselines.common import (
    CONTEXT,
    START_DEADLINE_S,
    Barrier,
    begin_child,
    count_steps,
    run_all,
)
from downpour.benchmarks.inception.plain import (
    PlainInception,
    PlainSetup,
    child_main,
    mini_batch,
)
from downpour.workers.spec import Precision
from downpour.workers.step.precision import computing_in

SIDE = 1024
"""Of the square matrices whose product is timed."""
COPIED = 16 << 20
"""Numbers of float32 that are copied: more than a cache holds."""
aten = torch.ops.aten
MOVES = frozenset(
    {
        aten.convolution.default,
        aten.convolution_backward.default,
        aten.native_batch_norm.default,
        aten.native_batch_norm_backward.default,
        aten.max_pool2d_with_indices.default,
        aten.max_pool2d_with_indices_backward.default,
        aten.avg_pool2d.default,
        aten.avg_pool2d_backward.default,
        aten.mm.default,
        aten.addmm.default,
        aten._log_softmax.default,
        aten._log_softmax_backward_data.default,
    }
)
"""Kernels whose tensors have to be moved, whatever is fused."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step has to do."""

    multiply_adds: int
    """Of convolutions and matrix products."""
    moved_bytes: int
    """Taken and given by the kernels of `MOVES`."""


class _Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what kernels take and give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in MOVES:
            given = result if isinstance(result, list | tuple) else (result,)
            self.moved += sum(t.nbytes for t in (*args, *given) if isinstance(t, Tensor))
        return result


def work_of(module: nn.Module, inputs: Tensor, targets: Tensor, precision: Precision) -> Work:
    """Count one forward and backward pass of cross-entropy over a mini-batch."""
    with FlopCounterMode(display=False) as flops, _Bytes() as traffic:
        with computing_in(precision):
            loss = functional.cross_entropy(module(inputs), targets)
        parameters = [p for p in module.parameters() if p.requires_grad]
        torch.autograd.grad(loss, parameters)
    return Work(multiply_adds=flops.get_total_flops() // 2, moved_bytes=traffic.moved)


def _speeds(setup: PlainSetup, barrier: Barrier, results: SimpleQueue[Any]) -> None:
    begin_child()
    dtype = torch.bfloat16 if setup.precision == "bfloat16" else torch.float32
    a, b = (torch.rand(SIDE, SIDE).to(dtype) for _ in range(2))
    source, target = torch.ones(COPIED), torch.zeros(COPIED)
    out = torch.mm(a, b)
    barrier.wait(START_DEADLINE_S)
    products, product_s = count_steps(lambda: torch.mm(a, b, out=out), setup.seconds)
    barrier.wait(START_DEADLINE_S)
    copies, copy_s = count_steps(lambda: target.copy_(source), setup.seconds)
    results.put((products * SIDE**3 / product_s, 2 * copies * source.nbytes / copy_s))


def measure(setup: PlainSetup) -> dict[str, Any]:
    """The floor of a mini-batch, and images a second of all processors there."""
    barrier, results = CONTEXT.Barrier(setup.workers), CONTEXT.SimpleQueue()
    arguments = [(setup, barrier, results)] * setup.workers
    deadline_s = START_DEADLINE_S + 4 * setup.seconds
    run_all(_speeds, arguments, name="speeds", deadline_s=deadline_s)
    found = [results.get() for _ in arguments]
    multiplied, moved = (sum(each) / len(found) for each in zip(*found, strict=True))
    torch.set_num_threads(1)
    model = PlainInception(setup, torch.channels_last).train()
    generator = torch.Generator().manual_seed(0)
    work = work_of(model, *mini_batch(setup, generator), setup.precision)
    multiply_s, move_s = work.multiply_adds / multiplied, work.moved_bytes / moved
    return {
        "images_per_s": setup.workers * setup.batch_size / (multiply_s + move_s),
        "multiply_ms": 1e3 * multiply_s,
        "move_ms": 1e3 * move_s,
        "multiply_adds": work.multiply_adds,
        "moved_bytes": work.moved_bytes,
        "multiply_adds_per_s": multiplied,
        "bytes_per_s": moved,
    }


if __name__ == "__main__":
    child_main(measure)

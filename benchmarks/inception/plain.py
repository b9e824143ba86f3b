"""Plain PyTorch loops of BN-Inception: a process for each processor, which share nothing.

PyTorch's own batch normalization and `torch.optim.SGD`, mini-batches ready in memory, in whichever
memory format is the faster one on this machine. As a main module it is given a `PlainSetup` as JSON
and the path to write to.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.benchmarks.baselines.common import (
    CONTEXT,
    START_DEADLINE_S,
    Barrier,
    begin_child,
    count_steps,
    run_all,
    write_result,
)
from downpour.benchmarks.models import with_pytorchs_norms
from downpour.models.inception import Inception
from downpour.workers.spec import Precision
from downpour.workers.step.precision import computing_in

CLASSES, KEPT = 10, 4
FORMATS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


@dataclass(frozen=True, kw_only=True)
class PlainSetup:
    """What is to be measured."""

    width: float
    """Of every layer, 1 being Figure 5's."""
    pixels: int
    """Height and width of an image."""
    precision: Precision
    """What forward and backward passes compute in."""
    workers: int
    """Processes."""
    seconds: float
    """How long to measure."""
    warmup_s: float
    """How long to run before that."""
    batch_size: int
    """Images in a mini-batch."""


class PlainInception(nn.Module):
    """BN-Inception of PyTorch's own layers, computing in a memory format of choice."""

    def __init__(self, setup: PlainSetup, memory_format: torch.memory_format) -> None:
        super().__init__()
        net = Inception(seed=0, num_classes=CLASSES, image_size=setup.pixels, width=setup.width)
        self.net = with_pytorchs_norms(net)
        self._format = memory_format
        self.to(memory_format=memory_format)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Logits, `[m, 10]`, of images `[m, 3, pixels, pixels]` in [0, 1]."""
        net = self.net
        maps = net.stages((2 * x - 1).contiguous(memory_format=self._format))  # type: ignore[operator]
        y: Tensor = net.output(net.dropout(net.pool(maps).flatten(1)))  # type: ignore[operator]
        return y


def mini_batch(setup: PlainSetup, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random images float32 `[m, 3, pixels, pixels]` and labels int64 `[m]`."""
    shape = (setup.batch_size, 3, setup.pixels, setup.pixels)
    return (
        torch.rand(shape, generator=generator),
        torch.randint(CLASSES, (setup.batch_size,), generator=generator),
    )


def training_step(setup: PlainSetup, memory_format: torch.memory_format) -> Callable[[], None]:
    """What makes one step on the next mini-batch."""
    model = PlainInception(setup, memory_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    batches = [mini_batch(setup, generator) for _ in range(KEPT)]

    def step() -> None:
        inputs, targets = batches[0]
        batches.append(batches.pop(0))
        optimizer.zero_grad()
        with computing_in(setup.precision):
            loss = functional.cross_entropy(model(inputs), targets)
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def loop(setup: PlainSetup, barrier: Barrier, results: SimpleQueue[Any]) -> None:
    """One process: find the faster format, warm up, then count steps."""
    begin_child()
    times: dict[str, float] = {}
    steps = {name: training_step(setup, which) for name, which in FORMATS.items()}
    for name, step in steps.items():
        step()
        began_s = time.thread_time()
        step()
        step()
        times[name] = time.thread_time() - began_s
    chosen = min(times, key=times.__getitem__)
    step = steps.pop(chosen)
    steps.clear()
    barrier.wait(START_DEADLINE_S)
    count_steps(step, setup.warmup_s)
    count, elapsed_s = count_steps(step, setup.seconds)
    results.put((chosen, count / elapsed_s))


def measure(setup: PlainSetup) -> dict[str, Any]:
    """Images a second over all processes, and the format of each."""
    barrier, results = CONTEXT.Barrier(setup.workers), CONTEXT.SimpleQueue()
    arguments = [(setup, barrier, results)] * setup.workers
    deadline_s = START_DEADLINE_S + setup.warmup_s + 2 * setup.seconds
    run_all(loop, arguments, name="loop", deadline_s=deadline_s)
    found = [results.get() for _ in arguments]
    return {
        "images_per_s": setup.batch_size * sum(rate for _, rate in found),
        "format": ", ".join(sorted({name for name, _ in found})),
        "setup": dataclasses.asdict(setup),
    }


def child_main(do: Callable[[PlainSetup], dict[str, Any]]) -> None:
    """The main of a module of this room."""
    write_result(Path(sys.argv[2]), do(PlainSetup(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    child_main(measure)

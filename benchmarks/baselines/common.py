"""What all baselines share: their setup, the data, one training step, and when to count.

A baseline is run as `python -m downpour.benchmarks.baselines.NAME SETUP RESULT`, with a `Setup` as
JSON and the path that its measurements are written to as JSON. Some can be given a `Lesson`
(`lesson`) in its place, and write how they learned.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.benchmarks.models import FACTORIES
from downpour.benchmarks.processes import die_with_parent

if TYPE_CHECKING:
    from downpour.benchmarks.baselines.lesson import Lesson

CONTEXT = multiprocessing.get_context("fork")
"""A baseline's module forks its processes before anything has started a thread: ten imports of
torch would take longer than what is measured.
"""
INPUTS, LABELS = "inputs.npy", "labels.npy"
TEST = "test-"
"""What the names of these files begin with for the test split."""
START_DEADLINE_S = 180.0


class Barrier(Protocol):
    """A multiprocessing barrier."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for all."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The network and its optimizer."""

    model: str = "mnist"
    """A name of `benchmarks.models.FACTORIES`."""
    batch_size: int = 32
    """Examples in a mini-batch."""
    learning_rate: float = 0.002
    """Rate; it has no influence on speed."""
    momentum: float = 0.9
    """Momentum, as torch.optim.SGD has it."""
    nesterov: bool = False
    """Nesterov's momentum, as torch.optim.SGD has it."""
    fused: bool = False
    """torch's fused implementation of SGD in place of the default one."""
    seed: int = 0
    """What the initial weights come from."""

    def build(self) -> nn.Module:
        """The network, the same in every process."""
        return FACTORIES[self.model](seed=self.seed)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Momentum SGD."""
        return torch.optim.SGD(
            model.parameters(),
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            fused=self.fused or None,
        )


@dataclass(frozen=True, kw_only=True)
class Setup(Task):
    """What a baseline is to measure."""

    data: str
    """Folder with the decoded training split: `inputs.npy` float32 [N, 784], `labels.npy`."""
    workers: int
    """Processes that compute gradients."""
    seconds: float
    """How long to measure."""
    warmup_s: float
    """How long to run before that."""
    dashboard: bool = False
    """Ray's dashboard beside it, where Ray is in it."""

    def batches(self, worker: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Mini-batches without end, ready in memory: the data cost a plain loop nothing."""
        folder = Path(self.data)
        # Copy-on-write: torch wants memory that it could write; the pages are shared all the same.
        inputs = torch.from_numpy(np.load(folder / INPUTS, mmap_mode="c"))
        labels = torch.from_numpy(np.load(folder / LABELS))
        size = self.batch_size
        starts = np.arange(0, len(labels) - size + 1, size)
        rng = np.random.default_rng([worker, len(labels)])
        while True:
            for start in rng.permutation(starts).tolist():
                yield inputs[start : start + size], labels[start : start + size]


def gradient_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Leave the mini-batch's gradient in the parameters."""
    torch.autograd.backward(functional.cross_entropy(model(inputs), targets))


def begin_child() -> None:
    """For every process of a baseline: one thread, and no life after its parent's."""
    die_with_parent()
    torch.set_num_threads(1)


def count_steps(step: Callable[[], object], seconds: float) -> tuple[int, float]:
    """Run steps for so many seconds; returns how many, and the seconds that they took."""
    began_s = now_s = time.monotonic()
    steps = 0
    while now_s < began_s + seconds:
        step()
        steps += 1
        now_s = time.monotonic()
    return steps, now_s - began_s


def run_all(
    target: Callable[..., None],
    arguments: Iterable[tuple[Any, ...]],
    *,
    name: str,
    deadline_s: float,
) -> None:
    """Run `target` in a process for each of `arguments`; raises if one fails or is late."""
    processes = [
        CONTEXT.Process(target=target, args=given, name=f"{name} {i}")
        for i, given in enumerate(arguments)
    ]
    for process in processes:
        process.start()
    _join(processes, deadline_s)


def _join(processes: Sequence[ForkProcess], deadline_s: float) -> None:
    """Wait for processes; raises for one that failed."""
    give_up_s = time.monotonic() + deadline_s
    for process in processes:
        process.join(max(0.0, give_up_s - time.monotonic()))
        if process.exitcode != 0:
            raise RuntimeError(f"{process.name} ended with {process.exitcode}")


def child_main(
    measure: Callable[[Setup], dict[str, Any]],
    learn: Callable[[Lesson], dict[str, Any]] | None = None,
) -> None:
    """The main of a baseline's module: measure a `Setup`, or learn a `Lesson`."""
    from downpour.benchmarks.baselines.lesson import Lesson

    asked, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    if "goal" in asked:
        assert learn is not None
        value = learn(Lesson(**asked))
    else:
        value = measure(Setup(**asked))
    write_result(result, value)


def write_result(path: Path, value: dict[str, Any]) -> None:
    """Write what was measured as JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.rename(path)

"""torch DistributedDataParallel over gloo, on the MNIST net: synchronous.

One iteration takes a mini-batch on each rank, averages the gradients and makes a single step. So
that the work is the same as elsewhere, each of those mini-batches counts as an update. The ranks'
BN averages are left apart, which spares it a broadcast an iteration.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from downpour.benchmarks.baselines.common import (
    CONTEXT,
    START_DEADLINE_S,
    Setup,
    begin_child,
    child_main,
    gradient_of,
    run_all,
)
from downpour.benchmarks.baselines.lesson import (
    Averaged,
    Course,
    Examiner,
    Examples,
    Lesson,
    set_rate,
)

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

PROBE_STEPS = 20


def join_group(rank: int, task: Setup | Lesson, store: str) -> DistributedDataParallel:
    """Join the group of all ranks; returns the network, wrapped."""
    begin_child()
    warnings.simplefilter("ignore")
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=task.workers
    )
    return DistributedDataParallel(
        task.build().train(), broadcast_buffers=False, gradient_as_bucket_view=True
    )


def run(rank: int, setup: Setup, store: str, results: SimpleQueue[Any]) -> None:
    """One rank that measures."""
    model = join_group(rank, setup, store)
    import torch.distributed as dist

    batches = setup.batches(rank)
    optimizer = setup.optimizer(model)

    def step() -> None:
        optimizer.zero_grad()
        gradient_of(model, *next(batches))
        optimizer.step()

    def steps(seconds: float, step_s: float) -> int:
        # All ranks must take the same number; the first one's clock decides it.
        number = torch.tensor([max(1, round(seconds / step_s))])
        dist.broadcast(number, 0)
        return int(number)

    def times(number: int) -> float:
        began_s = time.monotonic()
        for _ in range(number):
            step()
        return (time.monotonic() - began_s) / number

    step_s = times(PROBE_STEPS)
    step_s = times(steps(setup.warmup_s, step_s))
    number = steps(setup.seconds, step_s)
    step_s = times(number)
    if rank == 0:
        results.put((number, step_s))
    dist.destroy_process_group()


def run_lesson(rank: int, lesson: Lesson, store: str, results: SimpleQueue[Any]) -> None:
    """One rank that learns; the first one conducts."""
    model = join_group(rank, lesson, store)
    net: nn.Module = model.module
    import torch.distributed as dist

    examples, course = Examples(lesson), Course(lesson)
    examiner = Examiner(lesson) if rank == 0 else None
    optimizer, averaged = lesson.optimizer(model), Averaged(lesson, net)
    for span in lesson.spans(multiple=lesson.workers):
        dist.barrier()
        with course.training():
            set_rate(optimizer, lesson.rate(span.epoch))
            for index in range(span.start + rank, span.stop, lesson.workers):
                inputs, targets = examples.batch(span.epoch, index)
                optimizer.zero_grad()
                gradient_of(model, inputs, targets)
                optimizer.step()
                averaged.follow()  # on every rank, since all wait for the slowest
            dist.barrier()
        if examiner is not None:
            with course.scoring():
                accuracies = examiner.score(averaged.model)
            course.look(span, accuracies, averaged=lesson.workers)
        over = torch.tensor([course.over])
        dist.broadcast(over, 0)
        if over:
            break
    if rank == 0:
        results.put(course.result())
    dist.destroy_process_group()


def _on_all_ranks(run_rank: Callable[..., None], task: Setup | Lesson, deadline_s: float) -> Any:
    """Run `run_rank` in a process for each rank, and return what the first one puts."""
    results = CONTEXT.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as folder:
        store = str(Path(folder) / "store")
        arguments = [(i, task, store, results) for i in range(task.workers)]
        run_all(run_rank, arguments, name="rank", deadline_s=deadline_s)
    return results.get()


def measure(setup: Setup) -> dict[str, Any]:
    """Mini-batches a second over all ranks."""
    deadline_s = START_DEADLINE_S + 3 * (setup.warmup_s + setup.seconds)
    iterations, step_s = _on_all_ranks(run, setup, deadline_s)
    return {
        "updates_per_s": setup.workers / step_s,
        "updates": setup.workers * iterations,
        "iterations_per_s": 1 / step_s,
    }


def learn(lesson: Lesson) -> dict[str, Any]:
    """All ranks, to the goal."""
    result: dict[str, Any] = _on_all_ranks(run_lesson, lesson, lesson.deadline_s)
    return result


if __name__ == "__main__":
    child_main(measure, learn)

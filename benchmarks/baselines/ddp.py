"""torch DistributedDataParallel over gloo, on the MNIST net: synchronous.

One iteration takes a mini-batch on each rank, averages the gradients and makes a single step. So
that the work is the same as elsewhere, each of those mini-batches counts as an update. The ranks'
BN averages are left apart, which spares it a broadcast an iteration.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch

from downpour.benchmarks.baselines.common import (
    CONTEXT,
    START_DEADLINE_S,
    Setup,
    begin_child,
    child_main,
    gradient_of,
    join,
)

PROBE_STEPS = 20


def run(rank: int, setup: Setup, store: str, results: SimpleQueue[Any]) -> None:
    """One rank."""
    begin_child()
    warnings.simplefilter("ignore")
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=setup.workers
    )
    model = DistributedDataParallel(
        setup.build().train(), broadcast_buffers=False, gradient_as_bucket_view=True
    )
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


def measure(setup: Setup) -> dict[str, Any]:
    """Mini-batches a second over all ranks."""
    results = CONTEXT.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as folder:
        store = str(Path(folder) / "store")
        processes = [
            CONTEXT.Process(target=run, args=(i, setup, store, results), name=f"rank {i}")
            for i in range(setup.workers)
        ]
        for process in processes:
            process.start()
        join(processes, START_DEADLINE_S + 3 * (setup.warmup_s + setup.seconds))
    iterations, step_s = results.get()
    return {
        "updates_per_s": setup.workers / step_s,
        "updates": setup.workers * iterations,
        "iterations_per_s": 1 / step_s,
    }


if __name__ == "__main__":
    child_main(measure)

"""A parameter server over torch RPC, asynchronous under a lock, on the MNIST net.

The pattern of PyTorch's tutorials on `torch.distributed.rpc`: trainers send their gradients with
`rpc_sync`; the server takes the step under a lock, and the call's answer is the new weights.
"""

from __future__ import annotations

import tempfile
import threading
import warnings
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from downpour.benchmarks.baselines.common import (
    CONTEXT,
    START_DEADLINE_S,
    Barrier,
    Setup,
    begin_child,
    child_main,
    count_steps,
    gradient_of,
    join,
)


class ParameterServer:
    """Weights and optimizer, under a lock."""

    current: ParameterServer
    """The one of this process, for calls that come in."""

    def __init__(self, setup: Setup) -> None:
        self.lock = threading.Lock()
        self.model = setup.build().train()
        self.optimizer = setup.optimizer(self.model)

    def update(self, gradients: list[Tensor]) -> list[Tensor]:
        """Take a step, and return a copy of the weights."""
        with self.lock:
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            return [parameter.detach().clone() for parameter in self.model.parameters()]


def update(gradients: list[Tensor]) -> list[Tensor]:
    """What a trainer calls on the server's process."""
    return ParameterServer.current.update(gradients)


def run(rank: int, setup: Setup, store: str, barrier: Barrier, results: SimpleQueue[Any]) -> None:
    """One process: rank 0 is the server, the others train."""
    begin_child()
    warnings.simplefilter("ignore")
    from torch.distributed import rpc

    if rank == 0:
        ParameterServer.current = ParameterServer(setup)
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{store}")
    name = f"trainer{rank}" if rank else "server"
    initialize: Any = rpc.init_rpc  # which has no types
    initialize(name, rank=rank, world_size=setup.workers + 1, rpc_backend_options=options)
    if rank:
        results.put(_train(rank, setup, barrier))
    rpc.shutdown()


def _train(rank: int, setup: Setup, barrier: Barrier) -> tuple[int, float]:
    from torch.distributed import rpc

    model, batches = setup.build().train(), setup.batches(rank)
    parameters = list(model.parameters())

    def step() -> None:
        model.zero_grad()
        gradient_of(model, *next(batches))
        weights = rpc.rpc_sync("server", update, args=([p.grad for p in parameters],))
        with torch.no_grad():
            for parameter, values in zip(parameters, weights, strict=True):
                parameter.copy_(values)

    step()
    barrier.wait(START_DEADLINE_S)
    count_steps(step, setup.warmup_s)
    return count_steps(step, setup.seconds)


def measure(setup: Setup) -> dict[str, Any]:
    """Updates a second over all trainers."""
    barrier, results = CONTEXT.Barrier(setup.workers), CONTEXT.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as folder:
        store = str(Path(folder) / "store")
        processes = [
            CONTEXT.Process(target=run, args=(i, setup, store, barrier, results), name=f"rank {i}")
            for i in range(setup.workers + 1)
        ]
        for process in processes:
            process.start()
        join(processes, START_DEADLINE_S + setup.warmup_s + 2 * setup.seconds)
    found = [results.get() for _ in range(setup.workers)]
    return {
        "updates_per_s": sum(steps / elapsed_s for steps, elapsed_s in found),
        "updates": sum(steps for steps, _ in found),
    }


if __name__ == "__main__":
    child_main(measure)

"""Ray's documented asynchronous parameter server, on the MNIST net.

The pattern of Ray's documentation ("Parameter Server", asynchronous training): an actor holds the
model and its optimizer, worker actors compute gradients on weights that they are handed, and the
driver waits with `ray.wait` for whichever gradient is ready, applies it, and sends that worker on
with the new weights. Weights and gradients travel through the object store.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from downpour.benchmarks.baselines.common import Setup, child_main, gradient_of

Arrays = list[npt.NDArray[np.float32]]


class ParameterServer:
    """The actor that holds the weights."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(1)
        self.model = setup.build().train()
        self.optimizer = setup.optimizer(self.model)
        self.updates = 0

    def apply_gradients(self, gradients: Arrays) -> Arrays:
        """Take a step, and return the new weights."""
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient.copy())
        self.optimizer.step()
        self.updates += 1
        return self.get_weights()

    def get_weights(self) -> Arrays:
        """The weights as they are."""
        return [parameter.detach().numpy() for parameter in self.model.parameters()]

    def progress(self) -> tuple[int, float]:
        """Updates so far, and the monotonic clock."""
        return self.updates, time.monotonic()


class Worker:
    """An actor that computes gradients on weights that it is handed."""

    def __init__(self, setup: Setup, index: int) -> None:
        torch.set_num_threads(1)
        self.model = setup.build().train()
        self.batches = setup.batches(index)

    def compute_gradients(self, weights: Arrays) -> Arrays:
        """The gradient of the worker's next mini-batch."""
        parameters = list(self.model.parameters())
        with torch.no_grad():
            for parameter, values in zip(parameters, weights, strict=True):
                parameter.copy_(torch.from_numpy(values.copy()))
                parameter.grad = None
        gradient_of(self.model, *next(self.batches))
        return [p.grad.numpy() for p in parameters if p.grad is not None]

    def ready(self) -> bool:
        """Answers once the actor is up."""
        return True


def measure(setup: Setup) -> dict[str, Any]:
    """Updates a second by the server's own count and clock."""
    ray.init(include_dashboard=setup.dashboard, log_to_driver=False, logging_level=logging.ERROR)
    try:
        remote: Any = ray.remote
        server = remote(ParameterServer).options(num_cpus=0).remote(setup)
        worker_class = remote(Worker).options(num_cpus=0)
        workers = [worker_class.remote(setup, i) for i in range(setup.workers)]
        ray.get([worker.ready.remote() for worker in workers])
        weights = server.get_weights.remote()
        gradients = {worker.compute_gradients.remote(weights): worker for worker in workers}

        def train(seconds: float) -> tuple[int, float]:
            give_up_s = time.monotonic() + seconds
            while time.monotonic() < give_up_s:
                (ready,), _ = ray.wait(list(gradients))
                worker = gradients.pop(ready)
                latest = server.apply_gradients.remote(ready)
                gradients[worker.compute_gradients.remote(latest)] = worker
            count: tuple[int, float] = ray.get(server.progress.remote())
            return count

        before, before_s = train(setup.warmup_s)
        after, after_s = train(setup.seconds)
        return {
            "updates_per_s": (after - before) / (after_s - before_s),
            "updates": after - before,
        }
    finally:
        ray.shutdown()


if __name__ == "__main__":
    child_main(measure)

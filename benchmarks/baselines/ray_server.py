"""Ray's documented asynchronous parameter server, on the MNIST net.

The pattern of Ray's documentation ("Parameter Server", asynchronous training): an actor holds the
model and its optimizer, worker actors compute gradients on weights that they are handed, and the
driver waits with `ray.wait` for whichever gradient is ready, applies it, and sends that worker on
with the new weights. Weights and gradients travel through the object store.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import nn

from downpour.benchmarks.baselines.common import Setup, child_main, gradient_of
from downpour.benchmarks.baselines.lesson import (
    Averaged,
    Course,
    Examiner,
    Examples,
    Lesson,
    set_rate,
)

Arrays = list[npt.NDArray[np.float32]]


class ParameterServer:
    """The actor that holds the weights."""

    def __init__(self, task: Setup | Lesson) -> None:
        torch.set_num_threads(1)
        self.model = task.build().train()
        self.optimizer = task.optimizer(self.model)
        self.averaged = Averaged(task, self.model) if isinstance(task, Lesson) else None
        self.updates = 0

    def apply_gradients(self, gradients: Arrays) -> Arrays:
        """Take a step, and return the new weights."""
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient.copy())
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.follow()
        self.updates += 1
        return self.get_weights()

    def get_weights(self) -> Arrays:
        """The weights as they are."""
        return _weights_of(self.model)

    def get_scored(self) -> Arrays:
        """The weights that are to be scored."""
        return _weights_of(self.model if self.averaged is None else self.averaged.model)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate."""
        set_rate(self.optimizer, rate)

    def progress(self) -> tuple[int, float]:
        """Updates so far, and the monotonic clock."""
        return self.updates, time.monotonic()


def _weights_of(model: nn.Module) -> Arrays:
    return [parameter.detach().numpy() for parameter in model.parameters()]


class Follower:
    """A network that is handed its weights."""

    def __init__(self, task: Setup | Lesson) -> None:
        torch.set_num_threads(1)
        self.model = task.build().train()

    def take(self, weights: Arrays) -> None:
        """Use these weights."""
        with torch.no_grad():
            for parameter, values in zip(self.model.parameters(), weights, strict=True):
                parameter.copy_(torch.from_numpy(values.copy()))
                parameter.grad = None

    def gradients(self, weights: Arrays, inputs: torch.Tensor, targets: torch.Tensor) -> Arrays:
        """The gradient of a mini-batch."""
        self.take(weights)
        gradient_of(self.model, inputs, targets)
        return [p.grad.numpy() for p in self.model.parameters() if p.grad is not None]

    def ready(self) -> bool:
        """Answers once the actor is up."""
        return True


class Worker(Follower):
    """An actor that computes gradients on weights that it is handed, for a measurement."""

    def __init__(self, setup: Setup, index: int) -> None:
        super().__init__(setup)
        self.batches = setup.batches(index)

    def compute_gradients(self, weights: Arrays) -> Arrays:
        """The gradient of the worker's next mini-batch."""
        return self.gradients(weights, *next(self.batches))


class Learner(Follower):
    """An actor that computes gradients on weights that it is handed, to learn, and scores."""

    def __init__(self, lesson: Lesson, *, scores: bool) -> None:
        super().__init__(lesson)
        self.examples = Examples(lesson)
        self.examiner = Examiner(lesson) if scores else None

    def compute_gradients(self, weights: Arrays, epoch: int, index: int) -> Arrays:
        """The gradient of mini-batch `index` of an epoch."""
        return self.gradients(weights, *self.examples.batch(epoch, index))

    def score(self, weights: Arrays) -> tuple[float, float | None]:
        """Accuracies of the weights; see `Examiner.score`."""
        assert self.examiner is not None
        self.take(weights)
        return self.examiner.score(self.model)


@contextlib.contextmanager
def started(task: Setup | Lesson, dashboard: bool = False) -> Iterator[Any]:
    """A Ray of its own, with the server; gives its handle."""
    ray.init(include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield actor(ParameterServer).remote(task)
    finally:
        ray.shutdown()


def actor(cls: type) -> Any:
    """The class as an actor's, of which any number find room."""
    remote: Any = ray.remote
    return remote(cls).options(num_cpus=0)


def measure(setup: Setup) -> dict[str, Any]:
    """Updates a second by the server's own count and clock."""
    with started(setup, setup.dashboard) as server:
        workers = [actor(Worker).remote(setup, i) for i in range(setup.workers)]
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


def learn(lesson: Lesson) -> dict[str, Any]:
    """Server and workers, to the goal; the driver conducts.

    A worker that has no more mini-batches in a span stays idle until the next, so that nothing is
    computed while the first one scores.
    """
    with started(lesson) as server:
        workers = [
            actor(Learner).remote(lesson, scores=index == 0) for index in range(lesson.workers)
        ]
        ray.get([worker.ready.remote() for worker in workers])
        course = Course(lesson)
        for span in lesson.spans():
            server.set_rate.remote(lesson.rate(span.epoch))
            weights = server.get_weights.remote()
            ray.wait([weights])
            indices = iter(range(span.start, span.stop))
            with course.training():
                gradients = {
                    worker.compute_gradients.remote(weights, span.epoch, index): worker
                    for worker, index in zip(workers, indices, strict=False)
                }
                while gradients:
                    (ready,), _ = ray.wait(list(gradients))
                    worker = gradients.pop(ready)
                    weights = server.apply_gradients.remote(ready)
                    index = next(indices, None)
                    if index is not None:
                        next_ready = worker.compute_gradients.remote(weights, span.epoch, index)
                        gradients[next_ready] = worker
                ray.wait([weights])
            with course.scoring():
                accuracies = ray.get(workers[0].score.remote(server.get_scored.remote()))
            course.look(span, accuracies)
            if course.over:
                break
        return course.result()


if __name__ == "__main__":
    child_main(measure, learn)

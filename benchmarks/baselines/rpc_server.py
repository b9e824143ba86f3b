"""A parameter server over torch RPC, asynchronous under a lock, on the MNIST net.

The pattern of PyTorch's tutorials on `torch.distributed.rpc`: trainers send their gradients with
`rpc_sync`; the server takes the step under a lock, and the call's answer is the new weights.
"""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from downpour.benchmarks.baselines.common import (
    CONTEXT,
    START_DEADLINE_S,
    Barrier,
    Setup,
    begin_child,
    child_main,
    count_steps,
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


class ParameterServer:
    """Weights and optimizer, under a lock."""

    current: ParameterServer
    """The one of this process, for calls that come in."""

    def __init__(self, task: Setup | Lesson) -> None:
        self.lock = threading.Lock()
        self.model = task.build().train()
        self.optimizer = task.optimizer(self.model)
        self.averaged = Averaged(task, self.model) if isinstance(task, Lesson) else None

    def update(self, gradients: list[Tensor]) -> list[Tensor]:
        """Take a step, and return a copy of the weights."""
        with self.lock:
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            if self.averaged is not None:
                self.averaged.follow()
            return _weights_of(self.model)

    def begin(self, rate: float) -> list[Tensor]:
        """Set the learning rate, and return a copy of the weights."""
        with self.lock:
            set_rate(self.optimizer, rate)
            return _weights_of(self.model)

    def scored(self) -> list[Tensor]:
        """Return a copy of the weights that are to be scored."""
        with self.lock:
            return _weights_of(self.model if self.averaged is None else self.averaged.model)


def _weights_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def update(gradients: list[Tensor]) -> list[Tensor]:
    """What a trainer calls on the server's process after a step."""
    return ParameterServer.current.update(gradients)


def begin(rate: float) -> list[Tensor]:
    """What a trainer calls on the server's process between two looks."""
    return ParameterServer.current.begin(rate)


def scored() -> list[Tensor]:
    """What a trainer calls on the server's process to score."""
    return ParameterServer.current.scored()


def join_network(rank: int, task: Setup | Lesson, store: str) -> None:
    """Join the network of the server, which is rank 0, and the trainers."""
    begin_child()
    warnings.simplefilter("ignore")
    from torch.distributed import rpc

    if rank == 0:
        ParameterServer.current = ParameterServer(task)
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{store}")
    name = f"trainer{rank}" if rank else "server"
    initialize: Any = rpc.init_rpc  # which has no types
    initialize(name, rank=rank, world_size=task.workers + 1, rpc_backend_options=options)


class Trainer:
    """A network that follows the server's."""

    def __init__(self, task: Setup | Lesson) -> None:
        self.model = task.build().train()
        self._parameters = list(self.model.parameters())

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Send a mini-batch's gradient, and take the new weights."""
        from torch.distributed import rpc

        self.model.zero_grad()
        gradient_of(self.model, inputs, targets)
        self._take(rpc.rpc_sync("server", update, args=([p.grad for p in self._parameters],)))

    def begin(self, rate: float) -> None:
        """Set the server's learning rate, and take its weights."""
        from torch.distributed import rpc

        self._take(rpc.rpc_sync("server", begin, args=(rate,)))

    def take_scored(self) -> None:
        """Take the weights that are to be scored."""
        from torch.distributed import rpc

        self._take(rpc.rpc_sync("server", scored))

    def _take(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, values in zip(self._parameters, weights, strict=True):
                parameter.copy_(values)


def run(rank: int, setup: Setup, store: str, barrier: Barrier, results: SimpleQueue[Any]) -> None:
    """One process that measures."""
    join_network(rank, setup, store)
    from torch.distributed import rpc

    if rank:
        trainer, batches = Trainer(setup), setup.batches(rank)

        def step() -> None:
            trainer.step(*next(batches))

        step()
        barrier.wait(START_DEADLINE_S)
        count_steps(step, setup.warmup_s)
        results.put(count_steps(step, setup.seconds))
    rpc.shutdown()


def run_lesson(
    rank: int,
    lesson: Lesson,
    store: str,
    barrier: Barrier,
    results: SimpleQueue[Any],
    shared: Shared,
) -> None:
    """One process that learns; the first trainer conducts.

    Trainers take the next mini-batch that nobody has, so that none waits at the end of a span for
    longer than a step.
    """
    join_network(rank, lesson, store)
    from torch.distributed import rpc

    if rank:
        conducts = rank == 1
        trainer, examples, course = Trainer(lesson), Examples(lesson), Course(lesson)
        examiner = Examiner(lesson) if conducts else None
        for span in lesson.spans():
            trainer.begin(lesson.rate(span.epoch))
            if conducts:
                shared.next.value = span.start
            barrier.wait(lesson.deadline_s)
            with course.training():
                while (index := shared.take()) < span.stop:
                    trainer.step(*examples.batch(span.epoch, index))
                barrier.wait(lesson.deadline_s)
            if examiner is not None:
                trainer.take_scored()
                with course.scoring():
                    accuracies = examiner.score(trainer.model)
                course.look(span, accuracies)
                shared.over.value = course.over
            barrier.wait(lesson.deadline_s)
            if shared.over.value:
                break
        if conducts:
            results.put(course.result())
    rpc.shutdown()


class Shared:
    """What trainers that learn share."""

    def __init__(self) -> None:
        """Made before the processes are forked."""
        self.next = CONTEXT.Value("q", 0)
        self.over = CONTEXT.Value("b", 0)

    def take(self) -> int:
        """The number of the next mini-batch of the epoch, for the caller alone."""
        with self.next.get_lock():
            index = int(self.next.value)
            self.next.value = index + 1
        return index


def _on_all(
    run_rank: Callable[..., None], task: Setup | Lesson, deadline_s: float, *more: Any
) -> SimpleQueue[Any]:
    """Run `run_rank` in a process for the server and each trainer; returns what they put."""
    barrier, results = CONTEXT.Barrier(task.workers), CONTEXT.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as folder:
        store = str(Path(folder) / "store")
        ranks = range(task.workers + 1)
        arguments = [(i, task, store, barrier, results, *more) for i in ranks]
        run_all(run_rank, arguments, name="rank", deadline_s=deadline_s)
    return results


def measure(setup: Setup) -> dict[str, Any]:
    """Updates a second over all trainers."""
    results = _on_all(run, setup, START_DEADLINE_S + setup.warmup_s + 2 * setup.seconds)
    found = [results.get() for _ in range(setup.workers)]
    return {
        "updates_per_s": sum(steps / elapsed_s for steps, elapsed_s in found),
        "updates": sum(steps for steps, _ in found),
    }


def learn(lesson: Lesson) -> dict[str, Any]:
    """Server and trainers, to the goal."""
    result: dict[str, Any] = _on_all(run_lesson, lesson, lesson.deadline_s, Shared()).get()
    return result


if __name__ == "__main__":
    child_main(measure, learn)

"""The limit: plain training loops, a process for each core, that share nothing.

No server, no communication: each has its own weights and `torch.optim.SGD`. Where learning is
compared, there is one, on one core.
"""

from __future__ import annotations

import time
from multiprocessing.queues import SimpleQueue
from typing import Any

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


def loop(worker: int, setup: Setup, barrier: Barrier, results: SimpleQueue[Any]) -> None:
    """One process: warm up, then count steps."""
    begin_child()
    model, batches = setup.build().train(), setup.batches(worker)
    optimizer = setup.optimizer(model)

    def step() -> None:
        optimizer.zero_grad()
        gradient_of(model, *next(batches))
        optimizer.step()

    step()
    barrier.wait(START_DEADLINE_S)
    count_steps(step, setup.warmup_s)
    cpu_s = time.process_time()
    steps, elapsed_s = count_steps(step, setup.seconds)
    results.put((steps, elapsed_s, time.process_time() - cpu_s))


def measure(setup: Setup) -> dict[str, Any]:
    """Updates a second over all processes, and what an update costs."""
    barrier, results = CONTEXT.Barrier(setup.workers), CONTEXT.SimpleQueue()
    arguments = [(i, setup, barrier, results) for i in range(setup.workers)]
    deadline_s = START_DEADLINE_S + setup.warmup_s + 2 * setup.seconds
    run_all(loop, arguments, name="loop", deadline_s=deadline_s)
    found = [results.get() for _ in arguments]
    steps = sum(steps for steps, _, _ in found)
    return {
        "updates_per_s": sum(steps / elapsed_s for steps, elapsed_s, _ in found),
        "updates": steps,
        "cpu_ms_per_update": 1e3 * sum(cpu_s for _, _, cpu_s in found) / steps,
    }


def learn(lesson: Lesson) -> dict[str, Any]:
    """One loop on one core, to its goal."""
    begin_child()
    examples, examiner, course = Examples(lesson), Examiner(lesson), Course(lesson)
    model = lesson.build().train()
    optimizer, averaged = lesson.optimizer(model), Averaged(lesson, model)
    for span in lesson.spans():
        with course.training():
            set_rate(optimizer, lesson.rate(span.epoch))
            for index in range(span.start, span.stop):
                inputs, targets = examples.batch(span.epoch, index)
                optimizer.zero_grad()
                gradient_of(model, inputs, targets)
                optimizer.step()
                averaged.follow()
        with course.scoring():
            accuracies = examiner.score(averaged.model)
        course.look(span, accuracies)
        if course.over:
            break
    return course.result()


if __name__ == "__main__":
    child_main(measure, learn)

"""Training to a goal, as all baselines do it: epochs, mini-batches, clock, scoring.

A `Lesson` says what to train and how far. Training runs in spans between two looks at the test
split; only what happens within a span is on the clock. An `Averaged` network is scored if weights
are averaged. Not here: how gradients are combined.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from downpour.benchmarks.baselines.common import INPUTS, LABELS, START_DEADLINE_S, TEST, Task
from downpour.benchmarks.learning.curve import Curve, Ended, Look, as_plain
from downpour.benchmarks.learning.search import REFERENCE_BATCH

CHUNK = 1000
"""Examples that are scored at a time."""
LOOK_DEADLINE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Span:
    """Mini-batches [start, stop) of an epoch, between two looks."""

    epoch: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Lesson(Task):
    """What a baseline is to learn."""

    data: str
    """Folder with both splits, decoded: see `harness.decoded_mnist`."""
    num_examples: int
    """Of the training split."""
    workers: int
    """Processes that compute gradients."""
    decay: float
    """What the rate is multiplied by after every epoch."""
    average: float | None
    """Share of the weights' average that is kept at every 32 examples; None scores the weights
    themselves."""
    step_examples: int
    """Examples in the gradient of one step."""
    epochs: int
    """Epochs at most."""
    looks_per_epoch: int
    """How often the test split is scored."""
    goal: float
    """Accuracy in [0, 1] at which to stop."""
    bound_s: float
    """Training seconds after which to stop, at the next look."""
    recompute_examples: int
    """Training examples from which Algorithm 2 recomputes BN statistics."""
    asked_s: float
    """When this was asked for, by the monotonic clock."""

    def rate(self, epoch: int) -> float:
        """The learning rate in an epoch, counted from 0."""
        return self.learning_rate * self.decay**epoch

    @property
    def deadline_s(self) -> float:
        """Seconds after which something must have gone wrong."""
        return START_DEADLINE_S + 3 * self.bound_s + LOOK_DEADLINE_S * len(self.spans())

    def spans(self, multiple: int = 1) -> list[Span]:
        """The whole training, span by span, each of a `multiple` of mini-batches.

        An epoch leaves out the examples that do not fill a mini-batch, others each time.
        """
        steps = self.num_examples // self.batch_size // multiple
        looks = min(self.looks_per_epoch, steps)
        cuts = [multiple * (steps * i // looks) for i in range(looks + 1)]
        return [
            Span(epoch=epoch, start=start, stop=stop)
            for epoch in range(self.epochs)
            for start, stop in itertools.pairwise(cuts)
        ]


class Examples:
    """The training split in memory, in an order of its own each epoch, the same everywhere."""

    def __init__(self, lesson: Lesson) -> None:
        """Map the arrays."""
        self._lesson = lesson
        self._inputs, self._labels = load(lesson.data)
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Mini-batch `index` of an epoch: float32 [m, 784] and int64 [m]."""
        if epoch != self._epoch:
            rng = np.random.default_rng([self._lesson.seed, epoch])
            self._order = torch.from_numpy(rng.permutation(self._lesson.num_examples))
            self._epoch = epoch
        size = self._lesson.batch_size
        rows = self._order[index * size : (index + 1) * size]
        return self._inputs[rows], self._labels[rows]


class Examiner:
    """Scores a network on the test split, and recomputes its BN statistics for that."""

    def __init__(self, lesson: Lesson) -> None:
        """Load what is scored, and what Algorithm 2 looks at: the same examples every time."""
        self._lesson = lesson
        self._inputs, self._labels = load(lesson.data, TEST)
        inputs, _ = load(lesson.data)
        rng = np.random.default_rng([lesson.seed, 0, lesson.recompute_examples])
        rows = rng.permutation(len(inputs))[: lesson.recompute_examples]
        self._training = inputs[torch.from_numpy(rows)]

    def score(self, model: nn.Module) -> tuple[float, float | None]:
        """Accuracies with the running statistics, and with those of Algorithm 2.

        The second is left out if the first has reached the goal. `model` is left as it was.
        """
        running = self._accuracy(model)
        if running >= self._lesson.goal:
            return running, None
        return running, self._accuracy(self._recomputed(model))

    def _accuracy(self, model: nn.Module) -> float:
        training = model.training
        model.eval()
        correct = 0
        with torch.inference_mode():
            for start in range(0, len(self._labels), CHUNK):
                outputs = model(self._inputs[start : start + CHUNK])
                correct += int((outputs.argmax(1) == self._labels[start : start + CHUNK]).sum())
        model.train(training)
        return correct / len(self._labels)

    def _recomputed(self, model: nn.Module) -> nn.Module:
        """A copy with the mean over mini-batches of their means and unbiased variances."""
        other = copy.deepcopy(model)
        for layer in other.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.reset_running_stats()
                layer.momentum = None  # a plain mean over all mini-batches
        other.train()
        size = self._lesson.batch_size
        with torch.no_grad():
            for start in range(0, len(self._training) - size + 1, size):
                other(self._training[start : start + size])
        return other


class Averaged:
    """An exponential moving average of a network's weights as they change, as this system has it.

    Running statistics are averaged likewise. One call takes all tensors, so this costs less than
    `torch.optim.swa_utils.AveragedModel` does.
    """

    def __init__(self, lesson: Lesson, model: nn.Module) -> None:
        """Nothing is averaged yet; `model` is the one that is trained, by whatever changes it."""
        self._decay = lesson.average
        self._batches = lesson.step_examples / REFERENCE_BATCH
        self._seen = 0.0
        self.model = model if self._decay is None else copy.deepcopy(model)
        """What is to be scored: the average, or the model itself if nothing is averaged."""
        self._averages, self._values = _numbers(self.model), _numbers(model)

    def follow(self) -> None:
        """Take in the weights after a step."""
        if self._decay is None:
            return
        self._seen += self._batches
        share = max(1 - self._decay**self._batches, self._batches / self._seen)
        torch._foreach_lerp_(self._averages, self._values, share)


def _numbers(model: nn.Module) -> list[Tensor]:
    """All floating-point numbers of a network: parameters and running statistics."""
    return [value for value in model.state_dict().values() if value.is_floating_point()]


class Course:
    """Clock and record of a training; kept by the process that conducts it."""

    def __init__(self, lesson: Lesson, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing has been trained."""
        self._lesson = lesson
        self._clock = clock
        self._looks: list[Look] = []
        self._startup_s: float | None = None
        self._examples = self._updates = 0
        self.seconds = 0.0
        """Training seconds so far."""
        self.scoring_s = 0.0
        """Seconds that scoring took so far."""
        self._ended: Ended | None = None

    @property
    def over(self) -> bool:
        """Whether the goal is reached, or the time is up."""
        return self._ended is not None

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """On the clock."""
        began_s = self._clock()
        if self._startup_s is None:
            self._startup_s = began_s - self._lesson.asked_s
        yield
        self.seconds += self._clock() - began_s

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Off the clock."""
        began_s = self._clock()
        yield
        self.scoring_s += self._clock() - began_s

    def look(self, span: Span, accuracies: tuple[float, float | None], averaged: int = 1) -> None:
        """Note accuracies at the end of a span; `averaged` mini-batches make an update."""
        batches = span.stop - span.start
        self._examples += batches * self._lesson.batch_size
        self._updates += batches // averaged
        self._looks.append(
            Look(
                examples=self._examples,
                updates=self._updates,
                epoch=self._examples / self._lesson.num_examples,
                seconds=self.seconds,
                accuracy=accuracies[0],
                accuracy_recomputed=accuracies[1],
            )
        )
        if self._looks[-1].best >= self._lesson.goal:
            self._ended = "arrived"
        elif self.seconds >= self._lesson.bound_s:
            self._ended = "out of time"

    def result(self) -> dict[str, Any]:
        """The curve, as plain data."""
        return as_plain(
            Curve(
                startup_s=self._startup_s or 0.0,
                scoring_s=round(self.scoring_s, 3),
                looks=tuple(self._looks),
                ended=self._ended or "out of epochs",
            )
        )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def load(folder: str, prefix: str = "") -> tuple[Tensor, Tensor]:
    """The decoded inputs, float32 [N, 784], and labels, int64 [N], of a split."""
    # Copy-on-write: torch wants memory that it could write; the pages are shared all the same.
    inputs = np.load(Path(folder) / f"{prefix}{INPUTS}", mmap_mode="c")
    labels = np.load(Path(folder) / f"{prefix}{LABELS}")
    return torch.from_numpy(inputs), torch.from_numpy(labels)

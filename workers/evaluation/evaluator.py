"""Scoring weights with BN statistics: those that the server keeps, or Algorithm 2's.

Weights come in as flat vectors, from partitions or from a checkpoint; mini-batches come in as an
iterable. Ray is not here.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from downpour.models.batchnorm import DEFAULT_EPS
from downpour.models.conversion.state import has_spectral_norm, settle_spectral_norm
from downpour.models.flat import FlatModel
from downpour.models.moments import Moments, Population
from downpour.models.outputs import LOSSES, main_output, tells_classes
from downpour.paramserver import durable
from downpour.shuffler.images.specs import ImageSpec
from downpour.workers.evaluation.answers import Answers
from downpour.workers.evaluation.joint_moments import JointMoments
from downpour.workers.evaluation.metrics import metrics_of
from downpour.workers.spec import ModelSpec
from downpour.workers.tasks import ACCURACY, EVALUATION_LOSS, Figure, goodness

Batches = Iterable[tuple[Tensor, Tensor]]
"""Inputs [m, ...], and targets: classes, int64 [m], or what the task has."""
PRECISION = 0.01
"""The standard error at which an estimate of population statistics is good enough: the root mean
square, over features, of how far normalized values are expected to be off, in standard deviations.
About 470 mini-batches of 32 independent normal values; about 200 of section 4.1's net."""
LEAST_BATCHES = 16
"""Fewer mini-batches do not tell how much they vary."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well weights do on a split."""

    accuracy: float
    """Share of examples whose highest output is their class, in [0, 1]; 0 if outputs are not of
    classes."""
    loss: float
    """Mean loss; of cross-entropy, in nats."""
    num_examples: int
    of_classes: bool = True
    """Whether the network gives a number for each class."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The figures of a task other than classification, the one that decides first."""

    @property
    def metric(self) -> str:
        """The name of the figure that decides which weights are best."""
        if self.metrics:
            return next(iter(self.metrics))
        return ACCURACY if self.of_classes else EVALUATION_LOSS

    @property
    def value(self) -> float:
        """That figure."""
        if self.metrics:
            return self.metrics[self.metric]
        return self.accuracy if self.of_classes else self.loss

    @property
    def goodness(self) -> float:
        """The same, turned so that more is better; -inf if it is not a number."""
        return goodness(self.metric, self.value)

    @property
    def figure(self) -> Figure:
        """The figure that decides, with its name."""
        return Figure(metric=self.metric, value=self.value)

    @property
    def figures(self) -> dict[str, float]:
        """All figures by their names, the loss aside."""
        return dict(self.metrics) if self.metrics else {self.metric: self.value}


class Evaluator:
    """A model that scores any weights on one split."""

    def __init__(self, spec: ModelSpec, batches: Callable[[], Batches]) -> None:
        """`batches()` gives the split afresh each time."""
        self._batches = batches
        self._model: FlatModel = spec.build_flat()
        self.layout = self._model.layout
        self.weights = torch.zeros(self.layout.num_parameters)
        """Where to put the weights to be scored, float32 [P]."""
        self.statistics = torch.zeros(2, self.layout.num_features)
        """Where to put their BN statistics, float32 [2, F]: mean, unbiased variance."""
        self._model.bind(self.weights, statistics=self.statistics)
        self._model.module.eval()
        self._joint = JointMoments(self._model)
        self._spectral = has_spectral_norm(self._model.module)
        self._loss = spec.build_loss()
        self._main_only = spec.loss in LOSSES  # auxiliary classifiers are for training
        self._num_classes = spec.num_classes
        image = spec.image
        self._task = spec.task
        self._shape = (
            (image.channels, image.height, image.width) if isinstance(image, ImageSpec) else None
        )
        self.answers = Answers()
        """Of the latest scoring."""
        self.num_batches = 0
        """Mini-batches that it has begun on so far, for whoever looks whether it gets on."""

    def _counted(self, batches: Batches) -> Batches:
        for batch in batches:
            self.num_batches += 1
            yield batch

    def score(self, *, keep_answers: bool = True) -> Score:
        """Score what is in `weights` and `statistics`, by Algorithm 2's inference.

        `answers` are those of this scoring if they are to be kept, and none otherwise.
        """
        if self._spectral:
            settle_spectral_norm(self._model.module)
        correct = examples = 0
        answers = Answers(self._shape)
        metrics = metrics_of(self._task)
        loss, of_classes = 0.0, metrics is None
        with torch.inference_mode():
            for inputs, targets in self._counted(self._batches()):
                outputs = self._model.module(inputs)
                answer = main_output(outputs)
                if metrics is not None:
                    metrics.add(answer, targets)
                else:
                    of_classes = tells_classes(answer, self._num_classes)
                if of_classes:
                    correct += int((answer.argmax(1) == targets).sum())
                    if keep_answers:
                        answers.add(inputs, answer, targets)
                scored = answer if self._main_only else outputs
                loss += float(self._loss(scored, targets)) * len(targets)
                examples += len(targets)
        self.answers = answers
        return Score(
            accuracy=correct / max(examples, 1),
            loss=loss / max(examples, 1),
            num_examples=examples,
            of_classes=of_classes,
            metrics={} if metrics is None else metrics.compute(),
        )

    def recompute(self, batches: Batches, *, most_s: float = math.inf) -> PopulationEstimate:
        """Replace `statistics` by Algorithm 2's for `weights`; see `estimate_population`."""
        counted = self._counted(batches)
        estimate = estimate_population(
            self._model, counted, precision=PRECISION, most_s=most_s, joint=self._joint
        )
        self.statistics.copy_(estimate.statistics)
        return estimate

    def save(
        self, path: str, *, versions: Sequence[int], score: Score, num_recomputed: int = 0
    ) -> None:
        """Write what was scored as safetensors under PyTorch's names, whole or not at all.

        `num_recomputed` mini-batches are what the statistics were recomputed on; 0 says that they
        are the server's.
        """
        state = self._model.state_dict()
        about = {
            "versions": list(versions),
            **score.figures,
            "loss": score.loss,
            "num_examples": score.num_examples,
            "bn_statistics": "recomputed" if num_recomputed else "moving",
            "mini_batches": num_recomputed,
        }
        durable.save_tensors(
            {name: tensor.clone() for name, tensor in state.items()},
            path,
            metadata={"downpour": json.dumps(about)},
        )

    def load(self, path: str) -> None:
        """Read what `save` wrote. Raises `ModelError` for a file of another model."""
        import safetensors.torch

        state = safetensors.torch.load_file(path)
        weights, statistics = self._model.split(state)
        self.weights.copy_(weights)
        self.statistics.copy_(statistics)


@dataclass(frozen=True, kw_only=True, eq=False)
class PopulationEstimate:
    """Population statistics from some mini-batches."""

    statistics: Tensor
    """float32 [2, F]: mean and unbiased variance."""
    num_batches: int
    """Mini-batches that they were computed on."""
    standard_error: float
    """How far normalized values are expected to be off, see `standard_error`; inf for fewer than
    two mini-batches."""


def population_statistics(model: FlatModel, batches: Batches) -> Tensor:
    """Algorithm 2, steps 8 to 10: statistics [2, F] recomputed with the weights frozen.

    `E[x]` is the mean over mini-batches of their means, `Var[x]` that of their unbiased variances,
    over all of `batches`. The model is left in inference mode, bound as it was.
    """
    return estimate_population(model, batches).statistics


def estimate_population(
    model: FlatModel,
    batches: Batches,
    *,
    precision: float = 0.0,
    most_s: float = math.inf,
    clock: Callable[[], float] = time.thread_time,
    joint: JointMoments | None = None,
) -> PopulationEstimate:
    """Algorithm 2's statistics over as many of `batches` as are needed.

    Several go through the network in one pass, by `joint` if it is given: it belongs to `model`,
    and remembers whether they may. Ends once, after `LEAST_BATCHES`, the estimate has a standard
    error of at most `precision`, or `most_s` seconds are over; it looks after each pass. By default
    these are processor time: what others use of a busy machine does not count. A mini-batch whose
    moments are not finite is left out, as the server refuses it. A feature that no mini-batch had
    values of, since its layer is frozen or was always skipped, keeps the model's statistics. The
    model is left in inference mode, bound as it was.

    Raises `MomentsError` if there is no mini-batch to average.
    """
    num_features = model.layout.num_features
    population = Population.empty(num_features)
    between = Moments.empty(2 * num_features)
    error, number = math.inf, 0
    began_s = clock()
    model.module.train()
    try:
        passes = (joint or JointMoments(model)).of(batches)
        with torch.no_grad(), contextlib.closing(passes):
            for moments in passes:
                number += len(moments)
                finite = moments[torch.isfinite(moments[:, 1:]).flatten(1).all(1)]
                if len(finite):
                    population = population.merge(Population.from_batches(finite))
                    there = (finite[:, 0] > 0).repeat(1, 2)
                    values = finite[:, 1:].flatten(1)
                    between = between.merge(Moments.of_values(values, there))
                if number < LEAST_BATCHES:
                    continue
                if population.num_batches >= 2:
                    error = standard_error(population, between)
                if error <= precision or clock() - began_s >= most_s:
                    break
    finally:
        model.module.eval()
    return PopulationEstimate(
        statistics=torch.stack(population.compute(model.statistics)).to(torch.float32),
        num_batches=population.num_batches,
        standard_error=error,
    )


def standard_error(population: Population, between: Moments, eps: float = DEFAULT_EPS) -> float:
    """How far values normalized by an estimate are expected to be from those by the population.

    `between` are the moments, over the k mini-batches of `population`, of their means and unbiased
    variances: [2F]. With s^2 the variance over mini-batches, the estimates' own variances are
    `s^2(mean)/k` and `s^2(var)/k`. A normalized value moves by `d(mean)/sqrt(var + eps)`, and is
    scaled by `1 + d(var)/(2*(var + eps))` to first order. The result is the root mean square of
    both together over features, in the unit of `disagreement`. Features without values do not
    count: 0 for a model that has no others, inf if one has values in a single mini-batch.
    """
    seen = population.seen
    known = seen > 0
    if not bool(known.any()):
        return 0.0
    if bool((seen == 1).any()):
        return math.inf
    of_mean, of_variance = (between.m2 / (between.count - 1).clamp(min=1)).view(2, -1)
    scale = population.variance + eps
    square = of_mean / scale + of_variance / (2 * scale).square()
    return float((square / seen)[known].mean().sqrt())

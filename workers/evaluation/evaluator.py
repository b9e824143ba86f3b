"""Scoring weights with the server's BN statistics, and recomputing those by Algorithm 2.

Weights come in as flat vectors, from partitions or from a checkpoint; mini-batches come in as an
iterable. Ray is not here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

from downpour.models.flat import FlatModel, flatten, state_dict
from downpour.models.moments import Population
from downpour.workers.spec import ModelSpec

Batches = Iterable[tuple[Tensor, Tensor]]
"""Inputs [m, ...] and int64 targets [m]."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well weights do on a split."""

    accuracy: float
    """Share of examples whose highest output is their class, in [0, 1]."""
    loss: float
    """Mean loss; of cross-entropy, in nats."""
    num_examples: int


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
        self._loss = spec.build_loss()

    def score(self) -> Score:
        """Score what is in `weights` and `statistics`, by Algorithm 2's inference."""
        correct = examples = 0
        loss = 0.0
        with torch.inference_mode():
            for inputs, targets in self._batches():
                outputs = self._model.module(inputs)
                correct += int((outputs.argmax(1) == targets).sum())
                loss += float(self._loss(outputs, targets)) * len(targets)
                examples += len(targets)
        return Score(
            accuracy=correct / max(examples, 1),
            loss=loss / max(examples, 1),
            num_examples=examples,
        )

    def save(self, path: str, *, versions: Sequence[int], score: Score) -> None:
        """Write what was scored as safetensors under PyTorch's names, whole or not at all."""
        state = state_dict(self.weights, self.statistics, self.layout)
        about = {
            "versions": list(versions),
            "accuracy": score.accuracy,
            "loss": score.loss,
            "num_examples": score.num_examples,
        }
        partial = f"{path}.partial"
        safetensors.torch.save_file(
            {name: tensor.clone() for name, tensor in state.items()},
            partial,
            metadata={"downpour": json.dumps(about)},
        )
        os.replace(partial, path)

    def load(self, path: str) -> None:
        """Read what `save` wrote. Raises `ModelError` for a file of another model."""
        state = safetensors.torch.load_file(path)
        weights, statistics = flatten(state, self.layout)
        self.weights.copy_(weights)
        self.statistics.copy_(statistics)


def population_statistics(model: FlatModel, batches: Batches) -> Tensor:
    """Algorithm 2, steps 8 to 10: statistics [2, F] recomputed with the weights frozen.

    `E[x]` is the mean over mini-batches of their means, `Var[x]` that of their unbiased variances,
    over all of `batches`. The model is left in inference mode, bound as it was.
    """
    population = Population.empty(model.layout.num_features)
    model.module.train()
    with torch.no_grad():
        for inputs, _ in batches:
            model.module(inputs)
            count, mean, variance = model.moments
            population = population.merge(Population.from_batch(count, mean, variance))
    model.module.eval()
    mean, variance = population.compute()
    return torch.stack([mean, variance]).to(torch.float32)

"""The arithmetic of a virtual cluster: real gradients, and partitions that apply them.

Gradients are computed one after the other, on the weights that a step's pull has got, by the code
of a real replica. Partitions keep a real `PartitionState`. A version's weights are never written
over: pulls of one version share them, and they are freed when nobody needs them any more.

Everything is computed on one thread, in an order that the virtual clock decides, so the bits are
the same every time. Not here: that order (`run`), and scoring (`learning`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from downpour.cluster.config.derive import make_decoder, model_spec, step_config
from downpour.cluster.config.run import RunConfig
from downpour.cluster.simulate.partition import CarriedPush, PartitionKeeper
from downpour.cluster.training.inputs import Model, build_model, check_data, loader
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.ledger import Ledger
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Version
from downpour.shuffler.dataset.own import open_split
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.plan.plan import Plan
from downpour.workers.step.model_copy import Mailbox, ModelCopy, StepContext

KEEP_BYTES = 1 << 30
"""Most bytes of decoded training rows that are kept in memory."""
ROWS_AT_A_TIME = 1000

Load = Callable[[int, int], tuple[Tensor, Tensor]]
"""Gives inputs [m, ...] and targets [m] of mini-batch (epoch, batch)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRows:
    """The training rows and the initial weights of a run; several runs may share them."""

    plan: Plan
    load: Load
    model: Model

    @classmethod
    def of(cls, config: RunConfig) -> TrainingRows:
        """Open the data of `config`, and build its network.

        Raises:
            DatasetError: a split cannot be read, or is damaged.
            PlanError: the data has too few rows for the run.
        """
        plan = check_data(config).plan
        load = _kept_rows(config, plan) or loader(config, plan)
        return cls(plan=plan, load=load, model=build_model(config))


def _kept_rows(config: RunConfig, plan: Plan) -> Load | None:
    """All rows decoded once, if they are the same in every epoch and fit into `KEEP_BYTES`.

    Returns:
        What gives a mini-batch of them; None if rows have to be decoded each time.
    """
    decoder = make_decoder(config)
    row_bytes = 4 * math.prod(decoder.spec.input_shape)
    if not decoder.augment.changes_nothing or plan.num_rows * row_bytes > KEEP_BYTES:
        return None
    dataset = open_split(config.data.data, config.data.train_split, config.model.columns)
    reader = RowReader(dataset, num_classes=config.model.num_classes)
    inputs, labels = [], []
    for start in range(0, plan.num_rows, ROWS_AT_A_TIME):
        rows = np.arange(start, min(start + ROWS_AT_A_TIME, plan.num_rows), dtype=np.int64)
        decoded = decoder.decode(reader.take(rows), rows=rows)
        if len(decoded.kept) < len(rows):
            return None
        inputs.append(torch.from_numpy(decoded.inputs))
        labels.append(torch.from_numpy(decoded.labels))
    all_inputs, all_labels = torch.cat(inputs), torch.cat(labels)

    def load(epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(plan.rows(epoch, batch))
        return all_inputs[rows], all_labels[rows]

    return load


@dataclass(kw_only=True, eq=False)
class CollectedPush:
    """What a push has collected."""

    mailbox: Mailbox
    loss: float = 0.0
    """Summed over the examples."""
    examples: int = 0
    norm: float = 0.0


class VirtualArithmetic:
    """Computes the steps of all replicas, and makes the partitions' state."""

    def __init__(self, config: RunConfig, num_partitions: int, examples: TrainingRows) -> None:
        """Prepare for a run of `config`."""
        self.plan = examples.plan
        self.partitions = examples.model.cut(num_partitions)
        self._initial = torch.from_numpy(examples.model.weights)
        self._load = examples.load
        spec, steps = model_spec(config), step_config(config)
        model = spec.build_flat()
        self._layout = model.layout
        self._depth = steps.batches_per_push
        context = StepContext(
            self._layout,
            loss=spec.build_loss(),
            recorded=steps.records(spec),
            watched=not spec.is_ours,
            depth=self._depth,
            precision=steps.precision,
        )
        for together in range(2, self._depth + 1):
            # A real replica takes whichever way is faster. A clock must not decide on bits here.
            context.trial(together).joined = True
        self._copy = ModelCopy(model, context)

    def keeper(self, index: int, config: UpdateConfig) -> Callable[[], PartitionKeeper]:
        """What makes the state of a partition, at version 0."""
        partition = self.partitions[index]
        weights = self._initial[partition.start : partition.stop]
        return lambda: LearningPartition(partition, config, weights)

    # As `process.StepArithmetic`

    def begin_push(self) -> CollectedPush:
        """Room for what one push collects."""
        gradient = torch.zeros(self._layout.num_parameters)
        moments = torch.zeros(self._depth, 3, self._layout.num_features)
        return CollectedPush(mailbox=Mailbox(0, self._layout, gradient, moments))

    def step(
        self,
        found: CollectedPush,
        weights: Sequence[Tensor],
        epoch: int,
        batches: Sequence[int],
        index: int,
    ) -> None:
        """See `StepArithmetic`. Mini-batches of one size are joined, as in a replica."""
        for part, vector in zip(self.partitions, weights, strict=True):
            self._copy.weights[part.start : part.stop] = vector.numpy()
        loaded = [self._load(epoch, batch) for batch in batches]
        for _, group in itertools.groupby(loaded, key=lambda pair: len(pair[1])):
            pairs = list(group)
            inputs, targets = _joined([x for x, _ in pairs]), _joined([y for _, y in pairs])
            result = self._copy.step(inputs, targets, found.mailbox, index, len(pairs))
            index += len(pairs)
            found.loss += result.loss * len(targets)
            found.examples += len(targets)
            found.norm = result.gradient_norm

    def carry(self, found: CollectedPush, partition: int, push: Push) -> CarriedPush:
        """The push to one partition, with its part of the gradient and the moments."""
        part, mailbox = self.partitions[partition], found.mailbox
        own = slice(part.feature_start, part.feature_stop)
        header: dict[str, Any] = {f.name: getattr(push, f.name) for f in dataclasses.fields(push)}
        header |= {
            "examples": found.examples,
            "loss": found.loss / found.examples,
            "gradient_norm": found.norm,
        }
        return CarriedPush(
            **header,
            gradient=mailbox.gradient[part.trained],
            moments=mailbox.moments[: len(push.batches), :, own].contiguous(),
        )


def _joined(tensors: list[Tensor]) -> Tensor:
    """Tensors [m, ...] of k mini-batches as one [m*k, ...]: row i*k + j is row i of the j-th."""
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors, 1).flatten(0, 1)


class LearningPartition:
    """A `PartitionState` whose versions each have memory of their own."""

    def __init__(self, partition: Partition, config: UpdateConfig, weights: Tensor) -> None:
        """Version 0, with these weights, float32 [n]."""
        statistics = torch.zeros(2, partition.num_features)
        statistics[1:].fill_(1.0)  # as torch's: mean 0, variance 1 before the first push
        self._state = PartitionState(
            partition, config, Version(weights=weights.clone(), statistics=statistics)
        )

    @property
    def ledger(self) -> Ledger:
        """See `PartitionKeeper`."""
        return self._state.ledger

    @property
    def weights(self) -> Tensor:
        """See `PartitionKeeper`."""
        return self._state.current.weights

    @property
    def scored(self) -> Version:
        """The weights and BN statistics that are the run's model."""
        return self._state.vectors.scored

    def take(self, push: Push) -> Outcome:
        """See `PartitionKeeper`."""
        assert isinstance(push, CarriedPush)
        return self._state.apply(push, push.gradient, push.moments, self._room)

    def _room(self) -> Version:
        current = self._state.current
        return Version(
            weights=torch.empty_like(current.weights),
            statistics=torch.empty_like(current.statistics),
        )

    def dump(self) -> Any:
        """See `PartitionKeeper`."""
        return self._state.dump()

    def load(self, saved: Any) -> None:
        """See `PartitionKeeper`."""
        self._state.load(*saved)

    def check(self) -> None:
        """See `PartitionKeeper`."""
        self._state.check()

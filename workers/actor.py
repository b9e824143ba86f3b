"""The actors of the workers: a process of replicas, and the evaluator.

Plain classes, which a test can construct; `cluster.ray_backend` makes Ray actors of them.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from downpour.models.errors import MomentsError
from downpour.models.flat import FlatModel
from downpour.paramserver.access import Access, way
from downpour.paramserver.client import ParameterClient
from downpour.paramserver.spec import Average
from downpour.paramserver.transport.endpoint import Endpoint, machine
from downpour.shuffler.delivery import Part, join
from downpour.shuffler.errors import DatasetError, ShufflerError
from downpour.shuffler.plan.keys import stream_key
from downpour.workers.evaluation.evaluator import Evaluator, Score
from downpour.workers.evaluation.split import SplitBatches
from downpour.workers.evaluation.training_sample import TrainingSample
from downpour.workers.messages import Keeping
from downpour.workers.replica.replicas import (
    AnyModelCopy,
    ReplicaFailed,
    Replicas,
    WindowReport,
)
from downpour.workers.replica.rotation import (
    num_mailboxes,
    turns_together,
)
from downpour.workers.replica.windows import WindowDecoder
from downpour.workers.spec import EvaluatorSpec, ReplicasSpec
from downpour.workers.step.device import Lock, find_device
from downpour.workers.step.device_context import DeviceStepContext
from downpour.workers.step.device_model_copy import DeviceModelCopy
from downpour.workers.step.model_copy import Mailbox, ModelCopy, StepContext
from downpour.workers.tasks import ACCURACY

STOP_DEADLINE_S = 10.0
ANY_WAY = Access()
NOTHING_KEPT = Keeping()
MOVING_EVERY = 4
"""Scorings of which one is made with the server's moving averages, too. So are those that make the
run's model."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The score of a snapshot taken while training goes on."""

    versions: tuple[int, ...]
    """Version of each partition."""
    score: Score
    """With the BN statistics that were recomputed, if they were; else with the server's."""
    wall_s: float
    moving: Score | None = None
    """With the server's moving averages, if BN statistics were recomputed and it is their turn."""
    num_recomputed: int = 0
    """Mini-batches that they were recomputed on."""
    note: str | None = None
    """What is to be told: why they were not, if they should have been; rows that are not scored."""
    skipped: tuple[str, ...] = ()
    """A line for each row that is not scored, because its image cannot be decoded."""
    age_s: float | None = None
    """Seconds since the weights were pulled; None takes `wall_s`."""

    @property
    def gap(self) -> float | None:
        """How much accuracy the server's moving averages cost; None if that was not looked at, or
        the task has no accuracy.
        """
        if self.moving is None or self.score.metric != ACCURACY:
            return None
        return self.score.accuracy - self.moving.accuracy


class ReplicasActor:
    """Some of the run's replicas in one process."""

    def __init__(self, spec: ReplicasSpec) -> None:
        """Build the slots' models, which need no weights yet."""
        torch.set_num_threads(spec.num_threads)
        self._device = find_device(spec.steps.device)
        self._lock: Lock | None = None
        # Dropout draws from the process's generator, which starts alike everywhere.
        stream = stream_key(spec.model.seed, "dropout", *spec.replicas)
        torch.default_generator.manual_seed(stream)
        if self._device is not None:
            self._device.seed(stream)
        self._spec = spec
        self._models = [spec.model.build_flat()]
        self._statistics: Tensor | None = None
        self._client: ParameterClient | None = None
        self._windows = WindowDecoder(
            spec.decoder,
            num_threads=spec.num_threads,
            num_windows=len(spec.replicas) * spec.queued_windows,
            together=spec.steps.together if spec.steps.fresh else 1,
        )

    def __repr__(self) -> str:
        """What Ray's dashboard and log prefixes show."""
        replicas = self._spec.replicas
        if len(replicas) == 1:
            return f"Replica {replicas[0]}"
        return f"Replicas {', '.join(map(str, replicas))}"

    def connect(self, endpoints: Sequence[Endpoint], key: bytes, access: Access = ANY_WAY) -> int:
        """Connect to every partition, start the thread that runs the steps; gives the process id.

        Apart from construction, so that processes start while the partitions do. A second time it
        drops the windows in hand and every old connection: a partition has been replaced, or a
        connection to one was lost. Raises `ReplicaFailed` if the steps do not end.
        """
        self.stop()
        here = machine()
        nearby = all(way(e, access.transport, here) == "shared" for e in endpoints)
        self._client = client = ParameterClient(
            endpoints,
            key=key,
            access=access,
            num_mailboxes=num_mailboxes(len(self._spec.replicas), self._spec.steps, nearby),
            depth=self._spec.steps.batches_per_push,
            bell_every=turns_together(len(self._spec.replicas), self._spec.steps),
        )
        layout = self._models[0].layout
        self._statistics = self._frozen_statistics(client)
        pairs = zip(client.mailboxes.gradients, client.mailboxes.moments, strict=True)
        self._replicas = Replicas(
            replicas=self._spec.replicas,
            config=self._spec.steps,
            client=client,
            mailboxes=[Mailbox(i, layout, g, m) for i, (g, m) in enumerate(pairs)],
            make_copy=self._copy_maker(client.mailboxes.memory),
            ahead=0 if self._device is None else self._device.ahead,
            choices=client.choices,
        )
        self._thread = threading.Thread(target=self._replicas.run, name="steps", daemon=True)
        self._thread.start()
        return os.getpid()

    def _frozen_statistics(self, client: ParameterClient) -> Tensor | None:
        """What frozen BN layers normalize with, float32 [2, F]; None if there are none.

        They are the run's, wherever it began from, and nobody changes them.
        """
        model = self._models[0]
        model.module.train()
        if not model.has_frozen_norms:
            return None
        layout = model.layout
        weights, statistics = (
            torch.zeros(layout.num_parameters),
            torch.zeros(2, layout.num_features),
        )
        client.pull_statistics(weights.numpy(), statistics.numpy(), [0] * client.num_partitions)
        return statistics

    def _copy_maker(self, mailboxes: Tensor) -> Callable[[], AnyModelCopy]:
        """What makes model copies that share a context; `mailboxes` is all mailboxes' memory."""
        spec, device = self._spec, self._device
        layout, loss, models = self._models[0].layout, spec.model.build_loss(), self._all_models()
        options: dict[str, Any] = {
            "loss": loss,
            "recorded": spec.steps.records(spec.model),
            "precision": spec.steps.precision,
        }
        if device is None:
            context = StepContext(
                layout,
                depth=spec.steps.batches_per_push,
                watched=not spec.model.is_ours,
                **options,
            )
            context.statistics = self._statistics
            return lambda: ModelCopy(next(models), context)
        self._lock = device.lock(mailboxes)
        direct = self._lock is not None
        depth = spec.steps.together if spec.steps.fresh else 1
        shared = DeviceStepContext(layout, device, direct=direct, depth=depth, **options)
        shared.statistics = self._statistics
        return lambda: DeviceModelCopy(next(models), shared)

    def _all_models(self) -> Iterator[FlatModel]:
        """The models that have been built, then new ones."""
        yield from self._models
        while True:
            users = self._spec.model.is_users  # then its factory may take long, or download
            first = self._models[0]
            self._models.append(first.another() if users else self._spec.model.build_flat())
            yield self._models[-1]

    def run_window(
        self,
        replica: int,
        epoch: int,
        batches: tuple[int, ...],
        *parts: Part,
    ) -> WindowReport:
        """Train one of the replicas on a window, and return when every push is answered.

        The window's rows come in parts, one from each shuffler.
        """
        window, skipped = self._windows.open(epoch, batches, join(parts))
        report = self._replicas.assign(replica, window).result()
        readings = tuple(part.reading for part in parts if part.reading is not None)
        return dataclasses.replace(report, skipped=skipped(), readings=readings)

    def stop(self) -> None:
        """Stop after the step in hand, and close the connections."""
        client, self._client = self._client, None
        if client is not None:
            self._replicas.stop()
            client.interrupt()  # or it might wait for a partition that is gone
            self._thread.join(STOP_DEADLINE_S)
            if self._thread.is_alive():
                raise ReplicaFailed(f"a step has not ended for {STOP_DEADLINE_S:.0f} s")
            if self._lock is not None:
                self._lock.release()
                self._lock = None
            client.close()


class EvaluatorActor:
    """Scores the partitions' weights on a split, beside the training."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        """Open the split, and build the model."""
        torch.set_num_threads(1)
        self._client: ParameterClient | None = None
        self._turn = threading.Lock()  # connecting waits for the scoring in hand
        self._split = SplitBatches(spec.model, spec.data, spec.split)
        self._evaluator = Evaluator(spec.model, self._split)
        self._sample: TrainingSample | None = None
        self._most_s = 0.0
        self._scorings = 0
        self._pass_s = 0.0
        """Processor seconds of the latest pass over the scored split."""
        self._note: str | None = None
        if spec.recompute is not None and self._evaluator.layout.num_features:
            self._most_s = spec.recompute.most_s
            try:
                self._sample = TrainingSample(spec.recompute)
            except (DatasetError, OSError) as error:
                self._cannot_recompute(error)

    def _cannot_recompute(self, error: Exception) -> None:
        self._sample = None
        self._note = (
            f"the training split cannot be read where the evaluator is ({error}): accuracy is with "
            "the server's moving averages of the BN statistics"
        )

    def connect(self, endpoints: Sequence[Endpoint], key: bytes, access: Access = ANY_WAY) -> int:
        """Connect to every partition, or connect anew if one was replaced; gives the process id."""
        with self._turn:
            torch.set_num_threads(1)  # of the thread that this call is run by
            self.stop()
            self._load()  # which is not what a scoring costs
            self._client = ParameterClient(endpoints, key=key, access=access)
        return os.getpid()

    def progress(self) -> int:
        """How many mini-batches have been scored, or recomputed statistics on; at any time."""
        return self._evaluator.num_batches

    def _load(self) -> None:
        """Read what is kept of both splits, the first time."""
        self._split.load()
        if self._sample is not None:
            try:
                self._sample.load()
            except (ShufflerError, OSError) as error:
                self._cannot_recompute(error)

    def __repr__(self) -> str:
        """What Ray's dashboard and log prefixes show."""
        return "Evaluator"

    def evaluate(self, keeping: Keeping = NOTHING_KEPT, *averages: Average) -> Evaluation:
        """Pull the latest version of every partition, and score it; or score `averages`, if given.

        BN statistics are recomputed on training mini-batches with just these weights, if the spec
        says so and there is batch normalization.

        If `keeping` says so, just these weights and statistics are written, under PyTorch's names,
        each file whole or not at all.
        """
        with self._turn:
            torch.set_num_threads(1)
            return self._evaluate(keeping, averages)

    def _evaluate(self, keeping: Keeping, averages: Sequence[Average]) -> Evaluation:
        began_s = time.monotonic()
        evaluator = self._evaluator
        versions = self._take(averages) if averages else self._pull()
        pulled_s = time.monotonic()
        score, moving, num_recomputed = self._score(keeping.goal)
        about: dict[str, Any] = {"versions": versions, "score": score}
        about["num_recomputed"] = num_recomputed
        if keeping.model_path is not None and score.goodness >= keeping.goal:
            evaluator.save(keeping.model_path, **about)
            if keeping.answers_path is not None and score.of_classes:
                evaluator.answers.save(keeping.answers_path, self._split.scored_rows.tolist())
        if keeping.best_path is not None and (
            keeping.best is None or score.goodness > keeping.best
        ):
            evaluator.save(keeping.best_path, **about)
        return Evaluation(
            versions=tuple(versions),
            score=score,
            moving=moving,
            num_recomputed=num_recomputed,
            note="; ".join(filter(None, (self._note, self._split.note))) or None,
            skipped=self._split.skipped,
            wall_s=time.monotonic() - began_s,
            age_s=time.monotonic() - pulled_s,
        )

    def _pull(self) -> list[int]:
        """Have the latest weights and statistics scored; gives their versions."""
        client, evaluator = self._client, self._evaluator
        assert client is not None, "connect comes before evaluate"
        versions = [0] * client.num_partitions
        client.pull_statistics(evaluator.weights.numpy(), evaluator.statistics.numpy(), versions)
        return versions

    def _take(self, averages: Sequence[Average]) -> list[int]:
        """Have the partitions' averages scored, which are in their order; gives their versions."""
        evaluator = self._evaluator
        np.concatenate([a.weights for a in averages], out=evaluator.weights.numpy())
        statistics = [a.statistics for a in averages]
        np.concatenate(statistics, axis=1, out=evaluator.statistics.numpy())
        return [a.version for a in averages]

    def _score(self, goal: float) -> tuple[Score, Score | None, int]:
        """The score that counts, that of the server's averages, mini-batches recomputed on."""
        evaluator = self._evaluator
        if self._sample is None:
            return evaluator.score(), None, 0
        averages = evaluator.statistics.clone()
        moving = self._score_moving() if self._scorings % MOVING_EVERY == 0 else None
        self._scorings += 1
        most_s = max(self._most_s, self._pass_s)
        try:
            estimate = evaluator.recompute(self._sample(), most_s=most_s)
        except MomentsError:  # these weights give nothing that is finite
            return evaluator.score(), None, 0
        except (ShufflerError, OSError) as error:
            self._cannot_recompute(error)
            return evaluator.score(), None, 0
        score = evaluator.score()
        if moving is None and score.goodness >= goal:
            answers, recomputed = evaluator.answers, evaluator.statistics.clone()
            evaluator.statistics.copy_(averages)
            moving = self._score_moving()
            evaluator.statistics.copy_(recomputed)
            evaluator.answers = answers
        return score, moving, estimate.num_batches

    def _score_moving(self) -> Score:
        """The score with the statistics that the server keeps."""
        began_s = time.thread_time()
        moving = self._evaluator.score(keep_answers=False)
        self._pass_s = time.thread_time() - began_s
        return moving

    def stop(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

"""A virtual cluster that learns: the simulated run with real arithmetic, scored as it goes.

Scorings are outside of the virtual time: the clock stands still. Not here: what a gradient is
(`arithmetic`), and when it is computed (`run`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.resolve import recompute_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.simulate.arithmetic import LearningPartition, TrainingRows, VirtualArithmetic
from downpour.cluster.simulate.curve import LearningCurve, ScoredPoint
from downpour.cluster.simulate.inputs import Inputs
from downpour.cluster.simulate.run import Simulation
from downpour.cluster.simulate.settings import LearningConfig
from downpour.models.errors import MomentsError
from downpour.paramserver.messages import Outcome
from downpour.shuffler.plan.keys import stream_key
from downpour.workers.evaluation.evaluator import Evaluator, Score
from downpour.workers.evaluation.split import SplitBatches
from downpour.workers.evaluation.training_sample import TrainingSample


class WeightsScorer:
    """Scores the partitions' latest weights on the evaluation split.

    BN statistics are recomputed on a fixed sample of training mini-batches (Algorithm 2), unless
    the configuration wants the moving averages.
    """

    def __init__(self, config: RunConfig) -> None:
        """Open both splits.

        Raises:
            DatasetError: one cannot be read.
        """
        spec = model_spec(config)
        batches = SplitBatches(spec, config.data.data, config.data.eval_split)
        self._evaluator = Evaluator(spec, batches)
        self._sample: TrainingSample | None = None
        recompute = recompute_spec(config)
        if recompute is not None and self._evaluator.layout.num_features:
            self._sample = TrainingSample(recompute)

    def score(self, simulation: Simulation) -> Score:
        """Score what the partitions hold now."""
        evaluator, features = self._evaluator, 0
        start = 0
        for partition in simulation.partitions:
            keeper = partition.keeper
            assert isinstance(keeper, LearningPartition)
            scored = keeper.scored
            stop = start + len(scored.weights)
            evaluator.weights[start:stop] = scored.weights
            start = stop
            count = scored.statistics.shape[1]
            evaluator.statistics[:, features : features + count] = scored.statistics
            features += count
        if self._sample is not None:
            # Weights that give nothing finite are scored with the moving averages.
            with contextlib.suppress(MomentsError):
                evaluator.recompute(self._sample())
        return evaluator.score()


class LearningRun:
    """One run in a virtual cluster; `run` gives its curve."""

    def __init__(
        self,
        name: str,
        inputs: Inputs,
        learn: LearningConfig,
        *,
        examples: TrainingRows,
        scorer: WeightsScorer,
        seconds: float = math.inf,
    ) -> None:
        """Nothing has begun.

        Args:
            name: of the setting.
            inputs: what things cost; their configuration has the epochs to learn.
            learn: when to score and to end.
            examples: the training data, of just this configuration.
            scorer: of the configuration, too.
            seconds: of virtual time that it takes at the most.
        """
        arithmetic = VirtualArithmetic(inputs.config, inputs.num_partitions, examples)
        self.simulation = Simulation(inputs, arithmetic)
        self._learn, self._seed, self._scorer = learn, inputs.seed, scorer
        self._total = inputs.config.policy.epochs * examples.plan.num_batches
        rows = examples.plan.num_rows
        self.curve = LearningCurve(name=name, epoch_examples=rows)
        self._every = (
            math.inf if learn.score_every_epochs is None else learn.score_every_epochs * rows
        )
        self._every_s = math.inf if learn.score_every_s is None else learn.score_every_s
        self._next_examples, self._next_s = self._every, self._every_s
        self._arrived, self._last_s = False, seconds

    def run(self, progress: Callable[[int, int], None] = lambda done, total: None) -> LearningCurve:
        """Learn until the highest goal, all epochs, or the last second.

        Args:
            progress: gets the mini-batches that every partition has applied, and those of all
                epochs, now and then.

        Raises:
            UserError: members die so often that nothing is learned.
        """
        simulation = self.simulation
        with _the_same_every_time(self._seed):
            simulation.start()
            simulation.until(self._look, lambda *_: progress(self._applied, self._total), 0)
            last = self.curve.points[-1].examples if self.curve.points else -1
            if self._over and self._examples > last:
                self._score()
        simulation.check()
        self._conclude()
        return self.curve

    @property
    def _examples(self) -> int:
        return min(partition.ledger.examples for partition in self.simulation.partitions)

    @property
    def _applied(self) -> int:
        return min(p.ledger.applied.num_applied for p in self.simulation.partitions)

    def _look(self) -> bool:
        """Score if it is time; whether the run is over."""
        simulation, now_s = self.simulation, self.simulation.clock.now_s
        due = self._examples >= self._next_examples or now_s >= self._next_s
        if due and all(partition.up for partition in simulation.partitions):
            self._score()
            if self._every_s < math.inf:
                self._next_s = (now_s // self._every_s + 1) * self._every_s
            if self._every < math.inf:
                self._next_examples = (self._examples // self._every + 1) * self._every
        return self._over or (self._arrived and self._learn.until == "goal")

    @property
    def _over(self) -> bool:
        simulation = self.simulation
        return simulation.book.finished or simulation.clock.now_s >= self._last_s

    def _score(self) -> None:
        score = self._scorer.score(self.simulation)
        self.curve.points.append(
            ScoredPoint(
                seconds=self.simulation.clock.now_s,
                examples=self._examples,
                updates=min(p.ledger.version for p in self.simulation.partitions),
                accuracy=score.accuracy,
                loss=score.loss,
            )
        )
        self._arrived |= score.accuracy >= max(self._learn.goal)

    def _conclude(self) -> None:
        simulation, curve = self.simulation, self.curve
        ledgers = [partition.ledger for partition in simulation.partitions]
        for partition in simulation.partitions:
            curve.staleness = curve.staleness.merge(partition.seen)
        curve.seconds = simulation.clock.now_s
        curve.batches_computed = simulation.counts.steps
        curve.batches_applied = self._applied
        curve.dropped = sum(ledger.outcomes[Outcome.REFUSED_STALE] for ledger in ledgers)
        curve.repeated = sum(ledger.outcomes[Outcome.DUPLICATE] for ledger in ledgers)
        curve.refused = max(ledger.applied.num_refused for ledger in ledgers)
        curve.deaths = simulation.deaths
        curve.finished = simulation.book.finished


@contextlib.contextmanager
def _the_same_every_time(seed: int) -> Iterator[None]:
    """One thread, and random streams of `seed`; afterwards everything is as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_key(seed, "virtual steps"))
            yield
    finally:
        torch.set_num_threads(threads)

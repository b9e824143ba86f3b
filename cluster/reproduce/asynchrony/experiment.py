"""What the BN paper could not show: statistics and shuffling under asynchronous training.

The paper scores a network with moving averages while it trains. It does not say whose averages, if
50 steps are in flight on 10 replicas. Runs of the MNIST net are therefore recorded push by push and
computed again to the bit (`cluster.replay`). At some versions on the way, the same weights are
scored with the statistics of one replica, with their average over replicas, with the server's, and
with Algorithm 2's. The second half is the shuffling of section 4.2.1: the same training under
several strategies.

Here: the runs and what is measured on them. Not here: the report.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.options import apply
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.reproduce.asynchrony.local_statistics import LocalStatistics
from downpour.cluster.reproduce.runs import fitted
from downpour.cluster.run.folder import RESULT, RunFolder
from downpour.paramserver import durable

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from downpour.paramserver.messages import Push
    from downpour.paramserver.partition.state import PartitionState

FLIGHTS: Mapping[int, tuple[int, int]] = {1: (1, 1), 10: (10, 1), 50: (10, 5)}
"""Replicas, and concurrent steps of each, by steps in flight."""
ONE, AVERAGED, SERVER, RECOMPUTED = "one replica", "average of replicas", "server", "Algorithm 2"
STATISTICS = "statistics.json"
SHUFFLES: Mapping[str, tuple[str, bool]] = {
    "pairwise": ("pairwise", False),
    "random": ("random", False),
    "within_shard": ("within_shard", False),
    "within_shard, shards by class": ("within_shard", True),
}
"""Strategy, and whether a shard holds one class only."""
NUM_SHARDS = 10
BATCHES = 256
"""Mini-batches that Algorithm 2 is given."""
RESERVED = ("replicas", "concurrent_steps", "strategy", "partitions", "record_pushes", "seed")
"""Options that the experiment sets, and a user may not."""


def flight_run(flight: int, seed: int) -> str:
    """Return the name of a run with `flight` steps in flight."""
    return f"flight-{flight}-seed-{seed}"


def shuffle_run(shuffle: str, seed: int) -> str:
    """Return the name of a run under one of `SHUFFLES`; pairwise is the run with 50 in flight."""
    if shuffle == "pairwise":
        return flight_run(50, seed)
    return f"{shuffle.replace(',', '').replace(' ', '-')}-seed-{seed}"


def flight_runs(given: Mapping[str, object], seeds: Sequence[int]) -> dict[str, RunConfig]:
    """Return the recorded runs with 1, 10 and 50 steps in flight, by name."""
    base = _base(given)
    return {
        flight_run(flight, seed): apply(
            base,
            {
                "replicas": replicas,
                "concurrent_steps": steps,
                "in_flight": "all",
                "seed": seed,
                "record_pushes": True,
            },
        )
        for flight, (replicas, steps) in FLIGHTS.items()
        for seed in seeds
    }


def shuffle_runs(
    given: Mapping[str, object], seeds: Sequence[int], data: Mapping[bool, Path]
) -> dict[str, RunConfig]:
    """Return the runs with 50 steps in flight under each strategy but pairwise, by name.

    Args:
        given: the user's options.
        seeds: seeds of the runs.
        data: the dataset's folder, by whether a shard holds one class only; see `write_shards`.
    """
    base = _base(given)
    return {
        shuffle_run(name, seed): apply(
            base, {"strategy": strategy, "data": str(data[by_class]), "seed": seed}
        )
        for name, (strategy, by_class) in SHUFFLES.items()
        if name != "pairwise"
        for seed in seeds
    }


def _base(given: Mapping[str, object]) -> RunConfig:
    from downpour.cluster.config import recipes

    taken = [name for name in RESERVED if name in given]
    if taken:
        raise UserError(
            f"--{taken[0].replace('_', '-')} is what the experiment varies or needs as it is: "
            "leave it out"
        )
    return apply(fitted(recipes.find("mnist-bn"), given), {"partitions": 1})


def write_shards(
    source: str, folder: Path, *, train_split: str, eval_split: str, by_class: bool
) -> Path:
    """Write a dataset's training rows to `NUM_SHARDS` shards, or to one for each class.

    Rows keep their order; within their class, if shards are by class. The evaluation split is
    copied. A folder that exists is left alone. Returns the folder, which is made whole or not at
    all.
    """
    import numpy as np

    from downpour.shuffler.dataset.encoding import label_values
    from downpour.shuffler.dataset.reader import RowReader
    from downpour.shuffler.dataset.records import Dataset

    if folder.exists():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    train, test = Dataset.open(source, train_split), Dataset.open(source, eval_split)
    rows = RowReader(train).take(np.arange(train.num_rows))
    parts = np.array_split(np.arange(train.num_rows), NUM_SHARDS)
    if by_class:
        labels = label_values(rows.column("label"))
        parts = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    _write(partial, train_split, [rows.take(_indices(part)) for part in parts])
    _write(partial, eval_split, [RowReader(test).take(np.arange(test.num_rows))])
    for file in partial.iterdir():
        durable.sync(file)
    durable.sync(partial)
    partial.rename(folder)
    return folder


def _indices(rows: Any) -> Any:
    from downpour.shuffler.dataset.encoding import indices

    return indices(rows)


def _write(folder: Path, split: str, shards: Sequence[pa.RecordBatch]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for i, shard in enumerate(shards):
        name = f"{split}-{i:05d}-of-{len(shards):05d}.parquet"
        pq.write_table(pa.Table.from_batches([shard]), folder / name)


def measure(
    path: Path,
    *,
    looks: int,
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Compute a recorded run again and score its weights at `looks` versions, by each statistics.

    The result is kept in the run's folder, and is not measured twice.

    Raises:
        UserError: the replay differs from the run.
    """
    from downpour.cluster.replay.run import replay_run

    folder = RunFolder.open(path)
    if (path / STATISTICS).exists():
        return folder.read_json(STATISTICS)
    scorer = _Scorer(folder.config(), looks=looks)
    found = replay_run(folder, progress, say, taken=scorer.taken)
    if found.differing:
        raise UserError(
            f"{path.name} computed again is not what was trained ({found.differing[0]}): run the "
            "experiment on one machine, from an empty --output"
        )
    result = folder.read_json(RESULT)
    by_server = result.get("moving_accuracy")
    measured = {
        "staleness_mean": result["staleness"]["mean"],
        "accuracy": result["accuracy"] if by_server is None else by_server,
        "elapsed_s": result["elapsed_s"],
        "looks": scorer.looks,
    }
    folder.write_json(STATISTICS, measured)
    return measured


class _Scorer:
    """Takes the pushes of a replay, and scores the weights at some versions."""

    def __init__(self, config: RunConfig, *, looks: int) -> None:
        from downpour.cluster.training.inputs import check_data, loader
        from downpour.workers.evaluation.evaluator import Evaluator
        from downpour.workers.evaluation.split import SplitBatches

        plan, spec = check_data(config).plan, model_spec(config)
        self.looks: list[dict[str, Any]] = []
        self._per_epoch = plan.num_batches
        total = config.policy.epochs * plan.num_batches
        self._at = {math.ceil(total * (i + 1) / looks) for i in range(looks)}
        self._evaluator = Evaluator(
            spec, SplitBatches(spec, config.data.data, config.data.eval_split)
        )
        self._frozen = spec.build_flat("cpu")
        load = loader(config, plan)
        self._batches = [load(0, b) for b in range(min(BATCHES, plan.num_batches))]
        self._local = LocalStatistics(
            num_replicas=config.replicas.replicas,
            num_features=self._frozen.layout.num_features,
            rule=config.server.statistics,
        )

    def taken(self, state: PartitionState, push: Push, moments: Tensor) -> None:
        """See `Replay`."""
        self._local.take(push.replica, moments)
        if state.version in self._at:
            self._look(state)

    def _look(self, state: PartitionState) -> None:
        from downpour.workers.evaluation.evaluator import population_statistics

        self._evaluator.weights.copy_(state.current.weights)
        self._frozen.weights.copy_(state.current.weights)
        exact = population_statistics(self._frozen, self._batches)
        local = self._local
        self.looks.append(
            {
                "version": state.version,
                "epoch": state.version / self._per_epoch,
                ONE: {str(r): self._score(local.of(r), exact) for r in local.replicas},
                AVERAGED: self._score(local.averaged(), exact),
                SERVER: self._score(state.current.statistics, exact),
                RECOMPUTED: self._score(exact, exact),
            }
        )

    def _score(self, statistics: Tensor, exact: Tensor) -> dict[str, float]:
        from downpour.workers.evaluation.disagreement import disagreement

        self._evaluator.statistics.copy_(statistics)
        score = self._evaluator.score()
        return {
            "accuracy": score.accuracy,
            "loss": score.loss,
            "from_algorithm_2": disagreement(statistics, exact),
        }


def summary(
    measured: Mapping[str, Mapping[str, Any]], accuracies: Mapping[str, float], num_seeds: int
) -> dict[str, Any]:
    """Return the numbers of the report.

    Args:
        measured: what `measure` returned, by the name of the run.
        accuracies: accuracy at the end of each run of shuffling, by its name.
        num_seeds: seeds of each kind of run.
    """
    flights = {}
    for flight in FLIGHTS:
        runs = [measured[flight_run(flight, seed)] for seed in range(num_seeds)]
        flights[str(flight)] = {
            "staleness_mean": mean_and_deviation([run["staleness_mean"] for run in runs]),
            **{kind: _by_kind(kind, runs) for kind in (ONE, AVERAGED, SERVER, RECOMPUTED)},
        }
    shuffles = {
        name: mean_and_deviation([accuracies[shuffle_run(name, seed)] for seed in range(num_seeds)])
        for name in SHUFFLES
    }
    return {"flights": flights, "shuffles": shuffles}


def _by_kind(kind: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise one kind of statistics.

    A gap is accuracy with it less accuracy with Algorithm 2's, on the same weights.
    """
    gaps, away, ends = [], [], []
    for run in runs:
        for look in run["looks"]:
            scores = scores_of(look, kind)
            gaps.append([s["accuracy"] - look[RECOMPUTED]["accuracy"] for s in scores])
            away.append([s["from_algorithm_2"] for s in scores])
        ends.append(_mean([s["accuracy"] for s in scores_of(run["looks"][-1], kind)]))
    return {
        "final_accuracy": mean_and_deviation(ends),
        "mean_gap": _mean([_mean(gap) for gap in gaps]),
        "worst_gap": min(min(gap) for gap in gaps),
        "from_algorithm_2": _mean([_mean(a) for a in away]),
    }


def scores_of(look: Mapping[str, Any], kind: str) -> list[dict[str, float]]:
    """Return the scores with one kind of statistics at a look: one, or one for each replica."""
    return list(look[kind].values()) if kind == ONE else [look[kind]]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and the standard deviation with n - 1; 0 for a single value."""
    mean = _mean(values)
    square = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(square / max(1, len(values) - 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

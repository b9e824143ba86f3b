"""The evaluator of a run: its score is Algorithm 2's, however wrong the server's averages are."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.run.folder import BEST, MODEL
from downpour.models.flat import FlatModel, flatten
from downpour.paramserver.client import ParameterClient
from downpour.paramserver.spec import Average
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.images.decode import decode
from downpour.workers.actor import MOVING_EVERY, EvaluatorActor
from downpour.workers.evaluation.disagreement import disagreement
from downpour.workers.evaluation.evaluator import Evaluator, population_statistics
from downpour.workers.evaluation.split import SplitBatches
from downpour.workers.messages import Keeping
from tests.helpers import tiny
from tests.helpers.runs import Run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"), 4000)


def config(data: str, epochs: int = 3, **policy: Any) -> RunConfig:
    return tiny.config(data, replicas=2, epochs=epochs, **policy)


def whole_split(config: RunConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """All whole mini-batches of the training split, in its order."""
    dataset = Dataset.open(config.data.data, config.data.train_split)
    rows = RowReader(dataset).take(np.arange(dataset.num_rows))
    inputs, labels = decode(rows, config.model.input)
    for start in range(0, len(inputs) - 15, 16):
        part = slice(start, start + 16)
        yield torch.from_numpy(inputs[part]), torch.from_numpy(labels[part])


def evaluator_of(config: RunConfig) -> Evaluator:
    spec = model_spec(config)
    return Evaluator(spec, SplitBatches(spec, config.data.data, "test"))


@pytest.fixture
def wrong_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's averages are of another network altogether."""
    pull = ParameterClient.pull_statistics

    def spoiled(self: ParameterClient, weights: Any, statistics: Any, versions: list[int]) -> None:
        pull(self, weights, statistics, versions)
        statistics[0] += 3.0
        statistics[1] *= 50.0

    monkeypatch.setattr(ParameterClient, "pull_statistics", spoiled)


@pytest.mark.usefixtures("wrong_averages")
def test_the_score_is_algorithm_2s_whatever_the_server_kept(tmp_path: Path, data: str) -> None:
    run = Run(tmp_path / "run", config(data))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    evaluation = outcome.evaluation
    assert evaluation is not None
    assert evaluation.moving is not None
    assert evaluation.num_recomputed >= 16

    evaluator = evaluator_of(run.config)
    evaluator.load(str(run.folder.path / MODEL))
    torch.testing.assert_close(evaluator.weights, run.weights, rtol=0, atol=0)
    assert evaluator.score().accuracy == evaluation.score.accuracy  # as it was written
    written = evaluator.statistics.clone()
    model = FlatModel(model_spec(run.config).build())
    model.bind(evaluator.weights)
    exact = population_statistics(model, whole_split(run.config))
    assert disagreement(written, exact) < 0.06
    evaluator.statistics.copy_(exact)
    by_algorithm_2 = evaluator.score().accuracy
    assert abs(evaluation.score.accuracy - by_algorithm_2) <= 0.01
    assert by_algorithm_2 - evaluation.moving.accuracy > 0.1  # they were wrong enough to tell
    assert evaluation.gap == evaluation.score.accuracy - evaluation.moving.accuracy

    lines = [json.loads(x) for x in (run.folder.path / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "accuracy" in line][-1]
    assert last["accuracy"] == evaluation.score.accuracy
    assert last["moving_accuracy"] == evaluation.moving.accuracy
    assert last["bn_gap"] == pytest.approx(evaluation.gap)
    with safetensors.safe_open(run.folder.path / BEST, framework="pt") as file:
        about = json.loads(file.metadata()["downpour"])
    assert about["bn_statistics"] == "recomputed"
    assert about["mini_batches"] >= 16


def test_the_servers_averages_have_their_turn_and_so_has_the_runs_model(
    tmp_path: Path, data: str
) -> None:
    run = Run(tmp_path / "run", config(data))
    actor = EvaluatorActor(run.backend.specs.evaluator)
    model = FlatModel(model_spec(run.config).build())
    wrong = model.statistics.clone()
    wrong[0] += 3.0
    average = Average(version=1, weights=model.weights.numpy(), statistics=wrong.numpy())
    scored = [actor.evaluate(Keeping(), average) for _ in range(MOVING_EVERY + 1)]
    turns = [evaluation.moving is not None for evaluation in scored]
    assert turns == [True] + [False] * (MOVING_EVERY - 1) + [True]

    answers = tmp_path / "answers"
    kept = Keeping(model_path=str(tmp_path / MODEL), answers_path=str(answers), goal=-math.inf)
    last = actor.evaluate(kept, average)
    assert last.moving == scored[0].moving
    evaluator = evaluator_of(run.config)
    evaluator.load(str(tmp_path / MODEL))
    assert evaluator.score().accuracy == last.score.accuracy  # by the statistics of the score
    assert float((evaluator.statistics - wrong).abs().max()) > 1
    assert answers.stat().st_size > 0


@pytest.mark.usefixtures("wrong_averages")
def test_with_moving_statistics_the_servers_are_scored_and_written(
    tmp_path: Path, data: str
) -> None:
    run = Run(tmp_path / "run", config(data, epochs=1, bn_statistics="moving"))
    outcome = run.go()
    assert outcome.evaluation is not None
    assert (outcome.evaluation.moving, outcome.evaluation.num_recomputed) == (None, 0)
    state = safetensors.torch.load_file(run.folder.path / MODEL)
    _, statistics = flatten(state, evaluator_of(run.config).layout)
    assert float(statistics[0].mean()) > 2.0


def test_a_training_split_that_is_not_there_is_told_once(tmp_path: Path, data: str) -> None:
    run = Run(tmp_path / "run", config(data))
    specs = run.backend.specs
    assert specs.evaluator.recompute is not None
    elsewhere = dataclasses.replace(specs.evaluator.recompute, data=str(tmp_path / "nowhere"))
    evaluator = dataclasses.replace(specs.evaluator, recompute=elsewhere)
    run.backend.specs = dataclasses.replace(specs, evaluator=evaluator)
    outcome = run.go()
    run.assert_exactly_once(outcome)
    assert outcome.evaluation is not None
    assert outcome.evaluation.moving is None
    events = (run.folder.path / "events.jsonl").read_text()
    assert events.count("the training split cannot be read where the evaluator is") == 1


def test_a_network_without_batch_normalization_recomputes_nothing(
    tmp_path: Path, data: str
) -> None:
    base = config(data, epochs=1)
    arguments = {**base.model.arguments, "batch_norm": False}
    model = dataclasses.replace(base.model, arguments=arguments)
    run = Run(tmp_path / "run", dataclasses.replace(base, model=model))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    assert outcome.evaluation is not None
    assert (outcome.evaluation.moving, outcome.evaluation.note) == (None, None)

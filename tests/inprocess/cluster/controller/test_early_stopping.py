"""Runs that end when they have arrived, on threads: by accuracy, by patience, with losses, resumed.

What a run has trained is read from the partitions' applied sets.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from rich.console import Console

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller import reactions
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.controller.parts import RunParts
from downpour.cluster.controller.protocol.instructions import RunOutcome
from downpour.cluster.run.folder import BEST, MODEL, RESULT
from downpour.cluster.training.result import conclude
from downpour.paramserver.partition.applied_set import APPLIED, WAITING
from downpour.workers.evaluation.evaluator import Evaluator
from downpour.workers.evaluation.split import SplitBatches
from tests.helpers import tiny
from tests.helpers.runs import Run
from tests.helpers.thread_backend import ThreadBackend

EPOCHS = 400
"""More than any of these runs trains."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


def config(data: str, **policy: Any) -> RunConfig:
    config = tiny.config(data, epochs=EPOCHS, checkpoint_every_s=0.1, **policy)
    often = dataclasses.replace(config.policy, evaluate_every_s=0.05, evaluation_share=1.0)
    return dataclasses.replace(config, policy=often)


def assert_what_was_trained_was_trained_once(run: Run, outcome: RunOutcome) -> None:
    """From the applied sets, and not from anything that the controller says."""
    assert outcome.finished
    assert outcome.exactly_once
    first = run.flags[0]
    assert 0 < (first == APPLIED).sum() < first.size
    for flags, report in zip(run.flags, outcome.reports, strict=True):
        assert (flags == first).all()
        assert report.batches_applied == (flags == APPLIED).sum()
    settled = (first != WAITING).sum(1)
    partial = {e: int(n) for e, n in enumerate(settled) if 0 < n < first.shape[1]}
    assert dict(outcome.unfinished_epochs) == partial


def test_a_run_ends_at_the_first_scoring_that_reaches_the_accuracy(
    tmp_path: Path, data: str
) -> None:
    run = Run(tmp_path / "run", config(data, stop_at_accuracy=0.7))
    began_s = time.monotonic()
    outcome = run.go()
    assert_what_was_trained_was_trained_once(run, outcome)
    assert outcome.ended.by == "accuracy"
    assert outcome.evaluation is not None
    accuracy = outcome.evaluation.score.accuracy
    assert accuracy >= 0.7
    lines = [json.loads(x) for x in (run.folder.path / "metrics.jsonl").read_text().splitlines()]
    scored = [line["accuracy"] for line in lines if "accuracy" in line]
    assert scored[-1] == accuracy
    assert all(a < 0.7 for a in scored[:-1])

    # The model is what reached it.
    spec = model_spec(run.config)
    evaluator = Evaluator(spec, SplitBatches(spec, data, "test"))
    evaluator.load(str(run.folder.path / MODEL))
    assert evaluator.score().accuracy == accuracy
    best, model = (safetensors.torch.load_file(run.folder.path / name) for name in (BEST, MODEL))
    assert all((best[name] == model[name]).all() for name in best)

    assert conclude(run.folder, run.config, outcome, began_s, Console(file=io.StringIO())) == 0
    result = run.folder.read_json(RESULT)
    assert result["ended_by"] == "accuracy"
    assert "--stop-at-accuracy" in result["ended_because"]
    assert result["accuracy"] == accuracy
    assert result["exactly_once"] is True
    assert (run.folder.path / "plots" / "training.png").is_file()
    checkpoint, _ = run.store.latest()
    assert checkpoint is not None
    assert checkpoint.updates == result["updates"]


def test_a_run_is_finished_as_it_stands_when_somebody_asks_for_it(
    tmp_path: Path, data: str
) -> None:
    """As a callback does: from within a scoring. Its last weights are scored, and are its model."""
    run = Run(tmp_path / "run", config(data))
    scored: list[float] = []
    saved: list[int] = []

    class Asks:
        def evaluated(self, values: Any) -> None:
            scored.append(values["accuracy"])
            run.controller.request_end("seen enough")

        def saved(self, checkpoint: Any) -> None:
            saved.append(checkpoint.number)

        def trained(self, report: Any) -> None: ...

        def observed(self, observation: Any) -> None: ...

    run.telemetry._sinks = [Asks()]  # type: ignore[list-item]
    outcome = run.go()
    assert_what_was_trained_was_trained_once(run, outcome)
    assert (outcome.ended.by, outcome.ended.reason) == ("callback", "seen enough")
    assert len(scored) == 2, "the one that asked, and the last weights"
    assert outcome.evaluation is not None
    assert scored[-1] == outcome.evaluation.score.accuracy
    assert (run.folder.path / MODEL).is_file()
    checkpoint, _ = run.store.latest()
    assert checkpoint is not None
    assert saved[-1] == checkpoint.number == len(saved)


def test_a_run_ends_when_no_scoring_is_better_any_more(tmp_path: Path, data: str) -> None:
    config_ = config(data, patience=3)
    server = dataclasses.replace(
        config_.server,
        schedule=dataclasses.replace(config_.server.schedule, learning_rate=1e-6),
    )
    run = Run(tmp_path / "run", dataclasses.replace(config_, server=server))
    outcome = run.go()
    assert_what_was_trained_was_trained_once(run, outcome)
    assert outcome.ended.by == "patience"
    assert "--patience" in outcome.ended.reason
    assert (run.folder.path / MODEL).is_file()
    events = (run.folder.path / "events.jsonl").read_text()
    assert "the run ends early: 3 scorings" in events


@pytest.mark.parametrize("n_push", [1, 3])
def test_an_early_end_bears_the_loss_of_processes_and_of_a_partition(
    tmp_path: Path, data: str, n_push: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partition goes back to its checkpoint just when the run has arrived."""
    config_ = tiny.config(data, epochs=EPOCHS, n_push=n_push, checkpoint_every_s=0.1)
    policy = dataclasses.replace(config_.policy, evaluate_every_s=0.05, stop_at_accuracy=0.6)
    run = Run(tmp_path / "run", dataclasses.replace(config_, policy=policy))
    done, end_early = list[str](), reactions.end_early

    def ends(parts: RunParts) -> None:
        if not done:
            done.append("killed")
            run.backend.kill_process(1)
            run.backend.kill_partition(1)
        end_early(parts)

    monkeypatch.setattr(reactions, "end_early", ends)
    outcome = run.go()
    assert done == ["killed"]
    assert outcome.restarts["partition"] == 1
    assert_what_was_trained_was_trained_once(run, outcome)
    assert outcome.ended.by == "accuracy"


def test_a_resumed_run_goes_on_counting(tmp_path: Path, data: str) -> None:
    """Stopped after some scorings without a better one, it has only the rest of its patience."""
    config_ = config(data, patience=30)
    server = dataclasses.replace(
        config_.server,
        schedule=dataclasses.replace(config_.server.schedule, learning_rate=1e-6),
    )
    run = Run(tmp_path / "run", dataclasses.replace(config_, server=server))

    def stop(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if run.controller.state.early_stopping.dump(0.0)["without_better"] >= 10:
            run.controller.request_stop("SIGTERM")

    stopped = run.go(stop)
    assert not stopped.finished
    again = Run(tmp_path / "run", run.config, resume=True)
    assert again.resumed is not None
    assert again.resumed.scores is not None
    before = again.resumed.scores["without_better"]
    assert before >= 10
    assert again.controller.state.evaluation.best.value == again.resumed.scores["best"]
    metrics = run.folder.path / "metrics.jsonl"
    scored_before = metrics.read_text().count('"accuracy"')
    outcome = again.go()
    assert outcome.ended.by == "patience"
    assert_what_was_trained_was_trained_once(again, outcome)
    better = outcome.best.value != again.resumed.scores["best"]
    assert better or metrics.read_text().count('"accuracy"') - scored_before <= 30 - before + 1


def test_when_milestones_were_reached_is_told(tmp_path: Path, data: str) -> None:
    run = Run(tmp_path / "run", config(data, stop_at_accuracy=0.9))
    outcome = run.go()
    assert_what_was_trained_was_trained_once(run, outcome)
    reached = outcome.reached["0.9"]
    assert reached["accuracy"] == outcome.evaluation.score.accuracy  # type: ignore[union-attr]
    assert 0 < reached["training_s"] <= outcome.elapsed_s
    assert 0 < reached["examples"] <= max(r.examples for r in outcome.reports)
    np.testing.assert_allclose(reached["epochs"], reached["examples"] / 1000, atol=1e-4)

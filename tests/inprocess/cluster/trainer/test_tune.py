"""A trainer as a trainable of Ray Tune: trials are runs of their own; training and Tune are played.

A real search is `tests/ray/test_tune.py`.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import ray

import downpour
from downpour.cluster.config.run import RunConfig
from downpour.cluster.monitoring.observation import Handle
from downpour.cluster.run.folder import RESULT, RunFolder
from downpour.cluster.trainer import tune
from downpour.cluster.training import launch
from tests.helpers import tiny

RESULT_OF = {"accuracy": 0.75, "updates": 9, "exactly_once": True, "reached": {}, "seed": 1}


class PlayedTune:
    """What `ray.tune` does for a trial."""

    def __init__(self, trial: str, stop_after: int = 99) -> None:
        self.trial, self.stop_after = trial, stop_after
        self.reported: list[dict[str, Any]] = []
        self.resources: dict[str, float] = {}

    def report(self, metrics: dict[str, Any]) -> None:
        self.reported.append(metrics)
        if len(self.reported) >= self.stop_after:
            raise SystemExit(0)

    def with_resources(self, function: Any, resources: dict[str, float]) -> Any:
        self.resources = resources
        return function

    def get_context(self) -> Any:
        return types.SimpleNamespace(
            get_trial_id=lambda: self.trial, get_experiment_name=lambda: "search"
        )


def play(folder: RunFolder, data: Any, *, onlookers: Any, **options: Any) -> int:
    """Stands in for `launch.train`: two scorings, and the result."""
    config = folder.config()
    sinks = [
        onlooker(Handle(folder=folder.path, config=config, finish=print, tell=print))
        for onlooker in onlookers
    ]
    folder.append_event("resumed" if options["resume"] else "begun")
    folder.append_metrics({"updates": 1})
    assert not options["console"].stderr
    for step in (1, 2):
        for sink in sinks:
            sink.evaluated({"accuracy": step / 4, "updates": step, "epoch": step, "bn_gap": 0.0})
    folder.write_json(RESULT, RESULT_OF)
    return 0


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> downpour.Trainer:
    monkeypatch.setattr(launch, "train", play)
    monkeypatch.chdir(tmp_path)
    return downpour.Trainer(config=config_of(tmp_path), runs="runs", epochs=2)


def config_of(folder: Path) -> RunConfig:
    return tiny.config(tiny.dataset(folder / "data", num_rows=100))


def test_a_trial_is_a_run_with_its_values_that_reports_each_scoring(
    tmp_path: Path, trainer: downpour.Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = PlayedTune("t1")
    monkeypatch.setattr(ray, "tune", played, raising=False)
    trial = trainer.as_trainable(cpus=2)
    assert played.resources == {"cpu": 2}
    elsewhere = tmp_path / "elsewhere"  # a trial's process works in a folder of its own
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    trial({"learning_rate": 0.5, "momentum": 0.5})
    run = tmp_path / "runs" / "search" / "t1"
    config = RunFolder.open(run).config()
    assert (config.server.schedule.learning_rate, config.server.momentum) == (0.5, 0.5)
    replicas = config.replicas
    assert config.policy.epochs == 2
    assert (replicas.replicas_per_process, replicas.threads_per_process) == (2, 1)
    assert trainer.config.server.schedule.learning_rate != 0.5
    one = {"updates": 1, "epoch": 1, "accuracy": 0.25, "run": str(run)}
    two = {"updates": 2, "epoch": 2, "accuracy": 0.5, "run": str(run)}
    last = {**two, "accuracy": 0.75, "updates": 9, "exactly_once": True}
    assert played.reported == [one, two, last]


def test_a_trial_that_tune_ends_leaves_a_run_that_a_new_one_goes_on_with(
    tmp_path: Path, trainer: downpour.Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "tune", PlayedTune("t1", stop_after=1), raising=False)
    with pytest.raises(SystemExit):
        trainer.as_trainable()({})
    again = PlayedTune("t1")
    monkeypatch.setattr(ray, "tune", again, raising=False)
    trainer.as_trainable()({})
    events = (tmp_path / "runs" / "search" / "t1" / "events.jsonl").read_text()
    assert events.index("begun") < events.index("resumed")
    assert again.reported[-1]["accuracy"] == 0.75


def test_on_gpus_a_trial_asks_for_what_its_processes_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = PlayedTune("t1")
    monkeypatch.setattr(ray, "tune", played, raising=False)
    trainer = downpour.Trainer(
        config=config_of(tmp_path),
        scaling=downpour.ScalingConfig(num_workers=4, use_gpu=True),
        gpus_per_process=0.25,
        replicas_per_process=2,
    )
    trainer.as_trainable()
    assert played.resources == {"cpu": 1, "gpu": 0.5}


def test_a_wrong_value_of_a_trial_is_a_line(
    trainer: downpour.Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "tune", PlayedTune("t1"), raising=False)
    with pytest.raises(downpour.UserError, match="did you mean learning_rate"):
        trainer.as_trainable()({"lerning_rate": 0.5})
    with pytest.raises(downpour.UserError, match="cpus is 0: give at least 1"):
        trainer.as_trainable(cpus=0)


def test_without_tune_it_is_a_line(
    trainer: downpour.Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ray, "tune", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "ray.tune", None)
    with pytest.raises(downpour.UserError, match=r"pip install 'downpour\[tune\]'"):
        tune.trainable(trainer)

"""Callbacks for programs that track experiments: what those are told, by fakes of their modules.

Signatures of the fakes are those of wandb 0.31 and mlflow-skinny 3.17.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

import downpour
from downpour.cluster.config import recipes
from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.observation import Handle
from downpour.cluster.trainer.callbacks import CallbackSink
from downpour.cluster.trainer.result import Result
from downpour.cluster.trainer.trackers import MLflow, TensorBoard, WandB

METRICS = {"updates": 7, "accuracy": 0.5, "note": "text", "time": 1e9}


def tell(callback: Any, run: Path, result: Result | None) -> list[str]:
    """Tell a callback of a short run; gives what went wrong."""
    told: list[str] = []
    config = recipes.find("mnist-bn")
    handle = Handle(folder=run, config=config, finish=told.append, tell=told.append)
    sink = CallbackSink([callback], handle)
    sink.evaluated(METRICS)
    sink.end(result, None if result else "stopped")
    return told


def result_of(run: Path) -> Result:
    return Result(path=run, metrics={"accuracy": 0.75, "seed": 3, "recipe": "mnist-bn"})


class FakeWandb:
    """A run and the module at the same time."""

    def __init__(self) -> None:
        self.begun: dict[str, Any] = {}
        self.logged: list[Any] = []
        self.summary: dict[str, float] = {}
        self.ended: int | None = None

    def init(
        self,
        *,
        name: str,
        config: dict[str, Any],
        dir: str,
        project: str | None,
        mode: str | None = None,
    ) -> FakeWandb:
        self.begun = {"name": name, "config": config, "project": project, "mode": mode}
        return self

    def log(self, data: dict[str, float], step: int) -> None:
        self.logged.append((step, data))

    def log_model(self, path: str, name: str) -> None:
        self.logged.append((name, path))

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


def test_wandb_gets_configuration_figures_and_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    callback = WandB("mine", mode="offline", log_model=True)
    assert tell(callback, tmp_path / "a", result_of(tmp_path / "a")) == []
    assert (fake.begun["name"], fake.begun["project"], fake.begun["mode"]) == (
        "a",
        "mine",
        "offline",
    )
    assert fake.begun["config"]["learning_rate"] == 0.1
    assert fake.begun["config"]["argument.batch_norm"] is True
    model = str(tmp_path / "a" / "model.safetensors")
    assert fake.logged == [(7, {"updates": 7.0, "accuracy": 0.5}), ("a", model)]
    assert fake.summary == {"accuracy": 0.75, "seed": 3.0}
    assert fake.ended == 0
    assert tell(WandB("mine"), tmp_path / "b", None) == []
    assert fake.ended == 1


class FakeMlflow:
    """MLflow's client."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.metrics: list[Any] = []
        self.status = ""

    def get_experiment_by_name(self, name: str) -> Any:
        return None

    def create_experiment(self, name: str) -> str:
        return f"id of {name}"

    def create_run(self, experiment_id: str, *, run_name: str) -> Any:
        assert (experiment_id, run_name) == ("id of mine", "a")
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    def log_param(self, run_id: str, key: str, value: Any) -> None:
        self.params[key] = value

    def log_metric(self, run_id: str, key: str, value: float, step: int | None = None) -> None:
        assert run_id == "r1"
        self.metrics.append((key, value, step))

    def set_tag(self, run_id: str, key: str, value: str) -> None: ...

    def log_artifact(self, run_id: str, local_path: str) -> None:
        raise AssertionError("it was not asked for")

    def set_terminated(self, run_id: str, status: str) -> None:
        self.status = status


@pytest.mark.parametrize("finished", [True, False])
def test_mlflow_gets_configuration_figures_and_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    fake = FakeMlflow()
    module = types.SimpleNamespace(MlflowClient=lambda tracking_uri: fake)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    run = tmp_path / "a"
    assert tell(MLflow("mine"), run, result_of(run) if finished else None) == []
    assert fake.params["learning_rate"] == 0.1
    assert ("accuracy", 0.5, 7) in fake.metrics
    assert (("result.accuracy", 0.75, None) in fake.metrics) is finished
    assert fake.status == ("FINISHED" if finished else "FAILED")


def test_tensorboard_gets_the_figures_of_each_run(tmp_path: Path) -> None:
    assert tell(TensorBoard(tmp_path / "all"), tmp_path / "a", None) == []
    (file,) = (tmp_path / "all" / "a").iterdir()
    data, found, at = file.read_bytes(), {}, 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        at += size + 16
    assert found == {"updates": (7, 7.0), "accuracy": (7, 0.5)}


@pytest.mark.parametrize(("kind", "module"), [(WandB, "wandb"), (MLflow, "mlflow")])
def test_a_program_that_is_missing_is_a_line_before_training(
    monkeypatch: pytest.MonkeyPatch, kind: Any, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module} cannot be imported.*downpour\[{module}\]"):
        kind()


def test_they_are_where_users_look_for_them() -> None:
    assert downpour.callbacks.WandB is WandB
    assert downpour.callbacks.MLflow is MLflow
    assert downpour.callbacks.TensorBoard is TensorBoard

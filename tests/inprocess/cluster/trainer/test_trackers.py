"""Callbacks for programs that track experiments: what those are told, by fakes of their modules.

A run with the real ones is `tests/ray/test_trackers.py`. Signatures of the fakes are those of wandb
0.31 and mlflow-skinny 3.17.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
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
RATE = recipes.find("mnist-bn").server.schedule.learning_rate


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
        self.axes: dict[str, str | None] = {}

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

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, data: dict[str, float]) -> None:
        self.logged.append(data)

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
    assert fake.begun["config"]["learning_rate"] == RATE
    assert fake.begun["config"]["argument.batch_norm"] is True
    model = str(tmp_path / "a" / "model.safetensors")
    assert fake.logged == [{"updates": 7.0, "accuracy": 0.5}, ("a", model)]
    assert fake.axes == {"updates": None, "*": "updates"}
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

    def log_batch(self, run_id: str, metrics: Sequence[Any] = (), params: Any = ()) -> None:
        assert run_id == "r1"
        assert max(len(metrics), len(params)) <= 100
        self.metrics += [(key, value, step) for key, value, _, step in metrics]
        self.params |= dict(params)

    def set_tag(self, run_id: str, key: str, value: str) -> None: ...

    def log_artifact(self, run_id: str, local_path: str) -> None:
        raise AssertionError("it was not asked for")

    def set_terminated(self, run_id: str, status: str) -> None:
        self.status = status


def module_of(client: Any) -> types.SimpleNamespace:
    """The module with such a client, and with tuples for its entities."""

    def entity(*values: Any) -> tuple[Any, ...]:
        return values

    entities = types.SimpleNamespace(Param=entity, Metric=entity)
    return types.SimpleNamespace(MlflowClient=client, entities=entities)


@pytest.mark.parametrize("finished", [True, False])
def test_mlflow_gets_configuration_figures_and_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    fake = FakeMlflow()
    module = module_of(lambda tracking_uri: fake)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    run = tmp_path / "a"
    assert tell(MLflow("mine"), run, result_of(run) if finished else None) == []
    assert fake.params["learning_rate"] == str(RATE)
    assert ("accuracy", 0.5, 7) in fake.metrics
    assert (("result.accuracy", 0.75, 0) in fake.metrics) is finished
    assert fake.status == ("FINISHED" if finished else "FAILED")


def test_a_place_that_mlflow_cannot_use_is_a_line_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def client(tracking_uri: str) -> Any:
        raise ValueError("no such\nscheme.")

    monkeypatch.setitem(sys.modules, "mlflow", module_of(client))
    with pytest.raises(UserError, match=r"runs at 'x://y': no such scheme\. Remedy: give another"):
        MLflow("mine", tracking_uri="x://y")


def test_a_program_that_refuses_a_run_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> Any:
        raise OSError("not logged in")

    def lost(*, tracking_uri: str | None) -> Any:
        return types.SimpleNamespace(get_experiment_by_name=lambda name: refuse())

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    monkeypatch.setitem(sys.modules, "mlflow", module_of(lost))
    for callback in (WandB("mine"), MLflow("mine")):
        (said,) = tell(callback, tmp_path / "a", result_of(tmp_path / "a"))
        assert f"{type(callback).__name__}.on_start raised OSError: not logged in" in said


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

"""Callbacks that hand a run's figures on to programs for tracking experiments.

Each imports its program when it is made, so that one that is missing is told before training. If
their program refuses a run at its start, a line says so and nothing more goes there.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from downpour.cluster.config.run import RunConfig
from downpour.cluster.config.settings import settings_of
from downpour.cluster.errors import UserError, one_line
from downpour.cluster.trainer.callbacks import Callback, CurrentRun
from downpour.cluster.trainer.result import Result

MOST_PARAMS = 100
"""MLflow takes so many values in a request."""


class WandB(Callback):
    """Logs to Weights & Biases: the configuration, figures at each evaluation, the result."""

    def __init__(self, project: str | None = None, *, log_model: bool = False, **init: Any) -> None:
        """Nothing is begun until the run is.

        Args:
            project: of Weights & Biases.
            log_model: hand over the last weights, too.
            init: further arguments of `wandb.init`, such as `mode="offline"`.

        Raises:
            UserError: wandb is not installed.
        """
        self._wandb = _module("wandb", "wandb")
        self._init = {"project": project, **init}
        self._log_model = log_model
        self._run: Any = None

    def on_start(self, run: CurrentRun) -> None:
        """Begin a run of theirs, under the name of ours."""
        self._run = None
        given = {"name": run.name, "config": values_of(run.config), "dir": str(run.path)}
        self._run = self._wandb.init(**{**given, **self._init})
        # Not `log(step=...)`: that keeps the newest row back, and in the end it would replace the
        # result in the summary.
        self._run.define_metric("updates")
        self._run.define_metric("*", step_metric="updates")

    def on_evaluation(self, run: CurrentRun, metrics: Mapping[str, Any]) -> None:
        """Log the figures against updates."""
        if self._run is not None:
            self._run.log(numbers(metrics))

    def on_end(self, run: CurrentRun, result: Result | None) -> None:
        """Hand over the result and end their run, as failed if ours is not finished."""
        if self._run is None:
            return
        if result is not None:
            self._run.summary.update(numbers(result.metrics))
            if self._log_model:
                self._run.log_model(str(result.last_checkpoint), name=run.name)
        self._run.finish(exit_code=0 if result is not None else 1)


class MLflow(Callback):
    """Logs to MLflow: the configuration, figures at each evaluation, the result, the weights."""

    def __init__(
        self,
        experiment: str | None = None,
        *,
        tracking_uri: str | None = None,
        log_model: bool = False,
    ) -> None:
        """Nothing is begun until the run is.

        Args:
            experiment: its name; None is MLflow's default.
            tracking_uri: where MLflow keeps runs; None is MLflow's default.
            log_model: hand over the last weights, too.

        Raises:
            UserError: mlflow is not installed, or cannot keep runs at `tracking_uri`.
        """
        mlflow = _module("mlflow", "mlflow-skinny")
        self._client_of, self._entities = mlflow.MlflowClient, mlflow.entities
        self._experiment, self._tracking_uri = experiment, tracking_uri
        self._log_model = log_model
        self._client: Any = None
        self._id: str | None = None
        try:
            # Not kept: it may hold a database's connection. A new database takes seconds to make,
            # which a run would wait for.
            self._client_of(tracking_uri=tracking_uri)
        except Exception as error:
            where = "at its default place" if tracking_uri is None else f"at {tracking_uri!r}"
            remedy = "give another tracking_uri"
            if importlib.util.find_spec("sqlalchemy") is None:
                remedy += ", or, for a database, pip install 'downpour[mlflow]'"
            raise UserError(
                f"MLflow cannot keep runs {where}: {one_line(error)} Remedy: {remedy}"
            ) from error

    def on_start(self, run: CurrentRun) -> None:
        """Begin a run of theirs, under the name of ours."""
        # The client, not the functions of the module: those keep a current run in a thread.
        self._client, self._id = self._client_of(tracking_uri=self._tracking_uri), None
        name = self._experiment or "Default"
        found = self._client.get_experiment_by_name(name)
        id = found.experiment_id if found is not None else self._client.create_experiment(name)
        self._id = self._client.create_run(id, run_name=run.name).info.run_id
        values = [
            self._entities.Param(key, str(value)) for key, value in values_of(run.config).items()
        ]
        for at in range(0, len(values), MOST_PARAMS):
            self._client.log_batch(self._id, params=values[at : at + MOST_PARAMS])
        self._client.set_tag(self._id, "downpour.run", str(run.path))

    def on_evaluation(self, run: CurrentRun, metrics: Mapping[str, Any]) -> None:
        """Log the figures against updates."""
        self._log(numbers(metrics), int(metrics["updates"]))

    def on_end(self, run: CurrentRun, result: Result | None) -> None:
        """Hand over the result and end their run, as failed if ours is not finished."""
        if self._id is None:
            return
        if result is not None:
            self._log({f"result.{k}": v for k, v in numbers(result.metrics).items()}, 0)
            if self._log_model:
                self._client.log_artifact(self._id, str(result.last_checkpoint))
        status = "FINISHED" if result is not None else "FAILED"
        self._client.set_terminated(self._id, status=status)

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        """Log figures in one request, if their run was begun."""
        if self._id is not None:
            now_ms = int(time.time() * 1000)
            metric = self._entities.Metric
            logged = [metric(key, value, now_ms, step) for key, value in figures.items()]
            self._client.log_batch(self._id, metrics=logged)


class TensorBoard(Callback):
    """Writes figures at each evaluation to a TensorBoard folder of your own.

    Each run's folder has the same and more (`tensorboard/`); this gathers several runs in a folder.
    """

    def __init__(self, folder: str | Path) -> None:
        """`folder` holds a folder for each run."""
        self._folder = Path(folder)
        self._writer: Any = None

    def on_start(self, run: CurrentRun) -> None:
        """Open the run's events."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(self._folder / run.name), write_to_disk=True)

    def on_evaluation(self, run: CurrentRun, metrics: Mapping[str, Any]) -> None:
        """Write the figures against updates."""
        for key, value in numbers(metrics).items():
            self._writer.add_scalar(key, value, int(metrics["updates"]))

    def on_end(self, run: CurrentRun, result: Result | None) -> None:
        """Close the events."""
        self._writer.close()


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of the figures that are numbers."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and key != "time"
    }


def values_of(config: RunConfig) -> dict[str, Any]:
    """A configuration as flat values, under the names of the command line's options."""
    values = {setting.name: setting.value_in(config) for setting in settings_of(RunConfig)}
    named = dataclasses.asdict(config.model)
    return {
        "recipe": config.recipe,
        "model": config.model.model,
        "loss": config.model.loss,
        **{f"argument.{name}": value for name, value in named["arguments"].items()},
        **values,
    }


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name} cannot be imported ({error}): pip install 'downpour[{name}]', which brings "
            f"{package}"
        ) from None

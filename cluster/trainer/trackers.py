"""Callbacks that hand a run's figures on to programs for tracking experiments.

Each imports its program when it is made, so that one that is missing is told before training.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from downpour.cluster.config.run import RunConfig
from downpour.cluster.config.settings import settings_of
from downpour.cluster.errors import UserError
from downpour.cluster.trainer.callbacks import Callback, CurrentRun
from downpour.cluster.trainer.result import Result


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
        given = {"name": run.name, "config": values_of(run.config), "dir": str(run.path)}
        self._run = self._wandb.init(**{**given, **self._init})

    def on_evaluation(self, run: CurrentRun, metrics: Mapping[str, Any]) -> None:
        """Log the figures against updates."""
        self._run.log(numbers(metrics), step=int(metrics["updates"]))

    def on_end(self, run: CurrentRun, result: Result | None) -> None:
        """Hand over the result and end their run, as failed if ours is not finished."""
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
            UserError: mlflow is not installed.
        """
        self._client_of = _module("mlflow", "mlflow-skinny").MlflowClient
        self._experiment, self._tracking_uri = experiment, tracking_uri
        self._log_model = log_model
        self._client: Any = None
        self._id = ""

    def on_start(self, run: CurrentRun) -> None:
        """Begin a run of theirs, under the name of ours."""
        # The client, not the functions of the module: those keep a current run in a thread.
        self._client = self._client_of(tracking_uri=self._tracking_uri)
        name = self._experiment or "Default"
        found = self._client.get_experiment_by_name(name)
        id = found.experiment_id if found is not None else self._client.create_experiment(name)
        self._id = self._client.create_run(id, run_name=run.name).info.run_id
        for key, value in values_of(run.config).items():
            self._client.log_param(self._id, key, value)
        self._client.set_tag(self._id, "downpour.run", str(run.path))

    def on_evaluation(self, run: CurrentRun, metrics: Mapping[str, Any]) -> None:
        """Log the figures against updates."""
        for key, value in numbers(metrics).items():
            self._client.log_metric(self._id, key, value, step=int(metrics["updates"]))

    def on_end(self, run: CurrentRun, result: Result | None) -> None:
        """Hand over the result and end their run, as failed if ours is not finished."""
        if result is not None:
            for key, value in numbers(result.metrics).items():
                self._client.log_metric(self._id, f"result.{key}", value)
            if self._log_model:
                self._client.log_artifact(self._id, str(result.last_checkpoint))
        status = "FINISHED" if result is not None else "FAILED"
        self._client.set_terminated(self._id, status=status)


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

"""Ray Tune: a trainer as a trainable. A trial is a run of its own, with some other values.

    tuner = tune.Tuner(trainer.as_trainable(), param_space={"learning_rate": ...}, ...)

A trial reports at each evaluation, so a scheduler such as ASHA can end it early; the figure to go
by is `accuracy`, and `epoch` is how far it is. Trials run side by side on one cluster: nothing of a
run has a fixed name there. A trial that died and is started again goes on from its run's newest
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import CONFIG, RESULT
from downpour.cluster.trainer.callbacks import CurrentRun
from downpour.cluster.trainer.result import Result

OF_TASKS = (
    *("r2", "best_r2", "rmse", "mae", "f1", "best_f1", "macro_f1", "miou", "best_miou"),
    "best_evaluation_loss",
)
REPORTED = (
    *("accuracy", "best_accuracy", "evaluation_loss", "moving_accuracy", "loss", *OF_TASKS),
    *("epoch", "updates", "examples", "learning_rate", "elapsed_s", "updates_per_s"),
)
"""What a trial reports of an evaluation, if there is such a value."""
FINAL = (
    *("accuracy", "best_accuracy", "evaluation_loss", "moving_accuracy", *OF_TASKS),
    *("updates", "examples", "exactly_once", "ended_by"),
)
"""What a trial reports of its result."""


class Experiment(Protocol):
    """What trials need of a `Trainer`."""

    @property
    def config(self) -> RunConfig:
        """The full configuration."""

    @property
    def callbacks(self) -> Sequence[Any]:
        """What is told of a run."""

    @property
    def runs(self) -> Path:
        """The folder for runs."""

    def with_settings(self, **changes: Any) -> Self:
        """A trainer with other values."""

    def fit(self) -> Result:
        """Train a new run."""

    def resume(self, run: Path) -> Result:
        """Go on with a run."""


class TuneReport:
    """A callback that reports to Ray Tune, in whose trial it runs.

    If Tune ends the trial, the report raises `SystemExit`, which ends the run too.
    """

    def __init__(self) -> None:
        """Nothing has been reported yet."""
        self._newest: dict[str, Any] = {}

    def on_evaluation(self, run: CurrentRun, metrics: Mapping[str, Any]) -> None:
        """Report an evaluation, and wait for what Tune makes of it."""
        from ray import tune

        self._newest = {name: metrics[name] for name in REPORTED if name in metrics}
        tune.report({**self._newest, "run": str(run.path)})

    def on_end(self, run: CurrentRun, result: Result | None) -> None:
        """Report the result."""
        from ray import tune

        if result is not None:
            figures = {name: result.metrics[name] for name in FINAL if name in result.metrics}
            tune.report({**self._newest, **figures, "run": str(run.path)})


def trainable(trainer: Experiment, *, cpus: int = 1) -> Callable[[dict[str, Any]], None]:
    """A function trainable of a trainer.

    A trial's configuration gives values by the names that `downpour train --help` lists. Its run is
    in the trainer's folder of runs, as `<experiment>/<trial id>`.

    Args:
        trainer: gives everything else.
        cpus: processors that a trial takes; its replicas spread over as many processes.

    Raises:
        UserError: Ray Tune is not installed, or `cpus` is less than 1.
    """
    if cpus < 1:
        raise UserError(f"cpus is {cpus}: give at least 1")
    try:
        from ray import tune
    except ImportError as error:
        raise UserError(
            f"Ray Tune cannot be imported ({error}): pip install 'downpour[tune]'"
        ) from None
    replicas = trainer.config.replicas
    # Trials beside each other would wait for each other's threads.
    threads = replicas.threads_per_process or 1
    per_process = replicas.replicas_per_process or -(-replicas.replicas // cpus)
    resources: dict[str, float] = {"cpu": cpus}
    if replicas.gpu_share is not None:
        # The processes of a trial can take only what the trial has asked for.
        resources["gpu"] = replicas.gpu_share * -(-replicas.replicas // per_process)
    runs = trainer.runs.absolute()

    def trial(config: dict[str, Any]) -> None:
        context = tune.get_context()
        run_trial(
            trainer,
            {"replicas_per_process": per_process, "threads_per_process": threads, **config},
            runs=runs / context.get_experiment_name(),
            name=context.get_trial_id(),
        )

    return tune.with_resources(trial, resources)  # type: ignore[no-any-return]


def run_trial(trainer: Experiment, chosen: Mapping[str, Any], *, runs: Path, name: str) -> Result:
    """Train a trial's run, or go on with it if it was begun before.

    Args:
        trainer: of the experiment.
        chosen: values of this trial.
        runs: the folder for the experiment's runs.
        name: the trial's id, which becomes the run's name.
    """
    callbacks = [*trainer.callbacks, TuneReport()]
    mine = trainer.with_settings(
        **chosen, name=name, runs=runs, callbacks=callbacks, progress=False
    )
    if (runs / name / CONFIG).exists() and not (runs / name / RESULT).exists():
        return mine.resume(runs / name)
    return mine.fit()

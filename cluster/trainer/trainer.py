"""`downpour.Trainer`: a network, a loss and data in, a `Result` out.

Here: from what a caller gives to a configuration, and from a configuration to a result. Not here:
training itself (`cluster.training`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console

from downpour.cluster.config import recipes
from downpour.cluster.config.classifier import NAME as CLASSIFIER
from downpour.cluster.config.classifier import classifier
from downpour.cluster.config.options import apply
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError, one_line, user_message
from downpour.cluster.run.folder import INITIAL, RunFolder
from downpour.cluster.trainer.callbacks import CallbackSink, checked
from downpour.cluster.trainer.result import Result
from downpour.cluster.trainer.scaling import scaling_of
from downpour.cluster.trainer.settings import checked_settings
from downpour.cluster.training import api, carry, inputs
from downpour.cluster.training.classes import with_classes
from downpour.cluster.training.tasks import with_task
from downpour.paramserver import durable
from downpour.shuffler.config import DataConfig
from downpour.shuffler.dataset.own import is_own

if TYPE_CHECKING:
    from torch import Tensor

    from downpour.cluster.monitoring.observation import Handle, Sink


class Trainer:
    """Trains a network on the parameter server, in the manner of Ray Train's trainers.

        def net(num_classes):
            return nn.Sequential(nn.Linear(784, 100), nn.BatchNorm1d(100), nn.ReLU(),
                                 nn.Linear(100, num_classes))

        result = downpour.Trainer(model=net, data="data/mine", epochs=2).fit()

    A trainer holds no state of a run: each `fit` is a new run.
    """

    def __init__(
        self,
        *,
        model: object = None,
        loss: object = None,
        data: object = None,
        config: object = None,
        scaling: object = None,
        callbacks: Sequence[Any] = (),
        arguments: Mapping[str, Any] | None = None,
        name: str | None = None,
        runs: str | Path = "runs",
        address: str | None = None,
        dashboard: bool = False,
        progress: bool = True,
        **settings: object,
    ) -> None:
        """Look at everything that can be looked at before training.

        Args:
            model: a function or class that makes the network, a `torch.nn.Module` whose weights
                are the initial ones, or `"module:function"`. It may be defined in a script or a
                notebook's cell. None trains the network that `config` names.
            loss: a function of outputs and targets that returns the mean loss, or a name; None
                takes the configuration's.
            data: the folder or URI of a dataset, or a `DataConfig` with all about it; None takes
                the configuration's.
            config: the full configuration, or the name of a recipe, which everything else
                overrides; None is the recipe `classifier`, which takes classes, splits and sizes
                of pictures from the data.
            scaling: how many replicas, and on what (`ScalingConfig`).
            callbacks: are told of the run while it trains (`downpour.callbacks`).
            arguments: keyword arguments for the function that makes the network.
            name: the run's name; None makes one of the model, the date and the time.
            runs: the folder that the run's folder is made in.
            address: the Ray cluster to run on; None takes RAY_ADDRESS, or starts Ray here. If this
                process is connected to a cluster already, it is that one.
            dashboard: start Ray's dashboard with a cluster of our own.
            progress: show progress and result.
            settings: any value of the configuration, by the name that `downpour train --help`
                lists: `epochs=3, learning_rate=0.1, patience=5`.

        Raises:
            UserError: something cannot be used; the text names it and the remedy in one line.
        """
        self._model, self._loss, self._data = model, loss, data
        self._config = config
        self._arguments = arguments
        self._scaling = scaling_of(scaling)
        self._callbacks = checked(callbacks)
        self._name, self._runs = name, Path(runs)
        self._address, self._dashboard, self._progress = address, dashboard, progress
        self._settings = checked_settings(settings)
        with _users_errors():
            self._config_now, self._state = self._prepare()

    def with_settings(self, **changes: Any) -> Self:
        """A trainer like this one, with other values of the configuration.

        Args:
            changes: see `settings`. Besides, `name`, `runs`, `callbacks` and `progress`.

        Raises:
            UserError: a value cannot be used.
        """
        given: dict[str, Any] = {
            "model": self._model,
            "loss": self._loss,
            "data": self._data,
            "config": self._config,
            "scaling": self._scaling,
            "callbacks": self._callbacks,
            "arguments": self._arguments,
            "name": self._name,
            "runs": self._runs,
            "address": self._address,
            "dashboard": self._dashboard,
            "progress": self._progress,
        }
        return type(self)(**{**given, **self._settings, **changes})

    @property
    def callbacks(self) -> Sequence[Any]:
        """What is told of the run."""
        return tuple(self._callbacks)

    @property
    def runs(self) -> Path:
        """The folder that the run's folder is made in."""
        return self._runs

    @property
    def config(self) -> RunConfig:
        """The full configuration that `fit` trains with."""
        return self._config_now

    def fit(self) -> Result:
        """Train to the end.

        It may be called in any thread, and any number of times, one after the other. In the main
        thread, an interrupt asks for a checkpoint and an end.

        Raises:
            UserError: the run cannot be trained; the text names the value and the remedy in one
                line. If nothing was trained, no folder is left.
            RunStopped: it was stopped; `downpour.resume` goes on with it.
        """
        with _users_errors():
            config, state = self._config_now, self._state
            if state is not None and config.model.init is not None:
                raise UserError(
                    f"init is {config.model.init}, and the model is a module with weights of its "
                    "own: give a function that makes it, or no init"
                )
            if config.recipe != CLASSIFIER:
                chosen = "num_classes" in self._settings or isinstance(self._config, RunConfig)
                config = with_classes(config, chosen=chosen)
            data = inputs.check_data(config)
            folder = api.create(config, name=self._name, runs=self._runs)
            if state is not None:
                _write_initial(folder, state)
            return self._train(folder, data, resume=False)

    def resume(self, run: str | Path) -> Result:
        """Go on with a run of this trainer that was stopped or died; its folder says how.

        Raises:
            UserError: the folder holds no run, or one that cannot go on.
            RunStopped: it was stopped again.
        """
        with _users_errors():
            folder = RunFolder.open(Path(run))
            data = inputs.check_data(recipes.admit(folder.config()))
            return self._train(folder, data, resume=True)

    def as_trainable(self, *, cpus: int = 1) -> Callable[[dict[str, Any]], None]:
        """A function for `ray.tune.Tuner`: a trial is a run, with some values of its own.

        See `cluster.trainer.tune`.

        Args:
            cpus: processors that a trial takes of the cluster; its replicas spread over as many
                processes.

        Raises:
            UserError: Ray Tune is not installed.
        """
        from downpour.cluster.trainer.tune import trainable

        return trainable(self, cpus=cpus)

    def _train(self, folder: RunFolder, data: inputs.Data, *, resume: bool) -> Result:
        sinks: list[CallbackSink] = []

        def look_on(handle: Handle) -> Sink:
            sinks.append(CallbackSink(self._callbacks, handle))
            return sinks[-1]

        console = Console(stderr=True) if self._progress else Console(quiet=True)
        try:
            path = api.train_in(
                folder,
                data,
                resume=resume,
                address=self._address,
                dashboard=self._dashboard,
                console=console,
                onlookers=[look_on] if self._callbacks else [],
            )
            result = Result.open(path)
        except BaseException as error:
            for sink in sinks:
                sink.end(None, user_message(error) or f"{type(error).__name__}: {one_line(error)}")
            raise
        for sink in sinks:
            sink.end(result, None)
        return result

    def _prepare(self) -> tuple[RunConfig, Mapping[str, Tensor] | None]:
        """The configuration, and initial weights if a module was handed over."""
        config = dataclasses.replace(self._base(), data=self._data_config())
        state: Mapping[str, Tensor] | None = None
        model, label = config.model, config.recipe
        if self._model is not None:
            handed = carry.model(self._model)
            state, label = handed.state, handed.label
            # The recipe's arguments are for the recipe's network.
            model = dataclasses.replace(
                model, model=handed.name, arguments={}, carried=handed.carried
            )
        if self._arguments is not None:
            model = dataclasses.replace(model, arguments=dict(self._arguments))
        if self._loss is not None:
            handed = carry.loss(self._loss)
            carried = {**model.carried, **handed.carried}
            model = dataclasses.replace(model, loss=handed.name, carried=carried)
        try:
            config = apply(dataclasses.replace(config, model=model), self._settings)
            if state is not None and config.model.init is not None:
                raise UserError(
                    f"init is {config.model.init}, and model is a module, whose weights are the "
                    "initial ones: give a function that makes it, or load the file into it"
                )
            config = recipes.admit(carry.from_main(self._scaling.apply(config)))
        except ValueError as error:
            raise UserError(one_line(error)) from None
        return dataclasses.replace(self._completed(config), recipe=label), state

    def _base(self) -> RunConfig:
        if self._config is None:
            return classifier()
        if isinstance(self._config, str):
            return recipes.find(self._config)
        if isinstance(self._config, RunConfig):
            return self._config
        called = "; call the function, and give what it returns" if callable(self._config) else ""
        raise UserError(
            f"config is {self._config!r}: give a downpour.RunConfig, or the name of a "
            f"recipe{called}"
        )

    def _data_config(self) -> DataConfig:
        data = self._data
        config = data if isinstance(data, DataConfig) else self._base().data
        if not isinstance(data, DataConfig | str | os.PathLike | None):
            raise UserError(
                f"data is {data!r}: give a folder or URI with the shards, a downpour.DataConfig, "
                "or 'dataset:module:function' for a torch Dataset that the function makes"
            )
        given = data if isinstance(data, str | os.PathLike) else config.data
        return dataclasses.replace(config, data=_located(given))

    def _given(self, config: RunConfig) -> dict[str, object]:
        """The settings that the caller has chosen, by name."""
        given: dict[str, object] = {"data": config.data.data, **self._settings}
        if isinstance(self._data, DataConfig):
            given["eval_split"] = config.data.eval_split
        if self._loss is not None:
            given["loss"] = config.model.loss
        return given

    def _completed(self, config: RunConfig) -> RunConfig:
        """With what the recipe `classifier` takes from the data."""
        given = self._given(config)
        if config.recipe != CLASSIFIER:
            return with_task(config, given)
        if self._model is None and not config.model.model:
            raise UserError("there is no network to train: give model=, or config=")
        if self._data is None:
            raise UserError("there is no data to train on: give data=, a dataset, or config=")
        from downpour.cluster.training.from_data import complete
        from downpour.models.by_value import admit

        admit(config.model.carried)
        console = Console(stderr=True, quiet=not self._progress)
        return complete(config, given, lambda line: console.print(line, markup=False))


def _located(data: str | os.PathLike[str]) -> str:
    """The place of a dataset, such that it means the same in another folder."""
    text = os.fspath(data)
    return text if "://" in text or is_own(text) else str(Path(text).expanduser().absolute())


def _write_initial(folder: RunFolder, state: Mapping[str, Tensor]) -> None:
    """Keep a module's initial weights and BN statistics; its other buffers are in its pickle."""
    import torch

    kept = {k: v for k, v in state.items() if v.dtype == torch.float32}
    try:
        durable.save_tensors(kept, folder.path / INITIAL)
    except OSError as error:
        folder.discard_if_unused()
        raise UserError(f"{folder.path / INITIAL} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _users_errors() -> Iterator[None]:
    """Raise every error that a user can repair as a `UserError`, whatever class it has."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        raise UserError(message) from error

"""Training from Python: `downpour.train` and `downpour.resume`.

Not here: what training does (`launch`), and the command line (`cluster.cli`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from downpour.cluster.config import recipes
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import RESULT, RunFolder
from downpour.cluster.training import carry, change, initial, inputs, launch
from downpour.cluster.training.classes import with_classes
from downpour.cluster.training.tasks import with_task
from downpour.workers.spec import DeviceName

if TYPE_CHECKING:
    from downpour.cluster.monitoring.observation import Onlooker


class RunStopped(UserError):
    """Somebody stopped the run before its end: by a signal, Ctrl-C or `downpour stop`."""


def train(
    config: RunConfig | str,
    *,
    name: str | None = None,
    runs: str | Path = "runs",
    address: str | None = None,
    dashboard: bool = False,
) -> Path:
    """Train a run from its beginning to its end, as `downpour train` does.

    It may be called any number of times in a process, one after the other. SIGINT and SIGTERM ask
    for a checkpoint and an end if it is called in the main thread.

    Args:
        config: a configuration, or the name of a recipe (`"mnist-bn"`, `"mine:recipe"`).
        name: the run's name; None makes one of the recipe, the date and the time.
        runs: the folder that the run's folder is made in.
        address: the Ray cluster to run on; None takes RAY_ADDRESS, or starts Ray here. If this
            process is connected to a cluster already, it is that one.
        dashboard: start Ray's dashboard with a cluster of our own.

    Returns:
        The run's folder; `result.json` and `model.safetensors` are in it.

    Raises:
        UserError: the run cannot be trained; the text names the value and the remedy in one line.
            If nothing was trained, no folder is left.
        RunStopped: it was stopped; `downpour.resume` goes on with it.
    """
    told = with_task(_configuration(config), {})
    chosen = with_classes(told, chosen=not isinstance(config, str))
    data = inputs.check_data(chosen)
    folder = create(chosen, name=name, runs=Path(runs))
    return train_in(folder, data, resume=False, address=address, dashboard=dashboard)


def resume(
    run: str | Path,
    *,
    replicas: int | None = None,
    partitions: int | None = None,
    device: DeviceName | None = None,
    until: Mapping[str, float | int | None] | None = None,
    address: str | None = None,
    dashboard: bool = False,
) -> Path:
    """Go on with a run that was stopped or died, as `downpour resume` does.

    Args:
        run: the run's folder.
        replicas: another number of replicas.
        partitions: another number of partitions.
        device: another device for the replicas, `"cpu"` or `"cuda"`.
        until: other values of `stop_at_accuracy` and `patience`, by name; a value of None lets the
            run go on to its last epoch.
        address: as for `train`.
        dashboard: as for `train`.

    Returns:
        The run's folder.

    Raises:
        UserError: the folder holds no run, or one that cannot go on so.
        RunStopped: it was stopped again.
    """
    folder = RunFolder.open(Path(run))
    data = inputs.check_data(recipes.admit(folder.config()))
    change.change(
        folder, data, replicas=replicas, partitions=partitions, device=device, until=until
    )
    return train_in(folder, data, resume=True, address=address, dashboard=dashboard)


def create(config: RunConfig, *, name: str | None, runs: Path) -> RunFolder:
    """Make the folder of a new run.

    Args:
        config: the run's configuration.
        name: the run's name; None makes one of the recipe, the date and the time that no other
            run has.
        runs: the folder that it is made in.

    Raises:
        UserError: the name is a path; the folder exists, or cannot be written; or the file that the
            network is to start from is of another network.
        ModelError: nothing is called as what is to be frozen.
    """
    start = initial.look(config)
    folder = _make(config, name, runs)
    if start is not None:
        initial.write(folder, start)
        for note in start.notes:
            Console(stderr=True).print(note, markup=False, highlight=False)
    return folder


def _make(config: RunConfig, name: str | None, runs: Path) -> RunFolder:
    if name:
        if name in (".", "..") or "/" in name or "\0" in name:
            raise UserError(
                f"name {name!r} is not that of one folder: --runs says where it is made"
            )
        return RunFolder.create(runs / name, config)
    stem = f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return RunFolder.create(next(p for p in (runs / n for n in names) if not p.exists()), config)


def _configuration(config: object) -> RunConfig:
    if isinstance(config, str):
        return recipes.find(config)
    if isinstance(config, RunConfig):
        return recipes.admit(carry.from_main(config))
    called = "; call the function, and give what it returns" if callable(config) else ""
    raise UserError(
        f"config is {config!r}: give a downpour.RunConfig, or the name of a recipe{called}"
    )


def train_in(
    folder: RunFolder,
    data: inputs.Data,
    *,
    resume: bool,
    address: str | None,
    dashboard: bool,
    console: Console | None = None,
    onlookers: Sequence[Onlooker] = (),
) -> Path:
    """Train the run of a folder to its end.

    Args:
        folder: the run's.
        data: what `check_data` found for the run's configuration.
        resume: whether to go on from the newest checkpoint.
        address: as for `train`.
        dashboard: as for `train`.
        console: shows progress, and the result unless it is quiet; None takes stderr.
        onlookers: are told what happens.

    Returns:
        The run's folder.

    Raises:
        UserError: the run cannot be trained. A new run of which nothing was trained is removed.
        RunStopped: it was stopped.
    """
    try:
        launch.train(
            folder,
            data,
            resume=resume,
            address=address,
            dashboard=dashboard,
            console=console or Console(stderr=True),
            age_s=0.0,
            onlookers=onlookers,
        )
    except BaseException:
        if not resume:
            folder.discard_if_unused()
        raise
    if not (folder.path / RESULT).exists():
        reason = folder.status().get("reason", "somebody")
        raise RunStopped(
            f"{folder.path} was stopped by {reason} before its end: go on with "
            f"downpour.resume({str(folder.path)!r})"
        )
    return folder.path

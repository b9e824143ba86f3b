"""The training runs of an experiment, one after the other, and what their metrics say.

A run that is finished is left alone, and one that was stopped goes on. Not here: which runs an
experiment has, and the reports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downpour.cluster.config.options import apply
from downpour.cluster.config.plain import to_plain
from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.protocol.backend import RunFailed
from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.plots import read_metrics, series
from downpour.cluster.run.folder import METRICS, RESULT, RunFolder
from downpour.cluster.training import inputs, launch, session
from downpour.shuffler.dataset.records import Dataset, split_names

if TYPE_CHECKING:
    from rich.console import Console

FAILED = "failed.json"
PAUSE_S = 10.0
"""If two lines of metrics are further apart, the run or the machine was stopped meanwhile."""
LOSSES = 100
"""About how many training losses of a run a report keeps."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Accuracy over a run."""

    updates: tuple[int, ...]
    """Updates applied when the weights were scored."""
    accuracy: tuple[float, ...]
    """Share of the evaluation split, in [0, 1]."""
    seconds: float
    """Time that the run trained, over all its sessions."""
    failure: str | None = None
    """Why the run failed; None if it finished."""
    losses: tuple[tuple[int, float], ...] = ()
    """(updates, smoothed training loss), at the looks of the metrics."""

    @property
    def best(self) -> float:
        """The highest accuracy."""
        return max(self.accuracy, default=0.0)

    @property
    def final(self) -> float:
        """The accuracy at the last look."""
        return self.accuracy[-1] if self.accuracy else 0.0

    @property
    def interval(self) -> int:
        """Most updates between two looks."""
        return max((b - a for a, b in itertools.pairwise(self.updates)), default=0)

    def first_at(self, accuracy: float) -> int | None:
        """Return the updates at the first score of `accuracy` or more; None if there is none."""
        pairs = zip(self.updates, self.accuracy, strict=True)
        return next((u for u, a in pairs if a >= accuracy), None)


def fitted(config: RunConfig, given: Mapping[str, object]) -> RunConfig:
    """Return a recipe with the user's options, and the data's number of classes and splits.

    Raises:
        UserError: an option is wrong, or the data has no evaluation split that is meant.
    """
    config = apply(config, given)
    data = config.data
    names = Dataset.open(data.data, data.train_split).class_names
    changes: dict[str, object] = {}
    if "num_classes" not in given and names:
        changes["num_classes"] = len(names)
    if "eval_split" not in given and data.eval_split not in split_names(data.data):
        others = [s for s in split_names(data.data) if s != data.train_split]
        if len(others) != 1:
            raise UserError(
                f"{data.data} has no split {data.eval_split!r}: name the one to score with "
                "--eval-split"
            )
        changes["eval_split"] = others[0]
    return apply(config, changes)


def train_all(
    runs: Mapping[str, RunConfig], folder: Path, *, address: str | None, console: Console
) -> int:
    """Train the runs that are not finished; return the exit status, 0 unless a signal stopped one.

    All runs are on one Ray, which starts when the first of them needs it.

    Raises:
        UserError: a run in `folder` has other options.
    """
    with contextlib.ExitStack() as ray:
        return _train_all(runs, folder, address=address, console=console, ray=ray)


def _train_all(
    runs: Mapping[str, RunConfig],
    folder: Path,
    *,
    address: str | None,
    console: Console,
    ray: contextlib.ExitStack,
) -> int:
    started = False
    took_s: list[float] = []
    for number, (name, config) in enumerate(runs.items(), 1):
        path = folder / name
        exists = (path / "config.json").is_file()
        run = RunFolder.open(path) if exists else None
        if run is not None and _plain(run.config()) != _plain(config):
            raise UserError(
                f"{path} is a run with other options: give those again, or another --output"
            )
        if (path / RESULT).exists() or (path / FAILED).exists():
            console.print(f"{name}: finished ({number} of {len(runs)})")
            took_s.append(curve_of(path).seconds)
            continue
        left = _told_of_time(took_s, len(runs) - number + 1)
        console.print(f"{name}: run {number} of {len(runs)}{left}")
        data = inputs.check_data(config)
        if not started:
            ray.enter_context(session.on_ray(address=address, dashboard=False))
            started = True
        if run is None:
            run = RunFolder.create(path, config)
        try:
            status = launch.train(
                run,
                data,
                resume=exists,
                address=address,
                dashboard=False,
                console=console,
                age_s=0.0,
            )
        except RunFailed as error:
            # A network that blows up is a finding, not a mishap.
            console.print(f"{name}: {error}", style="yellow")
            run.write_json(FAILED, {"reason": str(error)})
            continue
        if status:
            console.print("the same command goes on from there")
            return status
        took_s.append(curve_of(path).seconds)
    return 0


def _told_of_time(took_s: Sequence[float], left: int) -> str:
    """Say about how long so many runs will take, by the mean of those before."""
    if not took_s:
        return ""
    minutes = max(1, round(statistics.fmean(took_s) * left / 60))
    about = f"{minutes} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"
    return f", about {about} left"


def curve_of(path: Path) -> Curve:
    """Return the accuracy of a run, from its folder."""
    read = read_metrics(path / METRICS)
    metrics = _lasting(read)
    updates, accuracy = series(metrics, "accuracy")
    failure = None
    if (path / FAILED).exists():
        failure = json.loads((path / FAILED).read_text())["reason"]
    at, loss = series(metrics, "loss")
    thin = slice(None, None, max(1, len(at) // LOSSES))
    return Curve(
        updates=tuple(int(u) for u in updates),
        accuracy=tuple(accuracy),
        seconds=_at_work([row["time"] for row in read]),
        failure=failure,
        losses=tuple((int(u), v) for u, v in zip(at[thin], loss[thin], strict=True)),
    )


def _lasting(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out lines that were lost and trained again, after a run went on from a checkpoint."""
    kept: list[dict[str, Any]] = []
    for row in metrics:
        while kept and kept[-1]["updates"] > row["updates"]:
            kept.pop()
        kept.append(row)
    return kept


def _at_work(times: Sequence[float]) -> float:
    """Return the seconds of training: between lines of metrics, pauses of `PAUSE_S` left out.

    So is a clock that is set back.
    """
    return sum(b - a for a, b in itertools.pairwise(times) if 0 <= b - a < PAUSE_S)


def curve_as_data(curve: Curve) -> dict[str, Any]:
    """Return a curve as plain data."""
    return dataclasses.asdict(curve)


def with_network(config: RunConfig, name: str, **arguments: object) -> RunConfig:
    """Return a recipe under another name, with other arguments of its network."""
    model = dataclasses.replace(config.model, arguments={**config.model.arguments, **arguments})
    return dataclasses.replace(config, recipe=name, model=model)


def _plain(config: RunConfig) -> Any:
    """Return the configuration as JSON has it, with lists for tuples."""
    return json.loads(json.dumps(to_plain(config)))

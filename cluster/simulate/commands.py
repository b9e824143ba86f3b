"""The command `downpour simulate`, as click sees it, and how a forecast is shown."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from downpour.cluster.config import recipes
from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.options import ConfigCommand, apply, config_options
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.checkpoint import partitions_before
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.simulate.likeness import Likeness, likeness
from downpour.cluster.simulate.options import SimulateConfig, configured, make_inputs
from downpour.cluster.simulate.settings import (
    LearningConfig,
    SimulateOptions,
    lasting,
    settings,
)
from downpour.shuffler.processors import processors

if TYPE_CHECKING:
    from downpour.cluster.simulate.curve import LearningCurve
    from downpour.cluster.simulate.forecast import Forecast

LINES_EVERY_S = 10.0
"""Seconds between two lines of progress if there is no terminal."""


@click.command(cls=ConfigCommand)
@config_options(SimulateOptions)
@click.argument("recipe", required=False)
@click.option(
    "--like",
    "run",
    type=click.Path(path_type=Path),
    default=None,
    help="A run that was measured: its configuration, and what its steps and pushes cost.",
)
@click.option(
    "--learn",
    "learns",
    is_flag=True,
    help="Compute gradients and weights, too: accuracy against virtual time.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Save a picture: the histogram of staleness, or with --learn the curves of accuracy.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def simulate(
    recipe: str | None,
    run: Path | None,
    learns: bool,
    plot: Path | None,
    as_json: bool,
    given: dict[str, object],
) -> None:
    """Predict staleness and throughput of RECIPE, or of a run like another, on a virtual clock.

    The server's own decisions on staleness, duplicates and leases are run; time is simulated. With
    --learn the arithmetic is real, too, the same to the bit every time.
    """
    if (recipe is None) == (run is None):
        raise UserError("nothing, or both of two, to simulate: name a recipe or a run with --like")
    learning_options = [name for name in given if name in LEARNING]
    if learning_options and not learns:
        option = learning_options[0].replace("_", "-")
        raise UserError(f"--{option} is of a run that learns: give --learn, too")
    every = apply(SimulateOptions(), given)
    options = every.simulate
    folder = None if run is None else RunFolder.open(run)
    config = recipes.find(recipe) if folder is None and recipe else _of(folder)
    measured = None if folder is None else likeness(folder, partitions_of(config), processors())
    if learns:
        from downpour.cluster.simulate import report

        curves = learn(config, every, measured)
        report.give(curves, every.learn.goal, plot=plot, as_json=as_json)
        return
    forecast = predict(config, options, measured, show_progress=not as_json)
    if plot is not None:
        from downpour.cluster.monitoring.plots import plot_histogram

        plot_histogram(plot, forecast.staleness.bars, title(forecast))
    if as_json:
        click.echo(json.dumps(as_plain(forecast, measured)))
    else:
        show(forecast, measured, Console())


LEARNING = frozenset(field.name for field in dataclasses.fields(LearningConfig))
"""Options that mean something with `--learn` alone."""


def learn(
    config: RunConfig, options: SimulateOptions, measured: Likeness | None
) -> list[LearningCurve]:
    """What runs of `config` would learn, one for each setting that is compared.

    Raises:
        UserError: costs are missing, or settings do not go together.
    """
    from downpour.cluster.monitoring.bars import progress_bar
    from downpour.cluster.simulate.arithmetic import TrainingRows
    from downpour.cluster.simulate.learning import LearningRun, WeightsScorer

    runs = []
    for setting in settings(options.learn):
        given = setting.given(options.simulate)
        runs.append((setting, given, lasting(configured(config, given), options.learn, setting)))
    examples, scorer = TrainingRows.of(runs[0][2]), WeightsScorer(config)
    curves = []
    for setting, given, simulated in runs:
        inputs = make_inputs(
            simulated,
            given,
            num_rows=examples.plan.num_rows,
            num_parameters=examples.model.num_parameters,
            like=measured,
        )
        run = LearningRun(
            setting.name,
            inputs,
            options.learn,
            examples=examples,
            scorer=scorer,
            seconds=given.seconds or math.inf,
        )
        what = "mini-batches" if len(runs) == 1 else f"mini-batches, {setting.name}"
        with progress_bar(what, lines_every_s=LINES_EVERY_S) as show:
            curves.append(run.run(show))
    return curves


def predict(
    config: RunConfig,
    options: SimulateConfig,
    measured: Likeness | None,
    *,
    show_progress: bool = False,
) -> Forecast:
    """What a run of `config` would show."""
    from downpour.cluster.monitoring.bars import progress_bar
    from downpour.cluster.simulate.run import Simulation
    from downpour.cluster.training.inputs import check_data

    simulated = configured(config, options)
    inputs = make_inputs(
        simulated,
        options,
        num_rows=check_data(config).plan.num_rows,
        num_parameters=model_spec(config).build_flat().layout.num_parameters,
        like=measured,
    )
    with progress_bar("updates", console=Console(stderr=True, quiet=not show_progress)) as show:
        return Simulation(inputs).forecast(
            seconds=options.seconds,
            progress=lambda done, total: show(done, total or None),
        )


def partitions_of(config: RunConfig) -> int:
    """How many partitions a run of `config` has on this machine."""
    layout = model_spec(config).build_flat().layout
    return config.server.num_partitions(layout.num_parameters, processors())


def _of(folder: RunFolder | None) -> RunConfig:
    """The configuration of a run, with the number of partitions that it had."""
    assert folder is not None
    config = recipes.admit(folder.config())
    server = dataclasses.replace(config.server, partitions=partitions_before(folder))
    return dataclasses.replace(config, server=server)


def title(forecast: Forecast) -> str:
    """What was simulated, on one line."""
    return (
        f"{_count(forecast.replicas, 'replica')} x {_count(forecast.concurrent_steps, 'step')}, "
        f"{_count(forecast.processes, 'process')}, {_count(forecast.partitions, 'partition')}"
    )


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def as_plain(forecast: Forecast, measured: Likeness | None) -> dict[str, Any]:
    """A forecast as JSON has it, beside what it was made from."""
    plain = {
        field.name: getattr(forecast, field.name)
        for field in dataclasses.fields(forecast)
        if field.name != "staleness"
    }
    plain["staleness"] = {
        **forecast.staleness.summary(),
        "histogram": [[low, n] for low, n in forecast.staleness.bars],
    }
    if measured is not None:
        plain["like"] = dataclasses.asdict(measured)
    return plain


def show(forecast: Forecast, measured: Likeness | None, console: Console) -> None:
    """Print a table."""
    staleness = forecast.staleness.summary()
    table = Table(title=title(forecast), title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("predicted", justify="right")
    if measured is not None:
        table.add_column("run it is like", justify="right")

    def add(name: str, value: str, there: str = "") -> None:
        table.add_row(name, value, *([there] if measured is not None else []))

    def of(text: str) -> str:
        return text if measured is not None else ""

    add(
        "updates a second",
        f"{forecast.updates_per_s:,.0f}",
        of(f"{measured.updates_per_s:,.0f}" if measured else ""),
    )
    add("mini-batches settled a second", f"{forecast.batches_per_s:,.0f}")
    add(
        "staleness, mean",
        f"{staleness['mean']:,.1f}",
        of(f"{measured.staleness_mean:,.1f}" if measured else ""),
    )
    add(
        "staleness, median / 99% / highest",
        f"{staleness['p50']:,} / {staleness['p99']:,} / {staleness['max']:,}",
    )
    add("push to last answer, ms", f"{forecast.push_ms:,.2f}")
    add("wait for weights, ms a step", f"{forecast.pull_wait_ms:,.2f}")
    add("processors used, replicas / server", "{:.0%} / {:.0%}".format(*forecast.busy))
    if forecast.deaths:
        add("deaths", f"{forecast.deaths:,}")
        add("pushes repeated", f"{forecast.repeated:,}")
    console.print(table)
    console.print(
        f"{forecast.updates:,} updates in {forecast.seconds:,.2f} s of simulated time",
        style="dim",
        highlight=False,
    )

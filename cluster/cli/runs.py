"""Commands about runs: recipes, status, watch, stop, report, trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from downpour.cluster.cli.shared import RUNS
from downpour.cluster.config import classifier, recipes
from downpour.cluster.config.options import ConfigCommand, apply, config_options
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.scores import figure_of, figures_in
from downpour.cluster.monitoring.texts import cell_text, percent_text
from downpour.cluster.run.folder import CONFIG, METRICS, RESULT, RunFolder


@click.command(
    cls=ConfigCommand, name="recipes", named_by="recipe", find=recipes.find, of_data=recipes.of_data
)
@config_options(RunConfig)
@click.argument("recipe", required=False)
def list_recipes(recipe: str | None, given: dict[str, object]) -> None:
    """List the recipes; or show RECIPE, with any options: its network and all its values."""
    if recipe is not None:
        from downpour.cluster.config.describe import describe
        from downpour.cluster.training import from_data

        config = recipes.admit(apply(recipes.find(recipe), given))
        if "data" in given or config.recipe == classifier.NAME:
            config = from_data.complete(config, given)
        describe(config, Console())
        return
    if given:
        raise UserError("options say nothing without a recipe: name one to see it with them")
    table = Table(box=None, pad_edge=False, show_header=False)
    for known in recipes.RECIPES.values():
        table.add_row(f"[bold]{known.name}[/bold]", known.summary)
    Console().print(table)


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option(
    "--runs", type=click.Path(path_type=Path), default=RUNS, help="Folder that runs are kept in."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(run: Path | None, runs: Path, as_json: bool) -> None:
    """Show where RUN stands; without one, where all runs stand."""
    if run is not None:
        folders = [RunFolder.open(run)]
    else:
        found = sorted(runs.iterdir()) if runs.is_dir() else []
        folders = [RunFolder.open(path) for path in found if (path / CONFIG).is_file()]
        if not folders and not as_json:
            click.echo(f"no runs in {runs}: `downpour train mnist-bn` makes one")
            return
    from downpour.cluster.monitoring.watch import states

    ends = states(folders)
    rows = [run_status(folder, ended) for folder, ended in zip(folders, ends, strict=True)]
    if as_json:
        click.echo(json.dumps(rows if run is None else rows[0]))
        return
    table = Table(box=None, pad_edge=False)
    columns = ("run", "recipe", "state", "epoch", "updates", "loss", "accuracy")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    for row in rows:
        cells = {column: cell_text(row.get(column)) for column in columns}
        figure = figure_of(row)
        if figure is not None and figure.accuracy is None:
            cells["accuracy"] = figure.text
        else:
            cells["accuracy"] = percent_text(row.get("accuracy"))
        table.add_row(*cells.values())
    Console().print(table)


def run_status(folder: RunFolder, ended: str | None) -> dict[str, Any]:
    """Return where a run stands; `ended` is how it ended, None while it goes on."""
    status: dict[str, Any] = {"run": folder.name, "recipe": folder.config().recipe}
    status |= folder.status()
    if (folder.path / RESULT).exists():
        result = folder.read_json(RESULT)
        figure = figure_of(result)
        status |= {"state": "finished"} | ({} if figure is None else {figure.metric: figure.value})
        if "ended_because" in result:
            status["reason"] = result["ended_because"]
    elif ended is None and "state" not in status:
        status["state"] = "starting"
    elif ended is not None and not ended.startswith("stopped"):
        status["state"] = ended
    if figure_of(status) is None:  # a run from before its status had it
        scored = figures_in(list(folder.read_lines(METRICS)))
        status |= {scored[-1].metric: scored[-1].value} if scored else {}
    return status


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--once", is_flag=True, help="Print where it stands, and end.")
def watch(run: Path, once: bool) -> int:
    """Show the progress of the run in the folder RUN until it ends, wherever it trains."""
    from downpour.cluster.monitoring.watch import watch as follow

    return follow(RunFolder.open(run), once=once, console=Console())


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--wait/--no-wait", default=True, help="Wait until it has stopped.")
def stop(run: Path, wait: bool) -> int:
    """Have the run in the folder RUN write a checkpoint and end, wherever it trains."""
    from downpour.cluster.monitoring.watch import stop as ask

    return ask(RunFolder.open(run), wait=wait, console=Console())


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write report.html of RUN, a page with its curves up to now."""
    from downpour.cluster.monitoring.report.html_report import write_report

    click.echo(f"written: {write_report(RunFolder.open(run).path)}")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def trust(run: Path) -> None:
    """Have the code in the folder RUN used here, as if you had trained it.

    A run whose network or loss was defined in a script or notebook keeps it as pickled code, which
    is used only where it was made. RUN may come from another machine or user: trust it only if you
    trust them, since the code then runs as you.
    """
    from downpour.cluster.run import sealed

    for name in sealed.trust(RunFolder.open(run).path):
        click.echo(f"trusted: {name}")


COMMANDS = (list_recipes, status, watch, stop, report, trust)

"""The commands of `downpour` that are about clusters and about runs on them."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
from rich.console import Console

from cluster import recipes
from cluster.config import RunConfig
from cluster.errors import EXIT_ERROR, UserError
from cluster.options import apply, given_in
from cluster.run_folder import RunFolder

FILES = "`downpour train` and `downpour resume`"


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> int:
    """Check FILE, a cluster for `ray up` or KubeRay, before it costs anything."""
    from cluster.cluster_file import problems

    found = problems(file)
    for problem in found:
        click.echo(f"{file}: {problem}")
    if found:
        return EXIT_ERROR
    click.echo(f"{file}: nothing to change")
    return 0


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--address",
    default=None,
    help="The cluster's dashboard; without it RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265.",
)
@click.option("--id", "job_id", default=None, help="Name of the job; default: Ray makes one.")
@click.option("--wait/--no-wait", default=True, help="Follow the job's output until it ends.")
@click.option("--follow", is_flag=True, help="Submit nothing: follow the job that --id names.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def submit(
    address: str | None, job_id: str | None, wait: bool, follow: bool, arguments: tuple[str, ...]
) -> int:
    """Run a command of `downpour` as a job on a Ray cluster: `downpour submit train mnist-bn ...`.

    The job goes on when this command ends or its terminal closes; --follow takes up its output.
    """
    from cluster import jobs

    if not follow:
        check_job(arguments)
    elif job_id is None or arguments:
        raise UserError("--follow needs --id of a job, and no command")
    client = jobs.connect(address)
    if not follow:
        job_id = jobs.submit(client, arguments, job_id)
        click.echo(f"job {job_id} submitted: {shlex.join(('downpour', *arguments))}")
        if not wait:
            click.echo(f"follow it with `downpour submit --follow --id {job_id}`")
            return 0
    assert job_id is not None
    return jobs.follow(client, job_id)


def check_job(arguments: tuple[str, ...]) -> None:
    """Refuse here what the job would refuse on the cluster, before anything is uploaded."""
    from cluster.commands import downpour

    if not arguments:
        raise UserError(f"no command: give one of {FILES} with its arguments")
    name, *rest = arguments
    command = downpour.commands.get(name)
    if name not in ("train", "resume") or command is None:
        raise UserError(f"{name!r} is no command for a cluster: give {FILES}")
    with command.make_context(name, rest) as context:
        parameters = context.params
        given = given_in(context, RunConfig) if name == "train" else {}
    place = parameters["runs"] if name == "train" else parameters["run"]
    if not place.is_absolute():
        option = "--runs" if name == "train" else "RUN"
        raise UserError(
            f"{option} is {place}, which would be in the job's own folder and go with it: give "
            "the full path of a folder that the nodes share, such as /mnt/downpour/runs"
        )
    if name == "train":
        apply(recipes.find(parameters["recipe"]), given)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--once", is_flag=True, help="Print where it stands, and end.")
def watch(run: Path, once: bool) -> int:
    """Show the progress of RUN, the folder of a run that trains somewhere, until it ends."""
    from cluster.watch import watch as follow

    return follow(RunFolder.open(run), once=once, console=Console())


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--wait/--no-wait", default=True, help="Wait until it has stopped.")
def stop(run: Path, wait: bool) -> int:
    """Ask the training of RUN to write a checkpoint and end, wherever it runs."""
    from cluster.watch import stop as ask

    return ask(RunFolder.open(run), wait=wait, console=Console())


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write RUN's report.html, a page with its curves, as far as it has come."""
    from cluster.html_report import write_report

    click.echo(f"written: {write_report(RunFolder.open(run).path)}")


COMMANDS = (check, submit, watch, stop, report)

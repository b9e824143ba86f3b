"""Commands about clusters and runs on them: cluster-files, check, submit."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from downpour.cluster.cli.training import resume, train
from downpour.cluster.config import recipes
from downpour.cluster.config.options import apply, given_in
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import EXIT_ERROR, UserError

if TYPE_CHECKING:
    from downpour.cluster.deploy.upload import Upload

FILES = "`downpour train` and `downpour resume`"


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> int:
    """Check FILE, a cluster for `ray up` or KubeRay, before it costs money."""
    from downpour.cluster.deploy.cluster_file import problems

    found = problems(file)
    for problem in found:
        click.echo(f"{file}: {problem}")
    if found:
        return EXIT_ERROR
    click.echo(f"{file}: nothing to change")
    return 0


@click.command(name="cluster-files")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def cluster_files(folder: Path) -> None:
    """Write the cluster files to FOLDER: for `ray up` and KubeRay, with what they copy to nodes.

    Run `ray up` from that folder. Files there that differ are never overwritten.
    """
    from downpour.cluster.deploy.files import CLUSTER_FILE, write_cluster_files

    written = write_cluster_files(folder)
    click.echo(f"{len(written)} files in {folder}; change them to your needs, and then:")
    click.echo(f"cd {shlex.quote(str(folder))} && downpour check {CLUSTER_FILE}")


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
    from downpour.cluster.deploy import jobs

    jobs.use_token()
    if not follow:
        travels = check_job(arguments)
    elif job_id is None or arguments:
        raise UserError("--follow needs --id of a job, and no command")
    client = jobs.connect(address)
    if not follow:
        click.echo(travels.line())
        job_id = jobs.submit(client, arguments, job_id, travels)
        click.echo(f"job {job_id} submitted: {shlex.join(('downpour', *arguments))}")
        if not wait:
            click.echo(f"follow it with `downpour submit --follow --id {job_id}`")
            return 0
    assert job_id is not None
    return jobs.follow(client, job_id)


def check_job(arguments: tuple[str, ...]) -> Upload:
    """Check a job's command before anything is sent, and return what would be sent with it.

    Raises:
        UserError: the command is wrong, or something that it needs would not be sent.
    """
    from downpour.cluster.deploy import upload

    if not arguments:
        raise UserError(f"no command: give one of {FILES} with its arguments")
    name, *rest = arguments
    command = {"train": train, "resume": resume}.get(name)
    if command is None:
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
    config = apply(recipes.find(parameters["recipe"]), given) if name == "train" else None
    here = Path.cwd()
    if config is None:  # the run's data may be anything in the working directory
        travels = upload.measure(here)
    else:
        modules = upload.own_modules(here, parameters["recipe"], config)
        travels = upload.measure(here, data=config.data.data, modules=modules)
    upload.check_size(travels)
    if config is not None:
        for line in upload.missing(travels, parameters["recipe"], config):
            click.echo(line, err=True)
    return travels


COMMANDS = (cluster_files, check, submit)

"""Commands about datasets: ingest, inspect."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console

from downpour.cluster.config.options import ConfigCommand, apply, config_options
from downpour.cluster.datasets.inspection import InspectConfig
from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.bars import progress_bar
from downpour.shuffler.ingest.config import IngestConfig


@click.command(cls=ConfigCommand)
@config_options(IngestConfig)
@click.argument("source")
@click.argument("destination")
def ingest(source: str, destination: str, given: dict[str, object]) -> None:
    """Make a dataset in DESTINATION from SOURCE, its rows shuffled once.

    SOURCE is a folder of IDX files (MNIST's), of CIFAR's binary files, of a folder for each class
    (ImageNet's layout, with its class list and validation ground truth), of Parquet or Arrow files
    as Hugging Face and others write them, of WebDataset's tar files, or of lists of paths and
    labels (CSV, JSON lines). Both may be URIs of pyarrow.fs, such as s3://bucket/folder.
    """
    from downpour.shuffler.ingest.ingest import ingest as write

    lines: list[str] = []
    try:
        with _ends_on_signals(), progress_bar("shuffling rows") as show:
            config = apply(IngestConfig(), given)
            manifest = write(source, destination, config, progress=show, say=lines.append)
    finally:
        for line in lines:
            click.echo(line, err=True)
    for name, split in manifest.splits.items():
        size = sum(shard.num_bytes for shard in split.shards)
        click.echo(f"{name}: {split.num_rows:,} rows, {size:,} bytes, {len(split.shards)} file(s)")


@click.command(cls=ConfigCommand)
@config_options(InspectConfig)
@click.argument("data")
@click.option(
    "--sheet",
    type=click.Path(path_type=Path),
    default=None,
    help="Save a mini-batch as a picture, varied as in training.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(data: str, sheet: Path | None, as_json: bool, given: dict[str, object]) -> None:
    """Show what the dataset DATA holds, and how a strategy mixes it."""
    from downpour.cluster.datasets import inspection

    config = apply(InspectConfig(), given)
    with progress_bar("counting pairs") as show:
        found = inspection.inspect(data, config, progress=show)
    if sheet is not None:
        found["sheet"] = {
            "path": str(sheet),
            "images": inspection.contact_sheet(data, config, sheet),
        }
    if as_json:
        click.echo(json.dumps(found))
    else:
        inspection.show(found, Console())


@contextlib.contextmanager
def _ends_on_signals() -> Iterator[None]:
    """Have SIGTERM end what is under way as Ctrl-C does, so that it removes what it has written."""

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not disturb the removal
        raise UserError("stopped by SIGTERM; what was written is removed")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


COMMANDS = (ingest, inspect)

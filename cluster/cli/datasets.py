"""Commands about datasets: ingest, inspect."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from downpour.cluster.config.options import ConfigCommand, apply, config_options
from downpour.cluster.datasets.inspection import InspectConfig
from downpour.cluster.monitoring.bars import progress_bar
from downpour.shuffler.ingest.ingest import IngestConfig


@click.command(cls=ConfigCommand)
@config_options(IngestConfig)
@click.argument("source")
@click.argument("destination")
def ingest(source: str, destination: str, given: dict[str, object]) -> None:
    """Make a dataset in DESTINATION from SOURCE, its rows shuffled once.

    SOURCE is a folder of IDX files (MNIST's), of CIFAR's binary files, of a folder for each class
    (ImageNet's layout, with its class list and validation ground truth), or of Parquet in the
    Hugging Face convention. Both may be URIs of pyarrow.fs, such as s3://bucket/folder.
    """
    from downpour.shuffler.ingest.ingest import ingest as write

    with progress_bar("shuffling rows") as show:
        manifest = write(source, destination, apply(IngestConfig(), given), progress=show)
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


COMMANDS = (ingest, inspect)

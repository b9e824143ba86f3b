"""Commands that use trained weights: evaluate, recalibrate, predict, export, serve."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from downpour.cluster.cli.shared import (
    also_option,
    crops_option,
    with_weights_options,
)
from downpour.cluster.config.options import ConfigCommand, apply, config_options
from downpour.cluster.errors import UserError
from downpour.cluster.serving.app import ServeConfig


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@with_weights_options
@click.option("--data", default=None, help="Folder or URI with the shards; default: the run's.")
@click.option("--split", default=None, help="Split to score; default: the run's evaluation split.")
@crops_option
def evaluate(
    runs: tuple[Path, ...],
    best: bool,
    weights: str | None,
    data: str | None,
    split: str | None,
    crops: str,
) -> None:
    """Score the weights of one of RUNS, or of several as an ensemble, on a split.

    Batch normalization uses the statistics that the server kept. Class probabilities are averaged
    over the crops of an image and over the networks.
    """
    from downpour.cluster.serving import inference

    loaded = [inference.load(run, best=best, weights=weights) for run in runs]
    score = inference.evaluate(loaded, data=data, split=split, crops=int(crops))
    click.echo(json.dumps(score))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@with_weights_options
@click.option("--data", default=None, help="Folder or URI with the shards; default: the run's.")
@click.option("--split", default=None, help="Split to use; default: the run's training split.")
@click.option(
    "--batches", default=500, show_default=True, type=click.IntRange(1), help="Mini-batches."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="File to write; default: recalibrated.safetensors in RUN.",
)
def recalibrate(
    run: Path,
    best: bool,
    weights: str | None,
    data: str | None,
    split: str | None,
    batches: int,
    output: Path | None,
) -> None:
    """Recompute the BN statistics of RUN on any dataset (Algorithm 2), its weights as they are.

    The other commands take the result with `--weights`.
    """
    from downpour.cluster.serving import inference

    loaded = inference.load(run, best=best, weights=weights)
    told = inference.recalibrate(loaded, data=data, split=split, batches=batches, output=output)
    click.echo(json.dumps(told))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@with_weights_options
@also_option
@crops_option
@click.option(
    "--top", default=5, show_default=True, type=click.IntRange(1), help="Classes to show."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def predict(
    run: Path,
    images: tuple[Path, ...],
    best: bool,
    weights: str | None,
    also: tuple[Path, ...],
    crops: str,
    top: int,
    as_json: bool,
) -> None:
    """Show the most probable classes of the files IMAGES, by the weights of RUN."""
    from downpour.cluster.serving import inference
    from downpour.workers.evaluation.predictor import Predictor

    files = inference.read_images(images)
    loaded = [inference.load(path, best=best, weights=weights) for path in (run, *also)]
    predictor = Predictor([one.network for one in loaded], crops=int(crops))
    names = [str(path) for path in images]
    answers = inference.predict(predictor, loaded[0].class_names, files, names, top=top)
    if as_json:
        pairs = zip(names, answers, strict=True)
        click.echo(json.dumps([{"image": n, "predictions": found} for n, found in pairs]))
        return
    for name, found in zip(names, answers, strict=True):
        told = "  ".join(f"{p['class']} {p['probability']:.1%}" for p in found)
        click.echo(f"{name}: {told}")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@with_weights_options
@click.option(
    "--format", "kind", type=click.Choice(["onnx", "torch"]), default="onnx", show_default=True
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="File to write; default: model.onnx or model.pt2 in RUN.",
)
@click.option("--data", default=None, help="Folder or URI with the shards; default: the run's.")
@click.option(
    "--batches",
    default=100,
    show_default=True,
    type=click.IntRange(1),
    help="Mini-batches that the BN statistics are checked on.",
)
@click.option(
    "--max-disagreement",
    default="0.25",
    show_default=True,
    metavar="FLOAT|none",
    help="Most that moving and recomputed statistics may differ, in standard deviations.",
)
def export(
    run: Path,
    best: bool,
    weights: str | None,
    kind: Any,
    output: Path | None,
    data: str | None,
    batches: int,
    max_disagreement: str,
) -> None:
    """Write the network of RUN, its batch normalization folded, for other programs.

    The file is read back and compared with the checkpoint before it is kept.
    """
    try:
        bound = None if max_disagreement.lower() == "none" else float(max_disagreement)
    except ValueError:
        raise UserError(f"--max-disagreement {max_disagreement}: give a number, or none") from None
    from downpour.cluster.serving import export as exporting
    from downpour.cluster.serving import inference

    loaded = inference.load(run, best=best, weights=weights)
    path = output or loaded.folder.path / f"model{exporting.SUFFIX[kind]}"
    told = exporting.export(
        loaded, path, format=kind, data=data, batches=batches, max_disagreement=bound
    )
    click.echo(json.dumps(told))


@click.command(cls=ConfigCommand)
@config_options(ServeConfig)
@click.argument("run", type=click.Path(path_type=Path))
@with_weights_options
@also_option
@click.option(
    "--address",
    default=None,
    help="Ray cluster to run on; without it RAY_ADDRESS, or a new one on this machine.",
)
def serve(
    run: Path,
    best: bool,
    weights: str | None,
    also: tuple[Path, ...],
    address: str | None,
    given: dict[str, object],
) -> None:
    """Answer images over HTTP with their most probable classes by RUN, until interrupted.

    Callers have to show a key: a new one for each deployment, or the one in --key-file. A file
    that is named at the start holds the header to send.
    """
    from downpour.cluster.serving import app

    config = apply(ServeConfig(), given)
    runs = (run, *also)
    with app.serving(runs, best=best, weights=weights, config=config, address=address) as told:
        url, header = told
        click.echo(f"serving {run} at {url}")
        click.echo(f"try: curl -H @{header} --data-binary @image.jpg {url}/predict")
        sys.stdout.flush()
        app.wait_for_signal()


COMMANDS = (evaluate, recalibrate, predict, export, serve)

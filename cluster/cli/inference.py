"""Commands that use trained weights: evaluate, recalibrate, predict, export, serve."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from downpour.cluster.cli.shared import (
    also_option,
    crops_option,
    orientation_option,
    with_weights_options,
)
from downpour.cluster.config.options import ConfigCommand, apply, config_options
from downpour.cluster.errors import EXIT_ERROR, PROGRAM, UserError
from downpour.cluster.serving.settings import ServeConfig
from downpour.shuffler.errors import DatasetError
from downpour.shuffler.images.decode import BadImage
from downpour.shuffler.images.reading import Orientation

if TYPE_CHECKING:
    from downpour.cluster.serving.inference import Trained
    from downpour.workers.evaluation.predictor import Predictor


MASKS = "masks"
"""Folder in a run's folder for the masks that its network finds."""


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@with_weights_options
@click.option("--data", default=None, help="Folder or URI with the shards; default: the run's.")
@click.option("--split", default=None, help="Split to score; default: the run's evaluation split.")
@crops_option
@orientation_option
@click.option(
    "--on-bad-image",
    type=click.Choice(["stop", "skip"]),
    default=None,
    help="What an image does that cannot be decoded; default: as it did to the run.",
)
def evaluate(
    runs: tuple[Path, ...],
    best: bool,
    weights: str | None,
    data: str | None,
    split: str | None,
    crops: str,
    orientation: Orientation | None,
    on_bad_image: BadImage | None,
) -> None:
    """Score the weights of one of RUNS, or of several as an ensemble, on a split.

    Batch normalization uses the statistics that the server kept. Class probabilities are averaged
    over the crops of an image and over the networks. Networks and data have to name the same
    classes.
    """
    from downpour.cluster.serving import inference

    loaded = inference.load_all(runs, best=best, weights=weights, orientation=orientation)
    from downpour.cluster.monitoring.bars import progress_bar

    told: list[str] = []
    with progress_bar("images") as show:
        score = inference.evaluate(
            loaded,
            data=data,
            split=split,
            crops=int(crops),
            on_bad_image=on_bad_image,
            say=told.append,
            progress=show,
        )
    for line in told:
        _tell(line)
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
@orientation_option
@click.option(
    "--top", default=5, show_default=True, type=click.IntRange(1), help="Classes to show."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder for the masks of a segmentation; default: masks in RUN.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def predict(
    run: Path,
    images: tuple[Path, ...],
    best: bool,
    weights: str | None,
    also: tuple[Path, ...],
    crops: str,
    orientation: Orientation | None,
    top: int,
    output: Path | None,
    as_json: bool,
) -> int:
    """Show the most probable classes of the files IMAGES, by the weights of RUN.

    A segmentation writes a mask of each image's size, a PNG with a class in each pixel.

    For a network of numbers, IMAGES are Parquet or CSV files with its input columns, and each row
    is answered. A regression gives numbers, and multilabel every class above one half. If inputs
    come from a dataset of your own, IMAGES are .npy files of inputs.

    Files that cannot be read or decoded are named on stderr, and the others are answered. Then the
    exit status is 2.
    """
    from downpour.cluster.serving import inference, masks, prediction
    from downpour.workers.evaluation.predictor import Predictor

    loaded = inference.load_all((run, *also), best=best, weights=weights, orientation=orientation)
    predictor = Predictor([one.network for one in loaded], crops=int(crops))
    masked = predictor.task == "segmentation" and not loaded[0].network.spec.columns.inputs
    if output is not None and not masked:
        raise UserError(f"--output is for masks, and {run} finds none of pictures: leave it out")
    if loaded[0].network.spec.columns.inputs:
        return _predict_tables(predictor, loaded[0], images, as_json=as_json)
    folder = output or loaded[0].folder.path / MASKS
    paths = masks.file_names(folder, images) if masked else [None] * len(images)
    answers = []
    status = 0
    predictions = prediction.predict_files(predictor, loaded[0].class_names, images, top=top)
    for found, path in zip(predictions, paths, strict=True):
        if found.mask is not None and path is not None:
            masks.write(path, found.mask)
        if found.problem is not None:
            status = EXIT_ERROR
            _tell(f"error: {found.problem}")
        if found.note is not None:
            _tell(found.note)
        if as_json:
            told: dict[str, Any] = {"image": found.name, "predictions": found.classes}
            told |= {} if found.mask is None else {"mask": str(path)}
            answers.append(told | ({"error": found.problem} if found.problem else {}))
        elif found.problem is None:
            where = "" if found.mask is None else f"  (mask: {path})"
            click.echo(f"{found.name}: {'  '.join(map(_in_words, found.classes))}{where}")
    if as_json:
        click.echo(json.dumps(answers))
    return status


def _predict_tables(
    predictor: Predictor, run: Trained, paths: tuple[Path, ...], *, as_json: bool
) -> int:
    """Answer each row of some tables; a file that cannot be used is named, and is 2."""
    from downpour.cluster.serving import tables

    columns = run.network.spec.columns
    status = 0
    answers: list[dict[str, Any]] = []
    for path in paths:
        try:
            found = list(tables.predictions(predictor, columns, run.class_names, path))
        except (UserError, DatasetError) as error:
            status = EXIT_ERROR
            _tell(f"error: {error}")
            if as_json:
                answers.append({"file": str(path), "error": str(error)})
            continue
        for row, answer in enumerate(found):
            if as_json:
                answers.append({"file": str(path), "row": row, **answer})
            else:
                click.echo(f"{path}, row {row}: {_of_row(answer)}")
    if as_json:
        click.echo(json.dumps(answers))
    return status


def _of_row(answer: dict[str, Any]) -> str:
    if "predictions" in answer:
        return "  ".join(map(_in_words, answer["predictions"])) or "none"
    return json.dumps(answer["outputs"])


def _in_words(found: dict[str, Any]) -> str:
    """Returns a class with its probability, or what a network gives that tells no classes apart."""
    if "outputs" in found:
        return json.dumps(found["outputs"])
    if "share" in found:
        return f"{found['class']} {found['share']:.1%}"
    return f"{found['class']} {found['probability']:.1%}"


def _tell(line: str) -> None:
    click.echo(f"{PROGRAM}: {line}", err=True)


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
@orientation_option
@click.option(
    "--with-preprocessing",
    is_flag=True,
    help="The file takes images of any size as a decoder gives them; ONNX only.",
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
    orientation: Orientation | None,
    with_preprocessing: bool,
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

    loaded = inference.load(run, best=best, weights=weights, orientation=orientation)
    path = output or loaded.folder.path / f"model{exporting.SUFFIX[kind]}"
    told = exporting.export(
        loaded,
        path,
        format=kind,
        with_preprocessing=with_preprocessing,
        data=data,
        batches=batches,
        max_disagreement=bound,
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
    """Answer images, or rows of numbers, over HTTP by the weights of RUN, until interrupted.

    A network for pictures answers image files with their most probable classes, or with a mask.
    One for rows of numbers answers JSON.

    Callers have to show a key: a new one for each deployment, or the one in --key-file. A file
    that is named at the start holds the header to send.
    """
    from downpour.cluster.serving.server import app

    config = apply(ServeConfig(), given)
    runs = (run, *also)
    with app.serving(runs, best=best, weights=weights, config=config, address=address) as told:
        url, header, sent = told
        click.echo(f"serving {run} at {url}")
        click.echo(f"try: curl -H @{header} {sent} {url}/predict")
        sys.stdout.flush()
        app.wait_for_signal()


COMMANDS = (evaluate, recalibrate, predict, export, serve)

"""Trained runs put to use: loading them, scoring, recalibrating.

Here: from a run's folder to networks, rows and scores. Not here: the classes of image files
(`prediction`), exporting (`export`), serving over HTTP (`app`), the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from downpour.cluster.config import recipes
from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import BEST, DATA, MODEL, RunFolder
from downpour.cluster.serving.classes import check_same_classes
from downpour.models.layout import state_dict
from downpour.paramserver import durable
from downpour.shuffler.dataset.own import open_split
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.images.decode import BadImage
from downpour.shuffler.images.reading import Orientation
from downpour.shuffler.plan.plan import Plan
from downpour.workers.evaluation.disagreement import disagreement
from downpour.workers.evaluation.evaluator import population_statistics
from downpour.workers.evaluation.predictor import Network, Predictor, decode_any_size

ROWS = 256
"""Rows that are read and decoded at a time, if each is one crop."""
READ_BATCHES = 8
"""Mini-batches that are read and decoded at a time for Algorithm 2."""
SKIPPED_SHOWN = 5
RECALIBRATED = "recalibrated.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A run's weights, ready for inference."""

    folder: RunFolder
    config: RunConfig
    weights: Path
    network: Network

    @property
    def named_classes(self) -> tuple[str, ...]:
        """Names that the run's data has for the labels 0, 1, ...; none if it has none."""
        if not (self.folder.path / DATA).exists():
            return ()
        return tuple(self.folder.read_json(DATA).get("class_names") or ())

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; numbers if the run's data has no names."""
        names, count = self.named_classes, self.config.model.num_classes
        return names if len(names) == count else tuple(map(str, range(count)))


def load(
    run: Path,
    *,
    best: bool = False,
    weights: str | None = None,
    orientation: Orientation | None = None,
) -> Trained:
    """Load the weights of the run in the folder `run`.

    Args:
        run: the run's folder.
        best: the best weights instead of the last.
        weights: another file of weights, in the folder or elsewhere.
        orientation: whether photos are turned upright; None is as the run was trained.

    Raises:
        UserError: the folder holds no run, or no such weights.
    """
    folder = RunFolder.open(run)
    if weights is not None:
        path = folder.path / weights if (folder.path / weights).is_file() else Path(weights)
        if not path.is_file():
            raise UserError(
                f"there are no weights {weights}, in {folder.path} or here: give a file"
            )
    else:
        path = folder.path / (BEST if best else MODEL)
        if not path.exists():
            other = "--last" if best else "--best"
            raise UserError(f"{path} does not exist (yet): wait for the run to end, or try {other}")
    config = recipes.admit(folder.config())
    if orientation is not None:
        model = dataclasses.replace(config.model, orientation=orientation)
        config = dataclasses.replace(config, model=model)
    network = Network.load(model_spec(config), str(path))
    return Trained(folder=folder, config=config, weights=path, network=network)


def load_all(
    runs: Sequence[Path],
    *,
    best: bool,
    weights: str | None,
    orientation: Orientation | None = None,
) -> list[Trained]:
    """Load the weights of several runs, for an ensemble.

    Raises:
        UserError: see `load`; or the runs tell different classes apart.
    """
    loaded = [load(run, best=best, weights=weights, orientation=orientation) for run in runs]
    check_same_classes([(str(run.folder.path), run.named_classes) for run in loaded])
    return loaded


def evaluate(
    runs: Sequence[Trained],
    *,
    data: str | None,
    split: str | None,
    crops: int,
    rows: int | None = None,
    on_bad_image: BadImage | None = None,
    say: Callable[[str], object] = lambda _line: None,
    progress: Callable[[int, int], object] = lambda _done, _total: None,
) -> dict[str, Any]:
    """Score one run, or several as an ensemble, on a split.

    Args:
        runs: one or more of them.
        data: folder or URI with the shards; None takes the first run's.
        split: the split to score; None takes the first run's.
        crops: of each image: 1, 10 or 144.
        rows: score the first so many rows; None scores all.
        on_bad_image: what an image does that cannot be decoded; None is what it does to the run.
        say: is told, in a line each, of images that are skipped, and of what is not known.
        progress: is told the images done, and all.

    Raises:
        UserError: the data or the networks do not fit together.
        DecodeError: an image cannot be decoded, and is not to be skipped.
    """
    first = runs[0].config
    source, split = data or first.data.data, split or first.data.eval_split
    predictor = Predictor([run.network for run in runs], crops=crops)
    dataset = open_split(source, split, first.model.columns)
    named = [(str(run.folder.path), run.named_classes) for run in runs]
    check_same_classes([*named, (f"split {split!r} of {source}", dataset.class_names)])
    has_classes = predictor.task != "regression"
    if data is not None and has_classes and not (dataset.class_names and named[0][1]):
        silent = named[0][0] if dataset.class_names else source
        say(f"{silent} does not name its classes: whether they are the same is not known")
    step = max(1, ROWS // crops)
    with rows_of_split(dataset, predictor.num_classes, rows=step, limit=rows) as batches:
        counted = _counted(batches, min(dataset.num_rows, rows or dataset.num_rows), progress)
        score = predictor.score(counted, on_bad_image=on_bad_image or first.data.on_bad_image)
    for line in score.skipped[:SKIPPED_SHOWN]:
        say(f"skipped: {line}")
    if len(score.skipped) > SKIPPED_SHOWN:
        say(f"skipped: {len(score.skipped) - SKIPPED_SHOWN} more")
    return {
        "run": [str(run.folder.path) for run in runs] if len(runs) > 1 else runs[0].folder.name,
        "weights": runs[0].weights.name,
        "split": split,
        "crops": crops,
        **(score.metrics or {"accuracy": score.accuracy, "top5_accuracy": score.top5_accuracy}),
        "loss": round(score.loss, 6),
        "examples": score.num_examples,
        "images_skipped": len(score.skipped),
    }


def _counted(
    batches: Iterable[pa.RecordBatch], total: int, progress: Callable[[int, int], object]
) -> Iterator[pa.RecordBatch]:
    """The same batches; each is done when the next is asked for."""
    done = 0
    for batch in batches:
        progress(done, total)
        yield batch
        done += len(batch)
    progress(done, total)


@contextlib.contextmanager
def rows_of_split(
    dataset: Dataset, num_classes: int, *, rows: int = ROWS, limit: int | None = None
) -> Iterator[Iterator[pa.RecordBatch]]:
    """Yield a split's rows in their order, `rows` at a time; only the first `limit` if given."""
    end = min(dataset.num_rows, limit or dataset.num_rows)
    with contextlib.closing(RowReader(dataset, num_classes=num_classes)) as reader:
        yield (
            reader.take(np.arange(start, min(start + rows, end), dtype=np.int64))
            for start in range(0, end, rows)
        )


def recomputed_statistics(
    run: Trained, *, data: str | None, split: str | None, batches: int
) -> tuple[Tensor, int]:
    """Compute Algorithm 2's statistics over mini-batches of a split, the weights as they are.

    The mini-batches are those of the first epoch of the run's plan on that split. Images are seen
    as in inference, without random crops or distortion. A mini-batch with an image that cannot be
    decoded is left out if the run skips those.

    Returns:
        Mean and unbiased variance, float32 `[2, F]`, and the number of mini-batches.

    Raises:
        UserError: the network has no batch normalization.
        DecodeError: an image cannot be decoded, and the run does not skip those.
    """
    config = run.config
    source, split = data or config.data.data, split or config.data.train_split
    dataset = open_split(source, split, config.model.columns)
    plan = Plan(
        num_rows=dataset.num_rows, batch_size=config.data.batch_size, seed=config.policy.seed
    )
    count = min(batches, plan.num_batches)
    if not run.network.model.layout.num_features:
        raise UserError(f"{run.folder.name} has no batch normalization: nothing to recompute")
    spec = run.network.spec
    with contextlib.closing(RowReader(dataset, num_classes=spec.num_classes)) as reader:

        def mini_batches() -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, count, READ_BATCHES):
                indices = range(start, min(start + READ_BATCHES, count))
                rows, lengths = plan.rows_of(0, np.array(indices))
                decoded = decode_any_size(
                    reader.take(rows),
                    spec.image,
                    numbers=rows,
                    on_bad_image=config.data.on_bad_image,
                    columns=spec.columns,
                )
                inputs = torch.from_numpy(decoded.inputs)
                # Where each mini-batch lies among those that were decoded.
                ends = np.searchsorted(decoded.kept, np.cumsum([0, *lengths.tolist()]))
                for length, (begin, end) in zip(lengths, itertools.pairwise(ends), strict=True):
                    if end - begin == length:
                        yield inputs[begin:end], inputs[begin:end]

        model = run.network.model
        kept = model.statistics.clone()
        found = population_statistics(model, mini_batches())
    assert torch.equal(model.statistics, kept), "recomputing must leave the statistics alone"
    return found, count


def recalibrate(
    run: Trained, *, data: str | None, split: str | None, batches: int, output: Path | None
) -> dict[str, Any]:
    """Write the run's weights with statistics recomputed on a dataset, whole or not at all.

    Raises:
        UserError: the network has no batch normalization, or the file cannot be written.
    """
    path = output or run.folder.path / RECALIBRATED
    if not path.parent.is_dir():
        raise UserError(f"the folder of {path} does not exist: make it, or give another --output")
    statistics, count = recomputed_statistics(run, data=data, split=split, batches=batches)
    model = run.network.model
    apart = disagreement(model.statistics, statistics)
    about = {
        "recalibrated_from": run.weights.name,
        "data": data or run.config.data.data,
        "split": split or run.config.data.train_split,
        "mini_batches": count,
        "disagreement": apart,
    }
    state = model.buffers() | state_dict(model.weights, statistics, model.layout)
    try:
        durable.save_tensors(
            {name: tensor.clone() for name, tensor in state.items()},
            path,
            partial=str(path.with_name(f".{path.name}.partial")),
            metadata={"downpour": json.dumps(about)},
        )
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    return {"written": str(path), **about}

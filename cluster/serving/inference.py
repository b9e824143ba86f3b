"""Trained runs put to use: loading them, scoring, recalibrating, predicting.

Here: from a run's folder to networks, rows and answers. Not here: exporting (`export`), serving
over HTTP (`app`), the command line.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from torch import Tensor

from downpour.cluster.config import recipes
from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import BEST, DATA, MODEL, RunFolder
from downpour.models.layout import state_dict
from downpour.paramserver import durable
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.plan.plan import Plan
from downpour.workers.evaluation.disagreement import disagreement
from downpour.workers.evaluation.evaluator import population_statistics
from downpour.workers.evaluation.predictor import Network, Predictor, decode_any_size, rows_of

ROWS = 256
"""Rows that are read and decoded at a time, if each is one crop."""
READ_BATCHES = 8
"""Mini-batches that are read and decoded at a time for Algorithm 2."""
RECALIBRATED = "recalibrated.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A run's weights, ready for inference."""

    folder: RunFolder
    config: RunConfig
    weights: Path
    network: Network

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; numbers if the run's data has no names."""
        names: list[str] = []
        if (self.folder.path / DATA).exists():
            names = self.folder.read_json(DATA).get("class_names") or []
        count = self.config.model.num_classes
        return tuple(names) if len(names) == count else tuple(map(str, range(count)))


def load(run: Path, *, best: bool = False, weights: str | None = None) -> Trained:
    """Load the weights of the run in the folder `run`.

    Args:
        run: the run's folder.
        best: the best weights instead of the last.
        weights: another file of weights, in the folder or elsewhere.

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
    network = Network.load(model_spec(config), str(path))
    return Trained(folder=folder, config=config, weights=path, network=network)


def evaluate(
    runs: Sequence[Trained],
    *,
    data: str | None,
    split: str | None,
    crops: int,
    rows: int | None = None,
) -> dict[str, Any]:
    """Score one run, or several as an ensemble, on a split, or on its first `rows` rows.

    Raises:
        UserError: the data or the networks do not fit together.
    """
    first = runs[0].config
    source, split = data or first.data.data, split or first.data.eval_split
    predictor = Predictor([run.network for run in runs], crops=crops)
    step = max(1, ROWS // crops)
    with split_rows(source, split, predictor.num_classes, rows=step, limit=rows) as batches:
        score = predictor.score(batches)
    return {
        "run": [str(run.folder.path) for run in runs] if len(runs) > 1 else runs[0].folder.name,
        "weights": runs[0].weights.name,
        "split": split,
        "crops": crops,
        "accuracy": score.accuracy,
        "top5_accuracy": score.top5_accuracy,
        "loss": round(score.loss, 6),
        "examples": score.num_examples,
    }


@contextlib.contextmanager
def split_rows(
    data: str, split: str, num_classes: int, *, rows: int = ROWS, limit: int | None = None
) -> Iterator[Iterator[pa.RecordBatch]]:
    """Yield a split's rows in their order, `rows` at a time; only the first `limit` if given."""
    dataset = Dataset.open(data, split)
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
    as in inference, without random crops or distortion.

    Returns:
        Mean and unbiased variance, float32 `[2, F]`, and the number of mini-batches.

    Raises:
        UserError: the network has no batch normalization.
    """
    config = run.config
    source, split = data or config.data.data, split or config.data.train_split
    dataset = Dataset.open(source, split)
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
                inputs = torch.from_numpy(decode_any_size(reader.take(rows), spec.image).inputs)
                for part in torch.split(inputs, lengths.tolist()):
                    yield part, part

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
    state = state_dict(model.weights, statistics, model.layout)
    try:
        with durable.replacing(path, str(path.with_name(f".{path.name}.partial"))) as partial:
            safetensors.torch.save_file(
                {name: tensor.clone() for name, tensor in state.items()},
                partial,
                metadata={"downpour": json.dumps(about)},
            )
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    return {"written": str(path), **about}


def read_images(paths: Sequence[Path]) -> list[bytes]:
    """Return the bytes of image files.

    Raises:
        UserError: a file cannot be read.
    """
    found = []
    for path in paths:
        try:
            found.append(path.read_bytes())
        except OSError as error:
            raise UserError(f"the image {path} cannot be read: {error.strerror}") from None
    return found


def predict(
    predictor: Predictor,
    class_names: Sequence[str],
    images: Sequence[bytes],
    names: Sequence[str],
    *,
    top: int,
) -> list[list[dict[str, Any]]]:
    """The most probable classes of each image, best first."""
    answers: list[list[dict[str, Any]]] = []
    step = ROWS // 4
    for start in range(0, len(images), step):
        rows = rows_of(images[start : start + step], names[start : start + step])
        answers += [best_of(p, class_names, top) for p in predictor.probabilities(rows)]
    return answers


def best_of(probabilities: Tensor, class_names: Sequence[str], top: int) -> list[dict[str, Any]]:
    """The `top` most probable classes, best first."""
    values, labels = probabilities.topk(min(top, len(class_names)))
    return [
        {"class": class_names[label], "label": label, "probability": value}
        for value, label in zip(values.tolist(), labels.tolist(), strict=True)
    ]

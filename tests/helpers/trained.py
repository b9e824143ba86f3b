"""A run that is trained: a small Inception fitted for a few steps to images of four colours."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from downpour.cluster.cli.commands import downpour
from downpour.cluster.config import recipes
from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.options import apply
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import run_cli
from downpour.cluster.run.folder import RunFolder
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.workers.evaluation.evaluator import Evaluator, Score, population_statistics
from downpour.workers.evaluation.predictor import decode_any_size

NAMES = ("red", "green", "blue", "grey")
SIDE = 32
torch.set_num_threads(1)


def coloured(count: int, seed: int, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Images of four colours, uint8 `[count, side, side, 3]`, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    colours = rng.integers(0, 90, (count, side, side, 3))
    for row, label in enumerate(labels):
        bright = rng.integers(40, 150)
        if label < 3:
            colours[row, :, :, label] += bright
        else:
            colours[row] += bright // 2
    return colours.astype(np.uint8), labels.astype(np.int64)


def small_config(data: Path, **given: object) -> RunConfig:
    """A small Inception for them."""
    options = {"width": 0.0625, "image_size": 28, "stem_stride": 2, "num_classes": 4}
    options |= {"data": str(data), "eval_split": "test"}
    return apply(recipes.find("bn-x5"), options | given)


def as_file(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def make_run(path: Path, config: RunConfig) -> None:
    """Make a run of `config`, fitted for a few steps."""
    folder = RunFolder.create(path, config)
    folder.write_json("data.json", {"train_fingerprint": "", "class_names": list(NAMES)})
    spec = model_spec(config)
    flat = spec.build_flat("cpu")
    rows, labels = training_rows(config)
    inputs = torch.from_numpy(decode_any_size(rows, spec.image).inputs)
    gradient = flat.gradient
    assert gradient is not None
    flat.module.train()
    for step in range(24):
        part = slice(step % 10 * 32, step % 10 * 32 + 32)
        gradient.zero_()
        functional.cross_entropy(flat.module(inputs[part]), labels[part]).backward()  # type: ignore[no-untyped-call]
        flat.weights.add_(gradient, alpha=-0.05)
    parts = list(zip(inputs.split(32), labels.split(32), strict=True))  # type: ignore[no-untyped-call]
    evaluator = Evaluator(spec, lambda: parts)
    evaluator.weights.copy_(flat.weights)
    evaluator.statistics.copy_(population_statistics(flat, parts))
    evaluator.save(
        str(path / "model.safetensors"),
        versions=[24],
        score=Score(accuracy=0, loss=0, num_examples=0),
    )


def training_rows(config: RunConfig) -> tuple[Any, torch.Tensor]:
    """The training rows and their labels."""
    dataset = Dataset.open(config.data.data, "train")
    reader = RowReader(dataset, num_classes=4)
    rows = reader.take(np.arange(dataset.num_rows))
    reader.close()
    return rows, torch.from_numpy(rows.column("label").to_numpy().copy())


def run_command(*arguments: object, capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command that succeeds prints, from JSON."""
    status = run_cli(downpour, [str(a) for a in arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def failed_command(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a command that fails prints."""
    """The line that a command that fails prints."""
    """What a command that succeeds prints, from JSON."""
    """The training rows and their labels."""
    """A run of `config`, fitted for a few steps."""
    """An image as a file."""
    """A small Inception for them."""
    """Images of four colours, uint8 `[count, side, side, 3]`, and their labels."""
    status = run_cli(downpour, [str(a) for a in arguments])
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert captured.err.startswith("downpour: error: ")
    assert len(captured.err.splitlines()) == 1
    return captured.err

"""Segmentation with masks as images in Parquet: settled from the data, trained, put to use."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from rich.console import Console

from downpour.cluster.config.plain import from_plain, to_plain, upgraded
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import RESULT
from downpour.cluster.serving.masks import file_names
from downpour.cluster.serving.server import key
from downpour.cluster.serving.server.batches import Asked
from downpour.cluster.serving.server.classifier import Classifier
from downpour.cluster.serving.settings import ServeConfig
from downpour.cluster.trainer.plain_model import plain_model
from downpour.cluster.training import inputs
from downpour.cluster.training.from_data import classifier
from downpour.cluster.training.result import conclude
from downpour.cluster.training.trial import check_step
from downpour.shuffler.errors import DatasetError
from tests.helpers import mask_pictures, tables
from tests.helpers.mask_pictures import pair, png
from tests.helpers.runs import Run
from tests.helpers.trained import failed_command, run_command

NET = "tests.helpers.mask_pictures:MaskNet"


def settled(data: str, **given: Any) -> RunConfig:
    """The recipe for any network, with one replica and one step at a time, as PyTorch's SGD."""
    config = classifier(NET, data, **given)
    steps = dataclasses.replace(config.replicas.steps, concurrent_steps=1)
    replicas = dataclasses.replace(config.replicas, replicas=1, queued_windows=1, steps=steps)
    schedule = dataclasses.replace(
        config.server.schedule, shape="exponential", warmup_epochs=0.0, learning_rate=0.1
    )
    server = dataclasses.replace(config.server, schedule=schedule, weight_decay=0.0)
    return dataclasses.replace(config, replicas=replicas, server=server)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("masks")
    data = mask_pictures.dataset(folder / "data", shards=2, sides=(16, 24))
    config = settled(data, epochs=6, image_size=16, bn_statistics="moving")
    run = Run(folder / "run", config)
    found = inputs.check_data(config)
    inputs.check_data_unchanged(run.folder, found)
    assert check_step(config, found.plan) is None
    began_at = time.time()
    outcome = run.go()
    run.assert_exactly_once(outcome)
    assert conclude(run.folder, config, outcome, began_at, Console(quiet=True)) == 0
    return run


def seen(height: int = 16, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures of the test split as the network gets them, and their masks."""
    import cv2

    pairs = [pair(10_000 + i, height, width) for i in range(32)]
    pictures = [cv2.resize(x, (16, 16), interpolation=cv2.INTER_LINEAR) for x, _ in pairs]
    places = ((np.arange(16) + 0.5) * width / 16).astype(int)
    shown = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return shown, torch.from_numpy(np.stack([m[:, places] for _, m in pairs])).long()


def test_a_plain_loop_on_the_same_masks_makes_the_same_network(run: Run) -> None:
    model = run.config.model
    assert (model.task, model.loss, model.num_classes) == (
        *("segmentation", "pixel_cross_entropy"),
        mask_pictures.CLASSES,
    )
    assert model.columns.target_shape == (16, 16)
    expected, _ = tables.plain_loop(run.config, run.plan)
    found = plain_model(run.config, run.folder.path / "model.safetensors")
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-4)

    pictures, masks = seen()
    with torch.no_grad():
        answer = found(pictures).argmax(1)
    counts = masks != 255
    ious = []
    for label in range(mask_pictures.CLASSES):
        ours, theirs = (answer == label) & counts, (masks == label) & counts
        ious.append(float((ours & theirs).sum() / (ours | theirs).sum()))
    result = run.folder.read_json(RESULT)
    assert result["metric"] == "miou"
    assert result["miou"] == pytest.approx(np.mean(ious), abs=0.01)
    assert result["miou"] > 0.7
    plain = json.loads(json.dumps(to_plain(run.config)))
    assert from_plain(RunConfig, upgraded(plain)) == run.config


def test_evaluate_predict_export_and_serve_follow(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.folder.path
    score = run_command("evaluate", path, capsys=capsys)
    assert score["miou"] == pytest.approx(run.folder.read_json(RESULT)["miou"], abs=0.01)

    picture, _ = pair(10_000, 16, 24)
    (tmp_path / "new.png").write_bytes(png(picture))
    (found,) = run_command(
        "predict", path, tmp_path / "new.png", "--json", "--output", tmp_path / "m", capsys=capsys
    )
    assert found["mask"] == str(tmp_path / "m" / "new.png")
    with Image.open(found["mask"]) as image:
        mask = np.asarray(image)
    assert image.mode == "P"
    assert mask.shape == (16, 24)
    module = plain_model(run.config, path / "model.safetensors")
    pictures, _ = seen()
    with torch.no_grad():
        answer = module(pictures[:1]).argmax(1)[0]
    places = ((np.arange(24) + 0.5) * 16 / 24).astype(int)
    assert (mask == answer.numpy()[:, places]).mean() > 0.99
    shares = {each["label"]: each["share"] for each in found["predictions"]}
    assert shares == {
        label: pytest.approx((mask == label).mean(), abs=1e-6) for label in np.unique(mask).tolist()
    }

    told = run_command(
        "export", path, "--max-disagreement", "none", "--format", "torch", capsys=capsys
    )
    about: dict[str, Any] = {"preprocessing.json": ""}
    program = torch.export.load(told["written"], extra_files=about).module()
    torch.testing.assert_close(program(pictures), module(pictures), rtol=1e-3, atol=1e-3)
    resized = json.loads(about["preprocessing.json"])
    assert (resized["resize"]["height"], resized["crop"]) == (16, None)
    for command in (("export", path, "--with-preprocessing"), ("evaluate", path, "--crops", "10")):
        assert "masks are of whole" in failed_command(*command, capsys=capsys)

    server = Classifier(
        [str(path)], best=False, weights=None, config=ServeConfig(), digest=key.digest("x")
    )
    body = (tmp_path / "new.png").read_bytes()
    asked = [Asked(query="top=1", headers={}, body=each, left_s=60) for each in (body, b"no", body)]
    first, bad, last = server.answer_all(asked)
    assert (first.status, bad.status, last.status) == (200, 415, 200)
    said = json.loads(first.body)
    assert said["predictions"] == found["predictions"][:1]
    import base64

    with Image.open(io.BytesIO(base64.b64decode(said["mask"]))) as image:
        np.testing.assert_array_equal(np.asarray(image), mask)


def refused(data: str, **given: Any) -> str:
    """The line that a run on these data ends with, before it starts."""
    with pytest.raises((UserError, DatasetError)) as error:
        inputs.check_data(classifier(NET, data, image_size=16, **given))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "given", "why"),
    [
        (lambda m: png(m[1:]), {}, "row 0 (row 0 of train-00000-of-00001.parquet): it has 15x16"),
        (lambda m: png(np.repeat(m[:, :, None], 3, 2)), {}, "its pixels are colours (RGB)"),
        (lambda m: png(m), {"num_classes": 2}, "class 2 out of range: the mask of row 1 (row 1 of"),
        (lambda m: png(np.where(m == 0, 0, 255).astype(np.uint8)), {}, "0 and 255 alone: 255 does"),
        (lambda m: png(m * 0), {}, "have 0 alone, and there is nothing to tell apart"),
        (lambda _: None, {}, "train-00000-of-00001.parquet): there is none: store its bytes"),
    ],
    ids=["size", "colours", "class", "foreground 255", "one class", "path"],
)
def test_what_is_wrong_with_masks_is_told_by_row(
    tmp_path: Path, change: Callable[[np.ndarray], Any], given: dict[str, Any], why: str
) -> None:
    data = mask_pictures.dataset(tmp_path, rows=8, masked=change)
    assert why in refused(data, **given)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("column", ["label", "anything"])
def test_which_column_has_masks_is_seen(tmp_path: Path, kind: pa.DataType, column: str) -> None:
    data = mask_pictures.dataset(tmp_path, rows=40, column=column, kind=kind)
    config = classifier(NET, data)
    assert config.model.task == "segmentation"
    assert config.model.columns.targets == (column,)
    assert config.model.columns.target_shape == (16, 16)
    assert inputs.check_data(config).plan.num_rows == 40


def test_options_that_do_not_go_with_masks(tmp_path: Path) -> None:
    data = mask_pictures.dataset(tmp_path, rows=40)
    assert "leave --input-columns out" in refused(data, input_columns=("a",), task="segmentation")
    assert "the loss mse is for regression" in refused(data, loss="mse")
    assert "has no column 'x'" in refused(data, target_column=("x",), task="segmentation")
    table = tables.dataset(tmp_path / "table")
    assert "has no column 'image'" in refused(table, task="segmentation")


def test_masks_never_take_the_place_of_another_file(tmp_path: Path) -> None:
    names = file_names(tmp_path, [Path("a/x.jpg"), Path("y.png"), Path("a/x.jpg")])
    assert [path.name for path in names] == ["x.png", "y.png", "x.png"]
    with pytest.raises(UserError, match=r"would both be .*x.png"):
        file_names(tmp_path, [Path("a/x.jpg"), Path("b/x.jpg")])
    with pytest.raises(UserError, match="would replace a picture"):
        file_names(tmp_path, [tmp_path / "y.png"])

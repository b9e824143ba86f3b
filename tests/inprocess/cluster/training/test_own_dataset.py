"""Datasets of a user's own, trained on threads: exactly once, and as PyTorch trains."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from downpour.cluster.cli.commands import downpour as command
from downpour.cluster.config.options import apply
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError, run_cli
from downpour.cluster.run.folder import RESULT
from downpour.cluster.trainer.plain_model import plain_model
from downpour.cluster.training import inputs
from downpour.cluster.training.result import conclude
from downpour.cluster.training.tasks import with_task
from downpour.cluster.training.trial import check_step
from downpour.shuffler.dataset.own import open_own
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.errors import DatasetError
from tests.helpers import own_data, tables
from tests.helpers.runs import Run
from tests.helpers.trained import run_command

MASKS = "dataset:tests.helpers.own_data:masks"


def settled(data: str, model: str, given: dict[str, Any], **more: Any) -> RunConfig:
    config = tables.config(data, **more)
    changed = dataclasses.replace(config.model, model=f"tests.helpers.own_data:{model}")
    return with_task(apply(dataclasses.replace(config, model=changed), given), given)


def test_masks_are_learnt_as_by_a_plain_loop_and_every_row_is_asked_for_once_an_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settled(MASKS, "MaskNet", {}, epochs=6, bn_statistics="moving")
    server = config.server
    schedule = dataclasses.replace(server.schedule, learning_rate=0.1)
    config = dataclasses.replace(config, server=dataclasses.replace(server, schedule=schedule))
    assert (config.model.task, config.model.loss) == ("segmentation", "pixel_cross_entropy")
    run = Run(tmp_path / "run", config)
    data = inputs.check_data(config)
    inputs.check_data_unchanged(run.folder, data)
    assert data.class_names == ("ground", "red", "green")
    assert check_step(config, data.plan) is None

    own_data.asked.clear()
    began_at = time.time()
    outcome = run.go()
    run.assert_exactly_once(outcome)
    trained = Counter(row for split, row in own_data.asked if split == "train")
    assert trained == dict.fromkeys(range(own_data.ROWS), 6)
    assert conclude(run.folder, config, outcome, began_at, Console(quiet=True)) == 0

    expected, _ = tables.plain_loop(config, run.plan)
    found = plain_model(config, run.folder.path / "model.safetensors")
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-4)

    pairs = [own_data.masks("test")[i] for i in range(32)]
    images, masks = (torch.stack(each) for each in zip(*pairs, strict=True))
    with torch.no_grad():
        answer = found(images).argmax(1)
    counts = masks != 255
    ious = []
    for label in range(3):
        ours, theirs = (answer == label) & counts, (masks == label) & counts
        ious.append(float((ours & theirs).sum() / (ours | theirs).sum()))
    result = run.folder.read_json(RESULT)
    assert result["metric"] == "miou"
    assert result["miou"] == pytest.approx(np.mean(ious), abs=0.01)
    assert result["miou"] > 0.8
    score = run_command("evaluate", run.folder.path, capsys=capsys)
    assert score["miou"] == pytest.approx(result["miou"], abs=0.01)
    told = run_command(
        "export", run.folder.path, "--max-disagreement", "none", "--format", "torch", capsys=capsys
    )
    program = torch.export.load(told["written"]).module()
    torch.testing.assert_close(program(images), found(images), rtol=1e-3, atol=1e-3)
    np.save(tmp_path / "new.npy", images.numpy())
    found_masks = run_command(
        "predict", run.folder.path, tmp_path / "new.npy", "--json", capsys=capsys
    )
    assert [each["mask"] for each in found_masks] == answer.tolist()
    assert sum(p["share"] for p in found_masks[0]["predictions"]) == pytest.approx(1, abs=1e-5)
    assert found_masks[0]["predictions"][0]["class"] == "ground"
    assert run_cli(command, ["predict", str(run.folder.path), "x.png"]) == 2
    assert "x.png is no .npy: the network's inputs come from" in capsys.readouterr().err
    np.save(tmp_path / "other.npy", images[:, :1].numpy())
    assert run_cli(command, ["predict", str(run.folder.path), str(tmp_path / "other.npy")]) == 2
    assert "has an array [32, 1, 8, 8], and the network takes [n, 2" in capsys.readouterr().err


def test_what_items_are_is_seen_by_the_first() -> None:
    columns = open_own("dataset:tests.helpers.own_data:numbers", "train").columns
    assert (columns.input_shape, columns.target_shape) == ((2,), (1,))
    assert (columns.input_type, columns.target_type) == ("float32", "float32")
    masks = open_own(MASKS, "test").columns
    assert (masks.input_shape, masks.target_shape) == ((2, 8, 8), (8, 8))
    assert masks.target_type == "int64"


@pytest.mark.parametrize(
    ("data", "given", "why"),
    [
        ("dataset:tests.helpers.own_data:nothing", {}, "cannot be imported (AttributeError"),
        ("dataset:tests.helpers.own_data:MaskNet", {}, "MaskNet('train') failed: "),
        (MASKS, {"target_column": ("y",)}, "has neither columns nor shards"),
        (MASKS, {"task": "regression"}, "the task is regression, and items of"),
        ("dataset:tests.helpers.own_data:numbers", {"task": "segmentation"}, "return other tar"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(data: str, given: dict[str, Any], why: str) -> None:
    with pytest.raises((UserError, DatasetError)) as error:
        settled(data, "MaskNet", given)
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_that_is_out_of_range_is_named() -> None:
    reader = RowReader(open_own(MASKS, "test"), num_classes=2)
    with pytest.raises(DatasetError, match=r"class 2 out of range: the mask of row 1 of split 'te"):
        reader.take(np.arange(4))


def test_a_row_that_is_unlike_the_first_is_named() -> None:
    dataset = open_own("dataset:tests.helpers.own_data:broken", "train")
    for row, why in ((1, "has an input of [1], and the first has [2]"), (2, "is str: return an")):
        with pytest.raises(DatasetError, match="row") as error:
            dataset.take(np.array([row]))
        assert why in str(error.value)

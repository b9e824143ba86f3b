"""What trained networks answer if they give numbers, mappings, or losses of their own count."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import downpour
from downpour.cluster.cli.commands import downpour as command
from downpour.cluster.config.derive import model_spec
from downpour.cluster.errors import run_cli
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.serving import export as exporting
from downpour.cluster.serving import inference
from downpour.workers.evaluation.evaluator import Evaluator
from downpour.workers.evaluation.predictor import decode_any_size
from tests.helpers.tiny import write_split
from tests.helpers.trained import NAMES, as_file, coloured, run_command, training_rows

SIDE = 32


class Linear(nn.Module):
    """A linear map of the mean colour, given in some form."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.map, self.form = nn.Linear(3, width), form

    def forward(self, x: Tensor) -> Any:
        y = self.map(x.mean((2, 3)))
        if self.form == "mapping":
            return {"logits": y, "mean": x.mean((2, 3))}
        return y.squeeze(1) if self.form == "numbers" else y


def linear(width: int, form: str) -> nn.Module:
    return Linear(width, form)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs, targets.float())


def smoothed(outputs: Any, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs["logits"], targets, label_smoothing=0.2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_split(tmp_path / "data", "train", *coloured(40, 1))
    return tmp_path / "data"


def plain(outputs: Any, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs["logits"], targets)


def made(folder: Path, data: Path, loss: str, **arguments: object) -> downpour.RunConfig:
    """A run with the network's initial weights."""
    config = downpour.RunConfig(
        recipe="outputs",
        model=downpour.ModelConfig(
            model=f"{__name__}:linear",
            arguments=arguments,
            loss=f"{__name__}:{loss}" if loss in globals() else loss,
            image=downpour.ImageSpec(height=SIDE, width=SIDE),
            num_classes=len(NAMES),
        ),
        data=downpour.DataConfig(data=str(data), eval_split="train"),
    )
    run = RunFolder.create(folder, config)
    run.write_json("data.json", {"train_fingerprint": "", "class_names": list(NAMES)})
    spec = model_spec(config)
    rows, labels = training_rows(config)
    inputs = torch.from_numpy(decode_any_size(rows, spec.image).inputs)
    evaluator = Evaluator(spec, lambda: [(inputs, labels)])
    evaluator.weights.copy_(spec.build_flat("cpu").weights)
    evaluator.save(str(folder / "model.safetensors"), versions=[1], score=evaluator.score())
    return config


def torchs_own(config: downpour.RunConfig, loss: Any) -> tuple[Any, float]:
    """The outputs on the training rows, and their loss, without anything of ours but the rows."""
    spec = model_spec(config)
    rows, labels = training_rows(config)
    inputs = torch.from_numpy(decode_any_size(rows, spec.image).inputs)
    with torch.inference_mode():
        outputs = spec.build().eval()(inputs)
        return outputs, float(loss(outputs, labels))


def test_numbers_are_told_as_numbers(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = made(tmp_path / "run", data, "squares", width=1, form="numbers")
    _, loss = torchs_own(config, squares)
    score = run_command("evaluate", tmp_path / "run", capsys=capsys)
    assert score["accuracy"] is None
    assert score["top5_accuracy"] is None
    assert score["loss"] == pytest.approx(loss, rel=1e-5)
    picture = tmp_path / "one.png"
    pixels = coloured(1, 3)[0][0]
    picture.write_bytes(as_file(pixels))
    expected = model_spec(config).build()(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    (found,) = run_command("predict", tmp_path / "run", picture, "--json", capsys=capsys)
    assert found["predictions"] == [{"outputs": pytest.approx(expected.item(), rel=1e-5)}]
    assert run_cli(command, ["predict", str(tmp_path / "run"), str(picture)]) == 0
    line = capsys.readouterr().out
    assert "%" not in line
    assert json.loads(line.rpartition(": ")[2]) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["smoothed", "cross_entropy"])
def test_a_mapping_of_classes_counts_by_its_answer_and_the_runs_loss(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    config = made(tmp_path / "run", data, loss, width=4, form="mapping")
    outputs, expected = torchs_own(config, smoothed if loss == "smoothed" else plain)
    _, labels = training_rows(config)
    score = run_command("evaluate", tmp_path / "run", capsys=capsys)
    accuracy = (outputs["logits"].argmax(1) == labels).float().mean().item()
    assert score["accuracy"] == pytest.approx(accuracy)
    assert score["loss"] == pytest.approx(expected, rel=1e-5)
    if loss == "smoothed":
        return
    run = inference.load(tmp_path / "run")
    told = exporting.export(run, tmp_path / "model.onnx", format="onnx")
    assert told["largest_difference"] < 1e-5


def test_the_evaluator_scores_numbers_by_their_loss_alone(tmp_path: Path, data: Path) -> None:
    config = made(tmp_path / "run", data, "squares", width=1, form="numbers")
    spec = model_spec(config)
    rows, labels = training_rows(config)
    inputs = torch.from_numpy(decode_any_size(rows, spec.image).inputs)
    evaluator = Evaluator(spec, lambda: [(inputs, labels)])
    evaluator.weights.copy_(spec.build_flat("cpu").weights)
    score = evaluator.score()
    assert (score.accuracy, score.of_classes) == (0, False)
    assert score.loss == pytest.approx(torchs_own(config, squares)[1], rel=1e-5)
    wider = dataclasses.replace(spec, arguments={"width": 4, "form": "plain"}, loss="cross_entropy")
    assert Evaluator(wider, lambda: [(inputs, labels)]).score().of_classes

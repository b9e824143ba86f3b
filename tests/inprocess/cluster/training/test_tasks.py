"""Tables and their tasks: settled from the data, trained on threads, put to use."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from torch import nn

import downpour
from downpour.cluster.cli.commands import downpour as command
from downpour.cluster.config.options import apply
from downpour.cluster.config.plain import from_plain, to_plain, upgraded
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError, run_cli
from downpour.cluster.monitoring.panel import training_panel
from downpour.cluster.monitoring.progress import plain_line
from downpour.cluster.monitoring.watch import end, progress
from downpour.cluster.run.folder import BEST, METRICS, RESULT
from downpour.cluster.trainer.plain_model import plain_model
from downpour.cluster.training import inputs
from downpour.cluster.training.result import conclude
from downpour.cluster.training.tasks import with_task
from downpour.cluster.training.trial import check_step
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.errors import DatasetError
from tests.helpers import tables
from tests.helpers.runs import Run
from tests.helpers.trained import failed_command, run_command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tables.dataset(tmp_path_factory.mktemp("table"))


INPUTS = {"target_column": ("y",), "input_columns": ("a", "b", "k", "pair")}


def settled(data: str, given: dict[str, Any], **more: Any) -> tuple[RunConfig, str]:
    lines: list[str] = []
    config = with_task(apply(tables.config(data, **more), given), given, lines.append)
    return config, " ".join(lines)


def trained(folder: Path, config: RunConfig) -> Run:
    """A run on threads, to its end, with its result."""
    run = Run(folder, config)
    data = inputs.check_data(config)
    inputs.check_data_unchanged(run.folder, data)
    assert check_step(config, data.plan) is None
    began_at = time.time()
    outcome = run.go()
    run.assert_exactly_once(outcome)
    assert conclude(run.folder, run.config, outcome, began_at, Console(quiet=True)) == 0
    return run


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory, data: str) -> Run:
    config, _ = settled(data, INPUTS)
    return trained(tmp_path_factory.mktemp("runs") / "regression", config)


def test_a_regression_is_what_a_plain_loop_makes_of_the_same_mini_batches(regression: Run) -> None:
    """One replica with one step at a time is PyTorch's SGD, but for rounding."""
    run, config = regression, regression.config
    expected, module = tables.plain_loop(config, run.plan)
    found = plain_model(config, run.folder.path / "model.safetensors")
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5)

    # The score is that of the same network by PyTorch, with the run's BN statistics.
    dataset = Dataset.open(config.data.data, "test", config.model.columns)
    rows = RowReader(dataset).take(np.arange(dataset.num_rows))
    decoded = inputs.make_decoder(config).decode(rows, rows=np.arange(dataset.num_rows))
    x, y = torch.from_numpy(decoded.inputs), torch.from_numpy(decoded.labels)
    with torch.no_grad():
        ours, theirs = found(x), module(x)
    mse = float(nn.functional.mse_loss(ours, y))
    result = run.folder.read_json(RESULT)
    assert result["evaluation_loss"] == pytest.approx(mse, rel=1e-4)
    assert result["rmse"] == pytest.approx(mse**0.5, rel=1e-4)
    assert result["mae"] == pytest.approx(float((ours - y).abs().mean()), rel=1e-4)
    assert result["r2"] == pytest.approx(1 - mse / float(y.var(correction=0)), rel=1e-4)
    assert result["r2"] > 0.5
    # PyTorch's moving averages are others than the recomputed statistics, yet worth as much.
    assert float((ours - theirs).square().mean()) < 0.1 * float(y.var())


def test_what_is_shown_is_the_task_s_figure(regression: Run) -> None:
    folder = regression.folder
    result = folder.read_json(RESULT)
    assert (result["task"], result["metric"]) == ("regression", "r2")
    assert "accuracy" not in result
    lines = [json.loads(line) for line in (folder.path / METRICS).read_text().splitlines()]
    scored = [line for line in lines if "r2" in line]
    assert scored
    assert not any("accuracy" in line for line in lines)
    assert result["best_r2"] == max(line["r2"] for line in scored)
    last = regression.shown[-1]
    assert f"R² {result['r2']:.4g} (best" in plain_line(last)
    console = Console(file=io.StringIO(), width=100)
    history = {"figure": [0.1], "loss": [1.0]}
    console.print(training_panel(last, history, title="t"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "R²" in shown
    assert "accuracy" not in shown
    seen = progress(folder)
    assert seen.best is not None
    assert seen.best.value == result["best_r2"]
    assert end(folder) == f"finished with r2 of {result['r2']:.4g}"
    page = (folder.path / "report.html").read_text()
    assert "R² on the evaluation split" in page
    assert "accuracy@1" not in page
    with pytest.raises(UserError, match=r"has no accuracy: its figure is r2"):
        _ = downpour.Result.open(folder.path).accuracy


def test_the_best_weights_are_those_with_the_best_figure(regression: Run) -> None:
    import safetensors

    with safetensors.safe_open(str(regression.folder.path / BEST), "pt") as file:
        about = json.loads(file.metadata()["downpour"])
    assert about["r2"] == regression.folder.read_json(RESULT)["best_r2"]


def test_the_configuration_is_read_back_as_it_was(regression: Run) -> None:
    plain = json.loads(json.dumps(to_plain(regression.config)))
    assert from_plain(RunConfig, upgraded(plain)) == regression.config
    assert regression.folder.config() == regression.config


def test_evaluate_predict_and_export_follow_the_task(
    regression: Run, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = regression.folder.path
    result = regression.folder.read_json(RESULT)
    score = run_command("evaluate", path, capsys=capsys)
    assert score["r2"] == pytest.approx(result["r2"], abs=1e-5)
    assert score["rmse"] == pytest.approx(result["rmse"], rel=1e-4)
    assert "accuracy" not in score

    rows = tables.table(10, 3)
    pq.write_table(rows, tmp_path / "new.parquet")
    found = run_command("predict", path, tmp_path / "new.parquet", "--json", capsys=capsys)
    module = plain_model(regression.config, path / "model.safetensors")
    x = np.stack([*(rows[name].to_numpy() for name in ("a", "b", "k"))], 1).astype(np.float32)
    pair = np.array(rows["pair"].to_pylist(), np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(np.concatenate([x, pair], 1)))[:, 0]
    answers = [each["outputs"]["y"] for each in found]
    torch.testing.assert_close(torch.tensor(answers), expected, rtol=1e-4, atol=1e-4)

    told = run_command("export", path, "--max-disagreement", "none", capsys=capsys)
    session = onnxruntime.InferenceSession(told["written"], providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, session.get_outputs()[0].name) == ("inputs", "outputs")
    (out,) = session.run(None, {"inputs": np.concatenate([x, pair], 1)})
    np.testing.assert_allclose(out[:, 0], expected, rtol=1e-4, atol=1e-4)
    about = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    assert about["columns"] == ["a", "b", "k", "pair"]

    why = failed_command("export", path, "--with-preprocessing", capsys=capsys)
    assert "is for pictures" in why
    why = failed_command("evaluate", path, "--crops", "10", capsys=capsys)
    assert "rows of numbers have none" in why
    without = rows.drop_columns(["k"])
    pq.write_table(without, tmp_path / "without.parquet")
    assert run_cli(command, ["predict", str(path), str(tmp_path / "without.parquet")]) == 2
    assert "has no column 'k'" in capsys.readouterr().err
    (tmp_path / "picture.png").write_bytes(b"")
    assert run_cli(command, ["predict", str(path), str(tmp_path / "picture.png")]) == 2
    assert "is neither .parquet nor .csv" in capsys.readouterr().err


def test_several_classes_a_row_are_trained_scored_and_predicted(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"target_column": ("tags",), "input_columns": ("a", "b", "k")}
    config, told = settled(data, given, epochs=8)
    assert "task multilabel with the loss bce" in told
    assert "of 3 classes" in told
    config = dataclasses.replace(
        config,
        server=dataclasses.replace(
            config.server, schedule=dataclasses.replace(config.server.schedule, learning_rate=0.1)
        ),
    )
    run = trained(tmp_path / "run", config)
    expected, _ = tables.plain_loop(config, run.plan)
    found = plain_model(config, run.folder.path / "model.safetensors")
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-4)
    rows = tables.table(100, 2)
    x = np.stack([rows[name].to_numpy() for name in ("a", "b", "k")], 1).astype(np.float32)
    with torch.no_grad():
        there = found(torch.from_numpy(x)).numpy() > 0
    truth = np.array([[i in row for i in range(3)] for row in rows["tags"].to_pylist()])
    both = (there & truth).sum()
    f1 = 2 * both / (there.sum() + truth.sum())
    result = run.folder.read_json(RESULT)
    assert result["metric"] == "f1"
    assert result["f1"] == pytest.approx(f1, abs=0.01)  # a logit near 0 may round either way
    assert result["f1"] > 0.8
    score = run_command("evaluate", run.folder.path, capsys=capsys)
    assert score["f1"] == pytest.approx(result["f1"], abs=0.01)
    pyarrow.csv.write_csv(rows.select(["a", "b", "k"]), tmp_path / "new.csv")
    found_rows = run_command(
        "predict", run.folder.path, tmp_path / "new.csv", "--json", capsys=capsys
    )
    labels = [{p["label"] for p in each["predictions"]} for each in found_rows]
    agree = [got == set(np.flatnonzero(row)) for got, row in zip(labels, there, strict=True)]
    assert np.mean(agree) > 0.95


def test_classes_of_a_table(data: str, tmp_path: Path) -> None:
    given = {"target_column": ("z",), "input_columns": ("a", "b", "k"), "task": "classification"}
    config, told = settled(data, given, epochs=6)
    assert "task classification with the loss cross_entropy" in told
    run = trained(tmp_path / "run", config)
    result = run.folder.read_json(RESULT)
    assert result["metric"] == "accuracy"
    assert result["accuracy"] > 0.7


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"target_column": ("z",)}, "may be classes or amounts: say which with --task"),
        ({"target_column": ("w",)}, "has no column 'w' (it has a, b, k, pair, y, z, tags)"),
        ({"target_column": ("y", "y")}, "--target-column names 'y' twice"),
        (INPUTS | {"input_columns": ("a", "y")}, "column 'y' is named as input and as target"),
        (INPUTS | {"task": "classification"}, "classes are whole numbers from 0"),
        (INPUTS | {"loss": "cross_entropy"}, "cross_entropy is for classification"),
        (INPUTS | {"loss": "bce"}, "the loss bce is for multilabel, and the task is regression"),
        (INPUTS | {"image_size": 32}, "--image-size is of pictures"),
        (INPUTS | {"mirror": True}, "leave augmentation out"),
        (INPUTS | {"target_column": ("y", "z"), "task": "classification"}, "one class a row"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(data: str, given: dict[str, Any], why: str) -> None:
    with pytest.raises((UserError, DatasetError)) as error:
        settled(data, given)
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_a_goal_is_of_the_task_s_figure(data: str) -> None:
    with pytest.raises(UserError, match="has no accuracy: give stop at metric"):
        settled(data, INPUTS | {"task": "regression", "stop_at_accuracy": 0.9})
    given = {"target_column": ("z",), "task": "classification", "stop_at_metric": 0.9}
    with pytest.raises(UserError, match="stop at accuracy"):
        settled(data, given)


@pytest.mark.parametrize(
    ("column", "values", "why"),
    [
        ("x", pa.array([1.0, None, 2.0]), "row 1 (row 1 of train-0.parquet): column 'x' has no"),
        ("x", pa.array([1.0, 2.0, float("nan")]), "row 2 (row 2 of train-0.parquet): column 'x' h"),
        ("x", pa.array([1.0, 1e300, 2.0]), "column 'x' has 1e+300, which float32 does not hold"),
        ("x", pa.array([1, 2, 2**24 + 1]), "column 'x' has 16777217, which float32 does not hold"),
        ("x", pa.array(["a", "b", "c"]), "has column 'x' as string, and inputs and targets are"),
        ("x", pa.array([[1.0], [1.0, 2.0], [3.0]]), "has a list of 2, and others have 1"),
        ("y", pa.array([1.0, 2.0, None]), "row 2 (row 2 of train-0.parquet): column 'y' has no"),
    ],
)
def test_a_value_that_is_no_number_is_named(
    tmp_path: Path, column: str, values: pa.Array, why: str
) -> None:
    whole = {"x": pa.array([1.0, 2.0, 3.0]), "y": pa.array([1.0, 2.0, 3.0])}
    for split, columns in (("train", whole | {column: values}), ("test", whole)):
        pq.write_table(pa.table(columns), tmp_path / f"{split}-0.parquet")
    with pytest.raises(DatasetError) as error:
        inputs.check_data(settled(str(tmp_path), {"target_column": ("y",)})[0])
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_a_network_of_another_width_is_found_before_anything_starts(data: str) -> None:
    config, _ = settled(data, INPUTS | {"target_column": ("y", "z"), "task": "regression"})
    model = dataclasses.replace(config.model, arguments={"num_outputs": 3})
    wrong = dataclasses.replace(config, model=model)
    with pytest.raises(UserError, match="a target has 2 numbers: give --model-arg num_outputs=2"):
        check_step(wrong, inputs.check_data(wrong).plan)


def test_a_trainer_takes_a_table(data: str) -> None:
    trainer = downpour.Trainer(
        model=tables.Net,
        data=data,
        target_column="y",
        input_columns=("a", "b", "k"),
        progress=False,
    )
    model = trainer.config.model
    assert (model.task, model.loss, model.input.input_shape) == ("regression", "mse", (3,))
    assert trainer.config.data.augment.changes_nothing

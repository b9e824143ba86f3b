"""A result, read from the folder of a run that was trained on threads, with a network of a cell."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import downpour
from downpour.cluster.config.derive import model_spec
from downpour.cluster.run.folder import BEST, METRICS
from downpour.cluster.training.result import conclude
from downpour.workers.evaluation.split import SplitBatches
from tests.helpers import tiny
from tests.helpers.runs import Run


def network(num_classes: int) -> nn.Module:
    """Layers of PyTorch's, and ours where the server keeps statistics."""
    return nn.Sequential(
        nn.Unflatten(1, (1, tiny.SIDE, tiny.SIDE)),
        nn.Conv2d(1, 4, 3, bias=False),
        downpour.BatchNorm(4, eps=1e-3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 16, bias=False),
        downpour.BatchNorm(16),
        nn.ReLU(),
        nn.Linear(16, num_classes),
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> downpour.Result:
    folder = tmp_path_factory.mktemp("result")
    trainer = downpour.Trainer(
        model=lambda num_classes: network(num_classes),
        config=tiny.config(tiny.dataset(folder / "data"), in_flight="auto"),
        runs=folder,
    )
    run = Run(folder / "a", trainer.config)
    began_s = time.monotonic()
    conclude(run.folder, run.config, run.go(), began_s, Console(file=io.StringIO()))
    return downpour.Result.open(folder / "a")


def test_it_has_figures_and_files(result: downpour.Result) -> None:
    assert result.exactly_once is True
    assert result.accuracy == result.metrics["accuracy"] > 0.9
    assert result.reached["0.9"]["accuracy"] >= 0.9
    assert result.last_checkpoint.is_file()
    assert result.best_checkpoint == result.path / BEST
    assert result.config.recipe == "lambda"
    assert "metrics" not in repr(result)


def test_its_history_is_a_frame_of_all_lines(result: downpour.Result) -> None:
    frame = result.history
    assert len(frame) == len((result.path / METRICS).read_text().splitlines())
    scored = frame.dropna(subset=["accuracy"])
    assert scored["accuracy"].iloc[-1] == result.accuracy
    assert frame["updates"].max() == result.metrics["updates"]


def test_without_pandas_it_says_where_the_figures_are(
    result: downpour.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(downpour.UserError, match=r"pip install pandas, or read .*metrics\.jsonl"):
        _ = result.history


def test_its_model_scores_as_the_run_did_with_pytorchs_own_layers(result: downpour.Result) -> None:
    spec = model_spec(result.config)
    for best, accuracy in ((False, "accuracy"), (True, "best_accuracy")):
        model = result.model(best=best)
        assert not model.training
        assert [type(m) for m in model][2::4] == [nn.BatchNorm2d, nn.BatchNorm1d]  # type: ignore[call-overload]
        assert model[2].eps == 1e-3  # type: ignore[index]
        split = SplitBatches(spec, result.config.data.data, "test")
        correct = total = 0
        with torch.inference_mode():
            for inputs, targets in split():
                correct += int((model(inputs).argmax(1) == targets).sum())
                total += len(targets)
        assert correct / total == result.metrics[accuracy]


WITHOUT = """
import sys
sys.modules["downpour"] = None  # whoever imports it fails
import torch
model = torch.load(sys.argv[1], weights_only=False)
print(model.training, float(model(torch.ones(2, 64)).detach().sum()))
model.train()(torch.ones(2, 64)).sum().backward()
"""


def test_its_model_needs_no_downpour(result: downpour.Result, tmp_path: Path) -> None:
    model = result.model()
    torch.save(model, tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, tmp_path / "model.pt"],
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = float(model(torch.ones(2, 64)).detach().sum())
    assert done.stdout.split() == ["False", str(expected)]


def test_a_run_that_is_not_finished_has_none(result: downpour.Result, tmp_path: Path) -> None:
    with pytest.raises(downpour.UserError, match="is not a run folder"):
        downpour.Result.open(tmp_path)
    Run(tmp_path / "b", result.config).backend.stop()
    with pytest.raises(downpour.UserError, match=r"has no result yet: go on with downpour\.resume"):
        downpour.Result.open(tmp_path / "b")

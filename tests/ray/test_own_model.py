"""The example of a model, a loss and a recipe of one's own trains, from a copy elsewhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, result

pytestmark = pytest.mark.ray


def test_the_example_trains(tmp_path: Path) -> None:
    # Under another name and outside the project, so that nothing but the working directory leads
    # to it, in the processes that Ray starts as well.
    text = (ROOT / "examples" / "own_model.py").read_text()
    # Its modules bear the names of Downpour's own, as those of many projects do.
    for name in ("models", "workers", "cluster"):
        (tmp_path / name).mkdir()
    text = text.replace("examples.own_model:", "models.mine:")
    (tmp_path / "models" / "mine.py").write_text(text)
    (tmp_path / "workers" / "recipes.py").write_text("from models.mine import recipe\n")
    shutil.copytree(ROOT / "data" / "mnist-binary", tmp_path / "data")
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
    command = Path(sys.executable).with_name("downpour")
    options = ["--epochs", "1", "--name", "own", "--data", "data", "--no-dashboard"]

    def run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    done = run("train", "workers.recipes:recipe", *options, timeout=110)
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "runs" / "own")
    assert found["accuracy"] > 0.85
    assert found["exactly_once"]
    scored = run("evaluate", "runs/own")
    assert scored.returncode == 0, scored.stderr
    wrong = run("train", "workers.recipes:nothing")
    assert wrong.returncode == 2
    assert "has no function 'nothing'" in wrong.stderr

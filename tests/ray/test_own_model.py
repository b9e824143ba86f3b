"""The example of a model, a loss and a recipe of one's own trains, from a copy elsewhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray.commands import ROOT, result

pytestmark = pytest.mark.ray


def test_the_example_trains(tmp_path: Path) -> None:
    # Under another name and outside the project, so that nothing but the working directory leads
    # to it, in the processes that Ray starts as well.
    text = (ROOT / "examples" / "own_model.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("examples.own_model:", "mine:"))
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

    done = run("train", "mine:recipe", *options, timeout=110)
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "runs" / "own")
    assert found["accuracy"] > 0.85
    assert found["exactly_once"]
    scored = run("evaluate", "runs/own")
    assert scored.returncode == 0, scored.stderr
    for words in ("has no function 'nothing'", "holds a models of its own"):
        wrong = run("train", "mine:nothing")
        assert wrong.returncode == 2
        assert words in wrong.stderr
        (tmp_path / "models").mkdir(exist_ok=True)

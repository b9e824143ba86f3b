"""A published network by its name, on a folder of pictures: the real commands, end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import commands, library_nets
from tests.helpers.ray_nodes import RayNodes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]
COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 40), "red": (200, 30, 30)}


def pictures(folder: Path, split: str, count: int, seed: int) -> None:
    """A folder of PNG files for each colour."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / split / name).mkdir(parents=True)
        for number in range(count):
            noise = rng.integers(-20, 20, (40, 40, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


def test_a_published_network_on_a_folder_of_pictures(ray_here: RayNodes, tmp_path: Path) -> None:
    library_nets.skip_without_libraries()
    pictures(tmp_path / "pictures", "train", 24, 1)
    pictures(tmp_path / "pictures", "validation", 5, 2)
    data, run, log = tmp_path / "data", tmp_path / "runs" / "net", tmp_path / "log"
    assert commands.run("ingest", tmp_path / "pictures", data, log=log) == 0, log.read_text()
    status = commands.run(
        *("train", "classifier", "--model", "timm:create_model"),
        *("--model-arg", "model_name=resnet10t", "--data", data, "--image-size", "32"),
        *("--epochs", "2", "--batch-size", "8", "--replicas", "2", "--concurrent-steps", "2"),
        *("--learning-rate", "0.02", "--warmup-epochs", "0.2"),
        *("--runs", run.parent, "--name", run.name, "--address", ray_here.address),
        log=log,
    )
    text = " ".join(log.read_text().split())
    assert status == 0, text
    assert "3 classes; pictures of 32x32 in RGB, cropped and mirrored at random" in text
    result = commands.result(run)
    assert (result["recipe"], result["exactly_once"]) == ("classifier", True)
    assert result["examples"] == 2 * 72
    evaluated = tmp_path / "evaluated"
    assert commands.run("evaluate", run, log=evaluated) == 0
    score = json.loads(evaluated.read_text().splitlines()[-1])
    assert score["examples"] == 15
    assert score["accuracy"] == pytest.approx(result["accuracy"])

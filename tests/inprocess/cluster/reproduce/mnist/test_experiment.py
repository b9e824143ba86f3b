"""Section 4.1's experiment, at a small size: it learns, resumes to the bit, and reports."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from downpour.cluster.cli.commands import downpour
from downpour.cluster.errors import run_cli
from downpour.cluster.reproduce.mnist.experiment import (
    Curves,
    MnistConfig,
    first_step_at,
    steadiness,
    train,
    typical_unit,
)

torch.set_num_threads(1)


def _quiet(_variant: str, _steps: int) -> None:
    pass


class Stopped(Exception):
    """What stands for an interrupt."""


def test_stopped_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    config = MnistConfig(steps=120, record_every=20, save_every=40, learning_rate=1.0)
    whole = train(config, tmp_path / "whole", show=_quiet)

    def stop(_variant: str, steps: int) -> None:
        if steps >= 100:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, tmp_path / "pieces", show=stop)
    pieces = train(config, tmp_path / "pieces", show=_quiet)
    for name, curves in whole.items():
        assert curves.steps.tolist() == list(range(0, 121, 20))
        assert np.array_equal(curves.accuracy, pieces[name].accuracy)
        assert np.array_equal(curves.percentiles, pieces[name].percentiles)
    bn, plain = whole["with BN"], whole["without BN"]
    assert bn.accuracy[-1] > 0.75
    assert bn.accuracy[-1] > plain.accuracy[-1]
    # Before any step BN's gamma is 1 and beta 0: the inputs of each sigmoid are normalized.
    low, middle, high = bn.percentiles[0].mean(1)
    assert low == pytest.approx(-1, abs=0.2)
    assert middle == pytest.approx(0, abs=0.1)
    assert high == pytest.approx(1, abs=0.2)


def test_steadiness_by_hand() -> None:
    # A unit that stands still, and one whose band moves by a whole width up and down.
    still = np.tile([[-1.0], [0.0], [1.0]], (5, 1, 1))
    moving = still + np.array([0.0, 2.0, -2.0, 2.0, -2.0])[:, None, None]
    both = np.concatenate([still, moving], axis=2)
    calm, wild = steadiness(both)
    assert (calm.band_wander, calm.median_wander, calm.width_ratio) == (0, 0, 1)
    assert wild.median_wander == pytest.approx(1)
    assert wild.band_wander == pytest.approx(1)
    assert typical_unit(np.concatenate([both, both * 3], axis=2)[:, :, :3]) in (0, 2)


def test_first_step_at() -> None:
    curves = Curves(
        steps=np.array([0, 10, 20]),
        accuracy=np.array([0.1, 0.8, 0.7]),
        percentiles=np.zeros((3, 3, 1)),
        seconds=0.0,
    )
    assert first_step_at(curves, 0.75) == 10
    assert first_step_at(curves, 0.9) is None


def test_the_command_leaves_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["reproduce", "mnist", "--steps", "40", "--record-every", "20"]
    arguments += ["--output", str(tmp_path), "--json"]
    assert run_cli(downpour, arguments) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[0])
    assert set(numbers["variants"]) == {"with BN", "without BN"}
    page = (tmp_path / "report.html").read_text()
    for name in ("figure-1a.png", "figure-1bc.png"):
        assert name in page
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "data.json").read_text())
    assert len(data["curves"]["with BN"]["accuracy"]) == 3
    # Another experiment in the same place is not mixed with this one.
    assert run_cli(downpour, [*arguments, "--seed", "1"]) == 2
    assert "of another experiment" in capsys.readouterr().err
    assert run_cli(downpour, [*arguments, "--steps", "41"]) == 2
    assert "record every is 20" in capsys.readouterr().err
    assert run_cli(downpour, [*arguments, "--init-std", "0"]) == 2
    assert "init std is 0.0: give a number above 0" in capsys.readouterr().err

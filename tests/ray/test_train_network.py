"""The real command with partitions reached over the network, on one machine."""

from pathlib import Path

import pytest

from tests.helpers import commands
from tests.ray.test_train import SMALL, check_result

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def test_a_run_over_the_network_applies_every_example_once(tmp_path: Path) -> None:
    log, run = tmp_path / "log", tmp_path / "runs" / "a"
    status = commands.run(
        *("train", "mnist-bn", "--runs", tmp_path / "runs", "--name", "a", "--epochs", "1"),
        *("--transport", "network", "--wire-dtype", "bfloat16", "--no-dashboard", *SMALL),
        log=log,
    )
    assert status == 0, log.read_text()
    check_result(commands.result(run), epochs=1)
    output = log.read_text()
    assert "Traceback" not in output
    assert "PRIVATE KEY" not in output
    assert "PRIVATE KEY" not in (run / "config.json").read_text()

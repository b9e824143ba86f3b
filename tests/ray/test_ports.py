"""A run that starts its own Ray: its ports are on loopback and refuse; its secrets are kept."""

import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import commands
from tests.helpers.strangers import beyond_loopback, kind_of_refusal, listening
from tests.ray.test_train import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def test_every_port_of_a_run_is_on_loopback_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, log, run = tmp_path / "home", tmp_path / "log", tmp_path / "a"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    with tempfile.TemporaryDirectory(prefix="dp", dir="/tmp") as short:  # Ray's sockets are there
        monkeypatch.setenv("RAY_TMPDIR", short)
        process = commands.start(
            *("train", "mnist-bn", "--runs", tmp_path, "--name", "a", "--epochs", "75", *SMALL),
            *("--transport", "network", "--partitions", "2"),
            log=log,
        )
        try:
            commands.wait_for(
                lambda: commands.updates(run) > 100 or process.poll() is not None, "updates"
            )
            assert process.poll() is None, log.read_text()
            processes = commands.descendants(process.pid)
            ports = listening({process.pid, *processes})
            assert {at for at in ports if beyond_loopback(at[0])} == set()
            kinds = Counter(kind_of_refusal("127.0.0.1", port) for _, port in ports)
            assert kinds["ours"] == 2  # a port of each partition
            assert kinds["grpc"] > 5
            assert kinds["http"] > 2

            token = (home / ".ray" / "auth_token").read_text().strip()
            files = [f for place in (run, Path(short)) for f in place.rglob("*") if f.is_file()]
            texts = {str(f): f.read_bytes() for f in [*files, log] if os.access(f, os.R_OK)}
            texts |= {f"arguments of {pid}": line.encode() for pid, line in processes.items()}
            for secret in (token, "PRIVATE KEY"):
                assert [place for place, text in texts.items() if secret.encode() in text] == []
            assert commands.run("stop", run, log=tmp_path / "stop.log") == 0
            assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
        finally:
            commands.end(process)

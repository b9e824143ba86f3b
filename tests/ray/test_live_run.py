"""A run that trains on a Ray of its own, looked at from outside.

Its ports are on loopback and refuse, its secrets are kept, and a real Prometheus finds data for
every query of the dashboard and of each alert.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from downpour.cluster.config.paths import ROOT
from downpour.cluster.monitoring import dashboard
from downpour.cluster.monitoring.scores import FIGURES
from tests.helpers import commands
from tests.helpers.small_run import SMALL, OwnRay
from tests.helpers.strangers import beyond_loopback, kind_of_refusal, listening

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]
ALERTS = ROOT / "cluster" / "monitoring" / "alerts.yaml"
PROMETHEUS = shutil.which("prometheus")
WHY = "Prometheus is not installed (Debian and Ubuntu: apt-get install prometheus)"


@pytest.fixture(scope="module")
def on_its_own_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRay]:
    """A run over the network with two partitions; it is told to stop when all have looked at it."""
    folder = tmp_path_factory.mktemp("own")
    home, log, run = folder / "home", folder / "log", folder / "a"
    home.mkdir()
    with commands.folder_for_ray() as short:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(home))
            patch.setenv("RAY_TMPDIR", short)
            patch.setenv("RAY_metrics_report_interval_ms", "1000")
            process = commands.start(
                *("train", "mnist-bn", "--runs", folder, "--name", "a", "--epochs", "750", *SMALL),
                *("--transport", "network", "--partitions", "2", "--evaluate-every-s", "1"),
                *("--past-bound", "rekey"),
                log=log,
            )
        try:
            commands.wait_for(
                lambda: commands.updates(run) > 20 or process.poll() is not None, "updates"
            )
            assert process.poll() is None, log.read_text()
            yield OwnRay(process, run, log, home, Path(short))
            assert commands.run("stop", run, log=folder / "stop.log") == 0
            assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
        finally:
            commands.end(process)
    assert (run / "tensorboard").is_dir()


def test_every_port_of_a_run_is_on_loopback_and_refuses(on_its_own_ray: OwnRay) -> None:
    found = on_its_own_ray
    processes = commands.descendants(found.process.pid)
    ports = listening({found.process.pid, *processes})
    assert {at for at in ports if beyond_loopback(at[0])} == set()
    kinds = Counter(kind_of_refusal("127.0.0.1", port) for _, port in ports)
    assert kinds["ours"] == 2  # a port of each partition
    assert kinds["grpc"] > 5
    assert kinds["http"] > 2

    token = (found.home / ".ray" / "auth_token").read_text().strip()
    files = [f for place in (found.run, found.ray) for f in place.rglob("*") if f.is_file()]
    texts = {str(f): f.read_bytes() for f in [*files, found.log] if os.access(f, os.R_OK)}
    texts |= {f"arguments of {pid}": line.encode() for pid, line in processes.items()}
    for secret in (token, "PRIVATE KEY"):
        assert [place for place, text in texts.items() if secret.encode() in text] == []


OF_OTHER_TASKS = tuple(
    f"ray_downpour_{which}{figure}{{" for figure in FIGURES for which in ("", "best_", "moving_")
)
"""A run that tells classes apart has none of these."""


def expressions() -> dict[str, str]:
    """What is asked of a run that tells classes apart, by where it comes from."""
    found = {}
    for panel in dashboard.dashboard()["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$run", ".*")
            if any(figure in query for figure in OF_OTHER_TASKS):
                continue
            found[f"{panel['title']}, {target['legendFormat']}"] = query
    for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]:
        # An alert that does not fire is empty; what it compares is not.
        for number, side in enumerate(sides(rule["expr"])):
            found[f"{rule['alert']}, side {number}"] = side
    return found


def sides(expression: str) -> list[str]:
    """The two sides of the comparison that an alert is."""
    for comparison in (" == ", " > "):
        if comparison in expression:
            return expression.split(comparison, 1)
    raise AssertionError(expression)


@contextlib.contextmanager
def prometheus(session: Path, folder: Path) -> Iterator[str]:
    """Prometheus with the file that Ray makes for it, scraping each second; gives its address."""
    made = session / "metrics" / "prometheus" / "prometheus.yml"
    config = yaml.safe_load(
        commands.wait_for(lambda: made.exists() and made.read_text(), str(made))
    )
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ALERTS)]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    assert PROMETHEUS is not None
    port = commands.free_port()
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def ask(address: str, path: str, **parameters: str) -> Any:
    """Prometheus's answer, or None while it gives none."""
    url = f"{address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["data"]
    return None


@pytest.mark.skipif(PROMETHEUS is None, reason=WHY)
def test_every_query_has_data(on_its_own_ray: OwnRay, tmp_path: Path) -> None:
    with prometheus(on_its_own_ray.ray / "ray" / "session_latest", tmp_path) as address:
        waiting = expressions()

        def all_answered() -> bool:
            for place, query in list(waiting.items()):
                answer = ask(address, "query", query=query)
                if answer and answer["result"]:
                    del waiting[place]
            return not waiting

        try:
            commands.wait_for(all_answered, "data")
        except AssertionError:
            log = on_its_own_ray.log.read_text()
            raise AssertionError(f"no data for {waiting}: {log}") from None
        (group,) = ask(address, "rules")["groups"]
        assert {rule["health"] for rule in group["rules"]} == {"ok"}
        assert [rule["name"] for rule in group["rules"] if rule["state"] == "firing"] == []
        (runs,) = [ask(address, "label/run/values")]
        assert runs == ["a"]

"""A real Prometheus scrapes a real run: every query of the dashboard and of each alert has data."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from downpour.cluster.config.paths import ROOT
from downpour.cluster.monitoring import dashboard
from tests.helpers import commands
from tests.helpers.small_run import OwnRay

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
ALERTS = ROOT / "cluster" / "monitoring" / "alerts.yaml"
PROMETHEUS = shutil.which("prometheus")
WHY = "Prometheus is not installed (Debian and Ubuntu: apt-get install prometheus)"


def expressions() -> dict[str, str]:
    """What is asked, by where it comes from."""
    found = {}
    for panel in dashboard.dashboard()["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$run", ".*")
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

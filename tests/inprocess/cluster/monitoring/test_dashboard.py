"""The dashboard and the alerts: well formed, up to date, and about metrics that there are."""

from __future__ import annotations

import re

import yaml

from downpour.cluster.config.paths import ROOT
from downpour.cluster.monitoring import dashboard
from downpour.cluster.monitoring.prometheus import METRICS

ALERTS = ROOT / "cluster" / "monitoring" / "alerts.yaml"


def queries() -> list[str]:
    """Every expression of the dashboard and of the alerts."""
    panels = dashboard.dashboard()["panels"]
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    shown = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return shown + [rule["expr"] for rule in rules]


def test_the_dashboards_file_is_the_dashboard() -> None:
    assert dashboard.FILE.read_text() == dashboard.text(), (
        "run `python -m downpour.cluster.monitoring.dashboard`"
    )


def test_the_dashboard_is_well_formed() -> None:
    board = dashboard.dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        columns, rows = range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert not cells & places, f"{panel['title']} lies over another panel"
        places |= cells
        for target in panel.get("targets", ()):
            assert "$run" in target["expr"]
            assert target["datasource"] == dashboard.DATASOURCE
    assert {v["name"] for v in board["templating"]["list"]} == {"datasource", "run"}


def test_queries_ask_for_metrics_that_there_are() -> None:
    suffixes = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    names = {
        f"ray_{name}{suffix}": {"run", "le", *metric.tags}
        for name, metric in METRICS.items()
        for suffix in suffixes[metric.kind]
    }
    asked = set()
    for query in queries():
        found = re.findall(r"(ray_downpour_\w+)(?:\{([^}]*)\})?", query)
        assert found, query
        for name, labels in found:
            assert name in names, query
            asked.add(name)
            assert set(re.findall(r"(\w+)=", labels)) <= names[name], query
    unasked = {
        name
        for name, metric in METRICS.items()
        for s in suffixes[metric.kind]
        if f"ray_{name}{s}" in asked
    } ^ set(METRICS)
    assert unasked <= {"downpour_restarts"}

"""The Grafana dashboard of a run, as data.

`python -m downpour.cluster.monitoring.dashboard` writes its file. The cluster files copy that to
the folder that Ray provisions Grafana from (RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR). Not here:
the metrics (`prometheus`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "grafana_dashboard.json"
UID = "downpour"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
RUN = 'run=~"$run"'


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A graph: its queries by their legend."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    help: str = ""
    least: float | None = 0
    """Where the axis begins; None leaves it to the values."""


def _rate(name: str, by: str = "run") -> str:
    return f"sum by ({by}) (rate(ray_downpour_{name}_total{{{RUN}}}[1m]))"


def _gauge(name: str, by: str = "run", how: str = "max") -> str:
    return f"{how} by ({by}) (ray_downpour_{name}{{{RUN}}})"


def _deciding(name: str) -> dict[str, str]:
    """The figure that decides: last, best, and with the server's averages."""
    return {
        "{{run}}": _gauge(name),
        "best of {{run}}": _gauge(f"best_{name}"),
        "with the server's averages {{run}}": _gauge(f"moving_{name}"),
    }


def _buckets(name: str) -> str:
    return f"sum by (le) (rate(ray_downpour_{name}{{{RUN}}}[1m]))"


def _percentiles(buckets: str, shares: Sequence[float] = (0.5, 0.99)) -> dict[str, str]:
    return {
        f"{round(100 * share)}th percentile": f"histogram_quantile({share}, {buckets})"
        for share in shares
    }


_STALENESS = _buckets("staleness_pushes_total")
_WANTED = f"sum by (run) (rate(ray_downpour_shuffler_cache_total{{{RUN}}}[1m]))"
_FOUND = f'sum by (run) (rate(ray_downpour_shuffler_cache_total{{{RUN}, result="hit"}}[1m]))'

ROWS: dict[str, tuple[Panel, ...]] = {
    "Training": (
        Panel(
            title="Accuracy",
            queries=_deciding("accuracy"),
            unit="percentunit",
            help="accuracy@1 on the evaluation split, with recomputed BN statistics.",
        ),
        Panel(
            title="Loss",
            queries={
                "training {{run}}": _gauge("loss"),
                "evaluation {{run}}": _gauge("evaluation_loss"),
                "not finite {{run}}": _gauge("loss_not_finite"),
            },
        ),
        Panel(title="Epochs", queries={"{{run}}": _gauge("epoch")}),
        Panel(
            title="Updates a second",
            queries={"{{run}}": f"min by (run) ({_rate('updates', 'run, partition')})"},
            help="Of the slowest partition.",
        ),
        Panel(title="Examples a second", queries={"{{run}}": _rate("examples")}),
        Panel(title="Learning rate", queries={"{{run}}": _gauge("learning_rate")}),
    ),
    "Other tasks than classification": (
        Panel(
            title="R²",
            queries=_deciding("r2"),
            help="Of a regression: the share of the targets' variance that is explained.",
            least=None,
        ),
        Panel(
            title="Error of a regression",
            queries={"RMSE {{run}}": _gauge("rmse"), "MAE {{run}}": _gauge("mae")},
            help="In the targets' unit.",
        ),
        Panel(
            title="F1",
            queries=_deciding("f1")
            | {
                "mean of classes {{run}}": _gauge("macro_f1"),
                "rows without a mistake {{run}}": _gauge("exact"),
            },
            unit="percentunit",
            help="Of rows with several classes.",
        ),
        Panel(
            title="Mean IoU",
            queries=_deciding("miou") | {"pixels {{run}}": _gauge("pixel_accuracy")},
            unit="percentunit",
            help="Of masks: intersection over union, and the share of pixels that are right.",
        ),
    ),
    "Staleness": (
        Panel(
            title="Staleness",
            queries=_percentiles(_STALENESS, (0.5, 0.9, 0.99))
            | {
                "over the session": _gauge("staleness_p99"),
                "bound": _gauge("staleness_bound"),
            },
            help="Versions between pull and push of the updates applied.",
        ),
        Panel(title="Pushes by staleness", queries={"at most {{le}}": _STALENESS}),
        Panel(
            title="Gap of BN statistics",
            queries={"{{run}}": _gauge("bn_gap")},
            unit="percentunit",
            help="Accuracy with recomputed BN statistics less that with the server's averages.",
        ),
        Panel(
            title="Drift of BN statistics",
            queries={"partition {{partition}}": _gauge("bn_drift", "run, partition")},
            help="Moving means against those of late, in standard deviations.",
        ),
    ),
    "Parameter server": (
        Panel(
            title="Versions",
            queries={"partition {{partition}}": _gauge("partition_version", "run, partition")},
        ),
        Panel(
            title="Versions behind the first",
            queries={
                "partition {{partition}}": (
                    f"scalar(max(ray_downpour_partition_version{{{RUN}}})) - "
                    + _gauge("partition_version", "run, partition")
                )
            },
        ),
        Panel(
            title="Processes connected",
            queries={"partition {{partition}}": _gauge("partition_connections", "run, partition")},
        ),
        Panel(
            title="Push to last answer",
            queries=_percentiles(_buckets("push_seconds_bucket")),
            unit="s",
        ),
        Panel(
            title="Wait for weights",
            queries=_percentiles(_buckets("pull_wait_seconds_bucket")),
            unit="s",
        ),
        Panel(
            title="Bytes a second",
            queries={"pushed": _rate("push_bytes"), "pulled": _rate("pull_bytes")},
            unit="Bps",
        ),
    ),
    "Trouble": (
        Panel(
            title="Duplicates a second",
            queries={"partition {{partition}}": _rate("duplicates", "run, partition")},
        ),
        Panel(
            title="Refusals a second",
            queries={"{{cause}}": _rate("refusals", "run, cause")},
        ),
        Panel(
            title="Windows lent again",
            queries={"{{run}}": f"sum by (run) (ray_downpour_leases_returned_total{{{RUN}}})"},
        ),
        Panel(
            title="Replicas",
            queries={"{{state}}": _gauge("replicas", "run, state")},
        ),
        Panel(
            title="Steps",
            queries={
                "replica {{replica}}": f"sum by (run, replica) (ray_downpour_steps_total{{{RUN}}})"
            },
            help="Mini-batches that each replica has trained on.",
        ),
        Panel(
            title="Windows",
            queries={"lent": _gauge("leases"), "queued at replicas": _gauge("queue_depth")},
        ),
        Panel(
            title="Time to train a window",
            queries=_percentiles(_buckets("window_seconds_bucket")),
            unit="s",
        ),
    ),
    "Shufflers": (
        Panel(
            title="Rows a second",
            queries={"shuffler {{shuffler}}": _rate("shuffler_rows", "run, shuffler")},
        ),
        Panel(
            title="Busy",
            queries={"shuffler {{shuffler}}": _rate("shuffler_seconds", "run, shuffler")},
            unit="percentunit",
            help="Share of the time spent on deliveries, of one thread.",
        ),
        Panel(
            title="Row groups found in the cache",
            queries={
                "{{run}}": f"{_FOUND} / ({_WANTED} > 0)",
            },
            unit="percentunit",
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "type": "row",
                "id": len(panels) + 1,
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
                "panels": [],
            }
        )
        top += 1
        for place, panel in enumerate(row):
            x, y = WIDTH * (place % COLUMNS), top + HEIGHT * (place // COLUMNS)
            panels.append(_panel(panel, len(panels) + 1, x, y))
        top += HEIGHT * -(-len(row) // COLUMNS)
    return {
        "uid": UID,
        "title": "Downpour",
        "tags": ["downpour", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_datasource(), _runs()]},
        "annotations": {"list": []},
        "panels": panels,
    }


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "id": number,
        "title": panel.title,
        "description": panel.help,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, **_axis(panel)}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": query,
                "legendFormat": legend,
            }
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _axis(panel: Panel) -> dict[str, float]:
    return {} if panel.least is None else {"min": panel.least}


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Source",
        "type": "datasource",
        "query": "prometheus",
        "current": {"text": "Prometheus", "value": "Prometheus"},
    }


def _runs() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": DATASOURCE,
        "query": "label_values(ray_downpour_epoch, run)",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def text() -> str:
    """Return the text of the dashboard's file."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())

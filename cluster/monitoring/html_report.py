"""A run as one page of HTML: result, curves, news, configuration.

The page needs no other file: no script, no font, no picture. It is made from the files in the run's
folder, so it can be written while the run lasts and after a crash.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from downpour.cluster.monitoring.plots import (
    METRICS_FILE,
    ReportError,
    read_metrics,
    series,
    smoothed,
)
from downpour.cluster.monitoring.texts import cell_text, percent_text
from downpour.cluster.run.folder import EVENTS, RESULT, RunFolder

REPORT = "report.html"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 520, 220, 54, 24
_MOST_POINTS = 600


@dataclass(frozen=True, kw_only=True)
class _Curve:
    title: str
    key: str
    percent: bool = False
    from_zero: bool = True
    smooth: bool = False


_CURVES = (
    _Curve(title="Accuracy on the evaluation split", key="accuracy", percent=True, from_zero=False),
    _Curve(title="Gap: recomputed BN statistics less the server's", key="bn_gap", percent=True),
    _Curve(title="Training loss", key="loss", smooth=True),
    _Curve(title="Updates a second", key="updates_per_s"),
    _Curve(title="Mean staleness, in versions", key="staleness_mean"),
    _Curve(title="Learning rate", key="learning_rate"),
    _Curve(title="Replicas at work", key="replicas_alive"),
)

_STYLE = """
:root { color-scheme: light dark; --line: #3b6fb6; --soft: #8a8f98; --rule: #8a8f9840; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.state { color: var(--soft); margin-top: .2rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0; }
.tiles div { border: 1px solid var(--rule); border-radius: 8px; padding: .6rem 1rem; }
.tiles b { display: block; font-size: 1.35rem; } .tiles span, figcaption { color: var(--soft); }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 1rem; }
figure { margin: 0; } svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--rule); } .raw { fill: none; stroke: var(--line); opacity: .3; }
.curve { fill: none; stroke: var(--line); stroke-width: 1.8; } .bar { fill: var(--line); }
table { border-collapse: collapse; } td, th { padding: .15rem 1.2rem .15rem 0; text-align: left;
  font-weight: normal; vertical-align: top; } th { color: var(--soft); }
pre { overflow-x: auto; font-size: 12px; }
"""


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` in a run's folder, whole or not at all, and return its path.

    Raises:
        ReportError: the folder has no metrics, or a file in it is damaged.
    """
    folder = RunFolder.open(Path(run_folder))
    metrics = read_metrics(folder.path / METRICS_FILE)
    if not metrics:
        raise ReportError(f"{folder.path / METRICS_FILE} holds no metrics yet; train for longer")
    unfinished = folder.path / f".{REPORT}.tmp"
    unfinished.write_text(page(folder, metrics), encoding="utf-8")
    return unfinished.replace(folder.path / REPORT)


def page(folder: RunFolder, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return the page's HTML."""
    result = folder.read_json(RESULT) if (folder.path / RESULT).exists() else {}
    status = folder.status()
    config = folder.config()
    state = "finished" if result else str(status.get("state", "begun"))
    events = folder.path / EVENTS
    news = read_metrics(events) if events.exists() else []
    histogram = (result.get("staleness") or {}).get("histogram") or []
    figures = [_figure(curve, metrics) for curve in _CURVES]
    if histogram:
        figures.append(_histogram(histogram))
    parts = [
        f"<h1>{_text(folder.name)}</h1><p class=state>recipe {_text(config.recipe)}, "
        f"{_text(state)}</p>",
        _tiles(result, status),
        f"<div class=curves>{''.join(figures)}</div>",
        _table("Result", {k: v for k, v in result.items() if not isinstance(v, dict | list)}),
        _table("Accuracy reached", _reached(result)),
        _table(
            "News", {f"{e.get('time', 0) - metrics[0]['time']:+.0f} s": e["event"] for e in news}
        ),
        "<h2>Configuration</h2><details><summary>as the run began with it</summary><pre>"
        f"{_text(json.dumps(folder.read_json('config.json'), indent=2))}</pre></details>",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_text(folder.name)}</title><style>{_STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _tiles(result: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    known = {**status, **result}
    staleness = known.get("staleness") or {"mean": known.get("staleness_mean")}
    tiles = {
        "accuracy@1": (known.get("accuracy"), percent_text),
        "best accuracy@1": (known.get("best_accuracy"), percent_text),
        "updates": (known.get("updates"), cell_text),
        "updates a second": (known.get("updates_per_s"), cell_text),
        "mean staleness": (staleness.get("mean"), cell_text),
        "seconds of training": (known.get("training_s"), cell_text),
        "every example exactly once": (known.get("exactly_once"), cell_text),
    }
    shown = (
        f"<div><b>{_text(write(value))}</b><span>{label}</span></div>"
        for label, (value, write) in tiles.items()
        if value is not None
    )
    return f"<div class=tiles>{''.join(shown)}</div>"


def _reached(result: Mapping[str, Any]) -> dict[str, str]:
    """By accuracy, when the run first had it."""
    return {
        f"{float(milestone):.1%}": f"{first['training_s']:,.1f} s of training, "
        f"{first['epochs']:.2f} epochs"
        for milestone, first in (result.get("reached") or {}).items()
    }


def _figure(curve: _Curve, metrics: Sequence[Mapping[str, Any]]) -> str:
    xs, ys = series(metrics, curve.key)
    if len(xs) < 2:
        return ""
    low, high = (0.0 if curve.from_zero else min(ys)), max(ys)
    high = high if high > low else low + 1.0
    show = percent_text if curve.percent else cell_text
    lines = [("raw", ys), ("curve", smoothed(ys))] if curve.smooth else [("curve", ys)]
    drawn = "".join(
        f'<polyline class="{kind}" points="{_points(xs, values, low, high)}"/>'
        for kind, values in lines
    )
    last = f"last {show(ys[-1])}, highest {show(max(ys))}, lowest {show(min(ys))}"
    return _frame(curve.title, last, drawn, (low, high), (min(xs), max(xs)), show)


def _points(xs: Sequence[float], ys: Sequence[float], low: float, high: float) -> str:
    step = max(1, len(xs) // _MOST_POINTS)
    chosen = [*range(0, len(xs) - 1, step), len(xs) - 1]
    first, span = min(xs), (max(xs) - min(xs)) or 1.0
    return " ".join(
        f"{_LEFT + (xs[i] - first) / span * (_WIDTH - _LEFT - 8):.1f},"
        f"{8 + (high - ys[i]) / (high - low) * (_HEIGHT - _BOTTOM - 8):.1f}"
        for i in chosen
    )


def _histogram(buckets: Sequence[Sequence[float]]) -> str:
    pairs = sorted((float(low), float(count)) for low, count in buckets)
    total, most = sum(n for _, n in pairs) or 1.0, max(n for _, n in pairs)
    first, last = pairs[0][0], pairs[-1][0] + 1
    across = (_WIDTH - _LEFT - 8) / (last - first)
    bars = "".join(
        f'<rect class=bar x="{_LEFT + (low - first) * across:.1f}" width="{max(across, 0.6):.1f}" '
        f'y="{8 + (1 - n / most) * (_HEIGHT - _BOTTOM - 8):.1f}" '
        f'height="{n / most * (_HEIGHT - _BOTTOM - 8):.1f}"/>'
        for low, n in pairs
    )
    title = "Staleness of the updates applied, in versions"
    return _frame(
        title, "share of updates", bars, (0, most / total), (first, last - 1), percent_text
    )


def _frame(
    title: str,
    caption: str,
    drawn: str,
    y_range: tuple[float, float],
    x_range: tuple[float, float],
    show: Any,
) -> str:
    lines = []
    for share in (0.0, 0.5, 1.0):
        y = 8 + (1 - share) * (_HEIGHT - _BOTTOM - 8)
        value = y_range[0] + share * (y_range[1] - y_range[0])
        lines.append(
            f'<line class=grid x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{show(value)}</text>'
        )
    ends = ((x_range[0], _LEFT, "start"), (x_range[1], _WIDTH - 8, "end"))
    marks = "".join(
        f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{cell_text(value)}</text>'
        for value, x, anchor in ends
    )
    return (
        f"<figure><b>{_text(title)}</b>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(title)}">'
        f"{''.join(lines)}{marks}{drawn}</svg><figcaption>{_text(caption)}</figcaption></figure>"
    )


def _table(title: str, rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    cells = "".join(
        f"<tr><th>{_text(key.replace('_', ' '))}<td>{_text(cell_text(value))}"
        for key, value in rows.items()
    )
    return f"<h2>{title}</h2><table>{cells}</table>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)

"""A run as one page of HTML: result, curves, classes, mistakes, news, data, configuration.

The page needs no other file: no script, no font; pictures are in it. It is made from the files in
the run's folder, so it can be written while the run lasts and after a crash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from downpour.cluster.config.run import RunConfig
from downpour.cluster.monitoring.learning import PREFIX
from downpour.cluster.monitoring.plots import (
    METRICS_FILE,
    ReportError,
    read_metrics,
    series,
    smoothed,
)
from downpour.cluster.monitoring.report import classes
from downpour.cluster.monitoring.report.figures import bars, curves, text
from downpour.cluster.monitoring.scores import TITLES, figure_of, metric_in
from downpour.cluster.monitoring.texts import cell_text, once_text, percent_text
from downpour.cluster.run.folder import ANSWERS, DATA, EVENTS, RESULT, RunFolder
from downpour.paramserver import durable
from downpour.workers.tasks import ACCURACY, EVALUATION_LOSS, SHARES

REPORT = "report.html"
MOST_SKIPPED = 200
"""Examples that were left out that are listed one by one."""


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


def _curves_of(metric: str) -> tuple[_Curve, ...]:
    """The curves of a task's own figure, and of the loss that goes with it."""
    loss = _Curve(title="Loss on the evaluation split", key=EVALUATION_LOSS, from_zero=False)
    if metric == EVALUATION_LOSS:
        return (loss,)
    title = f"{TITLES[metric]} on the evaluation split"
    return (_Curve(title=title, key=metric, percent=metric in SHARES, from_zero=False), loss)


_STYLE = """
:root { color-scheme: light dark; --line: #3b6fb6; --soft: #8a8f98; --rule: #8a8f9840; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.state { color: var(--soft); margin-top: .2rem; }
p.warning { border-left: 4px solid #d9822b; padding: .4rem .8rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0; }
.tiles div { border: 1px solid var(--rule); border-radius: 8px; padding: .6rem 1rem; }
.tiles b { display: block; font-size: 1.35rem; } .tiles span, figcaption { color: var(--soft); }
.curves { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }
.pictures img { width: 100%; max-width: 180px; image-rendering: pixelated; }
.pictures figcaption { font-size: 12px; }
figure { margin: 0; } svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--rule); } .raw { fill: none; stroke: var(--line); opacity: .3; }
.level { stroke: var(--soft); stroke-dasharray: 5 4; } .dot { fill: var(--line); }
.curve { fill: none; stroke: var(--line); stroke-width: 1.8; } .bar { fill: var(--line); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: .15rem 1.2rem .15rem 0; text-align: left;
  font-weight: normal; vertical-align: top; } th { color: var(--soft); }
.matrix { font-size: 12px; } .matrix td, .matrix th { padding: .2rem .4rem; text-align: right; }
.right { background: color-mix(in srgb, var(--line) calc(var(--share) * 70%), transparent); }
.wrong { background: color-mix(in srgb, #d9822b calc(var(--share) * 80%), transparent); }
pre { overflow-x: auto; font-size: 12px; }
"""


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` in a run's folder, whole or not at all, and return its path.

    Raises:
        ReportError: the folder has no metrics, a file in it is damaged, or it cannot be written.
    """
    folder = RunFolder.open(Path(run_folder))
    metrics = read_metrics(folder.path / METRICS_FILE)
    if not metrics:
        raise ReportError(f"{folder.path / METRICS_FILE} holds no metrics yet; train for longer")
    path, text = folder.path / REPORT, page(folder, metrics)
    try:
        with durable.replacing(path, str(path.with_name(f".{REPORT}.partial"))) as partial:
            Path(partial).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def page(folder: RunFolder, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return the page's HTML."""
    result = folder.read_json(RESULT) if (folder.path / RESULT).exists() else {}
    answers = folder.read_json(ANSWERS) if (folder.path / ANSWERS).exists() and result else None
    data = folder.read_json(DATA) if (folder.path / DATA).exists() else {}
    names = [str(name) for name in data.get("class_names") or ()]
    status, config = folder.status(), folder.config()
    state = "finished" if result else str(status.get("state", "begun"))
    events = folder.path / EVENTS
    news = read_metrics(events) if events.exists() else []
    histogram = (result.get("staleness") or {}).get("histogram") or []
    level = classes.chance(answers, config.model.num_classes)
    metric = metric_in(metrics)
    own = () if metric == ACCURACY else _curves_of(metric)
    figures = [_figure(curve, metrics, level) for curve in (*own, *_CURVES)]
    if histogram:
        pairs = [(float(low), float(count)) for low, count in histogram]
        figures.append(
            bars("Staleness of the updates applied", "share of updates", pairs, "versions")
        )
    began = next((line["time"] for line in metrics if "time" in line), 0)
    parts = [
        f"<h1>{text(folder.name)}</h1><p class=state>recipe {text(config.recipe)}, "
        f"{text(state)}</p>",
        *(
            f"<p class=warning>{text(e['event'])}</p>"
            for e in news
            if str(e.get("event", "")).startswith(PREFIX)
        ),
        _tiles(result, status),
        f"<div class=curves>{''.join(figures)}</div>",
        classes.sections(answers, names) if answers else "",
        _skipped(result),
        _table("Data", _data(config, names)),
        _table("Result", {k: v for k, v in result.items() if not isinstance(v, dict | list)}),
        _table("Accuracy reached", _reached(result)),
        _table("News", {f"{e.get('time', 0) - began:+.0f} s": e["event"] for e in news}),
        "<h2>Configuration</h2><details><summary>as the run began with it</summary><pre>"
        f"{text(json.dumps(folder.read_json('config.json'), indent=2))}</pre></details>",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(folder.name)}</title><style>{_STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _data(config: RunConfig, names: Sequence[str]) -> dict[str, str]:
    """Where the examples are, and what the classes are called."""
    data, columns = config.data, config.model.columns
    numbers = {"targets": ", ".join(columns.targets)}
    of_numbers = columns.kind == "numbers"
    return {
        "path": data.data,
        "training split": data.train_split,
        "scored split": data.eval_split,
        "task": config.model.the_task.name,
        **(numbers if of_numbers else {"classes": str(config.model.num_classes)}),
        **({"class names": ", ".join(names)} if names else {}),
    }


def _skipped(result: Mapping[str, Any]) -> str:
    """The examples that were left out, line by line."""
    lists = {
        "Training images left out": result.get("skipped") or [],
        "Images not scored": result.get("evaluation_skipped") or [],
    }
    shown = ""
    for title, lines in lists.items():
        if lines:
            items = "".join(f"<li>{text(str(line))}" for line in lines[:MOST_SKIPPED])
            more = len(lines) - MOST_SKIPPED
            rest = f"<p>and {more:,} more, see {RESULT}</p>" if more > 0 else ""
            shown += f"<h2>{title} ({len(lines):,})</h2><ul>{items}</ul>{rest}"
    return shown


def _tiles(result: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    known = {**status, **result}
    staleness = known.get("staleness") or {"mean": known.get("staleness_mean")}
    figure = figure_of(known)
    own = {}
    if figure is not None and figure.metric != ACCURACY:
        own[TITLES[figure.metric]] = (figure.value_text, str)
    tiles: dict[str, tuple[Any, Any]] = {
        **own,
        "accuracy@1": (known.get("accuracy"), percent_text),
        "best accuracy@1": (known.get("best_accuracy"), percent_text),
        "updates": (known.get("updates"), cell_text),
        "updates a second": (known.get("updates_per_s"), cell_text),
        "mean staleness": (staleness.get("mean"), cell_text),
        "seconds of training": (known.get("training_s"), cell_text),
        "every example exactly once": (once_text(known), cell_text),
    }
    shown = (
        f"<div><b>{text(write(value))}</b><span>{label}</span></div>"
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


def _figure(curve: _Curve, metrics: Sequence[Mapping[str, Any]], level: tuple[str, float]) -> str:
    xs, ys = series(metrics, curve.key)
    if not xs:
        return ""
    lines = [("raw", ys), ("curve", smoothed(ys))] if curve.smooth else [("curve", ys)]
    return curves(
        curve.title,
        xs,
        lines,
        percent=curve.percent,
        from_zero=curve.from_zero,
        level=level if curve.key == "accuracy" else None,
    )


def _table(title: str, rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    cells = "".join(
        f"<tr><th>{text(key.replace('_', ' '))}<td>{text(cell_text(value))}"
        for key, value in rows.items()
    )
    return f"<h2>{title}</h2><div class=wide><table>{cells}</table></div>"

"""Pages of HTML with pictures and data beside them. Not here: what they say."""

from __future__ import annotations

import html
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downpour.cluster.monitoring.texts import cell_text
from downpour.paramserver import durable
from downpour.shuffler.processors import processors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;text-align:right;"
    "border-bottom:1px solid #ccc}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}pre{background:#f4f4f4;padding:.6em;overflow:auto}"
)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table; the text of its cells is escaped."""
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    lines = [
        "<tr>" + "".join(f"<td>{html.escape(cell_text(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def heading(text: str) -> str:
    """Return a heading within the page."""
    return f"<h2>{html.escape(text)}</h2>"


def picture(name: str, caption: str) -> str:
    """Return the picture that lies beside the page as the file `name`."""
    return (
        f'<figure><img src="{html.escape(name)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def write_report(
    folder: Path, title: str, parts: Sequence[str], *, command: str, data: Mapping[str, Any]
) -> Path:
    """Write `report.html` and `data.json`; return the page's path."""
    made = {
        "command": command,
        "made": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "machine": f"{platform.machine()}, {processors()} processors, {platform.system()}",
        **data,
    }
    footer = f"<h2>How</h2><pre>{html.escape(command)}</pre>" + paragraph(
        f"{made['machine']}; {made['made']}. Everything in figures and tables is in data.json."
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}{footer}</html>\n"
    )
    write_text(folder / "data.json", json.dumps(made, indent=1) + "\n")
    path = folder / "report.html"
    write_text(path, page)
    return path


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path, str(path.with_name(f".{path.name}.partial"))) as partial:
        figure.savefig(partial, format="png", dpi=120)


def new_figure(columns: int, *, width: float = 10, height: float = 4) -> tuple[Figure, list[Any]]:
    """Return a figure with axes side by side, on a canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path, str(path.with_name(f".{path.name}.partial"))) as partial:
        Path(partial).write_text(text)

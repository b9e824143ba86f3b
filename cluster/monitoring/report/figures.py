"""Curves and bars as SVG, for a page that needs no script. Pure."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from downpour.cluster.monitoring.texts import cell_text, percent_text

WIDTH, HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 40
_MOST_POINTS = 600
_DOTTED = 40
"""Curves of up to so many points show each of them."""

Line = tuple[str, Sequence[float]]
"""A CSS class, and the values."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What a figure's place is a picture of."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str = "updates"
    percent: bool = False
    """Whether y is a share."""

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is, in the picture's units."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - up * (HEIGHT - _BOTTOM - _TOP),
        )

    @property
    def show(self) -> Callable[[float], str]:
        """How values of y are written."""
        return percent_text if self.percent else cell_text


def y_range(values: Sequence[float], *, percent: bool, from_zero: bool) -> tuple[float, float]:
    """Return the least and most of an axis for some values; a share of a whole stays within it.

    A flat curve gets room on both sides.
    """
    low, high = min(values), max(values)
    low = min(0.0, low) if from_zero else low
    if high <= low:
        room = 0.05 if percent else abs(high) / 2 or 1.0
        low = low - room if low < 0 else max(0.0, low - room)
        high += room
    if percent and min(values) >= 0 and max(values) <= 1:
        low, high = max(0.0, low), min(1.0, high)
    return low, high


def curves(
    title: str,
    xs: Sequence[float],
    lines: Sequence[Line],
    *,
    percent: bool = False,
    from_zero: bool = True,
    level: tuple[str, float] | None = None,
) -> str:
    """Return a figure of curves over updates; a single point is a dot.

    Args:
        title: what it shows.
        xs: where the points are.
        lines: the curves; the last is what the caption tells of.
        percent: whether values are shares.
        from_zero: whether the axis begins at 0.
        level: the name and the value of a line straight across.
    """
    ys = [y for _, values in lines for y in values]
    reach = ys if level is None else [*ys, level[1]]
    low, high = y_range(reach, percent=percent, from_zero=from_zero)
    axes = Axes(x=(min(0.0, *xs, 0.0), max(xs)), y=(low, high), percent=percent)
    drawn = "".join(_curve(axes, kind, xs, values) for kind, values in lines)
    if level is not None:
        drawn += _level(axes, *level)
    main = lines[-1][1]
    show = axes.show
    caption = f"last {show(main[-1])}, highest {show(max(main))}, lowest {show(min(main))}"
    return _frame(title, caption, drawn, axes)


def bars(title: str, caption: str, pairs: Sequence[tuple[float, float]], x_label: str) -> str:
    """Return a histogram.

    Args:
        title: what it shows.
        caption: shown below.
        pairs: the lower edge of each bar, and its count.
        x_label: of the edges.
    """
    pairs = sorted(pairs)
    total, most = sum(n for _, n in pairs) or 1.0, max(n for _, n in pairs)
    first, end = pairs[0][0], pairs[-1][0] + 1
    axes = Axes(x=(first, end), y=(0.0, most / total), x_label=x_label, percent=True)
    drawn = ""
    for low, count in pairs:
        left, top = axes.at(low, count / total)
        right, bottom = axes.at(low + 1, 0.0)
        drawn += (
            f'<rect class=bar x="{left:.1f}" width="{max(right - left, 0.6):.1f}" y="{top:.1f}" '
            f'height="{bottom - top:.1f}"/>'
        )
    return _frame(title, caption, drawn, axes)


def text(value: str) -> str:
    """Return text for HTML."""
    return html.escape(value, quote=True)


def _curve(axes: Axes, kind: str, xs: Sequence[float], ys: Sequence[float]) -> str:
    step = max(1, len(xs) // _MOST_POINTS)
    chosen = [*range(0, len(xs) - 1, step), len(xs) - 1]
    points = [axes.at(xs[i], ys[i]) for i in chosen]
    drawn = ""
    if len(points) > 1:
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawn = f'<polyline class="{kind}" points="{way}"/>'
    if len(points) <= _DOTTED and kind == "curve":
        drawn += "".join(f'<circle class=dot cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)
    return drawn


def _level(axes: Axes, name: str, value: float) -> str:
    left, y = axes.at(axes.x[0], value)
    right = WIDTH - _RIGHT
    return (
        f'<line class=level x1="{left:.1f}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{right}" y="{max(_TOP + 9.0, y - 4):.1f}" text-anchor="end">{text(name)}</text>'
    )


def _frame(title: str, caption: str, drawn: str, axes: Axes) -> str:
    lines = []
    for share in (0.0, 0.5, 1.0):
        value = axes.y[0] + share * (axes.y[1] - axes.y[0])
        left, y = axes.at(axes.x[0], value)
        lines.append(
            f'<line class=grid x1="{left}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{axes.show(value)}</text>'
        )
    below = HEIGHT - _BOTTOM + 16
    ends = ((axes.x[0], _LEFT, "start"), (axes.x[1], WIDTH - _RIGHT, "end"))
    marks = "".join(
        f'<text x="{x}" y="{below}" text-anchor="{anchor}">{cell_text(_whole(value))}</text>'
        for value, x, anchor in ends
    )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    label = f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{text(axes.x_label)}</text>'
    return (
        f"<figure><b>{text(title)}</b>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">'
        f"{''.join(lines)}{marks}{label}{drawn}</svg>"
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def _whole(value: float) -> float | int:
    return int(value) if math.isfinite(value) and value == int(value) else value

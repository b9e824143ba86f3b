"""Numbers as people read them, on the screen and in reports. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

MISSING = "–"


def clock_text(seconds: float | None) -> str:
    """Returns a length of time as `m:ss`, `h:mm:ss` or `d days h:mm:ss`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    whole = max(0, int(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} {'day' if days == 1 else 'days'} {hour}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def percent_text(fraction: float | None) -> str:
    """Returns a fraction as a percentage with two decimals."""
    if fraction is None:
        return MISSING
    return f"{100 * fraction:.2f}%" if math.isfinite(fraction) else str(fraction)


def number_text(value: float | None) -> str:
    """Returns a number with four significant digits."""
    if value is None:
        return MISSING
    return f"{value:.4g}"


def rate_text(value: float | None) -> str:
    """Returns a rate or a count: one decimal below 100, and then whole with separators."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    return f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def cell_text(value: object) -> str:
    """Returns a value as a cell of a table: four digits, `yes` and `no`, a dash for None."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else number_text(value)
    return str(value)


def points_text(difference: float | None) -> str:
    """Returns a difference of two shares in percentage points, with its sign."""
    return MISSING if difference is None else f"{100 * difference:+.2f} percentage points"


def once_text(result: Mapping[str, Any]) -> str | None:
    """Returns whether every example was trained on exactly once an epoch, from a result.

    Images that were skipped and mini-batches that were refused were not. None if there is no
    result.
    """
    if result.get("exactly_once") is None:
        return None
    if not result["exactly_once"]:
        return "no: a mini-batch was lost or applied twice"
    left_out = [
        f"{count:,} {what}{'' if count == 1 else plural}"
        for key, what, plural in (
            ("images_skipped", "image", "s"),
            ("refused", "mini-batch", "es"),
        )
        if (count := result.get(key) or 0)
    ]
    if left_out:
        return f"no: {' and '.join(left_out)} left out"
    return "yes"


def of_total(count: int, total: int | None) -> str:
    """Returns `3/10`, or `3` if the total is not known."""
    return f"{count}" if total is None else f"{count}/{total}"


def has_unicode(console: Console) -> bool:
    """Returns whether the console can show more than its 8-bit encoding."""
    return console.encoding.lower().startswith("utf")


def encodable(text: str, console: Console) -> str:
    """Returns text with what the console's encoding lacks replaced: printing must not raise."""
    encoding = console.encoding
    return text.encode(encoding, "replace").decode(encoding)

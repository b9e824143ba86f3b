"""The panel that shows a run on a terminal."""

import dataclasses
import io
import math

import pytest
from rich.console import Console

from downpour.cluster.monitoring.panel import sparkline, training_panel
from downpour.cluster.monitoring.progress import Progress, plain_line
from downpour.workers.tasks import Figure
from tests.helpers.progress import EMPTY, FULL

RISING = {"figure": [i / 60 for i in range(60)], "loss": [1 / (i + 1) for i in range(60)]}


def rendered(progress, width=100, **kwargs):
    console = Console(file=io.StringIO(), width=width, _environ={})
    console.print(training_panel(progress, RISING, title="mnist-bn", width=width, **kwargs))
    return console.file.getvalue()


def broken_values():
    """States with each number missing, NaN, infinite, negative or absurd."""
    for field in dataclasses.fields(Progress):
        if field.name in ("phase", "metric"):
            continue
        numbers = [0, -1, 10**18]
        is_figure = "Figure" in str(field.type)
        if "float" in str(field.type) or is_figure:
            numbers += [math.nan, math.inf, -math.inf]
        if field.name != "elapsed_s":
            numbers.append(None)
        for number in numbers:
            value = number
            if is_figure and number is not None:
                value = Figure(metric="accuracy", value=number)
            yield dataclasses.replace(FULL, **{field.name: value})


def test_the_panel_shows_every_number():
    text = rendered(FULL)
    for part in (
        "mnist-bn · training",
        "42%   ETA 0:09",
        "3/10",
        "7,812 updates",
        "97.81%   best 97.90%",
        "0.08123",
        "1,204 updates/s   38,500 examples/s",
        "48.9 mean   71.0 p99",
        "9/10",
        "0 duplicates   3 refused",
        "1:23",
        "▁▁▂",
    ):
        assert part in text
    assert len({len(line) for line in text.splitlines()}) == 1  # the border closes
    until = dataclasses.replace(FULL, goal=Figure(metric="accuracy", value=0.985))
    assert "best 97.90%   until 98.50%" in rendered(until)


def test_the_panel_before_anything_is_known():
    text = rendered(EMPTY)
    assert "starting Ray" in text
    assert "accuracy" not in text


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 300])
def test_no_width_breaks_the_panel_or_is_overrun(width):
    for progress in (FULL, EMPTY):
        lines = rendered(progress, width=width).splitlines()
        assert max(map(len, lines)) <= width


def test_no_value_breaks_the_panel_or_the_line():
    for progress in broken_values():
        assert rendered(progress)
        assert "\n" not in plain_line(progress)


def test_sparkline_means_shares_and_bounds():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([3, 3, 3], 8) == "▅▅▅"
    assert sparkline([math.nan, 1, math.inf, 2], 8) == "▁█"
    assert sparkline([], 8) == sparkline([1], 0) == ""
    assert len(sparkline(list(range(1000)), 24)) == 24
    assert sparkline([-1.7e308, 1.7e308], 8).isprintable()

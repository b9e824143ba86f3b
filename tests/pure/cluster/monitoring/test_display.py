"""Progress and results in the terminal."""

import dataclasses
import io
import math
import re

import pytest
from rich.console import Console

from downpour.cluster.monitoring.display import (
    MAX_HISTORY,
    Progress,
    TrainingDisplay,
    clock_text,
    percent_text,
    plain_line,
    print_result,
    rate_text,
    sparkline,
    training_panel,
)

FULL = Progress(
    elapsed_s=83.2,
    phase="training",
    epoch=3,
    epochs=10,
    examples=250_000,
    total_examples=600_000,
    updates=7812,
    updates_per_s=1204.3,
    examples_per_s=38_500.0,
    loss=0.08123456,
    accuracy=0.9781,
    best_accuracy=0.979,
    staleness_mean=48.91,
    staleness_p99=71.0,
    replicas_alive=9,
    replicas_wanted=10,
    duplicates=0,
    refused=3,
)
EMPTY = Progress(elapsed_s=0.0, phase="starting Ray")
RISING = {"accuracy": [i / 60 for i in range(60)], "loss": [1 / (i + 1) for i in range(60)]}


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def terminal(width=100, encoding="utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    return Console(file=stream, force_terminal=True, width=width, height=25, _environ={})


def written(console):
    console.file.flush()
    return console.file.buffer.getvalue().decode(console.file.encoding)


def rendered(progress, width=100, **kwargs):
    console = Console(file=io.StringIO(), width=width, _environ={})
    console.print(training_panel(progress, RISING, title="mnist-bn", width=width, **kwargs))
    return console.file.getvalue()


def broken_values():
    """States with each number missing, NaN, infinite, negative or absurd."""
    for field in dataclasses.fields(Progress):
        if field.name == "phase":
            continue
        numbers = [0, -1, 10**18]
        if "float" in str(field.type):
            numbers += [math.nan, math.inf, -math.inf]
        if field.name != "elapsed_s":
            numbers.append(None)
        for number in numbers:
            yield dataclasses.replace(FULL, **{field.name: number})


def test_fraction_and_remaining_time():
    assert FULL.fraction == pytest.approx(250 / 600)
    assert FULL.remaining_s == pytest.approx(350_000 / 38_500)
    assert EMPTY.fraction is None
    assert EMPTY.remaining_s is None
    assert dataclasses.replace(FULL, examples_per_s=0.0).remaining_s is None
    assert dataclasses.replace(FULL, examples=700_000).fraction == 1.0


def test_a_plain_line_says_what_matters_and_no_more_than_is_known():
    assert plain_line(FULL) == (
        "[1:23] training  epoch 3/10  42%  accuracy 97.81% (best 97.90%)  loss 0.08123  "
        "1,204 updates/s  staleness 48.9 (p99 71.0)  replicas 9/10  3 refused  ETA 0:09"
    )
    assert plain_line(EMPTY) == "[0:00] starting Ray"


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


@pytest.mark.parametrize("width", [5, 100])
def test_a_terminal_without_unicode_gets_plain_lines_and_never_raises(width):
    console = terminal(width, encoding="ascii")
    with TrainingDisplay("mnist-bn", console=console) as display:
        assert not display.interactive
        display.update(dataclasses.replace(FULL, phase="prüfen"))
    print_result({"naïve": "ü", "accuracy": 0.9}, "runs/ü", console=console)
    assert "pr?fen" in written(console)


def test_a_terminal_gets_a_panel_that_stays_at_the_end():
    console = terminal()
    with TrainingDisplay("mnist-bn", console=console) as display:
        assert display.interactive
        display.update(FULL)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written(console))
    assert "mnist-bn · training" in text
    assert "97.81%" in text


def test_a_failure_inside_leaves_the_terminal_in_order():
    console = terminal()

    def fail():
        with TrainingDisplay(console=console) as display:
            display.update(FULL)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert written(console).count("\x1b[?25l") == written(console).count("\x1b[?25h")  # the cursor


def plain_display(interval_s=5.0):
    console, clock = Console(file=io.StringIO(), width=40, _environ={}), FakeClock()
    display = TrainingDisplay(console=console, interval_s=interval_s, clock=clock)
    return display, clock, lambda: console.file.getvalue().splitlines()


def test_without_a_terminal_lines_come_at_intervals_and_at_a_change_of_phase():
    display, clock, lines = plain_display()
    with display:
        assert not display.interactive
        display.update(EMPTY)
        assert len(lines()) == 1
        clock.now += 4.9
        display.update(EMPTY)
        assert len(lines()) == 1
        clock.now += 0.2
        display.update(EMPTY)
        assert len(lines()) == 2
        display.update(FULL)
        assert len(lines()) == 3
        assert lines()[-1] == plain_line(FULL)  # not wrapped at the width of 40
    assert "\x1b" not in "".join(lines())


def test_the_last_state_is_printed_once():
    display, _, lines = plain_display()
    with display:
        display.update(FULL)
        last = dataclasses.replace(FULL, epoch=4)
        display.update(last)
    assert lines() == [plain_line(FULL), plain_line(last)]


def test_markup_in_a_phase_is_text():
    display, _, lines = plain_display()
    with display:
        display.update(dataclasses.replace(EMPTY, phase="[bold]x[/bold] [/oops]"))
    assert lines() == ["[0:00] [bold]x[/bold] [/oops]"]
    with TrainingDisplay("[/oops]", console=terminal()) as interactive:
        interactive.update(dataclasses.replace(FULL, phase="[/oops]"))


def test_history_is_bounded_and_keeps_the_newest():
    display, _, _ = plain_display()
    with display:
        for i in range(3 * MAX_HISTORY):
            display.update(dataclasses.replace(FULL, loss=float(i), accuracy=0.5))
    losses = display._history["loss"]
    assert len(losses) <= MAX_HISTORY
    assert losses[-1] == 3 * MAX_HISTORY - 1
    assert losses == sorted(losses)
    assert display._history["accuracy"] == [0.5]


def test_sparkline_means_shares_and_bounds():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([3, 3, 3], 8) == "▅▅▅"
    assert sparkline([math.nan, 1, math.inf, 2], 8) == "▁█"
    assert sparkline([], 8) == sparkline([1], 0) == ""
    assert len(sparkline(list(range(1000)), 24)) == 24
    assert sparkline([-1.7e308, 1.7e308], 8).isprintable()


def test_texts():
    assert [clock_text(s) for s in (0, 61, 3661, 90_061, 180_000)] == [
        "0:00",
        "1:01",
        "1:01:01",
        "1 day 1:01:01",
        "2 days 2:00:00",
    ]
    assert clock_text(math.inf) == clock_text(None) == percent_text(None) == "–"
    assert rate_text(99.95) == "100.0"
    assert rate_text(12345.6) == "12,346"


def test_the_result_table():
    console = Console(file=io.StringIO(), width=80, _environ={})
    result = {
        "recipe": "mnist-bn",
        "accuracy": 0.9811,
        "best_accuracy": 0.9812,
        "updates": 18_750,
        "elapsed_s": 92.1,
        "evaluation_loss": None,
        "staleness": {"mean": 48.9, "p99": 71, "histogram": [[0, 1]]},
        "run": "mnist-bn-1",
        "seed": 7,
        "time_to_first_update_s": 4.251,
        "exactly_once": True,
        "curve": [1, 2, 3],
    }
    print_result(result, "runs/mnist-bn [1]", console=console)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert lines[2:-1] == [
        "│ recipe │ mnist-bn │",
        "│ best accuracy │ 98.12% │",
        "│ last accuracy │ 98.11% │",
        "│ updates │ 18,750 │",
        "│ time │ 1:32 │",
        "│ staleness │ mean 48.9 p99 71.0 │",
        "│ seed │ 7 │",
        "│ time to first update │ 4.25 s │",
        "│ exactly once │ True │",
        "│ run │ runs/mnist-bn [1] │",
    ]


@pytest.mark.parametrize("width", [1, 10, 20, 200])
def test_the_result_table_fits_any_width(width):
    console = Console(file=io.StringIO(), width=width, _environ={})
    print_result({"accuracy": math.nan, "updates": 10**12}, "runs/x", console=console)
    assert max(map(len, console.file.getvalue().splitlines())) <= width

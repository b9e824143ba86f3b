"""Progress and results in the terminal."""

import dataclasses
import io
import math
import re
import sys
import types

import pytest
from rich.console import Console

from downpour.cluster.monitoring.display import MAX_HISTORY, TrainingDisplay, print_result
from downpour.cluster.monitoring.progress import plain_line
from downpour.workers.tasks import Figure
from tests.helpers.progress import EMPTY, FULL


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


def _accuracy(value):
    return Figure(metric="accuracy", value=value)


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
            display.update(dataclasses.replace(FULL, loss=float(i), figure=_accuracy(0.5)))
    losses = display._history["loss"]
    assert len(losses) <= MAX_HISTORY
    assert losses[-1] == 3 * MAX_HISTORY - 1
    assert losses == sorted(losses)
    assert display._history["figure"] == [0.5]


def test_the_result_table():
    console = Console(file=io.StringIO(), width=80, _environ={})
    result = {
        "recipe": "mnist-bn",
        "accuracy": 0.9811,
        "best_accuracy": 0.9812,
        "updates": 18_750,
        "elapsed_s": 92.1,
        "evaluation_loss": None,
        "bn_gap": 0.0012,
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
        "│ recomputed BN gains │ +0.12 percentage points │",
        "│ updates │ 18,750 │",
        "│ time │ 1:32 │",
        "│ staleness │ mean 48.9 p99 71.0 │",
        "│ exactly once │ yes │",
        "│ seed │ 7 │",
        "│ time to first update │ 4.25 s │",
        "│ run │ runs/mnist-bn [1] │",
    ]


@pytest.mark.parametrize("width", [1, 10, 20, 200])
def test_the_result_table_fits_any_width(width):
    console = Console(file=io.StringIO(), width=width, _environ={})
    print_result({"accuracy": math.nan, "updates": 10**12}, "runs/x", console=console)
    assert max(map(len, console.file.getvalue().splitlines())) <= width


def test_a_notebook_gets_a_panel_that_is_drawn_again_in_its_place(monkeypatch):
    shown = []

    class Handle:
        def update(self, page):
            shown.append(("again", page))

    def display(page, *, display_id):
        assert display_id is True
        shown.append(("first", page))
        return Handle()

    fake = types.SimpleNamespace(HTML=str, display=display)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=fake))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    clock = FakeClock()
    console = Console(file=io.StringIO(), force_jupyter=True)
    with TrainingDisplay("mine", console=console, clock=clock) as display_:
        assert not display_.interactive
        display_.update(FULL)
        display_.update(dataclasses.replace(FULL, figure=_accuracy(0.5)))  # too soon to draw
        clock.now += 1
        display_.update(dataclasses.replace(FULL, figure=_accuracy(0.25)))
        display_.update(dataclasses.replace(FULL, figure=_accuracy(0.125)))
    assert [how for how, _ in shown] == ["first", "again", "again"]
    assert "97.81%" in shown[0][1]
    assert "12.50%" in shown[2][1], "the last state stays"
    assert all(page.startswith("<pre") and "mine" in page for _, page in shown)
    quiet = Console(file=io.StringIO(), force_jupyter=True, quiet=True)
    with TrainingDisplay("mine", console=quiet) as display_:
        display_.update(FULL)
    assert len(shown) == 3

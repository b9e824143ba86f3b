"""Progress of a loop: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from downpour.cluster.monitoring.bars import progress_bar


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def plain() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=20, _environ={}), stream


def test_elsewhere_a_line_comes_at_each_interval_with_rate_and_time_left() -> None:
    console, stream = plain()
    clock = Clock()
    with progress_bar("pushes", console=console, lines_every_s=5.0, clock=clock) as show:
        show(1000, 4000)  # where an earlier session has left off
        for _ in range(10):
            clock.now_s += 1.0
            show(1000 + 200 * int(clock.now_s - 50), 4000)
    assert stream.getvalue().splitlines() == [
        "2,000 of 4,000 pushes  200 a second  0:10 left",
        "3,000 of 4,000 pushes  200 a second  0:05 left",
    ]


def test_a_loop_of_unknown_length_and_one_that_stands_still() -> None:
    console, stream = plain()
    clock = Clock()
    with progress_bar("rows", console=console, lines_every_s=5.0, clock=clock) as show:
        show(7, None)
        clock.now_s += 5.0
        show(7, None)
        clock.now_s += 5.0
        show(17, None)
    assert stream.getvalue().splitlines() == ["7 rows", "17 rows  1.0 a second"]


def test_elsewhere_nothing_is_shown_if_so_asked() -> None:
    console, stream = plain()
    with progress_bar("rows", console=console, lines_every_s=None) as show:
        show(1, 2)
    assert stream.getvalue() == ""


def test_long_work_in_a_pipe_tells_lines_by_itself() -> None:
    console, stream = plain()
    clock = Clock()
    with progress_bar("images", console=console, clock=clock) as show:
        show(0, 100)
        clock.now_s += 11.0
        show(10, 100)
    assert stream.getvalue().startswith("10 of 100 images")


def test_a_terminal_gets_a_bar_that_goes_at_the_end_and_after_a_failure() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, _environ={})

    def fail() -> None:
        with progress_bar("shuffling rows", console=console) as show:
            show(3, 9)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    text = stream.getvalue()
    assert "shuffling rows" in text
    assert "3/9" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor

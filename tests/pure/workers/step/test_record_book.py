"""When a step is recorded and when compared: the second of a shape, its next one, one of many."""

import pytest

from downpour.workers.step import record_book
from downpour.workers.step.record_book import RecordBook


def test_the_second_step_is_recorded_and_the_next_one_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(record_book, "CHECK_EVERY", 3)
    book: RecordBook[str] = RecordBook()
    assert [book.due((4,)), book.due((3,)), book.due((4,))] == [False, False, True]
    assert not book.check_due((4,))
    book.postpone((4,))
    assert book.due((4,)), "again, if it was put off"
    book.recordings[(4,)] = "recording"
    assert not book.due((4,))
    found = [(book.check_due((4,)), book.runs((4,))) for _ in range(7)]
    assert found == [
        (True, 0),
        (False, 1),
        (False, 2),
        (True, 2),
        (False, 1),
        (False, 2),
        (True, 2),
    ]


def test_a_recording_is_compared_more_often_in_the_beginning() -> None:
    book: RecordBook[str] = RecordBook()
    book.recordings[(4,)] = "recording"
    due = {run: book.runs((4,)) for run in range(1, 2100) if book.check_due((4,))}
    assert due == {1: 0, 10: 8, 100: 89, 1001: 900, 2001: 999}


def test_what_cannot_be_recorded_is_not_tried_again() -> None:
    book: RecordBook[str] = RecordBook(record_after=0)
    assert book.due((4,))
    book.recordings[(4,)] = None
    assert not book.due((4,))
    assert not book.check_due((4,))
    assert not RecordBook(recorded=False, record_after=0).due((4,))

"""Numbers as people read them."""

import math

from downpour.cluster.monitoring.texts import cell_text, clock_text, percent_text, rate_text


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


def test_cells_of_tables():
    values = (None, True, False, 12345, 0.123456, 999.94, 12345.6, math.inf, "text")
    assert [cell_text(value) for value in values] == [
        *("–", "yes", "no", "12,345", "0.1235", "999.9", "12,346", "inf", "text")
    ]

"""Where a run stands, and that as a line."""

import dataclasses

import pytest

from downpour.cluster.monitoring.progress import plain_line
from downpour.workers.tasks import Figure
from tests.helpers.progress import EMPTY, FULL


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
        "38,500 examples/s  staleness 48.9 (p99 71.0)  replicas 9/10  3 refused  ETA 0:09"
    )
    assert plain_line(EMPTY) == "[0:00] starting Ray"
    until = dataclasses.replace(FULL, goal=Figure(metric="accuracy", value=0.985))
    assert "accuracy 97.81% (best 97.90%, until 98.50%)" in plain_line(until)

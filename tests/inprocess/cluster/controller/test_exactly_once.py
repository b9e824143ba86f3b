"""Each mini-batch once an epoch, whoever comes, goes or is killed: processes and real kill -9."""

from __future__ import annotations

import numpy as np
import pytest

from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.plan.plan import Plan
from tests.helpers import tiny
from tests.helpers.lending import Lending, content

ROWS, EPOCHS = 2003, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.write_split(folder, "train", *tiny.images(ROWS, 1), shards=4)
    return str(folder)


def expected(data: str, plan: Plan) -> dict[tuple[int, int], bytes]:
    """All mini-batches, read on their own and without any lending."""
    reader = RowReader(Dataset.open(data, "train"))
    found = {
        (epoch, index): content(reader.take(plan.rows(epoch, index)))
        for epoch in range(EPOCHS)
        for index in range(plan.num_batches)
    }
    reader.close()
    return found


@pytest.mark.parametrize("replicas", [1, 3, 7, 10, 13])
def test_the_union_of_the_batches_is_the_plans(data, replicas):
    plan = Plan(num_rows=ROWS, batch_size=16, window_batches=5, seed=replicas)
    run = Lending(data, plan, EPOCHS, replicas, shufflers=2, seed=replicas)
    total = EPOCHS * plan.num_batches
    events = iter(
        [
            (0.1, run.kill_replica),
            (0.1, run.join),
            (0.2, run.join),
            (0.3, run.kill_shuffler),
            (0.45, run.leave),
            (0.5, run.kill_replica),
            (0.5, run.join),
            (0.6, run.join),
            (0.7, run.kill_shuffler),
            (0.8, run.kill_replica),
            (0.8, run.join),
        ]
    )
    due = next(events)
    while not run.book.finished:
        while due is not None and len(run.applied) >= due[0] * total:
            due[1]()
            due = next(events, None)
        run.turn()
    run.book.check()
    run.close()
    assert due is None
    assert run.kills == 5
    assert len(run.applied) == total
    assert run.applied == expected(data, plan)
    for epoch in range(EPOCHS):
        rows, _ = plan.rows_of(epoch, np.arange(plan.num_batches))
        assert (np.bincount(rows) == 1).all()

"""What all baselines that learn share: epochs, the clock, and scoring beside torch's own layers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from downpour.benchmarks.baselines.common import INPUTS, LABELS, TEST
from downpour.benchmarks.baselines.lesson import (
    Averaged,
    Course,
    Examiner,
    Examples,
    Lesson,
    Span,
)
from downpour.paramserver.rules.averaging import AVERAGE, Averaging

ROWS, TEST_ROWS = 103, 40


@pytest.fixture
def lesson(tmp_path: Path) -> Lesson:
    rng = np.random.default_rng(0)
    for prefix, rows in (("", ROWS), (TEST, TEST_ROWS)):
        np.save(tmp_path / f"{prefix}{INPUTS}", rng.random((rows, 784), dtype=np.float32))
        np.save(tmp_path / f"{prefix}{LABELS}", rng.integers(0, 10, rows))
    return Lesson(
        data=str(tmp_path),
        num_examples=ROWS,
        workers=2,
        batch_size=10,
        learning_rate=0.4,
        decay=0.5,
        average=None,
        step_examples=10,
        epochs=2,
        looks_per_epoch=4,
        goal=0.9,
        bound_s=30,
        recompute_examples=60,
        asked_s=0,
        seed=3,
    )


def test_spans_cut_each_epoch_evenly(lesson: Lesson) -> None:
    assert [(s.start, s.stop) for s in lesson.spans()] == [(0, 2), (2, 5), (5, 7), (7, 10)] * 2
    pairs = lesson.spans(multiple=2)
    assert [(s.start, s.stop) for s in pairs] == [(0, 2), (2, 4), (4, 6), (6, 10)] * 2
    assert [s.epoch for s in pairs] == [0] * 4 + [1] * 4
    assert [lesson.rate(epoch) for epoch in (0, 1, 2)] == [0.4, 0.2, 0.1]


def test_an_epoch_has_no_example_twice_and_another_order_each_time(lesson: Lesson) -> None:
    inputs = np.load(Path(lesson.data) / INPUTS)
    rows = {row.tobytes(): i for i, row in enumerate(inputs)}
    examples = Examples(lesson)
    orders = [
        [rows[r.numpy().tobytes()] for i in range(10) for r in examples.batch(epoch, i)[0]]
        for epoch in (0, 1, 0)
    ]
    assert all(len(set(order)) == 100 for order in orders)
    assert orders[0] == orders[2] != orders[1]


def test_scores_are_those_of_statistics_kept_and_recomputed(lesson: Lesson) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 10), nn.BatchNorm1d(10))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    examiner = Examiner(lesson)
    running, recomputed = examiner.score(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    inputs, labels = (
        torch.from_numpy(np.load(Path(lesson.data) / f"{TEST}{n}")) for n in (INPUTS, LABELS)
    )
    with torch.no_grad():
        x = model[0](inputs)
        assert running == pytest.approx(float((x.argmax(1) == labels).float().mean()))
        # Algorithm 2, written out: means over mini-batches of 10 of means and unbiased variances.
        batches = model[0](examiner._training).split(10)
        mean = torch.stack([b.mean(0) for b in batches]).mean(0)
        variance = torch.stack([b.var(0, unbiased=True) for b in batches]).mean(0)
        y = (x - mean) / (variance + model[1].eps).sqrt()
        assert recomputed == pytest.approx(float((y.argmax(1) == labels).float().mean()))


def test_an_average_is_the_one_that_the_server_keeps(lesson: Lesson) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    averaged = Averaged(dataclasses.replace(lesson, average=0.9, step_examples=64), model)
    rule = Averaging(decay=0.9)
    flat = nn.utils.parameters_to_vector
    weights = flat(model.parameters()).detach()
    state = rule.init(weights, torch.zeros(2, 0))
    for step in range(25):
        with torch.no_grad():
            for value in model.parameters():
                value.normal_()
            model[1].running_mean.fill_(step)
        averaged.follow()
        rule.update(state, flat(model.parameters()).detach(), torch.zeros(2, 0), 2)
        torch.testing.assert_close(flat(averaged.model.parameters()), state[AVERAGE])
    assert not torch.equal(flat(averaged.model.parameters()), flat(model.parameters()))
    assert 0 < averaged.model[1].running_mean[0] < 24


def test_without_an_average_the_model_itself_is_scored(lesson: Lesson) -> None:
    model = nn.Linear(3, 2)
    averaged = Averaged(lesson, model)
    averaged.follow()
    assert averaged.model is model


def test_the_clock_stands_still_while_scoring_and_the_goal_ends_it(lesson: Lesson) -> None:
    now_s = 0.0
    course = Course(lesson, clock=lambda: now_s)
    now_s = 5.0
    for index, accuracies in enumerate([(0.5, 0.6), (0.7, 0.95)]):
        assert not course.over
        with course.training():
            now_s += 2
        with course.scoring():
            now_s += 10
        course.look(Span(epoch=0, start=4 * index, stop=4 * index + 4), accuracies, averaged=2)
    assert course.over
    result = course.result()
    assert (result["startup_s"], result["scoring_s"], result["ended"]) == (5, 20, "arrived")
    assert [look["seconds"] for look in result["looks"]] == [2, 4]
    assert [look["examples"] for look in result["looks"]] == [40, 80]
    assert [look["updates"] for look in result["looks"]] == [2, 4]


def test_time_ends_it(lesson: Lesson) -> None:
    now_s = 0.0
    course = Course(lesson, clock=lambda: now_s)
    with course.training():
        now_s += 31
    course.look(Span(epoch=0, start=0, stop=2), (0.5, None))
    assert course.over
    assert course.result()["ended"] == "out of time"

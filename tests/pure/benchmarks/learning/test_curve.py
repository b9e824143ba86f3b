"""What a training's looks come to, by hand-computed cases."""

import dataclasses
import math

import pytest

from downpour.benchmarks.learning.curve import Curve, Look, as_plain, curve_of_run


def look(seconds: float, accuracy: float, recomputed: float | None = None) -> Look:
    return Look(
        examples=round(100 * seconds),
        updates=round(seconds),
        epoch=seconds / 10,
        seconds=seconds,
        accuracy=accuracy,
        accuracy_recomputed=recomputed,
    )


def rates(at: float, updates: int) -> dict[str, object]:
    return {"time": at, "updates": updates, "examples": 32 * updates, "replicas_alive": 2}


def scored(at: float, updates: int, accuracy: float) -> dict[str, object]:
    return {"time": at, "updates": updates, "accuracy": accuracy}


def test_whichever_statistics_are_first_at_the_goal_count() -> None:
    looks = (look(1, 0.5, 0.7), look(2, 0.6, 0.81), look(3, 0.9, 0.85))
    curve = Curve(startup_s=1, scoring_s=0, looks=looks, ended="arrived")
    assert curve.seconds_to(0.8) == 2
    assert curve.seconds_to(0.9) == 3
    assert curve.seconds_to(0.95) == math.inf
    assert curve.arrival(0.95) is None
    assert curve.best == 0.9
    assert Curve.from_plain(as_plain(curve)) == curve


def test_a_run_counts_from_its_first_update_to_the_scored_version() -> None:
    lines = [
        rates(100.0, 0),
        rates(101.0, 0),
        rates(102.0, 500),  # at 1000 a second: the first update was at 101.5
        rates(103.0, 1500),
        scored(103.2, 1000, 0.8),  # came about at 102.5
        rates(104.0, 2500),
    ]
    curve = curve_of_run(lines, asked_at=90.0, epoch_examples=32_000, ended="arrived")
    assert curve.startup_s == pytest.approx(11.5)
    (found,) = curve.looks
    assert found.seconds == pytest.approx(1.0)
    assert found.examples == 32_000
    assert found.epoch == pytest.approx(1.0)
    assert curve.scoring_s is None


def test_a_run_is_scored_with_both_statistics_if_it_tells_both() -> None:
    lines = [
        rates(101.0, 0),
        rates(102.0, 1000),
        {**scored(102.0, 900, 0.9), "moving_accuracy": 0.8},
    ]
    (found,) = curve_of_run(lines, asked_at=90.0, epoch_examples=32, ended="arrived").looks
    assert (found.accuracy, found.accuracy_recomputed, found.best) == (0.8, 0.9, 0.9)


def test_training_does_not_begin_before_a_line_without_updates() -> None:
    lines = [rates(101.9, 0), rates(102.0, 500), rates(103.0, 1000), scored(103.0, 1000, 0.8)]
    curve = curve_of_run(lines, asked_at=90.0, epoch_examples=32, ended="arrived")
    assert curve.startup_s == pytest.approx(11.9)


def test_a_version_beyond_all_rates_waits_for_the_next_line_unless_there_is_none() -> None:
    lines = [rates(101.0, 0), rates(102.0, 1000), rates(103.0, 2000), scored(103.5, 2100, 0.8)]
    known = {"asked_at": 90.0, "epoch_examples": 32}
    assert curve_of_run(lines, ended="out of epochs", **known).looks == ()
    (found,) = curve_of_run(lines, ended="out of epochs", finished=True, **known).looks
    assert found.seconds == pytest.approx(2.5)
    assert found.updates == 2100


def test_a_run_without_updates_has_no_looks() -> None:
    curve = curve_of_run([rates(101.0, 0)], asked_at=90.0, epoch_examples=32, ended="out of time")
    assert curve.looks == ()
    assert curve.best == 0
    assert dataclasses.replace(curve, looks=(look(1, 0.1),)).seconds == 1

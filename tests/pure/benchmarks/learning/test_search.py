"""The search for the best setting, on a made-up training."""

import pytest

from downpour.benchmarks.learning.curve import Curve, Look
from downpour.benchmarks.learning.search import Found, Grid, Setting, Shape, search

SMALL, LARGE = Shape(workers=1, batch_size=32), Shape(workers=1, batch_size=128)
GRID = Grid(shapes=(SMALL, LARGE), base_rates=(0.1, 0.2, 0.05), decays=(0.75, 0.85))
GOAL = 0.9


class Trainings:
    """Trainings that take known seconds; those that are not given reach 0.5."""

    def __init__(self, seconds: dict[tuple[int, float, float], float]) -> None:
        self.seconds = seconds
        self.asked: list[tuple[int, float, float]] = []
        self.limits: list[float] = []
        self.now_s = 0.0

    def __call__(self, setting: Setting, bound_s: float) -> Curve:
        key = (setting.shape.batch_size, setting.base_rate, setting.decay)
        self.asked.append(key)
        self.limits.append(bound_s)
        needed_s = self.seconds.get(key, float("inf"))
        arrives = needed_s <= bound_s
        seconds = min(needed_s, bound_s)
        self.now_s += seconds
        look = Look(
            examples=1, updates=1, epoch=1, seconds=seconds, accuracy=GOAL if arrives else 0.5
        )
        ended = "arrived" if arrives else "out of time"
        return Curve(startup_s=0, scoring_s=0, looks=(look,), ended=ended)

    def search(self, grid: Grid = GRID, *, bound_s: float = 60, budget_s: float = 1e9) -> Found:
        return search(
            grid,
            goal=GOAL,
            bound_s=bound_s,
            budget_s=budget_s,
            trial=self,
            clock=lambda: self.now_s,
        )


def test_shapes_first_then_every_rate_and_decay_at_the_best_shape() -> None:
    trainings = Trainings({(32, 0.1, 0.75): 30, (128, 0.1, 0.75): 12, (128, 0.2, 0.85): 9})
    found = trainings.search()
    assert (found.best.shape, found.best.base_rate, found.best.decay) == (LARGE, 0.2, 0.85)
    assert trainings.asked[:2] == [(32, 0.1, 0.75), (128, 0.1, 0.75)]
    rest = [(128, r, d) for r in GRID.base_rates for d in GRID.decays]
    assert trainings.asked[1:] == rest
    assert len(found.trials) == 7


def test_none_goes_on_for_longer_than_the_best_so_far() -> None:
    trainings = Trainings({(32, 0.1, 0.75): 30, (128, 0.1, 0.75): 12, (128, 0.2, 0.85): 9})
    trainings.search()
    assert trainings.limits == [60, 30, 12, 12, 12, 9, 9]


def test_if_none_arrives_the_highest_accuracy_counts() -> None:
    def trial(setting: Setting, bound_s: float) -> Curve:
        accuracy = 0.6 if setting.base_rate == 0.05 else 0.4
        look = Look(examples=1, updates=1, epoch=1, seconds=bound_s, accuracy=accuracy)
        return Curve(startup_s=0, scoring_s=0, looks=(look,), ended="out of time")

    found = search(GRID, goal=GOAL, bound_s=5, budget_s=1e9, trial=trial, clock=lambda: 0.0)
    assert found.best.base_rate == 0.05


def test_past_its_time_no_trial_begins() -> None:
    trainings = Trainings({(32, 0.1, 0.75): 30, (128, 0.1, 0.75): 12})
    found = trainings.search(budget_s=40)
    assert len(found.trials) == 2
    assert found.left_out == 5
    assert found.best.shape == LARGE


def test_one_setting_needs_no_trial() -> None:
    trainings = Trainings({})
    found = trainings.search(Grid(shapes=(SMALL,), base_rates=(0.1,), decays=(0.75,)))
    assert not found.trials
    assert found.best.learning_rate == 0.1


def test_an_average_is_tried_with_slow_decays_first() -> None:
    grid = Grid(shapes=(SMALL,), base_rates=(0.1, 0.2), decays=(0.75, 0.9), averages=(0.99, None))
    settings = [(s.average, s.base_rate, s.decay) for s in grid.settings(SMALL)]
    assert settings[:3] == [(0.99, 0.1, 0.9), (0.99, 0.1, 0.75), (0.99, 0.2, 0.9)]
    assert settings[4:6] == [(None, 0.1, 0.75), (None, 0.1, 0.9)]
    assert len(set(settings)) == 8


def test_the_rate_follows_the_examples_of_a_step() -> None:
    ranks = Shape(workers=2, batch_size=64, averaged=True)
    for shape, rate in ((SMALL, 0.1), (LARGE, 0.4), (ranks, 0.4)):
        setting = Setting(shape=shape, base_rate=0.1, decay=0.75)
        assert setting.learning_rate == pytest.approx(rate)
    assert str(setting) == "64, rate 0.4 x0.75, nesterov 0.9"
    averaged = Setting.at_rate(ranks, 0.4, 0.75, 0.999)
    assert averaged.base_rate == pytest.approx(0.1)
    assert str(averaged) == "64, rate 0.4 x0.75, nesterov 0.9, averaged 0.999"


def test_a_smaller_momentum_has_a_larger_rate() -> None:
    setting = Setting(shape=LARGE, base_rate=0.1, decay=0.75, momentum=0.8)
    assert setting.learning_rate == pytest.approx(0.8)
    assert Setting.at_rate(LARGE, 0.8, 0.75, momentum=0.8).base_rate == pytest.approx(0.1)
    grid = Grid(shapes=(SMALL,), base_rates=(0.1,), decays=(0.75,), momenta=(0.9, 0.8))
    assert [round(s.learning_rate, 9) for s in grid.settings(SMALL)] == [0.1, 0.2]


def test_both_kinds_of_momentum_are_tried_at_each_rate() -> None:
    grid = Grid(shapes=(SMALL,), base_rates=(0.1, 0.2), decays=(0.75,), nesterov=(True, False))
    kinds = [(s.base_rate, s.nesterov) for s in grid.settings(SMALL)]
    assert kinds == [(0.1, True), (0.1, False), (0.2, True), (0.2, False)]
    plain = grid.settings(SMALL)[1]
    assert str(plain) == "32, rate 0.1 x0.75, momentum 0.9"
    assert Setting.at_rate(SMALL, 0.1, 0.75, nesterov=False) == plain

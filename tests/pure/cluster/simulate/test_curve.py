"""What a curve says of goals, by hand."""

from downpour.cluster.simulate.curve import LearningCurve, ScoredPoint


def point(seconds: float, accuracy: float) -> ScoredPoint:
    return ScoredPoint(
        seconds=seconds, examples=int(100 * seconds), updates=3, accuracy=accuracy, loss=1.0
    )


def test_a_goal_is_reached_at_the_first_scoring_that_is_as_good() -> None:
    curve = LearningCurve(name="x", epoch_examples=200)
    assert curve.best is None
    assert curve.reached(0.1) is None
    curve.points = [point(1, 0.5), point(2, 0.9), point(3, 0.8), point(4, 0.9)]
    assert curve.best is curve.points[1]
    assert curve.reached(0.8) is curve.points[1]
    assert curve.reached(0.95) is None
    plain = curve.as_plain((0.5, 0.95))
    assert plain["goals"] == [
        {"accuracy": 0.5, "seconds": 1, "examples": 100, "epochs": 0.5},
        {"accuracy": 0.95, "seconds": None, "examples": None, "epochs": None},
    ]
    assert plain["best_accuracy"] == 0.9
    assert [p["seconds"] for p in plain["scorings"]] == [1, 2, 3, 4]

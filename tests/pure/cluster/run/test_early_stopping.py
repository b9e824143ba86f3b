"""When a run has arrived: by hand, over sessions, and with values that cannot be meant."""

from __future__ import annotations

import json

import pytest

from downpour.cluster.config.policy import PolicyConfig
from downpour.cluster.run.early_stopping import EarlyStopping, Ended, Scoring, examples_at
from downpour.workers.tasks import Figure


def scoring(accuracy: float, training_s: float = 1.0) -> Scoring:
    return Scoring(
        value=accuracy, training_s=training_s, examples=round(100 * training_s), epochs=0.5
    )


def verdicts(stopping: EarlyStopping, *accuracies: float) -> list[str | None]:
    found = [stopping.scored(scoring(a, float(i))) for i, a in enumerate(accuracies)]
    return [None if ended is None else ended.by for ended in found]


def test_without_a_goal_no_scoring_ends_the_run() -> None:
    assert verdicts(EarlyStopping(PolicyConfig()), 0.5, 1.0, 0.1, 0.1, 0.1) == [None] * 5


def test_the_first_scoring_at_the_goal_ends_the_run() -> None:
    policy = PolicyConfig(stop_at_accuracy=0.975)
    assert verdicts(EarlyStopping(policy), 0.9, 0.9749, 0.975) == [None, None, "accuracy"]
    (ended,) = [EarlyStopping(policy).scored(scoring(0.98))]
    assert ended == Ended(
        by="accuracy", reason="accuracy 98.00% reaches the 97.50% of --stop-at-accuracy"
    )


def test_patience_counts_scorings_that_do_not_beat_the_best() -> None:
    stopping = EarlyStopping(PolicyConfig(patience=2))
    found = verdicts(stopping, 0.5, 0.5, 0.6, 0.55, 0.7, 0.6, 0.65)
    assert found == [None, None, None, None, None, None, "patience"]
    assert stopping.best == Figure(metric="accuracy", value=0.7)


def test_a_later_session_goes_on_with_what_an_earlier_one_saw() -> None:
    policy = PolicyConfig(patience=3)
    first = EarlyStopping(policy)
    assert verdicts(first, 0.91, 0.8, 0.8) == [None, None, None]
    saved = json.loads(json.dumps(first.dump(training_s=7.5)))
    second = EarlyStopping(policy, saved)
    assert second.best == Figure(metric="accuracy", value=0.91)
    assert (second.trained_before_s, second.reached) == (7.5, first.reached)
    assert verdicts(second, 0.9) == ["patience"]


def test_milestones_are_those_of_the_first_scoring_at_or_above_them() -> None:
    stopping = EarlyStopping(PolicyConfig())
    verdicts(stopping, 0.2, 0.96, 0.9, 0.975, 0.974)
    assert list(stopping.reached) == ["0.9", "0.95", "0.97", "0.975"]
    assert [first["training_s"] for first in stopping.reached.values()] == [1, 1, 3, 3]
    assert stopping.reached["0.9"] == {
        "accuracy": 0.96,
        "training_s": 1.0,
        "examples": 100,
        "epochs": 0.5,
    }


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"stop_at_accuracy": 97.5}, "stop at accuracy is 97.5: give a share above 0 and up to 1"),
        ({"stop_at_accuracy": 0.0}, "stop at accuracy is 0.0"),
        ({"patience": 0}, "patience is 0: give at least 1 scoring"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_remedy(
    values: dict[str, float], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        PolicyConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "before", "after", "examples"),
    [
        (5, (0, 0), (0, 0), 80),  # nothing is known yet
        (5, (0, 0), (10, 160), 80),
        (15, (10, 160), (20, 960), 560),  # steps are computed together from 10 on
        (30, (10, 160), (20, 960), 1760),
        (0, (10, 160), (20, 960), 0),
    ],
)
def test_examples_grow_evenly_with_versions(
    version: int, before: tuple[int, int], after: tuple[int, int], examples: int
) -> None:
    assert examples_at(version, before, after, 16) == examples

"""Schedules by hand, and what is refused.

Against `torch.optim.lr_scheduler`: `tests/inprocess/paramserver/rules/test_schedule.py`.
"""

from typing import Any

import pytest

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.rules.schedule import Schedule

EPOCHS = 12
LR = 0.4


def test_after_its_epochs_the_last_rate_stays() -> None:
    schedule = Schedule(shape="cosine", schedule_epochs=2, final_share=0.5, learning_rate=LR)
    assert schedule.over(9) is schedule
    assert schedule.rate(300, 100) == schedule.rate(200, 100) == LR / 2


def test_a_warm_up_goes_with_any_shape() -> None:
    for options in (
        {"shape": "milestones", "milestones": (5.0,), "decay_factor": 0.1},
        {"shape": "one-cycle"},
        {"decay_factor": 0.5},
    ):
        warmed = Schedule(warmup_epochs=2, learning_rate=LR, **options).over(EPOCHS)
        plain = Schedule(learning_rate=LR, **options).over(EPOCHS)
        assert warmed.rate(100, 100) == pytest.approx(plain.rate(100, 100) / 2)
        assert warmed.rate(300, 100) == plain.rate(300, 100)


def thirds(epochs: float) -> float:
    """A schedule of somebody's own."""
    return 1 / (1 + epochs)


def negative(epochs: float) -> float:
    """A bad one."""
    return -1.0


HERE = "tests.pure.paramserver.rules.test_schedule"


def test_a_function_of_ones_own() -> None:
    schedule = Schedule(shape="own", function=f"{HERE}:thirds", learning_rate=LR)
    assert schedule.rate(200, 100) == pytest.approx(LR / 3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shape": "milestones"}, "milestones is none"),
        ({"shape": "milestones", "milestones": (3.0, 2.0), "decay_factor": 0.1}, "3,2"),
        ({"shape": "milestones", "milestones": (3.0,)}, "decay factor 1"),
        ({"milestones": (3.0,)}, "schedule exponential"),
        ({"shape": "cosine", "schedule_epochs": 2.0, "warmup_epochs": 3.0}, "warm-up epochs 3"),
        ({"shape": "cosine", "final_share": 1.5}, "final share is 1.5"),
        ({"shape": "one-cycle", "start_share": 0.0}, "start share 0"),
        ({"shape": "one-cycle", "peak_share": 1.0}, "peak share is 1"),
        ({"shape": "own"}, "schedule function none"),
        ({"function": "a:b"}, "schedule function a:b"),
    ],
)
def test_what_does_not_go_together_is_told_in_one_line(options: dict[str, Any], named: str) -> None:
    with pytest.raises(BadConfiguration, match=named) as caught:
        Schedule(**options)
    assert "give" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere:f", f"{HERE}:nothing", f"{HERE}:negative"])
def test_a_function_that_does_not_work_is_told_in_one_line(name: str) -> None:
    with pytest.raises(BadConfiguration, match="schedule function is") as caught:
        Schedule(shape="own", function=name).rates(100)
    assert "\n" not in str(caught.value)

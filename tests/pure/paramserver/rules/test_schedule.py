"""Schedules against `torch.optim.lr_scheduler`, read at the beginning of every mini-batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.rules.schedule import Schedule

BATCH, EPOCH_BATCHES, EPOCHS = 32, 25, 12
T = EPOCH_BATCHES * EPOCHS
LR = 0.4


def ours(schedule: Schedule) -> list[float]:
    rates = schedule.over(EPOCHS).rates(BATCH * EPOCH_BATCHES)
    return [rates(t * BATCH) for t in range(T)]


def theirs(make: Callable[[Any], Any]) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, found = make(optimizer), []
    for _ in range(T):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def warm_up(optimizer: Any) -> Any:
    """Two epochs; as here, the first mini-batch gets the rate of one example."""
    first, whole = 1 / BATCH, 2 * EPOCH_BATCHES
    return lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, max(t, first) / whole))


CASES: dict[str, tuple[Schedule, Callable[[Any], Any]]] = {
    "cosine": (
        Schedule(shape="cosine", learning_rate=LR),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T),
    ),
    "cosine to a share": (
        Schedule(shape="cosine", learning_rate=LR, final_share=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T, eta_min=0.1 * LR),
    ),
    "cosine after a warm-up": (
        Schedule(shape="cosine", learning_rate=LR, warmup_epochs=2),
        lambda o: lr_scheduler.SequentialLR(
            o,
            [warm_up(o), lr_scheduler.CosineAnnealingLR(o, T - 2 * EPOCH_BATCHES)],
            [2 * EPOCH_BATCHES],
        ),
    ),
    "milestones": (
        Schedule(shape="milestones", learning_rate=LR, milestones=(3, 7.4), decay_factor=0.1),
        lambda o: lr_scheduler.MultiStepLR(o, [75, 185], 0.1),
    ),
    # The rate is read before each of T mini-batches, and torch's last of T + 1 is its end.
    "one-cycle": (
        Schedule(shape="one-cycle", learning_rate=LR),
        lambda o: lr_scheduler.OneCycleLR(
            o, LR, total_steps=T + 1, pct_start=(0.3 * T + 1) / (T + 1), cycle_momentum=False
        ),
    ),
    "one-cycle of another shape": (
        Schedule(
            shape="one-cycle", learning_rate=LR, start_share=0.1, final_share=1e-3, peak_share=0.5
        ),
        lambda o: lr_scheduler.OneCycleLR(
            o,
            LR,
            total_steps=T + 1,
            pct_start=(0.5 * T + 1) / (T + 1),
            cycle_momentum=False,
            div_factor=10,
            final_div_factor=100,
        ),
    ),
    "staircase": (
        Schedule(learning_rate=LR, decay_factor=0.5, decay_epochs=4, staircase=True),
        lambda o: lr_scheduler.StepLR(o, 4 * EPOCH_BATCHES, 0.5),
    ),
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_is_torchs(name: str) -> None:
    schedule, make = CASES[name]
    assert ours(schedule) == pytest.approx(theirs(make), rel=1e-9, abs=1e-12)


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

"""Schedules against `torch.optim.lr_scheduler`, read at the beginning of every mini-batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

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

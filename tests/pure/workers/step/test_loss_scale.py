"""The factor on a loss in float16: halved at an overflow, doubled after many steps without."""

import pytest

from downpour.workers.step import loss_scale
from downpour.workers.step.loss_scale import FIRST, LossScale


def test_it_doubles_after_so_many_steps_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    scale = LossScale()
    for _ in range(2):
        scale.succeeded()
    assert scale.overflowed(FIRST)
    assert scale.value == FIRST / 2
    for expected in (FIRST / 2, FIRST / 2, FIRST, FIRST, FIRST, 2 * FIRST):
        scale.succeeded()
        assert scale.value == expected
    for _ in range(100):
        scale.succeeded()
    assert scale.value == loss_scale.LARGEST


def test_steps_that_began_with_the_same_factor_halve_it_once() -> None:
    scale = LossScale()
    assert scale.overflowed(FIRST)
    assert scale.overflowed(FIRST), "begun before the first of them was read"
    assert scale.value == FIRST / 2
    assert scale.overflowed(FIRST / 2)
    assert scale.value == FIRST / 4


def test_a_gradient_that_overflows_with_any_factor_leaves_it_as_it_was() -> None:
    scale, used, tries = LossScale(), FIRST, 0
    while scale.overflowed(used):
        used, tries = scale.value, tries + 1
    assert (used, tries) == (1.0, 16)
    scale.was_not_to_blame(FIRST)
    assert scale.value == FIRST

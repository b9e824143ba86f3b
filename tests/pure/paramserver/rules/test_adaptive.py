"""Adam, AdamW and RMSProp if a push brings several mini-batches; equality with torch is tested in
`test_update`."""

import math

import pytest
import torch

from downpour.paramserver.rules.adaptive import UPDATES, Adam, AdamW, RMSProp
from downpour.paramserver.rules.update import Rule
from tests.helpers.close import assert_close

torch.set_num_threads(1)

P = 33


@pytest.mark.parametrize("rule", [Adam(), AdamW(weight_decay=0.0), RMSProp(momentum=0.9)])
@pytest.mark.parametrize("k", [2, 5])
def test_a_push_of_k_is_a_step_on_the_mean_at_the_root_of_k_times_the_rate(
    rule: Rule, k: int
) -> None:
    # Neither rule sees how long a gradient is, but for epsilon: here it is far below the squares.
    joined, alone = torch.ones(P), torch.ones(P)
    state, state_alone = rule.init(P), rule.init(P)
    generator = torch.Generator().manual_seed(k)
    for _ in range(100):
        mean = torch.randn(P, generator=generator)
        rule.update(joined, k * mean, state, 0.01, joined, k)
        rule.update(alone, mean, state_alone, 0.01 * math.sqrt(k), alone)
    assert_close(joined, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", [Adam(), RMSProp()])
def test_gradients_that_are_noise_give_one_second_moment_whatever_a_push_adds_up(
    rule: Rule,
) -> None:
    n, found = 2000, {}
    for k in (1, 4, 16):
        generator = torch.Generator().manual_seed(k)
        weights, state = torch.zeros(n), rule.init(n)
        for _ in range(64):
            gradient = torch.randn(k, n, generator=generator).sum(0)
            rule.update(weights, gradient, state, 0.01, weights, k)
        name = "second_moment" if isinstance(rule, Adam) else "mean_square_gradient"
        found[k] = float(state[name].mean())
    assert found[4] == pytest.approx(found[1], rel=0.05)
    assert found[16] == pytest.approx(found[1], rel=0.05)


def test_decoupled_decay_is_once_for_each_mini_batch() -> None:
    rule = AdamW(weight_decay=0.1, num_decayed=1)
    weights, state = torch.ones(2), rule.init(2)
    rule.update(weights, torch.zeros(2), state, 0.5, weights, 3)
    assert weights.tolist() == pytest.approx([1 - 3 * 0.5 * 0.1, 1])


def test_updates_are_counted_as_far_as_the_correction_needs() -> None:
    rule = Adam()
    state = rule.init(1)
    state[UPDATES].fill_(2.0**24)
    weights = torch.zeros(1)
    rule.update(weights, torch.ones(1), state, 0.1, weights)
    assert torch.isfinite(weights).all()
    assert state[UPDATES].item() == 2.0**24

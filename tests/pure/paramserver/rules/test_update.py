"""Update rules and schedules against algebra by hand.

Against `torch.optim`: `tests/inprocess/paramserver/rules/test_update.py`.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.rules.adaptive import Adam, AdamW, RMSProp
from downpour.paramserver.rules.choice import RULES, RuleNumbers, make_regulariser, make_rule
from downpour.paramserver.rules.layerwise import LARS
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import (
    SGD,
    Adagrad,
    Momentum,
    Nesterov,
    Regulariser,
    Rule,
)
from tests.helpers.close import assert_close

torch.set_num_threads(1)

P = 97  # no multiple of a vector register's width: the tail is tested, too


def run(rule: Rule, start: float, gradients: Iterable[float], rate: float) -> list[float]:
    """The weight after each update of a single parameter."""
    weights, state = torch.tensor([start]), rule.init(1)
    path = []
    for gradient in gradients:
        rule.update(weights, torch.tensor([float(gradient)]), state, rate, weights)
        path.append(weights.item())
    return path


class TestByHand:
    # Halves and small integers: every value below is exact in float32.
    def test_sgd(self) -> None:
        assert run(SGD(), 1.0, [1, 2, -4], 0.5) == [
            1 - 0.5 * 1,
            1 - 0.5 * (1 + 2),
            1 - 0.5 * (1 + 2 - 4),
        ]

    def test_momentum(self) -> None:
        v1, v2, v3 = 1, 0.5 * 1 + 2, 0.25 * 1 + 0.5 * 2 - 4
        assert run(Momentum(momentum=0.5), 1.0, [1, 2, -4], 0.5) == [
            1 - 0.5 * v1,
            1 - 0.5 * (v1 + v2),
            1 - 0.5 * (v1 + v2 + v3),
        ]

    def test_the_rate_is_outside_the_velocity(self) -> None:
        weights, rule = torch.tensor([0.0]), Momentum(momentum=0.5)
        state = rule.init(1)
        rule.update(weights, torch.tensor([1.0]), state, 1.0, weights)
        rule.update(weights, torch.tensor([0.0]), state, 0.25, weights)
        assert state["velocity"].item() == 0.5
        assert weights.item() == -1 * 1 - 0.25 * 0.5

    def test_nesterov(self) -> None:
        v1, v2, v3 = 1, 0.5 * 1 + 2, 0.25 * 1 + 0.5 * 2 - 4
        d1, d2, d3 = 1 + 0.5 * v1, 2 + 0.5 * v2, -4 + 0.5 * v3
        assert run(Nesterov(momentum=0.5), 1.0, [1, 2, -4], 0.5) == [
            1 - 0.5 * d1,
            1 - 0.5 * (d1 + d2),
            1 - 0.5 * (d1 + d2 + d3),
        ]

    def test_adagrad(self) -> None:
        # 3, 4 and 12: the roots of the sums of squares are 3, 5 and 13.
        path = run(Adagrad(epsilon=1.0), 1.0, [3, 4, -12, 0], 0.5)
        steps = [3 / (3 + 1), 4 / (5 + 1), -12 / (13 + 1), 0]
        expected = [1 - 0.5 * sum(steps[: n + 1]) for n in range(4)]
        assert path == pytest.approx(expected, rel=1e-6)

    def test_adagrads_initial_accumulator_is_under_the_root(self) -> None:
        rule = Adagrad(initial_accumulator=16)
        assert rule.init(3)["squares"].dtype == torch.float32
        assert run(rule, 1.0, [3], 0.5) == pytest.approx([1 - 0.5 * 3 / 5], rel=1e-6)

    def test_a_parameter_without_a_gradient_stays(self) -> None:
        for name in RULES:
            assert run(make_rule(name, 0.9), 1.5, [0, 0], 0.5) == [1.5, 1.5]


@pytest.mark.parametrize("name", RULES)
def test_another_buffer_gets_what_the_same_buffer_would(name: str) -> None:
    rule, generator = make_rule(name, 0.9), torch.Generator().manual_seed(1)
    same = torch.randn(P, generator=generator)
    slots, latest = [same.clone(), torch.full((P,), torch.nan)], 0
    state, state_of_slots = rule.init(P), rule.init(P)
    for _ in range(5):
        gradient = torch.randn(P, generator=generator)
        before = slots[latest].clone()
        rule.update(same, gradient.clone(), state, 0.1, same)
        rule.update(slots[latest], gradient, state_of_slots, 0.1, slots[1 - latest])
        assert torch.equal(slots[latest], before), "the version that readers see was changed"
        latest = 1 - latest
        assert torch.equal(slots[latest], same)
    for key, value in state.items():
        assert torch.equal(value, state_of_slots[key])


@pytest.mark.parametrize("name", RULES)
def test_a_range_by_itself_gets_what_it_gets_in_the_whole(name: str) -> None:
    rule, generator = make_rule(name, 0.9), torch.Generator().manual_seed(2)
    whole = torch.randn(P, generator=generator)
    parts = [whole[:32].clone(), whole[32:].clone()]
    states = [rule.init(32), rule.init(P - 32)]
    state = rule.init(P)
    for _ in range(5):
        gradient = torch.randn(P, generator=generator)
        for part, part_state, g in zip(parts, states, gradient.tensor_split([32]), strict=True):
            rule.update(part, g.clone(), part_state, 0.1, part)
        rule.update(whole, gradient, state, 0.1, whole)
    assert torch.equal(torch.cat(parts), whole)


class TestRegulariser:
    def apply(self, regulariser: Regulariser, norm: float, num_decayed: int = 1) -> Tensor:
        gradient = torch.tensor([3.0, 4.0])
        regulariser.apply(gradient, torch.tensor([10.0, 20.0]), num_decayed, norm)
        return gradient

    def test_nothing_asked_nothing_done(self) -> None:
        assert self.apply(Regulariser(), 1e9).tolist() == [3, 4]

    def test_decay_stops_at_num_decayed(self) -> None:
        regulariser = Regulariser(weight_decay=0.5)
        assert self.apply(regulariser, 5, num_decayed=0).tolist() == [3, 4]
        assert self.apply(regulariser, 5, num_decayed=1).tolist() == [3 + 0.5 * 10, 4]
        assert self.apply(regulariser, 5, num_decayed=2).tolist() == [3 + 5, 4 + 10]

    def test_clips_by_the_norm_of_the_whole_gradient_not_of_the_slice(self) -> None:
        assert self.apply(Regulariser(clip_norm=2), 8).tolist() == [3 / 4, 4 / 4]

    def test_a_norm_at_the_limit_is_left_alone(self) -> None:
        assert self.apply(Regulariser(clip_norm=5), 5).tolist() == [3, 4]
        assert self.apply(Regulariser(clip_norm=5), 4.9).tolist() == [3, 4]

    def test_a_norm_just_above_the_limit_is_brought_down_to_it(self) -> None:
        clipped = self.apply(Regulariser(clip_norm=5), 5.5)
        assert_close(clipped, torch.tensor([3 * 5 / 5.5, 4 * 5 / 5.5]))

    def test_clipping_comes_before_decay(self) -> None:
        clipped = self.apply(Regulariser(clip_norm=2.5, weight_decay=0.5), 5)
        assert clipped.tolist() == [3 / 2 + 5, 4 / 2]


class TestSchedule:
    N = 1000  # examples in an epoch

    def rate(self, epochs: float, **options: Any) -> float:
        return Schedule(learning_rate=0.5, **options).rate(round(epochs * self.N), self.N)

    def test_constant(self) -> None:
        assert {self.rate(e) for e in (0, 0.5, 1, 1000)} == {0.5}

    def test_smooth_decay(self) -> None:
        for epochs in (0, 0.25, 8, 100):
            rate = self.rate(epochs, decay_factor=0.96, decay_epochs=8)
            assert rate == pytest.approx(0.5 * 0.96 ** (epochs / 8), rel=1e-12)

    def test_staircase_steps_at_the_very_example(self) -> None:
        schedule = Schedule(learning_rate=0.5, decay_factor=0.5, decay_epochs=8, staircase=True)
        for step in range(5):
            first = step * 8 * self.N
            for examples in (first, first + 1, first + 8 * self.N - 1):
                assert schedule.rate(examples, self.N) == 0.5 * 0.5**step

    def test_warm_up_is_linear_and_ends_at_the_full_rate(self) -> None:
        for epochs in (0.5, 1, 2, 3.999, 4, 5):
            expected = 0.5 * min(1, epochs / 4)
            assert self.rate(epochs, warmup_epochs=4) == pytest.approx(expected, rel=1e-12)
        assert self.rate(4, warmup_epochs=4) == 0.5

    def test_the_first_update_of_a_warm_up_has_some_effect(self) -> None:
        first, second = (self.rate(e, warmup_epochs=4) for e in (0, 1 / self.N))
        assert first == second == pytest.approx(0.5 / self.N / 4, rel=1e-12)

    def test_without_warm_up_the_first_update_has_the_full_rate(self) -> None:
        assert self.rate(0, decay_factor=0.1) == 0.5

    def test_warm_up_and_decay_multiply(self) -> None:
        rate = self.rate(2, warmup_epochs=4, decay_factor=0.25, decay_epochs=4)
        assert rate == pytest.approx(0.5 * (2 / 4) * 0.25 ** (2 / 4), rel=1e-12)

    @given(st.integers(0, 10**9), st.integers(1, 10**7), st.booleans())
    def test_is_above_zero_and_never_above_where_it_starts(
        self, examples: int, epoch_examples: int, staircase: bool
    ) -> None:
        schedule = Schedule(
            learning_rate=0.1,
            decay_factor=0.999,
            decay_epochs=1e9,
            staircase=staircase,
            warmup_epochs=0.5,
        )
        assert 0 < schedule.rate(examples, epoch_examples) <= 0.1


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        *((Momentum, {"momentum": m}, "momentum") for m in (-0.1, 1.0, 2, NAN, INF)),
        *((Nesterov, {"momentum": m}, "momentum") for m in (-0.1, 1.0, NAN)),
        *((Adagrad, {"epsilon": e}, "epsilon") for e in (-1e-9, NAN, INF, 0)),
        *((Adagrad, {"initial_accumulator": a}, "accumulator") for a in (-1, NAN, INF)),
        *((Regulariser, {"weight_decay": w}, "weight decay") for w in (-1e-9, NAN, INF)),
        *((Regulariser, {"clip_norm": c}, "clip norm") for c in (0, -1, NAN)),
        *((Schedule, {"learning_rate": r}, "learning rate") for r in (0, -1, NAN, INF)),
        *((Schedule, {"decay_factor": f}, "decay factor") for f in (0, -1, 1.1, NAN)),
        *((Schedule, {"decay_epochs": e}, "decay epochs") for e in (0, -1, NAN, INF)),
        *((Schedule, {"warmup_epochs": e}, "warm-up epochs") for e in (-1, NAN, INF)),
        *((Adam, {"beta1": b}, "beta1") for b in (-0.1, 1.0, NAN)),
        *((AdamW, {"beta2": b}, "beta2") for b in (-0.1, 1.0, NAN)),
        *((Adam, {"epsilon": e}, "epsilon") for e in (0, -1, NAN, INF)),
        *((RMSProp, {"decay": d}, "square decay") for d in (-0.1, 1.0, NAN)),
        *((RMSProp, {"momentum": m}, "momentum") for m in (-0.1, 1.0, NAN)),
        *((LARS, {"trust": t}, "trust") for t in (0, -1, NAN, INF)),
        (make_rule, {"name": "adamax", "momentum": 0.9}, "'adamax'"),
        (make_rule, {"name": "momentum", "numbers": RuleNumbers(beta1=0.8)}, "beta1 is 0.8"),
        (make_rule, {"name": "adam", "numbers": RuleNumbers(trust=0.1)}, "trust is 0.1"),
        (make_regulariser, {"name": "adamw", "weight_decay": -1.0, "clip_norm": None}, "decay"),
        (make_rule, {"name": "momentum", "momentum": 1.5}, "1.5"),
    ],
)
def test_bad_values_are_one_line_errors(
    make: Callable[..., object], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadConfiguration) as caught:
        make(**options)
    message = str(caught.value)
    assert named in message
    assert "give" in message, "names no remedy"
    assert "\n" not in message


def test_make_rule_passes_momentum_where_it_belongs() -> None:
    assert make_rule("momentum", 0.7) == Momentum(momentum=0.7)
    assert make_rule("nesterov", 0.7) == Nesterov(momentum=0.7)
    assert make_rule("sgd", 0.7) == SGD()
    assert make_rule("adagrad", 0.7) == Adagrad()
    assert make_rule("rmsprop", 0.7) == RMSProp(momentum=0.7)
    assert make_rule("adam", 0.7, weight_decay=0.1) == Adam()
    numbers = RuleNumbers(beta2=0.99, epsilon=1e-6)
    assert make_rule("adamw", 0.7, numbers, 0.1) == AdamW(
        beta2=0.99, epsilon=1e-6, weight_decay=0.1
    )
    assert make_rule("lars", 0.7, RuleNumbers(trust=0.02), 0.1) == LARS(
        momentum=0.7, trust=0.02, weight_decay=0.1
    )
    assert make_regulariser("lars", 0.1, 2.0) == Regulariser(clip_norm=2.0)
    assert make_regulariser("adam", 0.1, 2.0) == Regulariser(weight_decay=0.1, clip_norm=2.0)


def test_a_push_of_several_mini_batches_decays_and_is_clipped_for_each() -> None:
    """64 mini-batches of zero gradient leave the same weight, whatever a push adds up."""
    left = []
    for batches in (1, 4, 16):
        weights = torch.ones(2)
        regulariser = Regulariser(weight_decay=1e-3)
        for _ in range(64 // batches):
            gradient = torch.zeros(2)
            regulariser.apply(gradient, weights, 1, 0.0, batches)
            weights -= 0.1 * gradient
        left.append(weights[0].item())
        assert weights[1] == 1
    assert left == pytest.approx([left[0]] * 3, abs=1e-4)
    # The mean of 4 gradients is bounded, not their sum.
    gradient = torch.tensor([6.0, 8.0])
    Regulariser(clip_norm=2.0).clip(gradient, 10.0, batches=4)
    assert_close(gradient, torch.tensor([4.8, 6.4]))

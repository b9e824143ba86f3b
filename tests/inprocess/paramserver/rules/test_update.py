"""Update rules against `torch.optim`, over many steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from downpour.paramserver.rules.adaptive import Adam, AdamW, RMSProp
from downpour.paramserver.rules.update import (
    SGD,
    Adagrad,
    Momentum,
    Nesterov,
    Regulariser,
    Rule,
)

torch.set_num_threads(1)

P = 97  # no multiple of a vector register's width: the tail is tested, too

Optimizer = Callable[..., torch.optim.Optimizer]
TORCH: list[tuple[Rule, Optimizer, dict[str, Any]]] = [
    (SGD(), torch.optim.SGD, {}),
    (Momentum(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
    (Momentum(momentum=0.0), torch.optim.SGD, {"momentum": 0.0}),
    (Nesterov(momentum=0.8), torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    (Adagrad(), torch.optim.Adagrad, {}),
    (
        Adagrad(epsilon=1e-3, initial_accumulator=0.5),
        torch.optim.Adagrad,
        {"eps": 1e-3, "initial_accumulator_value": 0.5},
    ),
    (Adam(), torch.optim.Adam, {}),
    (
        Adam(beta1=0.8, beta2=0.95, epsilon=1e-3),
        torch.optim.Adam,
        {"betas": (0.8, 0.95), "eps": 1e-3},
    ),
    (RMSProp(), torch.optim.RMSprop, {}),
    (
        RMSProp(momentum=0.9, decay=0.9, epsilon=1.0),
        torch.optim.RMSprop,
        {"momentum": 0.9, "alpha": 0.9, "eps": 1.0},
    ),
    (AdamW(weight_decay=0.01), torch.optim.AdamW, {}),
]


@pytest.mark.parametrize("num_decayed", [0, 1, 50, P])
@pytest.mark.parametrize(("rule", "optimizer", "options"), TORCH)
def test_equals_torch_over_many_steps(
    rule: Rule, optimizer: Optimizer, options: dict[str, Any], num_decayed: int
) -> None:
    generator = torch.Generator().manual_seed(num_decayed)
    start = torch.randn(P, generator=generator)
    decayed, rest = (torch.nn.Parameter(p.clone()) for p in start.tensor_split([num_decayed]))
    reference = optimizer(
        [{"params": [decayed], "weight_decay": 0.01}, {"params": [rest], "weight_decay": 0}],
        lr=0.05,
        **options,
    )
    rule = rule.within(num_decayed, ())
    decay = 0.0 if isinstance(rule, AdamW) else 0.01
    weights, state, regulariser = start.clone(), rule.init(P), Regulariser(weight_decay=decay)
    for _ in range(150):
        gradient = torch.randn(P, generator=generator)
        decayed.grad, rest.grad = (g.clone() for g in gradient.tensor_split([num_decayed]))
        reference.step()
        regulariser.apply(gradient, weights, num_decayed, 1.0)
        rule.update(weights, gradient, state, 0.05, weights)
    assert not torch.equal(weights, start)
    # A fused multiply-add rounds once where two operations round twice: no more than that.
    torch.testing.assert_close(weights, torch.cat([decayed, rest]).detach(), rtol=1e-5, atol=5e-6)


def test_nesterov_keeps_the_weights_that_momentum_will_have_an_update_later() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(P, generator=generator, dtype=torch.float64)
    plain, ahead = Momentum(momentum=0.9), Nesterov(momentum=0.9)
    behind, before, seen, state = start.clone(), plain.init(P), start.clone(), ahead.init(P)
    before = {name: vector.double() for name, vector in before.items()}
    state = {name: vector.double() for name, vector in state.items()}
    for _ in range(50):
        # Any gradient, wherever it was computed: each rule gets the same one.
        gradient = torch.randn(P, generator=generator, dtype=torch.float64)
        plain.update(behind, gradient.clone(), before, 0.05, behind)
        ahead.update(seen, gradient.clone(), state, 0.05, seen)
        coming = behind - 0.05 * 0.9 * before["velocity"]
        torch.testing.assert_close(seen, coming, rtol=0, atol=1e-12)

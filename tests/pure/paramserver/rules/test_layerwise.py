"""LARS against the paper's equations, by layer, in float64."""

import pytest
import torch
from torch import Tensor

from downpour.paramserver.rules.layerwise import LARS
from tests.helpers.close import assert_close

torch.set_num_threads(1)

SIZES, REST = (40, 7, 120), 11
STOPS = (40, 47, 167)
P = 178


def oracle(parts: list[Tensor], gradients: list[list[Tensor]], rate: float, k: int) -> list[Tensor]:
    """You et al. 2017, Algorithm 1, as a loop over layers; the last part is in no layer."""
    velocities = [torch.zeros_like(p) for p in parts]
    for step in gradients:
        for i, g in enumerate(step):
            w, v = parts[i], velocities[i]
            if i == len(parts) - 1:
                change = k * g
            else:
                trust = 0.02 * w.norm() / (g.norm() + 0.01 * w.norm())
                change = trust * k * (g + 0.01 * w)
            velocities[i] = 0.9 * v + rate * change
            parts[i] = w - velocities[i]
    return parts


@pytest.mark.parametrize("k", [1, 4])
def test_is_the_papers_equation(k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(P, generator=generator)
    means = [torch.randn(P, generator=generator) for _ in range(100)]
    rule = LARS(momentum=0.9, trust=0.02, weight_decay=0.01).within(167, STOPS)
    weights, state = start.clone(), rule.init(P)
    for mean in means:
        rule.update(weights, k * mean, state, 0.1, weights, k)
    sizes = [*SIZES, REST]
    expected = oracle(
        list(start.double().split(sizes)), [list(m.double().split(sizes)) for m in means], 0.1, k
    )
    assert_close(weights.double(), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_a_layer_of_zeros_moves() -> None:
    rule = LARS(momentum=0.0, trust=0.02, layers=(2,))
    weights, state = torch.zeros(2), rule.init(2)
    rule.update(weights, torch.tensor([1.0, -2.0]), state, 0.5, weights)
    assert weights.tolist() == [-0.5, 1.0]


def test_a_layer_without_a_gradient_stays() -> None:
    rule = LARS(layers=(2,))
    weights, state = torch.ones(2), rule.init(2)
    rule.update(weights, torch.zeros(2), state, 0.5, weights)
    assert weights.tolist() == [1, 1]

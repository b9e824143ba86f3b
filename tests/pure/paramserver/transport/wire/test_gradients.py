"""A gradient in few bits: within a step of itself, right on the average, the same when repeated."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from downpour.paramserver.transport.wire.blocks import PIECE
from downpour.paramserver.transport.wire.gradients import (
    BLOCKS,
    LEVELS,
    Bits,
    GradientCoder,
    num_bytes,
    place_of,
    rounded,
)

torch.set_num_threads(1)
BLOCK = max(BLOCKS.values())
SIZES = [0, 1, 5, BLOCK - 1, BLOCK, 3 * BLOCK + 7, PIECE, PIECE + BLOCK + 1]
both = pytest.mark.parametrize("bits", [8, 4])


def scale_of_each(gradient: torch.Tensor, bits: Bits) -> torch.Tensor:
    """Of each element's block, float32 [n]."""
    blocks = gradient.split(BLOCKS[bits])
    return torch.cat([(block.abs().max() / LEVELS[bits]).expand(len(block)) for block in blocks])


def sent(gradient: torch.Tensor, place: int, bits: Bits) -> bytes:
    coder = GradientCoder(len(gradient), bits)
    data = torch.zeros(coder.num_bytes, dtype=torch.uint8)
    stops = list(coder.encode(gradient, place, data))
    assert stops == sorted(stops)
    assert (stops or [0])[-1] == len(data) == num_bytes(len(gradient), bits)
    return data.numpy().tobytes()


@given(
    st.sampled_from(SIZES[1:]),
    st.integers(0, 2**32 - 1),
    st.integers(0, PIECE - 1),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e18]),
    st.sampled_from([8, 4]),
)
def test_an_element_is_within_a_step_of_itself(
    size: int, seed: int, place: int, magnitude: float, bits: Bits
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient = magnitude * torch.randn(size, generator=generator)
    found = rounded(gradient, place, bits)
    assert ((found - gradient).abs() <= scale_of_each(gradient, bits) * 1.0001).all()


@both
def test_the_sum_of_many_is_that_of_the_gradients(bits: Bits) -> None:
    """Nothing is lost on the average, not even what is far below a step."""
    gradient = torch.full((3 * BLOCK,), 1e-3)
    gradient[::BLOCK] = 1.0  # so that a step is 8 times all the others, and more
    total, pushes = torch.zeros(len(gradient), dtype=torch.float64), 2000
    for batch in range(pushes):
        total += rounded(gradient, place_of(0, batch, 1), bits)
    mean, deviation = total / pushes, 1 / LEVELS[bits] / 2 / pushes**0.5
    assert (mean - gradient).abs().max() < 5 * deviation
    assert abs(float((mean - gradient).mean())) < deviation / 2


@both
@pytest.mark.parametrize("size", SIZES)
def test_the_same_push_is_rounded_the_same_way(size: int, bits: Bits) -> None:
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(size))
    place = place_of(3, 14, 1)
    data = sent(gradient, place, bits)
    assert sent(gradient, place, bits) == data
    coder = GradientCoder(size, bits)
    came = torch.frombuffer(bytearray(data), dtype=torch.uint8) if size else torch.empty(0)
    assert torch.equal(coder.decode(came, torch.empty(size)), rounded(gradient, place, bits))
    if size >= BLOCK:
        for name in [(3, 15, 1), (3, 14, 0)]:
            assert sent(gradient, place_of(*name), bits) != data


def test_they_are_a_quarter_and_an_eighth_of_float32() -> None:
    assert num_bytes(1_000_000, 8) < 0.255 * 4_000_000
    assert num_bytes(1_000_000, 4) < 0.128 * 4_000_000


@pytest.mark.parametrize(("bits", "noise"), [(8, 0.011), (4, 0.2)])
def test_the_noise_is_a_share_of_the_gradient(bits: Bits, noise: float) -> None:
    gradient = torch.randn(PIECE, generator=torch.Generator().manual_seed(7))
    assert (rounded(gradient, 9, bits) - gradient).norm() < noise * gradient.norm()


@both
def test_a_gradient_that_is_not_finite_stays_so(bits: Bits) -> None:
    coder = GradientCoder(BLOCK + 3, bits)
    data = torch.zeros(coder.num_bytes, dtype=torch.uint8)
    coder.spoil(data)
    assert coder.decode(data, torch.zeros(BLOCK + 3)).isnan().all()


@both
@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-39])
def test_what_is_next_to_nothing_is_nothing(value: float, bits: Bits) -> None:
    found = rounded(torch.full((BLOCK,), value), 5, bits)
    assert found.isfinite().all()
    assert found.abs().max() <= 1e-37


@both
def test_any_bytes_of_its_length_are_a_gradient(bits: Bits) -> None:
    coder, rng = GradientCoder(BLOCK + 5, bits), np.random.default_rng(8)
    for _ in range(50):
        data = torch.from_numpy(rng.integers(0, 256, coder.num_bytes).astype(np.uint8))
        assert coder.decode(data, torch.empty(BLOCK + 5)).shape == (BLOCK + 5,)


def test_places_differ_by_name() -> None:
    places = [place_of(e, b, p) for e in range(10) for b in range(100) for p in range(2)]
    assert all(0 <= place < PIECE for place in places)
    assert len(set(places)) > 1900

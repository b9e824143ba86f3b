"""Weights on a grid: what a client gets follows from the version alone, in few bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from downpour.paramserver.errors import MalformedMessage
from downpour.paramserver.transport.wire.blocks import BLOCK, PIECE
from downpour.paramserver.transport.wire.weights import (
    WeightsReceiver,
    WeightsSender,
    most_bytes,
    on_grid,
)

torch.set_num_threads(1)
SIZES = [0, 1, BLOCK - 1, 2 * BLOCK + 9, PIECE + 3 * BLOCK + 1]


@given(
    st.sampled_from(SIZES),
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from([0.0, 1e-4, 3e-3, 0.1, 2.0, 1e6]), min_size=1, max_size=6),
)
def test_a_client_has_each_version_on_the_grid(size: int, seed: int, moves: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = 0.1 * torch.randn(size, generator=generator)
    sender, receiver = WeightsSender(size), WeightsReceiver(size)
    for move in moves:
        weights += move * torch.randn(size, generator=generator)
        data = sender.encode(weights)
        assert len(data) <= most_bytes(size)
        came = torch.full((size,), torch.nan)
        receiver.decode(data.copy(), came)
        assert torch.equal(came, on_grid(weights))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e30])
def test_a_weight_is_within_a_step_of_itself(magnitude: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = magnitude * torch.randn(5 * BLOCK, generator=generator)
    largest = weights.view(5, BLOCK).abs().amax(1, keepdim=True)
    error = (on_grid(weights) - weights).view(5, BLOCK).abs() / largest
    assert error.max() <= 1 / 512
    assert (
        error.square().mean().sqrt() < 1 / 886
    )  # a step is a 256th at most, and the error even over it


def test_zeros_and_what_is_not_finite_come_as_they_are() -> None:
    weights = torch.zeros(3 * BLOCK)
    weights[BLOCK] = torch.inf
    weights[2 * BLOCK + 1] = torch.nan
    sender, receiver, came = WeightsSender(3 * BLOCK), WeightsReceiver(3 * BLOCK), weights.clone()
    receiver.decode(sender.encode(weights).copy(), came)
    assert not came[:BLOCK].any()
    assert came[BLOCK:].isnan().all()  # whoever computes with it finds out


def test_small_changes_take_few_bytes() -> None:
    size, generator = 2 * PIECE, torch.Generator().manual_seed(2)
    weights = 0.05 * torch.randn(size, generator=generator)
    sender = WeightsSender(size)
    assert len(sender.encode(weights)) > 0.9 * size
    assert len(sender.encode(weights)) == 2  # nothing has changed
    weights += 5e-5 * torch.randn(size, generator=generator)
    assert len(sender.encode(weights)) < 0.27 * size
    # The first weights of a block jump, which is an exception in each.
    weights.view(-1, BLOCK)[:, 0].copy_(0.9 * weights.view(-1, BLOCK).abs().amax(1))
    assert len(sender.encode(weights)) < 0.29 * size


def test_a_step_that_changes_is_no_reason_to_send_all() -> None:
    size, generator = PIECE, torch.Generator().manual_seed(6)
    weights = 0.02 * torch.randn(size, generator=generator)
    largest = weights.view(-1, BLOCK)[:, 0]
    sender, receiver, came = WeightsSender(size), WeightsReceiver(size), torch.empty(size)
    for value in (0.1249, 0.1251, 0.1249):  # its power of two is the next one, and back
        largest.fill_(value)
        data = sender.encode(weights)
        receiver.decode(data.copy(), came)
        assert torch.equal(came, on_grid(weights))
    assert len(data) < 0.27 * size


def test_a_new_connection_gets_all_of_them() -> None:
    weights = torch.randn(BLOCK, generator=torch.Generator().manual_seed(3))
    old = WeightsSender(BLOCK)
    old.encode(weights)
    came = torch.empty(BLOCK)
    WeightsReceiver(BLOCK).decode(WeightsSender(BLOCK).encode(weights).copy(), came)
    assert torch.equal(came, on_grid(weights))


def test_no_bytes_do_harm() -> None:
    rng, size, said = np.random.default_rng(4), 2 * BLOCK, list[str]()
    weights = torch.randn(size, generator=torch.Generator().manual_seed(5))
    good = WeightsSender(size).encode(weights).copy()
    for turn in range(400):
        data = good.copy()
        if turn % 3 == 0:
            data[rng.integers(len(data))] = rng.integers(256)
        elif turn % 3 == 1:
            data = np.resize(data, rng.integers(2 * len(data)))
        else:
            data = rng.integers(0, 256, rng.integers(1, 600)).astype(np.uint8)
        try:
            WeightsReceiver(size).decode(data, torch.empty(size))
        except MalformedMessage as error:
            said.append(str(error))
    assert len(said) > 200
    assert all("\n" not in line for line in said)

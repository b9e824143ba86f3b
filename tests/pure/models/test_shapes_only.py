"""Modules that are built for their shapes."""

import torch
from torch import nn

from downpour.models.shapes_only import shapes_only


class Filled(nn.Module):
    """Every way in which the models and PyTorch's layers fill their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.convolution = nn.Conv2d(3, 4, 2)
        nn.init.normal_(self.linear.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        nn.init.trunc_normal_(tensor=self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("drawn", torch.empty(5).uniform_())


def test_shapes_are_those_of_the_module_itself() -> None:
    with shapes_only():
        found = Filled()
    expected = Filled()
    assert all(tensor.is_meta for tensor in found.state_dict().values())
    shapes = {name: tensor.shape for name, tensor in found.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in expected.state_dict().items()}


def test_what_is_not_on_the_meta_device_is_filled() -> None:
    with shapes_only():
        real = torch.zeros(100, device="cpu").normal_()
    assert real.abs().min() > 0


def test_nothing_is_drawn_from_the_random_stream() -> None:
    before = torch.get_rng_state()
    with shapes_only():
        Filled()
    assert torch.equal(torch.get_rng_state(), before)

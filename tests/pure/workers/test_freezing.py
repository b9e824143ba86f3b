"""What is frozen by name: against the names of the network's parameters."""

import copy

import pytest
import torch
from torch import nn

from downpour.models.batchnorm import BatchNorm
from downpour.models.errors import ModelError
from downpour.models.flat import FlatModel
from downpour.workers.freezing import freeze
from tests.helpers.close import assert_close

torch.set_num_threads(1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 5, bias=False), BatchNorm(5), nn.ReLU())
    return nn.Sequential(body, nn.Linear(5, 4), BatchNorm(4), nn.Linear(4, 3))


def trained(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ((), ["0.0.weight", "0.1.weight", "0.1.bias", "1.weight", "1.bias", "2.weight", "2.bias"]),
        (("0",), ["1.weight", "1.bias", "2.weight", "2.bias"]),
        (("0.*", "1.*"), ["2.weight", "2.bias"]),
        (("*.bias",), ["0.0.weight", "0.1.weight", "1.weight", "2.weight"]),
        (("0.0",), ["0.1.weight", "0.1.bias", "1.weight", "1.bias", "2.weight", "2.bias"]),
    ],
)
def test_names_and_patterns(patterns: tuple[str, ...], left: list[str]) -> None:
    made = freeze(net(), patterns)
    assert trained(made) == [*left, "3.weight", "3.bias"] if patterns != ("*.bias",) else True
    assert "3.weight" in trained(made)
    assert all(name in trained(made) for name in left)


def test_frozen_batch_normalization_stays_in_inference_mode_in_copies_too() -> None:
    made = freeze(net(), ("0",)).train()
    for module in (made, copy.deepcopy(made).train()):
        assert isinstance(module, nn.Sequential)
        body = module[0]
        assert isinstance(body, nn.Sequential)
        assert not body[1].training
        assert module[2].training
        assert body[0].training
    # It normalizes with its statistics: mean 0, variance 1, so almost not at all.
    x = torch.randn(16, 6) * 7 + 3
    body = made[0]
    assert isinstance(body, nn.Sequential)
    assert_close(body(x), body[0](x).relu(), rtol=1e-4, atol=1e-4)


def test_only_whole_layers_of_batch_normalization_are_frozen() -> None:
    made = freeze(net(), ("2.bias",)).train()
    assert made[2].training


def test_what_is_frozen_lies_last_and_has_no_gradient() -> None:
    flat = FlatModel(freeze(net(), ("0", "1.bias")))
    layout = flat.layout
    assert [e.name for e in layout.entries if not e.trained] == [
        *("0.0.weight", "0.1.weight", "0.1.bias", "1.bias")
    ]
    assert layout.entries[-1].name == "1.bias"
    assert layout.trained == layout.num_parameters - (30 + 5 + 5 + 4)
    assert layout.decayed == 20 + 12
    flat.module.train()
    flat.zero_gradient()
    flat.module(torch.randn(8, 6)).square().sum().backward()
    assert flat.gradient is not None
    assert not flat.gradient[layout.trained :].any()
    assert flat.gradient[: layout.trained].any()
    count = flat.moments[0]
    assert count.tolist() == [0] * 5 + [8] * 4


@pytest.mark.parametrize(
    ("patterns", "named"),
    [(("layer9.*",), "'layer9.*', which names no parameter"), (("*",), "nothing to train")],
)
def test_what_cannot_be_meant_is_told(patterns: tuple[str, ...], named: str) -> None:
    with pytest.raises(ModelError) as told:
        freeze(net(), patterns)
    assert named in str(told.value)
    assert "\n" not in str(told.value)

"""What a network keeps beside parameters and BN: told apart, or found from the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from downpour.models.conversion.convert import convert
from downpour.models.conversion.state import has_spectral_norm, settle_spectral_norm
from downpour.models.errors import LayoutError
from downpour.models.flat import FlatModel


class Keeps(nn.Module):
    """Buffers and plain tensors that stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5]))
        self.register_buffer("scratch", torch.arange(4.0), persistent=False)
        self.plain = torch.ones(1)
        self.target = nn.Parameter(torch.ones(1), requires_grad=False)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x - self.mean + self.scratch * self.plain)
        return y


def test_a_checkpoint_has_the_buffers_that_torchs_would_have() -> None:
    theirs = Keeps()
    model = FlatModel(convert(Keeps()))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counts = {name for name in theirs.state_dict() if "num_batches" in name}
    assert set(state) == set(theirs.state_dict()) - counts
    theirs.load_state_dict(state)
    state["mean"] = torch.tensor([0.25])
    weights, statistics = model.split(state)
    assert torch.equal(weights, model.weights)
    assert torch.equal(statistics, model.statistics)
    assert model.state_dict()["mean"].item() == 0.25
    del state["mean"]
    model.split(state)  # as an older file lacks it
    with pytest.raises(LayoutError, match="'mean' is"):
        model.split(state | {"mean": torch.zeros(2)})
    with pytest.raises(LayoutError, match="unknown 'other'"):
        model.split(state | {"other": torch.zeros(2)})


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, spectral_norm])
def test_spectral_norm_is_found_for_weights_from_anywhere(norm: object) -> None:
    net = nn.Sequential(norm(nn.Linear(20, 10)))  # type: ignore[operator]
    assert has_spectral_norm(net)
    model = FlatModel(net)
    with torch.no_grad():
        model.weights.copy_(torch.randn(len(model.weights)))
    net.eval()
    settle_spectral_norm(net)
    net(torch.zeros(1, 20))
    weight = net[0].weight.detach()
    assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1.0, abs=1e-3)
    assert not any(m.training for m in net.modules())


def test_another_model_shares_nothing_and_costs_no_factory() -> None:
    model = FlatModel(convert(Keeps()))
    other = model.another()
    assert other.layout == model.layout
    other.bind(model.weights.clone(), statistics=model.statistics.clone())
    x = torch.randn(6, 4)
    assert torch.equal(other.module.eval()(x), model.module.eval()(x))
    other.module.train()(x)
    assert other.moments[0].tolist() == [6.0] * 4
    assert not model.moments.any()

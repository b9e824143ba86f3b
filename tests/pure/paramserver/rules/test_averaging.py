"""The average of the weights, against torch's `AveragedModel` and by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.rules.averaging import AVERAGE, AVERAGE_STATISTICS, Averaging
from tests.helpers.close import assert_close

torch.set_num_threads(1)


def followed(decay: float, weights: list[Tensor], batches: int = 1) -> Tensor:
    averaging, none = Averaging(decay=decay), torch.zeros(2, 0)
    state = averaging.init(torch.full_like(weights[0], 9.0), none)
    for w in weights:
        averaging.update(state, w, none, batches)
    return state[AVERAGE]


def test_is_torchs_averaged_model_with_the_same_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    path = [torch.randn(11, generator=generator) for _ in range(300)]

    def average(old: Tensor, new: Tensor, num: Any) -> Tensor:
        # torch copies the first and counts from there.
        return torch.lerp(old, new, max(0.02, 1 / (int(num) + 1)))

    module = nn.Linear(11, 1, bias=False)
    theirs = AveragedModel(module, avg_fn=average)
    for w in path:
        with torch.no_grad():
            module.weight.copy_(w[None])
        theirs.update_parameters(module)
    expected = theirs.module.weight.detach()[0]
    assert_close(followed(0.98, path), expected, rtol=1e-5, atol=1e-6)


def test_the_first_update_replaces_where_it_started_and_early_on_it_is_the_mean() -> None:
    path = [torch.tensor([w]) for w in (1.0, 2.0, 6.0)]
    assert followed(0.999, path[:1]).item() == 1
    assert followed(0.999, path).item() == pytest.approx(3)


def test_a_push_of_k_weighs_as_k_pushes() -> None:
    path = [torch.tensor([w]) for w in (1.0, 4.0, -2.0, 0.5) * 30]
    one_by_one = followed(0.9, [w for w in path for _ in range(5)])
    assert followed(0.9, path, batches=5).item() == pytest.approx(one_by_one.item(), rel=1e-5)


def test_bn_statistics_are_averaged_with_the_same_shares() -> None:
    averaging = Averaging(decay=0.5)
    state = averaging.init(torch.zeros(1), torch.zeros(2, 1))
    for value in (1.0, 3.0, 7.0):
        averaging.update(state, torch.tensor([value]), torch.full((2, 1), value), 1)
    assert state[AVERAGE].item() == 4.5
    assert state[AVERAGE_STATISTICS].tolist() == [[4.5], [4.5]]


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_told(decay: float) -> None:
    with pytest.raises(BadConfiguration, match="ema is"):
        Averaging(decay=decay)

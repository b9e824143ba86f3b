"""PyTorch's batch normalization layers made into ours, held against PyTorch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.models.batchnorm import BatchNorm
from downpour.models.conversion.convert import convert
from downpour.models.errors import ModelError
from downpour.models.flat import FlatModel
from downpour.models.fold import fold
from tests.helpers.close import assert_close


class BatchNormAct(nn.BatchNorm2d):
    """Written as timm's are: PyTorch's forward pasted in, then dropout and activation."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop = nn.Identity()
        self.act = nn.PReLU()

    def forward(self, input: Tensor) -> Tensor:
        torch._assert(input.ndim == 4, "expected a 4-D input")
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        x = functional.batch_norm(
            input,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            factor,
            self.eps,
        )
        y: Tensor = self.act(self.drop(x))
        return y


class BatchNormReLU(nn.BatchNorm2d):
    """Written as users write them."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu_(super().forward(input))


class NoisySyncBatchNorm(nn.SyncBatchNorm):
    """Does something else in training than in inference."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y * 3 if self.training else y


class AlwaysFrozen(nn.BatchNorm2d):
    """Never normalizes by the mini-batch."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class ByHand(nn.BatchNorm2d):
    """Normalizes in a way of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return input - input.mean((0, 2, 3), keepdim=True)


class Decides(nn.BatchNorm2d):
    """Looks at values, so it cannot be traced."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.sum() > 0 else input


class ShiftedGamma(nn.BatchNorm2d):
    """Normalizes with other weights than its own."""

    def forward(self, input: Tensor) -> Tensor:
        gamma = 1 + self.weight
        return functional.batch_norm(
            input, self.running_mean, self.running_var, gamma, self.bias, self.training,
            self.momentum or 0.0, self.eps,
        )  # fmt: skip


class WithResidual(nn.BatchNorm2d):
    """May take a second input."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(input=input)
        return y if residual is None else y + residual


class Gained(nn.BatchNorm2d):
    """Has a parameter and a buffer besides."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("temperature", torch.tensor(2.0))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input / self.temperature) * self.gain


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rows": (lambda: nn.BatchNorm1d(3), (6, 3)),
    "sequences": (lambda: nn.BatchNorm1d(3, eps=1e-2), (6, 3, 5)),
    "images": (lambda: nn.BatchNorm2d(3, momentum=0.3), (6, 3, 4, 5)),
    "volumes": (lambda: nn.BatchNorm3d(3, momentum=None), (6, 3, 2, 4, 3)),
    "synchronized": (lambda: nn.SyncBatchNorm(3), (6, 3, 4, 5)),
    "without gamma and beta": (lambda: nn.BatchNorm2d(3, affine=False), (6, 3, 4, 5)),
    "without beta": (lambda: nn.BatchNorm2d(3, bias=False), (6, 3, 4, 5)),
    "lazy": (nn.LazyBatchNorm2d, (6, 3, 4, 5)),
    "without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (6, 3, 4, 5)),
    "timm's": (lambda: BatchNormAct(3), (6, 3, 4, 5)),
    "a user's": (lambda: BatchNormReLU(3), (6, 3, 4, 5)),
    "noisy": (lambda: NoisySyncBatchNorm(3), (6, 3, 4, 5)),
    "frozen": (lambda: AlwaysFrozen(3), (6, 3, 4, 5)),
    "by hand": (lambda: ByHand(3, affine=False), (6, 3, 4, 5)),
    "decides": (lambda: Decides(3), (6, 3, 4, 5)),
    "other gamma": (lambda: ShiftedGamma(3), (6, 3, 4, 5)),
    "a second input": (lambda: WithResidual(3), (6, 3, 4, 5)),
    "more parameters": (lambda: Gained(3), (6, 3, 4, 5)),
}


WITHOUT_MOMENTS = ("without statistics", "frozen", "by hand")


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """PyTorch's layer with values of its own, the same converted, and an input."""
    make, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * 3 + 1
    theirs = make().eval()
    theirs(x)  # which gives a lazy one its size
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    theirs.train()
    return theirs, convert(copy.deepcopy(theirs)), x


@pytest.mark.parametrize("name", LAYERS)
def test_a_converted_layer_is_torchs_to_the_bit(name: str) -> None:
    theirs, ours, x = pair(name)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    found = []
    for layer in (theirs, ours):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        (y * dy).sum().backward()  # `y.backward(dy)` loads sympy first
        gradients = [p.grad for p in layer.parameters()]
        found.append([y.detach(), inputs.grad, *gradients])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert isinstance(ours, type(theirs)), "code that looks for PyTorch's class finds it"


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in WITHOUT_MOMENTS])
def test_its_moments_are_what_torch_averages_and_inference_is_torchs(name: str) -> None:
    theirs, ours, x = pair(name)
    theirs.momentum = 1.0  # type: ignore[assignment]
    theirs(x)
    assert isinstance(ours, BatchNorm)
    ours(x)
    assert torch.equal(ours.batch_mean, theirs.running_mean)  # type: ignore[arg-type]
    assert torch.equal(ours.batch_variance, theirs.running_var)  # type: ignore[arg-type]
    assert (ours.batch_count == x.numel() / 3).all()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert_close(fold(ours)(x), theirs(x), rtol=1e-4, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())


def test_a_layer_that_its_forward_freezes_has_no_moments() -> None:
    theirs, ours, x = pair("frozen")
    model = FlatModel(nn.Sequential(nn.Conv2d(3, 3, 1), ours))
    model.module(x)
    assert not model.moments.any()
    assert type(theirs) in type(ours).__mro__


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.LazyBatchNorm2d(), "'1' has no size yet: use BatchNorm2d"),
        (nn.BatchNorm2d(3).double(), "'1' keeps torch.float64 statistics"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(layer: nn.Module, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        convert(nn.Sequential(nn.ReLU(), layer))


def test_a_layer_that_cannot_be_traced_takes_a_second_input_and_keeps_its_place() -> None:
    theirs, ours, x = pair("a second input")
    assert torch.equal(ours(x, residual=x), theirs(x, residual=x))
    ours.load_state_dict(theirs.state_dict())
    folded = fold(nn.Sequential(ours))
    assert_close(folded.get_submodule("0")(x, x), theirs.eval()(x, x))


def test_a_compiled_layer_is_refused_by_name() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        script = torch.jit.script(nn.BatchNorm2d(3))  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match=r"'0' is batch normalization compiled by torch\.jit"):
        convert(nn.Sequential(script))


def test_lazy_layers_get_sizes_and_the_same_values_each_time() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2)
        )

    first, second = (convert(make(), (3, 5, 5), seed=7) for _ in range(2))
    assert first.training
    assert all(m.training for m in first.modules())
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert FlatModel(first).layout.num_features == 4
    with pytest.raises(ModelError, match=r"lazy layers get no sizes from an input of shape \[3\]"):
        convert(make(), (3,))


def test_layers_keep_identity_names_hooks_and_a_train_that_freezes_them() -> None:
    class Net(nn.Sequential):
        def train(self, mode: bool = True) -> Net:
            super().train(mode)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
            return self

    layer = nn.BatchNorm2d(3)
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    net = Net(nn.Conv2d(3, 3, 1), layer)
    names = list(net.state_dict())
    assert convert(net)[1] is layer  # type: ignore[index]
    assert list(net.state_dict()) == names
    net.train()(torch.randn(2, 3, 4, 4))
    assert calls == [1]
    assert not layer.training


def test_a_model_is_the_same_converted_twice() -> None:
    net = convert(nn.Sequential(nn.Linear(3, 4), BatchNormless(), nn.BatchNorm1d(4)))
    kinds = [type(m) for m in net.modules()]
    assert [type(m) for m in convert(net).modules()] == kinds


class BatchNormless(nn.Module):
    """Only sounds like it."""

    def forward(self, x: Tensor) -> Tensor:
        return x

"""The Inception network against the paper's Figure 5, and its variants."""

import statistics
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from downpour.models.batchnorm import BatchNorm
from downpour.models.errors import BatchError, ModelError
from downpour.models.flat import layout_of
from downpour.models.fold import fold
from downpour.models.inception import STAGES, Inception, plan
from downpour.models.layers import ActivationBatchNorm, ConvBN

torch.set_num_threads(1)

# Figure 5, "output size", row by row.
FIGURE_5 = {
    "conv1": (64, 112),
    "pool1": (64, 56),
    "conv2": (192, 56),
    "pool2": (192, 28),
    "3a": (256, 28),
    "3b": (320, 28),
    "3c": (576, 14),
    "4a": (576, 14),
    "4b": (576, 14),
    "4c": (576, 14),
    "4d": (576, 14),
    "4e": (1024, 7),
    "5a": (1024, 7),
    "5b": (1024, 7),
}


def _shapes(net: Inception, x: Tensor) -> dict[str, tuple[int, ...]]:
    """What every stage really puts out."""
    found = {}

    def note(name: str) -> object:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            found[name] = tuple(output.shape)

        return hook

    for name, stage in net.stages.named_children():
        stage.register_forward_hook(note(name))  # type: ignore[arg-type]
    net(x)
    return found


def _tiny(**options: object) -> Inception:
    arguments = {"seed": 1, "num_classes": 5, "image_size": 16, "width": 0.0625, "stem_stride": 2}
    return Inception(**(arguments | options))  # type: ignore[arg-type]


def _images(count: int = 4, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def _with_statistics(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for layer in net.modules():
        if isinstance(layer, BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(layer.bias, -0.5, 0.5, generator=generator)
            nn.init.uniform_(layer.running_mean, -0.2, 0.2, generator=generator)
            nn.init.uniform_(layer.running_var, 0.5, 1.5, generator=generator)
    return net.eval()


@pytest.mark.parametrize("separable", [True, False])
def test_every_stage_has_the_shape_of_figure_5(separable: bool) -> None:
    with torch.device("meta"):
        net = Inception(seed=0, separable=separable)
        shapes = _shapes(net, torch.empty(2, 3, 224, 224))
    assert shapes == {name: (2, c, size, size) for name, (c, size) in FIGURE_5.items()}
    assert {p.stage.name: (p.channels, p.size) for p in net.plan} == FIGURE_5


def test_parameters_counted_by_hand() -> None:
    """Weights of the table's convolutions, gamma and beta for each filter, and the softmax."""

    def bn_conv(fan_in: int, filters: int) -> int:
        return fan_in * filters + 2 * filters

    count = 3 * 8 * 49 + bn_conv(3 * 8, 64) + bn_conv(64, 64) + bn_conv(64 * 9, 192)
    rows = [stage for stage in STAGES if stage.name in FIGURE_5 and stage.name[0].isdigit()]
    inputs = [192, *(FIGURE_5[stage.name][0] for stage in rows)]
    for stage, into in zip(rows, inputs, strict=False):
        count += bn_conv(into, stage.reduce) + bn_conv(stage.reduce * 9, stage.threes)
        count += bn_conv(into, stage.double_reduce)
        count += bn_conv(stage.double_reduce * 9, stage.double)
        count += bn_conv(stage.double * 9, stage.double)
        count += bn_conv(into, stage.ones) if stage.ones else 0
        count += bn_conv(into, stage.projection) if stage.projection else 0
    count += 1024 * 1000 + 1000
    with torch.device("meta"):
        separable, plain = Inception(seed=0), Inception(seed=0, separable=False)
    assert layout_of(separable).num_parameters == count == 11_188_288
    assert layout_of(plain).num_parameters == count - 3 * 8 * 49 - 24 * 64 + 3 * 64 * 49


@pytest.mark.parametrize(
    ("image_size", "stem_stride", "sizes"),
    [(64, 8, (8, 4, 2)), (64, 4, (16, 8, 4)), (32, 4, (8, 4, 2)), (32, 2, (16, 8, 4))],
)
def test_smaller_images(image_size: int, stem_stride: int, sizes: tuple[int, ...]) -> None:
    with torch.device("meta"):
        net = Inception(seed=0, image_size=image_size, width=0.25, stem_stride=stem_stride)
        shapes = _shapes(net, torch.empty(2, 3, image_size, image_size))
    assert tuple(shapes[name][2] for name in ("3b", "4d", "5b")) == sizes
    assert {p.stage.name: (2, p.channels, p.size, p.size) for p in net.plan} == shapes
    assert shapes["3a"][1] == 64, "a quarter of the table's 256"


@pytest.mark.parametrize("options", [{}, {"per_activation": True}, {"separable": False}])
def test_folded_is_unfolded(options: dict[str, object]) -> None:
    net = _with_statistics(_tiny(**options))
    folded, x = fold(net), _images()
    assert not any(isinstance(m, BatchNorm) for m in folded.modules())
    with torch.inference_mode():
        expected = net(x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_before_every_nonlinearity_and_no_bias_there() -> None:
    blocks = [m for m in _tiny().modules() if isinstance(m, ConvBN)]
    assert len(blocks) == 3 + 8 * 7 + 2 * 5
    assert all(isinstance(b.bn, BatchNorm) and b.conv.bias is None for b in blocks)
    plain = [m for m in _tiny(batch_norm=False).modules() if isinstance(m, ConvBN)]
    assert all(isinstance(b.bn, nn.Identity) and b.conv.bias is not None for b in plain)
    assert not any(isinstance(m, BatchNorm) for m in _tiny(batch_norm=False).modules())


def test_activation_reaches_every_block() -> None:
    assert {m.activation for m in _tiny().modules() if isinstance(m, ConvBN)} == {torch.relu}
    sigmoid = _tiny(activation="sigmoid")
    assert {m.activation for m in sigmoid.modules() if isinstance(m, ConvBN)} == {torch.sigmoid}


def test_normalization_by_activation_in_the_last_module_only() -> None:
    net = _tiny(per_activation=True).train()
    found = {name for name, m in net.named_modules() if isinstance(m, ActivationBatchNorm)}
    assert len(found) == 4
    assert all(name.startswith("stages.5b.branches.") for name in found)
    layer = next(m for m in net.modules() if isinstance(m, ActivationBatchNorm))
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    net(_images(64))
    # Every place of every map is normalized by itself; a map's own mean alone would be 0 otherwise.
    torch.testing.assert_close(outputs[0].mean(0), torch.zeros(layer.shape), rtol=0, atol=1e-5)
    assert layer.bn.batch_count.tolist() == [64.0] * layer.bn.num_features


def test_dropout_works_in_training_only() -> None:
    net = _with_statistics(_tiny(dropout=0.4))
    x = _images()
    torch.testing.assert_close(net(x), net(x))
    dropout = net.get_submodule("dropout").train()
    zeros = (dropout(torch.ones(1, 10_000)) == 0).float().mean()
    assert 0.37 < float(zeros) < 0.43


def test_response_normalization_where_googlenet_has_it() -> None:
    names = [name for name, _ in _tiny(lrn=True, stem_stride=4).stages.named_children()]
    assert names[:6] == ["conv1", "pool1", "pool1_lrn", "conv2", "conv2_lrn", "pool2"]
    assert not any("lrn" in name for name, _ in _tiny().stages.named_children())


def test_initial_weights() -> None:
    base, again, other = _tiny(), _tiny(), _tiny(seed=2)
    large = _tiny(init_scale=2.0)
    for (name, weight), same, different, doubled in zip(
        base.named_parameters(),
        again.parameters(),
        other.parameters(),
        large.parameters(),
        strict=True,
    ):
        assert torch.equal(weight, same)
        if weight.ndim == 4:
            assert not torch.equal(weight, different)
            torch.testing.assert_close(doubled, 2 * weight)
        else:
            assert torch.equal(doubled, weight), name


def test_a_few_steps_lower_the_loss() -> None:
    # In float64: a net as small as this one goes other ways after each rounding.
    net, x, y = _tiny().double().train(), _images(16).double(), torch.arange(16) % 5
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("activation", "least", "most"), [("relu", 20.0, 100.0), ("sigmoid", 1.0, 8.0)]
)
@pytest.mark.parametrize("stem_stride", [8, 2])
def test_gradients_grow_towards_the_input_with_relu_and_hardly_with_sigmoids(
    activation: str, least: float, most: float, stem_stride: int
) -> None:
    """What docs/reproduction/inception-cifar10 explains sigmoids' head start in short runs with."""
    net = Inception(
        seed=0,
        num_classes=10,
        image_size=32,
        width=0.25,
        stem_stride=stem_stride,
        activation=activation,
    )
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(32, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (32,), generator=generator)
    nn.functional.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]

    def relative(stage: str) -> float:
        """The median over its convolutions of the gradient's norm over that of the weights."""
        convolutions = [p for p in net.stages.get_submodule(stage).parameters() if p.ndim == 4]
        gradients = [p.grad for p in convolutions]
        ratios = [
            float(g.norm() / p.detach().norm())
            for p, g in zip(convolutions, gradients, strict=True)
        ]
        return statistics.median(ratios)

    assert least < relative("conv2") / relative("5b") < most


def test_stages_are_joined_up() -> None:
    for before, after in pairwise(plan(width=0.3, image_size=64)):
        assert after.in_channels == before.channels


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"width": 0}, "width is 0"),
        ({"stem_stride": 3}, "stem stride is 3"),
        ({"image_size": 7, "stem_stride": 2}, "image size is 7"),
        ({"activation": "tanh"}, "'tanh'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"init_scale": 0}, "init scale is 0"),
        ({"num_classes": 1}, "num classes is 1"),
    ],
)
def test_refused_values(options: dict[str, object], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        _tiny(**options)


def test_images_of_another_size() -> None:
    with pytest.raises(BatchError, match=r"\[m, 3, 16, 16\]"):
        _tiny()(_images(size=8))

"""Flat buffers: what shares memory with what, and that training through them changes nothing."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.models.batchnorm import BatchNorm
from downpour.models.conversion.convert import convert
from downpour.models.errors import LayoutError
from downpour.models.flat import FlatModel, Layout, ParameterEntry, flatten, layout_of, state_dict
from downpour.models.layers import ConvBN
from downpour.models.mlp import MnistNet
from tests.helpers.close import assert_close

torch.set_num_threads(1)


def network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        ConvBN(2, 3, 3), ConvBN(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(4 * 3 * 3, 5)
    )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 6, 6, generator=generator)
    return x, torch.tensor([0, 4, 2, 2])


def backward(module: nn.Module) -> float:
    """The loss of `batch`, its gradient taken."""
    x, y = batch()
    loss = functional.cross_entropy(module(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def buffers(layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, f = layout.num_parameters, layout.num_features
    return torch.zeros(p), torch.zeros(p), torch.full((3, f), torch.nan), torch.zeros(2, f)


class TestLayout:
    def test_decayed_first_then_the_rest_each_in_order(self) -> None:
        layout = layout_of(network())
        assert [(e.name, e.start, e.stop, e.decays) for e in layout.entries] == [
            ("0.conv.weight", 0, 54, True),
            ("1.conv.weight", 54, 162, True),
            ("3.weight", 162, 342, True),
            ("0.bn.weight", 342, 345, False),
            ("0.bn.bias", 345, 348, False),
            ("1.bn.weight", 348, 352, False),
            ("1.bn.bias", 352, 356, False),
            ("3.bias", 356, 361, False),
        ]
        assert layout.entries[1].shape == (4, 3, 3, 3)
        assert [(f.name, f.start, f.stop) for f in layout.features] == [
            ("0.bn", 0, 3),
            ("1.bn", 3, 7),
        ]
        assert (layout.num_parameters, layout.num_features, layout.decayed) == (361, 7, 342)

    def test_another_predicate(self) -> None:
        layout = layout_of(network(), decay=lambda owner, name: name == "3.bias")
        assert (layout.entries[0].name, layout.decayed) == ("3.bias", 5)
        assert layout_of(network(), decay=lambda *_: False).decayed == 0

    def test_a_frozen_parameter_does_not_decay(self) -> None:
        module = network()
        module[3].weight.requires_grad_(False)
        flat = FlatModel(module)
        assert flat.layout.decayed == 162
        backward(module)
        flat.check()

    def test_json_round_trip(self) -> None:
        layout = layout_of(network())
        assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda d: d.pop("features"), "KeyError"),
            (lambda d: d["entries"][0].update(shape=[2, 2]), "has shape"),
            (lambda d: d["entries"][1].update(start=50), "does not begin at 54"),
            (lambda d: d["entries"].reverse(), "does not begin at 0"),
            (lambda d: d["entries"][0].update(decays=False), "those that decay go first"),
            (lambda d: d["features"][1].update(name="0.bn"), "there twice"),
            (lambda d: d["features"][1].update(colour=1), "TypeError"),
            (lambda d: d.update(num_parameters=3), "num_parameters is 3"),
        ],
    )
    def test_damaged_json(self, damage: Callable[[dict[str, object]], None], message: str) -> None:
        plain = layout_of(network()).to_dict()
        damage(plain)
        with pytest.raises(LayoutError, match=message):
            Layout.from_dict(plain)

    def test_of_no_features(self) -> None:
        layout = layout_of(MnistNet(batch_norm=False, seed=0))
        assert (layout.num_features, layout.num_parameters) == (0, 99_710)
        assert layout.decayed == 99_400

    def test_on_the_meta_device_is_the_same(self) -> None:
        with torch.device("meta"):
            module = network()
        assert layout_of(module) == layout_of(network())


class TestBinding:
    def test_construction_keeps_values_and_statistics(self) -> None:
        module = network()
        module.get_buffer("1.bn.running_var").fill_(3.0)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        flat = FlatModel(module)
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])
        assert torch.equal(flat.statistics[1], torch.tensor([1.0] * 3 + [3.0] * 4))
        flat.check()

    def test_parameters_and_gradients_are_views_of_the_callers_buffers(self) -> None:
        flat = FlatModel(network())
        weights, gradient, moments, statistics = buffers(flat.layout)
        weights.copy_(torch.arange(361.0))
        flat.bind(weights, gradient, moments, statistics)
        flat.check()
        assert flat.weights is weights
        assert flat.gradient is gradient
        parameters = dict(flat.module.named_parameters())
        for entry in flat.layout.entries:
            parameter = parameters[entry.name]
            expected = torch.arange(float(entry.start), float(entry.stop)).view(entry.shape)
            assert torch.equal(parameter, expected)
            assert parameter.grad is not None
            parameter.grad.fill_(entry.start)
            assert (gradient[entry.start : entry.stop] == entry.start).all()
        weights.fill_(7)
        assert all((p == 7).all() for p in parameters.values())

    def test_training_equals_that_of_the_plain_module(self) -> None:
        plain, flat = network(), FlatModel(network())
        weights, gradient, moments, statistics = buffers(flat.layout)
        weights.copy_(flat.weights)
        flat.bind(weights, gradient, moments, statistics)
        for _ in range(3):
            flat.zero_gradient()
            plain.zero_grad()
            assert backward(plain) == backward(flat.module)
            flat.check()
            wanted = {n: p.grad for n, p in plain.named_parameters()}
            for entry in flat.layout.entries:
                ours = gradient[entry.start : entry.stop].view(entry.shape)
                assert torch.equal(ours, wanted[entry.name])  # type: ignore[arg-type]
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter.sub_(parameter.grad, alpha=0.1)  # type: ignore[arg-type]
            weights.sub_(gradient, alpha=0.1)
        for feature in flat.layout.features:
            layer = plain.get_submodule(feature.name)
            assert isinstance(layer, BatchNorm)
            columns = moments[:, feature.start : feature.stop]
            assert torch.equal(columns[0], layer.batch_count)
            assert torch.equal(columns[1], layer.batch_mean)
            assert torch.equal(columns[2], layer.batch_variance)

    def test_gradients_accumulate(self) -> None:
        flat = FlatModel(network())
        backward(flat.module)
        assert flat.gradient is not None
        once = flat.gradient.clone()
        backward(flat.module)
        assert_close(flat.gradient, 2 * once)

    def test_rebinding_for_inference_lets_go_of_the_gradient(self) -> None:
        flat = FlatModel(network())
        weights, _, _, statistics = buffers(flat.layout)
        flat.bind(weights, statistics=statistics)
        assert flat.gradient is None
        assert all(p.grad is None for p in flat.module.parameters())
        flat.check()
        with pytest.raises(LayoutError, match="no gradient buffer"):
            flat.zero_gradient()

    def test_two_modules_on_the_same_weights(self) -> None:
        one, two = FlatModel(network()), FlatModel(network())
        two.bind(one.weights, statistics=one.statistics)
        with torch.no_grad():
            one.module.get_parameter("3.weight").mul_(2)
        x, _ = batch()
        assert torch.equal(one.module.eval()(x), two.module.eval()(x))

    def test_meta_module_allocates_on_bind_alone(self) -> None:
        source = FlatModel(network())
        with torch.device("meta"):
            flat = FlatModel(network())
        with pytest.raises(LayoutError, match="bind buffers before using it"):
            _ = flat.weights
        _, gradient, moments, statistics = buffers(flat.layout)
        flat.bind(source.weights, gradient, moments, statistics)
        flat.check()
        backward(source.module)
        backward(flat.module)
        assert source.gradient is not None
        assert torch.equal(gradient, source.gradient)

    @pytest.mark.parametrize(
        ("which", "buffer", "message"),
        [
            (0, torch.zeros(3), r"weights is torch.float32 \[3\]"),
            (0, torch.zeros(361).double(), "weights is torch.float64"),
            (0, torch.zeros(722)[::2], "weights must be contiguous"),
            (1, torch.zeros(360), "gradient is"),
            (1, torch.zeros(361, device="meta"), "gradient is on meta"),
            (2, torch.zeros(2, 7), "moments is"),
            (3, torch.zeros(3, 7), "statistics is"),
        ],
    )
    def test_buffers_that_do_not_fit(self, which: int, buffer: Tensor, message: str) -> None:
        flat = FlatModel(network())
        arguments = list(buffers(flat.layout))
        arguments[which] = buffer
        with pytest.raises(LayoutError, match=message):
            flat.bind(*arguments)

    def test_check_finds_a_lost_gradient_and_a_replaced_value(self) -> None:
        flat = FlatModel(network())
        flat.module.zero_grad()
        with pytest.raises(LayoutError, match=r"the gradient of '0.conv.weight' left"):
            flat.check()
        flat.bind(flat.weights, flat.gradient)
        flat.check()
        flat.module.get_parameter("3.bias").data = torch.zeros(5)
        with pytest.raises(LayoutError, match=r"the value of '3.bias' left"):
            flat.check()


class TestShared:
    """A parameter that several layers have is one, and its gradient the sum over its uses."""

    def test_tied_weights(self) -> None:
        a, b = nn.Linear(3, 3), nn.Linear(3, 3)
        b.weight = a.weight
        self.check(nn.Sequential(a, nn.ReLU(), b), ["0.weight", "0.bias", "2.bias"])

    def test_a_layer_under_two_names(self) -> None:
        a, bn = nn.Linear(3, 3), BatchNorm(3)
        net = nn.Sequential(a, bn, nn.ReLU(), a, bn)
        self.check(net, ["0.weight", "0.bias", "1.weight", "1.bias"])

    def test_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            a, b = nn.Linear(3, 3), nn.Linear(3, 3)
            b.weight = a.weight
            flat = FlatModel(nn.Sequential(a, b))
        flat.bind(torch.arange(flat.layout.num_parameters, dtype=torch.float32))
        assert b.weight is a.weight
        assert torch.equal(a.weight.flatten(), torch.arange(9.0))

    def check(self, net: nn.Module, names: list[str]) -> None:
        theirs = copy.deepcopy(net)
        flat = FlatModel(net).another()
        flat.bind(FlatModel(net).weights, torch.zeros(flat.layout.num_parameters))
        assert [entry.name for entry in flat.layout.entries] == names
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
        for module in (theirs, flat.module):
            module(x).square().sum().backward()
        for entry in flat.layout.entries:
            found = flat.gradient[entry.start : entry.stop]  # type: ignore[index]
            wanted = theirs.get_parameter(entry.name).grad
            assert torch.allclose(found, wanted.flatten(), rtol=1e-5)  # type: ignore[union-attr]
        state = flat.state_dict()
        theirs.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
        weights, statistics = flat.split(state)
        assert torch.equal(weights, flat.weights)
        assert torch.equal(statistics, flat.statistics)


def test_a_model_that_is_a_normalization_itself_has_pytorchs_names() -> None:
    class Root(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(3)
            self.map = nn.Linear(4, 3)

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(self.map(input))

    theirs = Root()
    flat = FlatModel(convert(copy.deepcopy(theirs)))
    state = flat.state_dict()
    assert set(state) == set(theirs.state_dict()) - {"num_batches_tracked"}
    theirs.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    flat.split(theirs.state_dict())


class TestRefusals:
    def test_parameters_over_the_same_memory(self) -> None:
        a, b = nn.Linear(3, 3), nn.Linear(3, 3)
        b.weight = nn.Parameter(a.weight.data)
        with pytest.raises(LayoutError, match=r"'0.weight' and '1.weight' are two over the same"):
            layout_of(nn.Sequential(a, b))

    def test_another_dtype(self) -> None:
        with pytest.raises(LayoutError, match=r"'weight' is torch.float64: make the model float32"):
            FlatModel(nn.Linear(2, 2).double())

    def test_nothing_to_train(self) -> None:
        with pytest.raises(LayoutError, match="ReLU has no parameters"):
            FlatModel(nn.ReLU())

    def test_no_shape_yet(self) -> None:
        with pytest.raises(LayoutError, match="'weight' has no shape yet"):
            layout_of(nn.LazyConv2d(2, 1))

    def test_pytorchs_own_normalization(self) -> None:
        module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        with pytest.raises(LayoutError, match="'1' is BatchNorm1d"):
            FlatModel(module)


class TestStateDict:
    def test_names_are_pytorchs_and_values_are_views(self) -> None:
        flat = FlatModel(network())
        state = state_dict(flat.weights, flat.statistics, flat.layout)
        counts = {"0.bn.num_batches_tracked", "1.bn.num_batches_tracked"}
        assert set(state) | counts == set(flat.module.state_dict())
        state["0.bn.running_mean"].fill_(4)
        assert (flat.statistics[0, :3] == 4).all()

    def test_loads_into_a_fresh_model(self) -> None:
        flat, fresh = FlatModel(network()), network()
        flat.weights.mul_(3)
        fresh.load_state_dict(state_dict(flat.weights, flat.statistics, flat.layout))
        x, _ = batch()
        assert torch.equal(fresh.eval()(x), flat.module.eval()(x))

    def test_round_trip(self) -> None:
        layout = layout_of(network())
        weights, statistics = torch.randn(361), torch.rand(2, 7)
        state = copy.deepcopy(state_dict(weights, statistics, layout))
        state["0.bn.num_batches_tracked"] = torch.tensor(9)
        again = flatten(state, layout)
        assert torch.equal(again[0], weights)
        assert torch.equal(again[1], statistics)

    def test_checkpoints_that_do_not_fit(self) -> None:
        layout = layout_of(network())
        good = state_dict(torch.zeros(361), torch.zeros(2, 7), layout)
        with pytest.raises(LayoutError, match=r"lacks '3.bias': use one of the same model"):
            flatten({k: v for k, v in good.items() if k != "3.bias"}, layout)
        with pytest.raises(LayoutError, match="unknown 'extra'"):
            flatten(good | {"extra": torch.zeros(1)}, layout)
        with pytest.raises(LayoutError, match=r"'3.bias' is torch.float32 \[6\]"):
            flatten(good | {"3.bias": torch.zeros(6)}, layout)
        with pytest.raises(LayoutError, match=r"'3.bias' is torch.float16"):
            flatten(good | {"3.bias": torch.zeros(5).half()}, layout)
        with pytest.raises(LayoutError, match=r"lacks .* and 9 more"):
            flatten({}, layout)


def test_layout_entries_are_checked_when_made_by_hand() -> None:
    entry = ParameterEntry(name="w", shape=(2, 3), start=0, stop=6, decays=True)
    assert Layout(entries=(entry,), features=()).num_parameters == 6
    with pytest.raises(LayoutError, match="'w' has the range"):
        Layout(entries=(entry, entry), features=())

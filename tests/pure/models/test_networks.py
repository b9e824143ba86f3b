"""The MNIST network, folding and the registry."""

import sys
import types
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from downpour.models import outputs, registry
from downpour.models.batchnorm import BatchNorm
from downpour.models.errors import BatchError, FoldError, ModelError, RegistryError
from downpour.models.flat import FlatModel
from downpour.models.fold import fold, fold_pair
from downpour.models.layers import ConvBN, LinearBN, NormalizedBlock
from downpour.models.mlp import MnistNet
from tests.helpers.close import assert_close

torch.set_num_threads(1)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _trained(model: nn.Module) -> nn.Module:
    """With BN parameters and statistics as training might leave them, in inference mode."""
    generator = torch.Generator().manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            for tensor, low in (
                (layer.weight, -2.0),
                (layer.bias, -2.0),
                (layer.running_mean, -2.0),
                (layer.running_var, 0.1),
            ):
                nn.init.uniform_(tensor, low, 2.0, generator=generator)
    return model.eval()


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, BatchNorm) for m in model.modules())


class TestMnistNet:
    def test_is_section_4_1(self) -> None:
        net = MnistNet(batch_norm=True, seed=0)
        names = [name for name, _ in net.named_parameters()]
        assert names == [
            *(
                f"hidden.{i}.{name}"
                for i in range(3)
                for name in ("linear.weight", "bn.weight", "bn.bias")
            ),
            "output.weight",
            "output.bias",
        ]
        assert net(_random(2, 1, 28, 28)).shape == (2, 10)

    @pytest.mark.parametrize("batch_norm", [True, False])
    def test_forward_written_out(self, batch_norm: bool) -> None:
        net, x = MnistNet(batch_norm=batch_norm, seed=1), _random(5, 784)
        u = x
        for block in net.hidden:
            assert isinstance(block, LinearBN)
            u = torch.sigmoid(block.bn(block.linear(u)))
        assert torch.equal(net(x), net.output(u))

    def test_weights_depend_on_the_seed_alone(self) -> None:
        a, b = MnistNet(batch_norm=True, seed=1), MnistNet(batch_norm=False, seed=1)
        c = MnistNet(batch_norm=True, seed=2)
        state = b.state_dict()
        for name, value in a.state_dict().items():
            if name.endswith("linear.weight") or name == "output.weight":
                assert torch.equal(value, state[name])
                assert not torch.equal(value, c.state_dict()[name])

    def test_scale_of_the_weights(self) -> None:
        wide = MnistNet(batch_norm=True, seed=1).state_dict()["hidden.0.linear.weight"]
        small = MnistNet(batch_norm=True, seed=1, init_std=0.01).state_dict()
        assert wide.std().item() == pytest.approx(1 / 28, rel=0.02)
        assert small["hidden.1.linear.weight"].std().item() == pytest.approx(0.01, rel=0.02)
        assert not MnistNet(batch_norm=False, seed=1).state_dict()["hidden.0.linear.bias"].any()

    @pytest.mark.parametrize("batch_norm", [True, False])
    def test_preactivation_is_the_input_of_the_sigmoids(self, batch_norm: bool) -> None:
        net, x = MnistNet(batch_norm=batch_norm, seed=1, hidden=(7, 6, 5)), _random(4, 784)
        last = net.preactivation(x)
        assert last.shape == (4, 5)
        assert torch.equal(net.output(torch.sigmoid(last)), net(x))
        assert torch.equal(last, net.preactivation(x, 2))
        assert net.preactivation(x, 0).shape == net.preactivation(x, -3).shape == (4, 7)
        if batch_norm:
            assert_close(last.mean(0), torch.zeros(5), atol=1e-5, rtol=0)

    def test_errors(self) -> None:
        net = MnistNet(batch_norm=True, seed=1)
        for layer in (3, -4):
            with pytest.raises(ModelError, match=f"no hidden layer {layer}: give one in"):
                net.preactivation(_random(2, 784), layer)
        with pytest.raises(BatchError, match=r"it takes \[m, 784\]"):
            net(_random(2, 783))
        with pytest.raises(BatchError, match=r"it takes \[m, 784\]"):
            net(_random(784))
        with pytest.raises(ModelError, match="at least one hidden layer"):
            MnistNet(batch_norm=True, seed=1, hidden=())
        with pytest.raises(ModelError, match="init_std is 0"):
            MnistNet(batch_norm=True, seed=1, init_std=0)


class Residual(nn.Module):
    """A user's block, which declares its pair."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = BatchNorm(4)

    def normalized_pairs(self) -> Iterable[tuple[str, str]]:
        return [("inner", "norm")]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + torch.relu(self.norm(self.inner(x)))
        return y


class TestFold:
    @pytest.mark.parametrize("bias", [True, False])
    def test_linear_pair(self, bias: bool) -> None:
        linear, bn, x = nn.Linear(5, 4, bias=bias), BatchNorm(4), _random(3, 5)
        _trained(bn)
        before = linear.weight.clone()
        assert_close(fold_pair(linear, bn)(x), bn(linear(x)))
        assert torch.equal(linear.weight, before)

    @pytest.mark.parametrize("bias", [True, False])
    def test_convolution_pair(self, bias: bool) -> None:
        conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=bias)
        bn, x = BatchNorm(6), _random(2, 4, 7, 7)
        _trained(bn)
        assert_close(fold_pair(conv, bn)(x), bn(conv(x)), atol=1e-5, rtol=1e-5)

    def test_is_exact_to_the_rounding_of_its_weights(self) -> None:
        linear, bn, x = nn.Linear(5, 4), BatchNorm(4), _random(50, 5).double()
        _trained(bn)
        got = fold_pair(linear, bn).double()(x)
        assert_close(got, bn.double()(linear.double()(x)), atol=2e-6, rtol=0)

    def test_mnist_net(self) -> None:
        net, x = _trained(MnistNet(batch_norm=True, seed=1)), _random(6, 784)
        folded = fold(net)
        assert not _has_batch_norm(folded)
        assert not folded.training
        assert_close(folded(x), net(x), atol=1e-5, rtol=1e-5)
        assert isinstance(folded, MnistNet)
        assert folded.preactivation(x).shape == (6, 100)

    def test_blocks_and_sequences_within_each_other(self) -> None:
        net = nn.Sequential(
            ConvBN(2, 4, 3),
            nn.Sequential(nn.Conv2d(4, 4, 1), BatchNorm(4), nn.ReLU()),
            Residual(),
            ConvBN(4, 3, 3, stride=2, batch_norm=False, activation=torch.sigmoid),
            nn.Flatten(),
            nn.Linear(27, 5),
            BatchNorm(5),
        )
        _trained(net)
        folded, x = fold(net), _random(3, 2, 6, 6)
        assert not _has_batch_norm(folded)
        assert _has_batch_norm(net)
        assert_close(folded(x), net(x), atol=1e-5, rtol=1e-5)

    def test_copy_owns_its_memory(self) -> None:
        net = _trained(MnistNet(batch_norm=True, seed=1))
        flat = FlatModel(net)
        folded, x = fold(net), _random(2, 784)
        before = folded(x)
        flat.weights.zero_()
        flat.statistics.zero_()
        assert torch.equal(folded(x), before)
        for parameter in folded.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.numel() * 4

    @pytest.mark.parametrize(
        "net",
        [
            nn.Sequential(nn.ReLU(), BatchNorm(3)),
            nn.Sequential(nn.Linear(3, 3), nn.ReLU(), BatchNorm(3)),
            nn.Sequential(nn.Linear(3, 3), BatchNorm(3), BatchNorm(3)),
            nn.Sequential(LinearBN(3, 3), BatchNorm(3)),
            BatchNorm(3),
        ],
    )
    def test_what_has_no_layer_before_it_stays_a_linear_map(self, net: nn.Module) -> None:
        _trained(net)
        folded, x = fold(net), _random(5, 3)
        assert not _has_batch_norm(folded)
        assert_close(folded(x), net(x), atol=1e-6, rtol=1e-5)

    def test_refuses_a_declared_pair_that_cannot_be(self) -> None:
        block = Residual()
        block.inner = nn.PReLU(4)  # type: ignore[assignment]
        with pytest.raises(FoldError, match="'0' pairs 'norm' with 'inner', a PReLU"):
            fold(nn.Sequential(block))

    def test_refuses_a_pair_of_other_widths(self) -> None:
        with pytest.raises(FoldError, match="puts out 3 features"):
            fold_pair(nn.Linear(2, 3), BatchNorm(4))

    def test_our_blocks_declare_their_pairs(self) -> None:
        assert isinstance(LinearBN(2, 2), NormalizedBlock)
        assert isinstance(ConvBN(2, 2, 1), NormalizedBlock)


class TestBlocks:
    def test_bias_is_dropped_under_batch_norm_only(self) -> None:
        assert LinearBN(2, 3).linear.bias is None
        assert ConvBN(2, 3, 3).conv.bias is None
        assert LinearBN(2, 3, batch_norm=False).linear.bias is not None
        assert ConvBN(2, 3, 3, batch_norm=False).conv.bias is not None

    def test_nonlinearity_comes_last(self) -> None:
        block, x = ConvBN(2, 3, 3), _random(4, 2, 5, 5)
        assert torch.equal(block(x), torch.relu(block.bn(block.conv(x))))
        assert block(x).shape == (4, 3, 5, 5)
        assert ConvBN(2, 3, 3, padding=0)(x).shape == (4, 3, 3, 3)


def _needs_width(width: int) -> nn.Module:
    return nn.Linear(width, width)


@pytest.fixture
def users_module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("a_users_module")
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    return module


class TestRegistry:
    def test_known(self) -> None:
        net = registry.build("mnist", 7, batch_norm=True, hidden=(5,))
        assert isinstance(net, MnistNet)
        same = MnistNet(batch_norm=True, seed=7, hidden=(5,)).state_dict()
        assert all(torch.equal(v, same[k]) for k, v in net.state_dict().items())

    def test_every_known_name_leads_to_a_factory(self) -> None:
        for target in registry.KNOWN.values():
            assert callable(registry._find("model", target, registry.KNOWN))

    def test_a_users_own(self, users_module: types.ModuleType) -> None:
        users_module.make = _needs_width  # type: ignore[attr-defined]
        before = torch.get_rng_state()
        nets = [registry.build("a_users_module:make", seed, width=3) for seed in (1, 1, 2)]
        assert torch.equal(torch.get_rng_state(), before)
        weights = [net.state_dict()["weight"] for net in nets]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_a_users_own_is_offered_what_it_asks_for(self, users_module: types.ModuleType) -> None:
        def sized(num_classes: int, seed: int) -> nn.Module:
            del seed
            return nn.Linear(2, num_classes)

        users_module.sized = sized  # type: ignore[attr-defined]
        name = f"{users_module.__name__}:sized"
        offered = {"num_classes": 7, "image_size": 32}
        assert registry.build(name, 1, offered=offered)(_random(1, 2)).shape == (1, 7)
        assert registry.build(name, 1, offered=offered, num_classes=3)(_random(1, 2)).shape == (
            1,
            3,
        )

    def test_losses(self, users_module: types.ModuleType) -> None:
        assert registry.find_loss("cross_entropy") is outputs.cross_entropy
        users_module.loss = nn.functional.mse_loss  # type: ignore[attr-defined]
        assert registry.find_loss(f"{users_module.__name__}:loss") is nn.functional.mse_loss
        with pytest.raises(RegistryError, match="no loss 'hinge': use one of bce, cross_entropy,"):
            registry.find_loss("hinge")

    def test_a_users_own_gets_the_seed_if_it_asks(self, users_module: types.ModuleType) -> None:
        seeds = []

        def make(seed: int) -> nn.Module:
            seeds.append(seed)
            return nn.ReLU()

        users_module.make = make  # type: ignore[attr-defined]
        registry.build("a_users_module:make", 12)
        assert seeds == [12]

    @pytest.mark.parametrize("name", ["minst", "", ":make", "os:"])
    def test_unknown_name_lists_the_known(self, name: str) -> None:
        with pytest.raises(RegistryError, match=r"there is no model '.*': use one of .*mnist"):
            registry.build(name, 0)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no_such_module_here:make", "cannot be imported: ModuleNotFoundError"),
            ("downpour.models.mlp:Mnist", "'Mnist' in 'downpour.models.mlp' does not exist"),
            ("downpour.models.batchnorm:DEFAULT_EPS", "cannot be called"),
        ],
    )
    def test_a_factory_that_is_not_there(self, name: str, message: str) -> None:
        with pytest.raises(RegistryError, match=message):
            registry.build(name, 0)

    def test_arguments_that_do_not_fit(self) -> None:
        with pytest.raises(
            RegistryError, match=r"unexpected keyword argument 'depth': its arg.*hid"
        ):
            registry.build("mnist", 0, batch_norm=True, depth=3)
        with pytest.raises(RegistryError, match=r"missing a required.*'batch_norm'"):
            registry.build("mnist", 0)

    def test_seed_out_of_range(self) -> None:
        with pytest.raises(RegistryError, match="seed is -1"):
            registry.build("mnist", -1, batch_norm=True)

    def test_a_refused_value_keeps_its_own_error(self) -> None:
        with pytest.raises(ModelError, match="init_std is -1"):
            registry.build("mnist", 0, batch_norm=True, init_std=-1)

    def test_a_factory_that_fails_or_returns_something_else(
        self, users_module: types.ModuleType
    ) -> None:
        users_module.make = _needs_width  # type: ignore[attr-defined]
        with pytest.raises(
            RegistryError, match="'a_users_module:make' failed: TypeError"
        ) as caught:
            registry.build("a_users_module:make", 0, width="wide")
        assert "\n" not in str(caught.value)
        users_module.make = lambda: 3  # type: ignore[attr-defined]
        with pytest.raises(RegistryError, match=r"returned int, not a module"):
            registry.build("a_users_module:make", 0)

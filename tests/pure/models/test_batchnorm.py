"""Algorithm 1 and 2: the layer against the paper's equations, autograd and PyTorch's own layers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.models import reference
from downpour.models.batchnorm import BatchNorm, inference_map
from downpour.models.errors import BatchError, LayoutError, ModelError
from tests.helpers.close import assert_close

torch.set_num_threads(1)

SHAPES = [(6, 4), (3, 4, 2, 5)]
EPS = 1e-3


def _input(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1


def _layer(dtype: torch.dtype = torch.float64) -> BatchNorm:
    layer = BatchNorm(4, eps=EPS).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 1.5]))
        layer.bias.copy_(torch.tensor([0.1, 0.0, -3.0, 1.0]))
    return layer


def _by_feature(x: Tensor) -> Tensor:
    """`[C, n]`: each feature's values in a row."""
    return x.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("shape", SHAPES)
class TestAlgorithm1:
    def test_the_layer_is_the_papers_forward_and_backward(self, shape: tuple[int, ...]) -> None:
        layer, x, dy = _layer(), _input(shape).requires_grad_(), _input(shape, seed=1)
        y = layer(x)
        (y * dy).sum().backward()  # `y.backward(dy)` loads sympy first
        with torch.no_grad():
            by_hand, saved = reference.forward(x, layer.weight, layer.bias, EPS)
            dx, dgamma, dbeta = reference.backward(dy, saved)
        assert_close(y, by_hand)
        assert_close(x.grad, dx)
        assert_close(layer.weight.grad, dgamma)
        assert_close(layer.bias.grad, dbeta)

    def test_the_papers_backward_is_autograds_of_its_forward(self, shape: tuple[int, ...]) -> None:
        layer, x, dy = _layer(), _input(shape).requires_grad_(), _input(shape, seed=1)
        y, saved = reference.forward(x, layer.weight, layer.bias, EPS)
        with torch.no_grad():
            by_hand = reference.backward(dy, saved)
        by_autograd = torch.autograd.grad((y * dy).sum(), (x, layer.weight, layer.bias))
        assert_close(by_hand, by_autograd)

    def test_gradcheck_training_and_inference(self, shape: tuple[int, ...]) -> None:
        layer, x = _layer(), _input(shape).requires_grad_()
        layer.running_var.fill_(2.0)
        for training in (True, False):
            layer.train(training)
            assert torch.autograd.gradcheck(
                lambda x, *_: layer(x), (x, layer.weight, layer.bias), fast_mode=True
            )

    def test_equals_pytorchs_layer(self, shape: tuple[int, ...]) -> None:
        theirs: nn.Module = nn.BatchNorm1d(4) if len(shape) == 2 else nn.BatchNorm2d(4)
        ours, x = BatchNorm(4), _input(shape).float()
        assert torch.equal(ours(x), theirs(x))
        ours.load_state_dict(
            {k: v for k, v in theirs.state_dict().items() if k != "num_batches_tracked"}
        )
        assert torch.equal(ours.eval()(x), theirs.eval()(x))

    def test_output_is_normalized(self, shape: tuple[int, ...]) -> None:
        layer = BatchNorm(4, eps=1e-12).double()
        rows = _by_feature(layer(_input(shape)))
        assert_close(rows.mean(1), torch.zeros(4).double(), atol=1e-9, rtol=0)
        assert_close(rows.var(1, correction=0), torch.ones(4).double())


class TestInvariants:
    """Section 3.3: BN(Wu) does not depend on the scale of W."""

    @staticmethod
    def _through(scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """BN(scale*W u), and the gradients with respect to u and to scale*W."""
        layer = BatchNorm(4, eps=1e-12).double()
        u = _input((8, 5)).requires_grad_()
        scaled = (_input((4, 5), seed=1) * scale).requires_grad_()
        y = layer(u @ scaled.T)
        y.backward(_input((8, 4), seed=2))
        assert u.grad is not None
        assert scaled.grad is not None
        return y, u.grad, scaled.grad

    @pytest.mark.parametrize("a", [0.25, 3.0, 100.0])
    def test_scale_of_weights(self, a: float) -> None:
        y, du, dw = self._through(1.0)
        y_a, du_a, dw_a = self._through(a)
        assert_close(y_a, y)
        assert_close(du_a, du)
        assert_close(dw_a, dw / a)


class TestMoments:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_training_writes_them_into_columns_of_a_shared_buffer(
        self, shape: tuple[int, ...]
    ) -> None:
        moments, statistics = torch.full((3, 9), torch.nan), torch.zeros(2, 9)
        layer, x = _layer(torch.float32), _input(shape).float()
        layer.bind(moments=moments[:, 2:6], statistics=statistics[:, 2:6])
        layer(x)
        rows = _by_feature(x)
        assert torch.equal(moments[0, 2:6], torch.full((4,), float(rows.shape[1])))
        assert_close(moments[1, 2:6], rows.mean(1))
        assert_close(moments[2, 2:6], rows.var(1, correction=1))
        assert moments[:, :2].isnan().all()
        assert moments[:, 6:].isnan().all()
        assert not statistics.any()

    def test_a_good_batch_follows_a_bad_one(self) -> None:
        layer, x = _layer(), _input((6, 4))
        layer(torch.full((6, 4), torch.nan).double())
        assert layer.batch_mean.isnan().all()
        layer(x)
        assert_close(layer.batch_mean, x.mean(0))
        assert_close(layer.batch_variance, x.var(0))

    def test_layers_over_one_buffer_do_not_spoil_each_others_backward(self) -> None:
        moments, statistics = torch.zeros(3, 8), torch.zeros(2, 8)
        layers = nn.Sequential(BatchNorm(4), nn.Sigmoid(), BatchNorm(4))
        for i, layer in enumerate((layers[0], layers[2])):
            assert isinstance(layer, BatchNorm)
            columns = slice(4 * i, 4 * i + 4)
            layer.bind(moments=moments[:, columns], statistics=statistics[:, columns])
        x = _input((6, 4)).float().requires_grad_()
        y = layers(x)
        moments.zero_()
        y.sum().backward()

    def test_a_layer_used_twice_in_a_step_goes_back_through_both(self) -> None:
        layer, x = _layer(), _input((6, 4)).requires_grad_()
        (gradient,) = torch.autograd.grad((layer(x) + layer(2 * x).square()).sum(), x)

        def once(x: Tensor) -> Tensor:
            return functional.batch_norm(
                x, None, None, layer.weight, layer.bias, training=True, eps=EPS
            )

        (expected,) = torch.autograd.grad((once(x) + once(2 * x).square()).sum(), x)
        assert_close(gradient, expected)

    def test_inference_leaves_them_alone(self) -> None:
        layer = _layer().eval()
        layer(_input((1, 4)))
        assert not layer.batch_count.any()

    def test_are_not_in_the_state_dict(self) -> None:
        assert list(BatchNorm(4).state_dict()) == list(nn.BatchNorm1d(4).state_dict())


class TestAlgorithm2:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_inference_is_the_fixed_linear_map(self, shape: tuple[int, ...]) -> None:
        layer, x = _layer().eval(), _input(shape)
        layer.running_mean.copy_(torch.tensor([1.0, -2.0, 0.0, 5.0]))
        layer.running_var.copy_(torch.tensor([4.0, 0.25, 1.0, 9.0]))
        scale, shift = inference_map(
            layer.weight, layer.bias, layer.running_mean, layer.running_var, EPS
        )
        expected = scale[:, None] * _by_feature(x) + shift[:, None]
        assert_close(_by_feature(layer(x)), expected)

    def test_inference_reads_the_bound_statistics(self) -> None:
        layer, x = BatchNorm(4).eval(), _input((2, 4)).float()
        statistics = torch.tensor([[0.0] * 4, [1.0] * 4])
        layer.bind(moments=torch.zeros(3, 4), statistics=statistics)
        before = layer(x)
        statistics[0] += 1
        assert_close(layer(x), before - 1 / (1 + layer.eps) ** 0.5)


class TestErrors:
    @pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 4), (2, 3, 4, 4)])
    def test_other_shapes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(BatchError, match=r"it takes \[m, 4\], or \[m, 4, \.\.\.\]"):
            BatchNorm(4)(torch.zeros(shape))

    @pytest.mark.parametrize("shape", [(1, 4), (0, 4), (1, 4, 1, 1)])
    def test_one_value_per_feature_in_training(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(BatchError, match="mini-batches of 2 examples or more") as caught:
            BatchNorm(4)(torch.zeros(shape))
        assert "\n" not in str(caught.value)

    def test_one_image_of_many_positions_trains(self) -> None:
        assert BatchNorm(4)(torch.zeros(1, 4, 2, 2)).shape == (1, 4, 2, 2)

    def test_buffers_of_another_shape_or_type(self) -> None:
        with pytest.raises(LayoutError, match=r"moments is torch.float32 \[2, 4\]"):
            BatchNorm(4).bind(moments=torch.zeros(2, 4), statistics=torch.zeros(2, 4))
        with pytest.raises(LayoutError, match=r"statistics is torch\.float64"):
            BatchNorm(4).bind(moments=torch.zeros(3, 4), statistics=torch.zeros(2, 4).double())

    def test_options(self) -> None:
        with pytest.raises(ModelError, match="num_features is 0"):
            BatchNorm(0)
        with pytest.raises(ModelError, match=r"eps is 0\.0"):
            BatchNorm(4, eps=0.0)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5)])
def test_mini_batches_together_are_normalized_each_by_itself(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    k, parts = 4, [torch.randn(*shape, requires_grad=True) for _ in range(4)]
    together, alone = BatchNorm(3), BatchNorm(3)
    for layer in (together, alone):
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(2))
    moments = torch.full((3, k * 3), torch.nan)
    together.bind(moments=moments, statistics=torch.zeros(2, 3), together=k)
    rows = torch.stack([p.detach() for p in parts], 1).flatten(0, 1).requires_grad_()
    y = together(rows)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    assert rows.grad is not None
    for j, part in enumerate(parts):
        z = alone(part)
        assert_close(y[j::k], z)
        (z * weight[j::k]).sum().backward()
        assert_close(rows.grad[j::k], part.grad)
        columns = slice(3 * j, 3 * (j + 1))
        for row, own in enumerate((alone.batch_count, alone.batch_mean, alone.batch_variance)):
            assert_close(moments[row, columns], own)
    assert_close(together.weight.grad, alone.weight.grad)
    assert_close(together.bias.grad, alone.bias.grad)

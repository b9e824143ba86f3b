"""The batch normalization layer: Algorithm 1 in training, Algorithm 2 in inference.

Here: the layer, and Algorithm 2's fixed linear map. Not here: how population statistics come
from many mini-batches (`moments`), the equations by hand (`reference`), folding (`fold`), PyTorch's
own layers made into this one (`convert`).

Ioffe & Szegedy 2015, sections 3, 3.1 and 3.2.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.models.errors import BatchError, LayoutError, ModelError

DEFAULT_EPS = 1e-5
"""Added to the variance. The paper leaves its value open; this is the customary one."""


class Pass:
    """Tells a model's layers one forward pass in training from the next.

    A hook before the model's forward (`FlatModel` puts it there). It zeroes the moments, so a layer
    that the pass leaves out has a count of 0, and a layer knows its second use in a pass from its
    first.
    """

    def __init__(self) -> None:
        self.number = 0
        """Passes begun."""
        self.moments: Tensor | None = None
        """Those of all layers, float32 `[3, k*F]`."""

    def __call__(self, module: nn.Module, _: object) -> None:
        """Begin a pass, if the model is training."""
        if module.training and self.moments is not None:
            self.number += 1
            self.moments.zero_()


class BatchNorm(nn.Module):
    """Batch normalization of `[m, C]` or, per feature map (section 3.2), of `[m, C, p, q]`.

    A feature map may have one dimension, two or three: `[m, C, ...]`. Training (Algorithm 1), over
    the `n` values of each feature, `n = m` or `n = m*p*q`::

        mu = sum(x)/n    var = sum((x - mu)^2)/n        (biased: divided by n)
        y  = gamma * (x - mu)/sqrt(var + eps) + beta

    and the gradient flows through `mu` and `var`. Inference (Algorithm 2)::

        y = gamma/sqrt(Var + eps) * x + (beta - gamma*E/sqrt(Var + eps))

    with the population's mean `E` and unbiased variance `Var`.

    The layer keeps **no running averages**. Every step of every replica sees a mini-batch, so
    averages kept here would be one set per replica, none of them the run's. Instead a training
    forward leaves its mini-batch's moments in `batch_count`, `batch_mean` and `batch_variance`
    (**unbiased**: divided by `n - 1`), whoever pushes the gradient pushes them too, and the
    server merges them; inference reads what the server made of them from `running_mean` and
    `running_var`. A later training forward replaces these moments.

    **Used twice, or not at all.** A layer may be used several times in a `Pass`. Each use is then
    a mini-batch of its own, as it is to PyTorch's layers: the count is the sum over the uses, and
    mean and variance are the averages of theirs. A layer that a pass leaves out has a count of 0,
    which says that there is nothing to merge. So does a layer in inference mode inside a model that
    trains (frozen BN); it normalizes with its statistics.

    **Mini-batches together.** With `together = k > 1` a training forward takes k mini-batches of
    m examples at once, example i of mini-batch j in row `i*k + j` (`interleaved`), and normalizes
    each by its own moments, as Algorithm 1 demands: `[m*k, C, ...]` is `[m, k*C, ...]` in the same
    memory, so one kernel sees k*C features. `in_blocks`, mini-batch j is in rows `j*m` to
    `(j+1)*m` instead, and a kernel sees each of them: feature maps in channels-last order stay in
    it, which the other way would have to change. The moments are `[k*C]` either way, mini-batch
    by mini-batch.

    All five are float32 `[C]` and belong to the layer until `bind` points them at columns of
    shared buffers, where the first three are `[k*C]`. The last two start as 0 and 1, and are in the
    `state_dict` under the names that PyTorch's layers use; the first three are scratch and are not.
    `num_batches_tracked`, int64, is there for those names' sake: it says how many mini-batches the
    statistics had seen when they came here.

    Parameters: `weight` is gamma, `[C]`, initially 1; `bias` is beta, `[C]`, initially 0. A layer
    converted from PyTorch's may lack either.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    batch_count: Tensor
    batch_mean: Tensor
    batch_variance: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    together: int
    in_blocks = False
    momentum: float | None
    """Share of a new mini-batch in the moving averages, as PyTorch counts it, for a layer that was
    made with one; None is the plain average. Of no meaning unless `own_momentum`."""
    own_momentum = False
    """Whether `momentum` holds, and not the run's rule."""
    _pass: Pass | None = None
    _last_pass = 0
    _uses = 0

    def __init__(self, num_features: int, *, eps: float = DEFAULT_EPS) -> None:
        super().__init__()
        if num_features < 1:
            raise ModelError(f"num_features is {num_features}: give at least 1")
        if not eps > 0:
            raise ModelError(f"eps is {eps}: give a positive number, such as {DEFAULT_EPS}")
        self.num_features = num_features
        self.eps = eps
        self.momentum = None
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self._add_moments()

    def _add_moments(self) -> None:
        self.together = 1
        for name in ("batch_count", "batch_mean", "batch_variance"):
            room = torch.zeros(self.num_features, device=self.running_mean.device)
            self.register_buffer(name, room, persistent=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """A state without `num_batches_tracked` leaves it as it is, as PyTorch's old ones do."""
        key = f"{prefix}num_batches_tracked"
        with_count = {key: self.num_batches_tracked, **state_dict}
        super()._load_from_state_dict(with_count, prefix, *args)

    def bind(
        self,
        *,
        moments: Tensor,
        statistics: Tensor,
        together: int = 1,
        in_blocks: bool = False,
        within: Pass | None = None,
    ) -> None:
        """Points the layer at the caller's memory; copies nothing.

        `moments` is float32 `[3, k*C]` (count, mean, unbiased variance; k is `together`), written
        by each training forward. `statistics` is float32 `[2, C]` (mean, unbiased variance of the
        population), read by inference. Both may be column ranges of wider buffers. What `moments`
        holds beforehand does not matter, NaN included.

        Raises:
            LayoutError: another shape or dtype.
        """
        columns = together * self.num_features
        for what, tensor, shape in (
            ("moments", moments, (3, columns)),
            ("statistics", statistics, (2, self.num_features)),
        ):
            if tensor.shape != shape or tensor.dtype != torch.float32:
                raise LayoutError(
                    f"{what} is {tensor.dtype} {list(tensor.shape)}: this layer takes "
                    f"torch.float32 {list(shape)}"
                )
        self.together, self.in_blocks = together, in_blocks
        self._pass = within
        # Autograd keeps the tensors that its kernel was given and refuses to go back once they were
        # written to. Views share one such count, so one layer's moments would spoil another's;
        # `.data` has a count of its own.
        self.batch_count, self.batch_mean, self.batch_variance = (row.data for row in moments)
        self.running_mean, self.running_var = statistics[0], statistics[1]

    def unbind(self, together: int, in_blocks: bool = False) -> None:
        """Gives the layer moments of its own, `[k*C]`, for so many mini-batches at a time.

        They have the dtype of the statistics, so a layer that was made float64 stays so.
        """
        self.together, self.in_blocks = together, in_blocks
        self._pass = None
        columns, like = together * self.num_features, self.running_mean
        self.batch_count, self.batch_mean, self.batch_variance = (
            torch.zeros(columns, dtype=like.dtype, device=like.device) for _ in range(3)
        )

    def leave_pass(self) -> None:
        """Belong to no model: every use is the first of its pass."""
        self._pass = None

    @property
    def has_run(self) -> bool:
        """Whether the layer has left moments in the present pass."""
        number = 0 if self._pass is None else self._pass.number
        return number > 0 and number == self._last_pass

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes `x`, `[m, C, ...]`, by its own moments or the population's.

        Raises `BatchError` for another shape and, in training, for one value per feature: its
        variance is 0 and says nothing.
        """
        return self._normalize(x, self.training)

    def _normalize(
        self,
        x: Tensor,
        by_batch: bool,
        weights: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> Tensor:
        """`weights` are gamma and beta if they are not the layer's own."""
        weight, bias = weights or (self.weight, self.bias)
        if x.ndim < 2 or x.shape[1] != self.num_features:
            c = self.num_features
            raise BatchError(
                f"batch normalization got an input of shape {list(x.shape)}: "
                f"it takes [m, {c}], or [m, {c}, ...] for feature maps"
            )
        if not by_batch:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, weight, bias, eps=self.eps
            )
        shape = x.shape
        blocks = self.together if self.in_blocks else 1
        if self.together > blocks:
            x = x.reshape(shape[0] // self.together, -1, *shape[2:])
            weight, bias = self._repeated(weight), self._repeated(bias)
        count = x.numel() // max(x.shape[1], 1) // blocks
        if count < 2:
            raise BatchError(
                f"batch normalization got {count} value per feature to train on "
                f"(input of shape {list(shape)}): use mini-batches of 2 examples or more"
            )
        again = self.has_run
        mean, variance = self._room(again)
        # With momentum 1 the kernel's update, 0*old + 1*new, leaves this mini-batch's mean and
        # unbiased variance: the very numbers to push, without another pass over x. It is also
        # why old contents must go first: 0*NaN is NaN, and would last forever.
        if blocks > 1:
            y = _normalize_blocks(x, weight, bias, mean, variance, blocks, self.eps)
        else:
            y = functional.batch_norm(
                x, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps
            )
        if again:
            self._pool(count, mean, variance)
        else:
            # (`.data`: see `bind`.)
            self.batch_count.data.fill_(count)
        return y if self.together == 1 else y.reshape(shape)

    def _repeated(self, values: Tensor | None) -> Tensor | None:
        """Gamma or beta, `[C]`, for each of the mini-batches together: `[k*C]`."""
        return None if values is None else values.expand(self.together, -1).reshape(-1)

    def _room(self, again: bool) -> tuple[Tensor, Tensor]:
        """Zeros for mean and variance of this use: where they belong, if it is the first."""
        if again:
            self._uses += 1
            return torch.zeros_like(self.batch_mean), torch.zeros_like(self.batch_variance)
        self._uses = 1
        if self._pass is None or self._pass.number == 0:
            self.batch_mean.data.zero_()
            self.batch_variance.data.zero_()
        else:
            self._last_pass = self._pass.number
        return self.batch_mean, self.batch_variance

    def _pool(self, count: int, mean: Tensor, variance: Tensor) -> None:
        """Take in one more use: the averages over uses, and the sum of the counts."""
        self.batch_count.data.add_(count)
        self.batch_mean.data.lerp_(mean, 1 / self._uses)
        self.batch_variance.data.lerp_(variance, 1 / self._uses)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return f"{self.num_features}, eps={self.eps}"


class _BlockNorm(torch.autograd.Function):
    """Batch normalization of k mini-batches that lie one after the other, each by itself.

    PyTorch's own kernels, one call a mini-batch, with what they give left where it belongs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        k: int,
        eps: float,
    ) -> Tensor:
        """`x` `[k*m, C, ...]`; `mean` and `variance` `[k*C]`, zeros, are overwritten."""
        layout = _memory_format(x)
        x = x.contiguous(memory_format=layout)
        y = torch.empty_like(x)
        means, variances = mean.view(k, -1), variance.view(k, -1)
        saved = mean.new_empty(2 * k, means.shape[1])
        parts, rows = _blocks(x, k), [saved[i] for i in range(2 * k)]
        for j, (part, out) in enumerate(zip(parts, _blocks(y, k), strict=True)):
            torch.native_batch_norm(
                part,
                weight,
                bias,
                means[j],
                variances[j],
                True,
                1.0,
                eps,
                out=(out, rows[j], rows[k + j]),
            )
        ctx.save_for_backward(weight, *parts, *rows)
        ctx.k, ctx.eps, ctx.layout = k, eps, layout
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Of the output `[k*m, C, ...]`; gives those of `x`, `weight` and `bias`."""
        weight, *saved = ctx.saved_tensors
        k, wanted = ctx.k, list(ctx.needs_input_grad[:3])
        parts, means, scales = saved[:k], saved[k : 2 * k], saved[2 * k :]
        given = gradients[0].contiguous(memory_format=ctx.layout)
        found = [
            torch.ops.aten.native_batch_norm_backward(
                dy, part, weight, None, None, mean, scale, True, ctx.eps, wanted
            )
            for dy, part, mean, scale in zip(_blocks(given, k), parts, means, scales, strict=True)
        ]
        by_x, by_weight, by_bias = zip(*found, strict=True)
        return (
            torch.cat(by_x) if wanted[0] else None,
            torch.stack(by_weight).sum(0) if wanted[1] else None,
            torch.stack(by_bias).sum(0) if wanted[2] else None,
            *(None,) * 4,
        )


def _normalize_blocks(*arguments: Any) -> Tensor:
    y: Tensor = _BlockNorm.apply(*arguments)  # type: ignore[no-untyped-call]
    return y


def _blocks(rows: Tensor, k: int) -> list[Tensor]:
    """Rows `[k*m, ...]` as k views `[m, ...]`."""
    m = len(rows) // k
    return [rows.narrow(0, j * m, m) for j in range(k)]


def _memory_format(x: Tensor) -> torch.memory_format:
    """The order in which `x` lies, if it is one for which PyTorch has fast kernels."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def inference_map(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 2, step 11: `(scale, shift)`, each `[C]`, such that inference is `scale*x + shift`.

    `mean` and `variance` (unbiased) are the population's; all arguments are `[C]`. Without gamma it
    is 1, without beta 0.
    """
    scale = torch.rsqrt(variance + eps) if gamma is None else gamma / torch.sqrt(variance + eps)
    shift = -mean * scale
    return scale, shift if beta is None else beta + shift

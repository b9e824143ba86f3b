"""The batch normalization layer: Algorithm 1 in training, Algorithm 2 in inference.

Here: the layer, and Algorithm 2's fixed linear map. Not here: how population statistics come
from many mini-batches (`moments`), the equations by hand (`reference`), folding (`fold`).

Ioffe & Szegedy 2015, sections 3, 3.1 and 3.2.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.models.errors import BatchError, LayoutError, ModelError

DEFAULT_EPS = 1e-5
"""Added to the variance. The paper leaves its value open; this is the customary one."""


class BatchNorm(nn.Module):
    """Batch normalization of `[m, C]` or, per feature map (section 3.2), of `[m, C, p, q]`.

    Training (Algorithm 1), over the `n = m` or `n = m*p*q` values of each feature::

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
    `running_var`. A second training forward replaces the moments of the first.

    **Mini-batches together.** With `together = k > 1` a training forward takes k mini-batches of
    m examples at once, example i of mini-batch j in row `i*k + j` (`interleaved`), and normalizes
    each by its own moments, as Algorithm 1 demands: `[m*k, C, ...]` is `[m, k*C, ...]` in the same
    memory, so one kernel sees k*C features. The moments are then `[k*C]`, mini-batch by
    mini-batch.

    All five are float32 `[C]` and belong to the layer until `bind` points them at columns of
    shared buffers, where the first three are `[k*C]`. The last two start as 0 and 1, and are in the
    `state_dict` under the names that PyTorch's layers use; the first three are scratch and are not.

    Parameters: `weight` is gamma, `[C]`, initially 1; `bias` is beta, `[C]`, initially 0.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    batch_count: Tensor
    batch_mean: Tensor
    batch_variance: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, *, eps: float = DEFAULT_EPS) -> None:
        super().__init__()
        if num_features < 1:
            raise ModelError(f"num_features is {num_features}: give at least 1")
        if not eps > 0:
            raise ModelError(f"eps is {eps}: give a positive number, such as {DEFAULT_EPS}")
        self.num_features = num_features
        self.eps = eps
        self.together = 1
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        for name in ("batch_count", "batch_mean", "batch_variance"):
            self.register_buffer(name, torch.zeros(num_features), persistent=False)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def bind(self, *, moments: Tensor, statistics: Tensor, together: int = 1) -> None:
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
        self.together = together
        # Autograd keeps the tensors that its kernel was given and refuses to go back once they were
        # written to. Views share one such count, so one layer's moments would spoil another's;
        # `.data` has a count of its own.
        self.batch_count, self.batch_mean, self.batch_variance = (row.data for row in moments)
        self.running_mean, self.running_var = statistics[0], statistics[1]

    def unbind(self, together: int) -> None:
        """Gives the layer moments of its own, `[k*C]`, for so many mini-batches at a time.

        They have the dtype of the weights, so a layer that was made float64 stays so.
        """
        self.together = together
        columns = together * self.num_features
        self.batch_count, self.batch_mean, self.batch_variance = (
            torch.zeros(columns, dtype=self.weight.dtype, device=self.weight.device)
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes `x`, `[m, C]` or `[m, C, p, q]`, by its own moments or the population's.

        Raises `BatchError` for another shape and, in training, for one value per feature: its
        variance is 0 and says nothing.
        """
        if x.ndim not in (2, 4) or x.shape[1] != self.num_features:
            c = self.num_features
            raise BatchError(
                f"batch normalization got an input of shape {list(x.shape)}: "
                f"it takes [m, {c}] or [m, {c}, p, q]"
            )
        if not self.training:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        shape = x.shape
        if self.together > 1:
            x = x.reshape(shape[0] // self.together, -1, *shape[2:])
            weight = weight.expand(self.together, -1).reshape(-1)
            bias = bias.expand(self.together, -1).reshape(-1)
        count = x.numel() // x.shape[1]
        if count < 2:
            raise BatchError(
                f"batch normalization got {count} value per feature to train on "
                f"(input of shape {list(shape)}): use mini-batches of 2 examples or more"
            )
        # With momentum 1 the kernel's update, 0*old + 1*new, leaves this mini-batch's mean and
        # unbiased variance: the very numbers to push, without another pass over x. It is also
        # why old contents must go first: 0*NaN is NaN, and would last forever.
        # (`.data`: a layer used twice in a step must not spoil its own first use, see `bind`.)
        self.batch_count.data.fill_(count)
        self.batch_mean.data.zero_()
        self.batch_variance.data.zero_()
        y = functional.batch_norm(
            x,
            self.batch_mean,
            self.batch_variance,
            weight,
            bias,
            training=True,
            momentum=1.0,
            eps=self.eps,
        )
        return y if self.together == 1 else y.reshape(shape)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return f"{self.num_features}, eps={self.eps}"


def inference_map(
    gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 2, step 11: `(scale, shift)`, each `[C]`, such that inference is `scale*x + shift`.

    `mean` and `variance` (unbiased) are the population's; all arguments are `[C]`.
    """
    scale = gamma / torch.sqrt(variance + eps)
    return scale, beta - mean * scale

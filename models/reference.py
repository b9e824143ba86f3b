"""Algorithm 1 and its gradient, equation by equation, in plain tensors.

The oracle that tests hold `batchnorm.BatchNorm` to, and the place to read what it computes. Not
for training: every line is a pass over memory.

Ioffe & Szegedy 2015, Algorithm 1 and the chain rule that follows it in section 3; section 3.2
for feature maps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Saved:
    """What the forward pass leaves for the backward pass."""

    x: Tensor
    """The input, `[m, C]` or `[m, C, p, q]`."""
    gamma: Tensor
    """The scale, `[C]`."""
    mean: Tensor
    """mu, broadcastable to `x`."""
    variance: Tensor
    """The biased variance, broadcastable to `x`."""
    normalized: Tensor
    """xhat, shaped as `x`."""
    eps: float
    """Added to the variance."""


def _axes(x: Tensor) -> tuple[int, ...]:
    """The axes that a feature's values lie along: all but the second."""
    return tuple(axis for axis in range(x.ndim) if axis != 1)


def _column(values: Tensor, x: Tensor) -> Tensor:
    """`values`, `[C]`, shaped to broadcast over `x`."""
    return values.reshape(1, -1, *(1 for _ in range(x.ndim - 2)))


def forward(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Saved]:
    """Algorithm 1 on `x`, `[m, C]` or `[m, C, p, q]`, with `gamma` and `beta`, `[C]`."""
    axes = _axes(x)
    n = x.numel() // x.shape[1]
    mean = x.sum(axes, keepdim=True) / n
    variance = (x - mean).square().sum(axes, keepdim=True) / n
    normalized = (x - mean) / torch.sqrt(variance + eps)
    y = _column(gamma, x) * normalized + _column(beta, x)
    saved = Saved(x=x, gamma=gamma, mean=mean, variance=variance, normalized=normalized, eps=eps)
    return y, saved


def backward(dy: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """`(dx, dgamma, dbeta)`: the loss's gradient, given `dy`, that with respect to `y`.

    The chain rule of section 3, in the paper's order.
    """
    x, mean, shifted = saved.x, saved.mean, saved.variance + saved.eps
    axes = _axes(x)
    n = x.numel() // x.shape[1]
    dxhat = dy * _column(saved.gamma, x)
    dvariance = (dxhat * (x - mean)).sum(axes, keepdim=True) * -0.5 * shifted.pow(-1.5)
    dmean = -dxhat.sum(axes, keepdim=True) / torch.sqrt(shifted)
    # The second term is zero in exact arithmetic; the paper has it, and so it stands.
    dmean = dmean + dvariance * (-2 * (x - mean)).sum(axes, keepdim=True) / n
    dx = dxhat / torch.sqrt(shifted) + dvariance * 2 * (x - mean) / n + dmean / n
    return dx, (dy * saved.normalized).sum(axes), dy.sum(axes)

"""How far two estimates of the BN statistics lie apart, in the units that the network feels."""

from __future__ import annotations

import torch
from torch import Tensor

from downpour.models.batchnorm import DEFAULT_EPS


def disagreement(kept: Tensor, recomputed: Tensor, eps: float = DEFAULT_EPS) -> float:
    """Root mean square over features of how much normalized values change; 0 where they agree.

    Both are `[2, F]`: mean and unbiased variance. A value x that is normalized by one pair and by
    the other differs by `(x - a)/s - (x - b)/t`; for x distributed as the second pair says, its
    mean square is `((b - a)/s)^2 + (t/s - 1)^2`, which is averaged over the features.
    """
    mean_a, var_a = kept.double()
    mean_b, var_b = recomputed.double()
    s, t = torch.sqrt(var_a + eps), torch.sqrt(var_b + eps)
    square = ((mean_b - mean_a) / s).square() + (t / s - 1).square()
    return float(square.mean().sqrt()) if square.numel() else 0.0

"""The precision that a step computes in; weights, gradients, moments and the server are float32.

Micikevicius et al., "Mixed Precision Training", 2018, section 3.1: a float32 master copy of the
weights. Bfloat16 has float32's range, so no loss is scaled (Kalamkar et al., "A Study of BFLOAT16
for Deep Learning Training", 2019). Float16 has not: see `workers.step.loss_scale`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from downpour.workers.spec import Precision


def computing_in(precision: Precision, device: str = "cpu") -> AbstractContextManager[Any]:
    """Return a context in which a forward pass computes in `precision`.

    With `bfloat16` and `float16`, matrix products and convolutions take and give it under PyTorch's
    autocast. Batch normalization takes its moments in float32 from such inputs, and losses are
    float32, as are the gradients that autograd leaves for float32 weights. Float16 is for GPUs:
    what a processor does for such a run, a trial before it say, it computes in float32.

    Args:
        precision: of the forward pass, and so of the backward pass.
        device: a device's type, as `torch.autocast` takes it.
    """
    if precision == "float32" or (precision == "float16" and device == "cpu"):
        return nullcontext()
    return torch.autocast(device, dtype=getattr(torch, precision))

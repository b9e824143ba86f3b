"""Tensors that are the same up to rounding, for the tests that developers run at each save."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TOLERANCES = {torch.float32: (1.3e-6, 1e-5), torch.float64: (1e-7, 1e-7)}
"""Relative and absolute, as `torch.testing.assert_close` has them."""


def assert_close(
    found: Tensor | Sequence[Tensor],
    expected: Tensor | Sequence[Tensor],
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """What `torch.testing.assert_close` asserts, which loads torch's distributed tensors first.

    Args:
        found: any shape, any dtype that numpy has; or several.
        expected: of the same shape and dtype; or as many.
        rtol: relative to `expected`; by default as the dtype has it, and 0 for integers.
        atol: likewise.
    """
    if not isinstance(found, Tensor):
        assert not isinstance(expected, Tensor)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, rtol=rtol, atol=atol)
        return
    assert isinstance(expected, Tensor)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    relative, absolute = TOLERANCES.get(found.dtype, (0.0, 0.0))
    np.testing.assert_allclose(
        found.detach().numpy(),
        expected.detach().numpy(),
        rtol=relative if rtol is None else rtol,
        atol=absolute if atol is None else atol,
        equal_nan=False,
    )

"""Building a module for its shapes alone: without memory, values, or the time that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FILLS: frozenset[Callable[..., Any]] = frozenset(
    {
        nn.init.uniform_,
        nn.init.normal_,
        nn.init.trunc_normal_,
        nn.init.kaiming_uniform_,
        nn.init.kaiming_normal_,
        nn.init.xavier_uniform_,
        nn.init.xavier_normal_,
        Tensor.uniform_,
        Tensor.normal_,
    }
)
"""What draws a tensor's values at random, and gives that tensor."""


class _NoValues(TorchFunctionMode):
    """Leaves tensors without values as they are.

    On the meta device PyTorch goes through Python for these, and imports its compiler to do so:
    800 modules, a second of every process's start.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Tensors that are made in here are on the meta device, and random values are not drawn."""
    with torch.device("meta"), _NoValues():
        yield

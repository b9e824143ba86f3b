"""A graph of kernels as a GPU has it, on plain memory: what was captured, where it was captured.

A list of the kernels that a piece of work called, bound to the very tensors. Python decides nothing
any more in a replay. Whatever the work allocated holds NaN in between, as if others had used that
memory, so a tensor that nobody computes anew shows in the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
LOOKS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default}


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in LOOKS:
            raise RuntimeError(f"{func} is not permitted while kernels are captured")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, *map(where_they_lie, (args, kwargs or {}, result))))
        return result


class TapeGraph:
    """Implements `workers.step.device.Graph`."""

    def __init__(self, work: Callable[[], object]) -> None:
        """Has to run the work once, where a GPU would only note it."""
        with _Tape() as tape:
            work()
        self._calls = tape.calls
        outside, self._made = set[int](), dict[int, Tensor]()
        for _, args, kwargs, result in self._calls:
            for tensor in tensors((args, kwargs)):
                if address(tensor) not in self._made:
                    outside.add(address(tensor))
            for tensor in tensors(result):
                if address(tensor) not in outside:
                    self._made.setdefault(address(tensor), tensor)
        self.replays = 0
        self._spoil()

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, result in self._calls:
                found = func(*args, **kwargs)
                used = {address(tensor) for tensor in tensors((args, kwargs))}
                for old, new in zip(tensors(result), tensors(found), strict=True):
                    if address(old) not in used:  # neither a view nor in place
                        old.copy_(new)
            self._spoil()

    def _spoil(self) -> None:
        for tensor in self._made.values():
            if tensor.is_floating_point():
                tensor.detach().fill_(torch.nan)


def where_they_lie(value: Any) -> Any:
    """The same tensors, wherever a parameter may be pointed later."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {name: where_they_lie(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(where_they_lie, value))
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

"""Copies of modules on memory of their own."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from downpour.models.batchnorm import BatchNorm, Pass

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def detached_copy(module: ModuleT, *, values: bool = True) -> ModuleT:
    """A deep copy whose tensors own their memory, apart from any `FlatModel` of the module.

    Plain `deepcopy` would copy the whole flat buffer that a parameter is a view of, and its
    gradient as well. It also refuses the weights that `nn.utils.weight_norm` computes and keeps.

    Args:
        module: to copy.
        values: whether parameters have the module's values, or none in particular.
    """
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        data = parameter.detach()
        own = data.clone() if values else torch.empty_like(data)
        memo[id(parameter)] = nn.Parameter(own, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        for number, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, Pass):
                del part._forward_pre_hooks[number]
        if isinstance(part, BatchNorm):
            part.leave_pass()
    return copied

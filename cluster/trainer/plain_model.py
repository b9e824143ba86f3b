"""A run's network as a plain PyTorch module: batch normalization is PyTorch's own."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError, one_line, user_message
from downpour.models.batchnorm import BatchNorm

NOT_IN_FILES = ("num_batches_tracked", "_extra_state")
"""Parts of a `state_dict` that files of weights need not have."""


def plain_model(config: RunConfig, weights: Path) -> nn.Module:
    """The network of a run, in inference mode.

    Args:
        config: of the run.
        weights: a safetensors file under PyTorch's names.

    Raises:
        UserError: the network cannot be built, or the weights are of another one.
    """
    try:
        module = model_spec(config).build()
        state = safetensors.torch.load_file(str(weights))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"the weights {weights} cannot be read: {one_line(error)}") from None
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        raise UserError(message) from error
    ours = {name: layer for name, layer in module.named_modules() if isinstance(layer, BatchNorm)}
    if ours:
        ranks = _ranks(module, ours, config)
        for name, layer in ours.items():
            module.set_submodule(name, _plain(layer, ranks.get(name, 4)))
    missing, unknown = module.load_state_dict(state, strict=False)
    missing, unknown = (
        [name for name in names if name.rpartition(".")[2] not in NOT_IN_FILES]
        for names in (missing, unknown)
    )
    if missing or unknown:
        raise UserError(
            f"the weights {weights} lack {missing or 'nothing'} and have {unknown or 'nothing'} "
            "besides: the network's factory makes another network than in training"
        )
    return module.eval()


def _plain(layer: BatchNorm, rank: int) -> nn.Module:
    """PyTorch's layer for inputs of that many dimensions, with the same parameters."""
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    plain = kinds[rank](layer.num_features, eps=layer.eps)
    assert layer.weight is not None
    assert layer.bias is not None
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


def _ranks(module: nn.Module, layers: dict[str, BatchNorm], config: RunConfig) -> dict[str, int]:
    """The number of dimensions of each layer's inputs, seen in one forward pass of zeros."""
    seen: dict[str, int] = {}

    def note(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = inputs[0].ndim

        return layers[name].register_forward_pre_hook(hook)

    hooks = [note(name) for name in layers]
    was_training = module.training
    try:
        with torch.inference_mode():
            module.eval()(torch.zeros(2, *config.model.input.input_shape))
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    return seen

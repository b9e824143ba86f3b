"""Downpour: asynchronous distributed training for batch-normalised networks, on Ray and PyTorch.

A recipe, a script or a notebook needs only the names that are here:

    import downpour

    def recipe() -> downpour.RunConfig: ...

    folder = downpour.train(recipe(), runs="runs")
    result = downpour.Trainer(model=net, config=recipe(), epochs=3).fit()

Every other module is imported by its full name, such as `downpour.paramserver.client`. In a
checkout the parts of this package are links to the folders at the root. `import downpour` imports
neither PyTorch nor Ray; the first use of a name imports its module.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from downpour import callbacks
    from downpour.cluster.config.placement import PlacementConfig
    from downpour.cluster.config.policy import PolicyConfig
    from downpour.cluster.config.run import RunConfig
    from downpour.cluster.errors import UserError
    from downpour.cluster.trainer.result import Result
    from downpour.cluster.trainer.scaling import ScalingConfig
    from downpour.cluster.trainer.trainer import Trainer
    from downpour.cluster.training.api import RunStopped, resume, train
    from downpour.cluster.training.from_data import classifier
    from downpour.models.batchnorm import BatchNorm
    from downpour.models.layers import ConvBN, LinearBN
    from downpour.paramserver.config import NetworkConfig, ServerConfig
    from downpour.paramserver.rules.schedule import Schedule
    from downpour.shuffler.config import DataConfig
    from downpour.shuffler.feed import Feed
    from downpour.shuffler.images.augment import AugmentConfig
    from downpour.shuffler.images.specs import ImageSpec
    from downpour.workers.config import ModelConfig, ReplicaConfig
    from downpour.workers.spec import StepConfig
    from downpour.workers.torch_feed import TorchFeed

__version__ = "0.1.0"

_HOMES = {
    "AugmentConfig": "shuffler.images.augment",
    "BatchNorm": "models.batchnorm",
    "ConvBN": "models.layers",
    "DataConfig": "shuffler.config",
    "Feed": "shuffler.feed",
    "ImageSpec": "shuffler.images.specs",
    "LinearBN": "models.layers",
    "ModelConfig": "workers.config",
    "NetworkConfig": "paramserver.config",
    "PlacementConfig": "cluster.config.placement",
    "PolicyConfig": "cluster.config.policy",
    "ReplicaConfig": "workers.config",
    "Result": "cluster.trainer.result",
    "RunConfig": "cluster.config.run",
    "RunStopped": "cluster.training.api",
    "ScalingConfig": "cluster.trainer.scaling",
    "Schedule": "paramserver.rules.schedule",
    "ServerConfig": "paramserver.config",
    "StepConfig": "workers.spec",
    "TorchFeed": "workers.torch_feed",
    "Trainer": "cluster.trainer.trainer",
    "UserError": "cluster.errors",
    "classifier": "cluster.training.from_data",
    "resume": "cluster.training.api",
    "train": "cluster.training.api",
}
"""Public name -> the module below `downpour` that defines it."""

__all__ = [
    "AugmentConfig",
    "BatchNorm",
    "ConvBN",
    "DataConfig",
    "Feed",
    "ImageSpec",
    "LinearBN",
    "ModelConfig",
    "NetworkConfig",
    "PlacementConfig",
    "PolicyConfig",
    "ReplicaConfig",
    "Result",
    "RunConfig",
    "RunStopped",
    "ScalingConfig",
    "Schedule",
    "ServerConfig",
    "StepConfig",
    "TorchFeed",
    "Trainer",
    "UserError",
    "callbacks",
    "classifier",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import the public name `name` from the module that defines it (PEP 562)."""
    if name == "callbacks":
        return importlib.import_module("downpour.callbacks")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'downpour' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"downpour.{home}"), name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

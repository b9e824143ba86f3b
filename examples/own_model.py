"""A network, a loss and a recipe of one's own, trained through the same system.

From the folder that holds this file's folder:

    downpour train examples.own_model:recipe

The network is any `torch.nn.Module`. Batch normalization is `downpour.BatchNorm`: the parameter
server keeps its statistics. A factory may take `seed`, `num_classes` and `image_size`; its other
arguments stand in the recipe's `arguments`. A loss takes the network's outputs and the labels of a
mini-batch and returns the mean loss.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

import downpour


def network(num_classes: int, channels: int = 8) -> nn.Module:
    """A small convolutional network for 28x28 grey images: `[m, 1, 28, 28] -> [m, classes]`."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 5, stride=2, padding=2, bias=False),
        downpour.BatchNorm(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
        downpour.BatchNorm(2 * channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * 7 * 7, num_classes),
    )


def smoothed_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with a tenth of the weight spread over all classes."""
    return functional.cross_entropy(outputs, targets, label_smoothing=0.1)


def recipe() -> downpour.RunConfig:
    """Three epochs on the bundled digits."""
    return downpour.RunConfig(
        recipe="own-model",
        model=downpour.ModelConfig(
            model="examples.own_model:network",
            arguments={"channels": 8},
            loss="examples.own_model:smoothed_cross_entropy",
            image=downpour.ImageSpec(height=28, width=28, channels=1, binary_threshold=127),
            num_classes=10,
        ),
        data=downpour.DataConfig(batch_size=32),
        server=downpour.ServerConfig(schedule=downpour.Schedule(learning_rate=0.01)),
        # With few steps in flight no long warm start is needed.
        replicas=downpour.ReplicaConfig(
            replicas=4, steps=downpour.StepConfig(concurrent_steps=2), warm_start_epochs=0.1
        ),
        policy=downpour.PolicyConfig(epochs=3),
    )


if __name__ == "__main__":
    model = network(num_classes=10)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(smoothed_cross_entropy(model(torch.zeros(2, 1, 28, 28)), torch.tensor([0, 1])))

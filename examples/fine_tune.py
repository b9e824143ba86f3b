"""Fine-tuning: a network learns one dataset, and begins the next one from there.

From the folder that holds this file's folder, with CIFAR-10 and some other pictures as Parquet:

    downpour train classifier --model examples.fine_tune:network --data DATA/cifar10 \
        --image-size 32 --epochs 3 --learning-rate 0.1 --name before
    downpour train classifier --model examples.fine_tune:network --data DATA/tiny-imagenet-50 \
        --image-size 32 --train-split validation --eval-split train --epochs 8 \
        --learning-rate 0.1 --name after --init runs/before --init-matching

The second run takes every tensor of the first run's model but the head, which has another number
of classes, and says so. It learns from the smaller split, where what was learned before counts, and
is scored on the larger one. The rate is one at which the new head learns. `docs/fine_tuning.md` has
what comes of it.
"""

from collections import OrderedDict

import torch
from torch import nn

import downpour


def block(inputs: int, outputs: int, stride: int) -> nn.Module:
    """A 3x3 convolution with batch normalization; height and width fall by the stride."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        downpour.BatchNorm(outputs),
        nn.ReLU(),
    )


def network(num_classes: int, width: int = 16) -> nn.Module:
    """A small network for colour images of any size: `[m, 3, h, w] -> [m, num_classes]`."""
    body = nn.Sequential(
        block(width, 2 * width, 2),
        block(2 * width, 4 * width, 2),
        block(4 * width, 8 * width, 2),
    )
    parts = OrderedDict(
        stem=block(3, width, 1),
        body=body,
        pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        head=nn.Linear(8 * width, num_classes),
    )
    return nn.Sequential(parts)


if __name__ == "__main__":
    model = network(num_classes=10)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(model(torch.zeros(2, 3, 32, 32)).shape)

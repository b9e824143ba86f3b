"""What a step must multiply and move, counted by hand for a small net."""

import torch
from torch import nn

from downpour.benchmarks.inception.floor import work_of

IMAGES, SIDE, MAPS, CLASSES = 2, 8, 4, 2


def test_the_work_of_a_step_is_that_of_its_kernels() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, MAPS, 3, padding=1, bias=False),
        nn.BatchNorm2d(MAPS),
        nn.ReLU(),
        nn.AvgPool2d(SIDE),
        nn.Flatten(),
        nn.Linear(MAPS, CLASSES),
    )
    inputs, targets = torch.rand(IMAGES, 3, SIDE, SIDE), torch.tensor([0, 1])
    work = work_of(net, inputs, targets, "float32")
    convolution = IMAGES * SIDE * SIDE * MAPS * 3 * 9
    linear = IMAGES * MAPS * CLASSES
    # Forwards, and by the weights; the linear layer's input has a gradient too.
    assert work.multiply_adds == 2 * convolution + 3 * linear
    images, maps = (4 * IMAGES * channels * SIDE * SIDE for channels in (3, MAPS))
    # The convolution's image twice and maps twice; of the normalization 2 and 3; of the pooling 1
    # and 2. Vectors and weights are small beside them.
    large = 2 * images + (2 + 2 + 3 + 1 + 2) * maps
    assert large < work.moved_bytes < 1.15 * large

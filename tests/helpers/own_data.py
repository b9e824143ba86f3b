"""Datasets of a user's own: pictures with masks, and vectors with numbers, by a split's name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

SIDE, ROWS, CLASSES = 8, 96, 3
asked: list[tuple[str, int]] = []
"""Which rows were asked for, in this process."""


class Masks(Dataset[tuple[Tensor, Tensor]]):
    """A bright square on a dark ground, whose class is its colour; a frame does not count."""

    classes = ("ground", "red", "green")

    def __init__(self, split: str) -> None:
        self.split = split
        self.rows = ROWS if split == "train" else 32

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        asked.append((self.split, index))
        generator = torch.Generator().manual_seed(index + 1000 * (self.split == "train"))
        image = 0.3 * torch.rand(2, SIDE, SIDE, generator=generator)
        mask = torch.zeros(SIDE, SIDE, dtype=torch.int64)
        kind = index % 2
        top, left = torch.randint(0, 4, (2,), generator=generator).tolist()
        image[kind, top : top + 4, left : left + 4] += 0.6
        mask[top : top + 4, left : left + 4] = 1 + kind
        mask[0] = 255
        return image, mask


def masks(split: str) -> Masks:
    """What `dataset:tests.helpers.own_data:masks` names."""
    return Masks(split)


class MaskNet(nn.Sequential):
    """A class for each pixel."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__(
            nn.Conv2d(2, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, num_outputs, 1),
        )


def numbers(split: str) -> list[tuple[list[float], float]]:
    """A list is a dataset, too."""
    count = 64 if split == "train" else 16
    return [([i / count, 1.0], 2.0 * i / count) for i in range(count)]


def broken(split: str) -> list[object]:
    """A row that is unlike the others."""
    del split
    return [([1.0, 2.0], 1.0), ([1.0], 2.0), "text"]

"""Networks of six numbers and three classes that do what a recording of a step would not repeat."""

import itertools

import torch
from torch import Tensor, nn


def unrepeatable() -> list[nn.Module]:
    """One of each, new."""
    return [Looks(6, 3), Picks(6, 3), Masks(6, 3), Remembers(), Alternates()]


class Looks(nn.Linear):
    """Decides by a value."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if y.sum().item() > 0 else y


class Picks(nn.Linear):
    """Goes on with as many values as are large: a recording would keep the first number of them."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + y[(y > 0).nonzero()[:, 0]].mean()


class Masks(nn.Linear):
    """Likewise, by a mask."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + y[y > 0].mean()


class Remembers(nn.Linear):
    """Changes a buffer that outlives the step."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        assert isinstance(self.seen, Tensor)
        self.seen.add_(y.detach().mean(0))
        return y - self.seen


class Alternates(nn.Linear):
    """Decides anew each time, outside of PyTorch."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.calls = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + next(self.calls) % 2)


class Scaled(nn.Linear):
    """Has a number that somebody may change."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale

"""Small networks that each have something which a step has to get right."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.models.layers import ConvBN, LinearBN
from downpour.models.layout import Layout
from downpour.models.mlp import MnistNet
from downpour.workers.step.model_copy import Mailbox

NAMES = ["mnist-bn", "mnist", "frozen", "images"]


class Frozen(nn.Module):
    """With a parameter that is not trained, one that has no part in the loss, and a buffer."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = LinearBN(6, 5)
        self.second = nn.Linear(5, 3)
        self.second.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(4))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.scale


class Images(nn.Module):
    """Convolutions, pooling, a branch that is used twice, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(3, 8, 3, stride=2)
        self.branches = nn.ModuleList([ConvBN(8, 4, 1), ConvBN(8, 4, 3)])
        self.output = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.max_pool2d(self.stem(x), 2)
        y = torch.cat([branch(y) for branch in self.branches], 1)
        return self.output(functional.dropout(y.mean((2, 3)), 0.4, self.training))


def build(name: str) -> nn.Module:
    """One of `NAMES`, the same each time."""
    torch.manual_seed(4)
    if name in ("mnist-bn", "mnist"):
        return MnistNet(batch_norm=name == "mnist-bn", seed=1, inputs=6, hidden=(7, 5), classes=3)
    return {"frozen": Frozen, "images": Images}[name]()


def batches(name: str, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Mini-batches of these sizes, the same each time."""
    torch.manual_seed(11)
    shape = (3, 9, 9) if name == "images" else (6,)
    return [(torch.randn(n, *shape), torch.randint(0, 3, (n,))) for n in sizes]


def mailboxes(layout: Layout, count: int) -> list[Mailbox]:
    """Mailboxes for three mini-batches each, with what a step has to write over."""
    return [
        Mailbox(
            i,
            layout,
            torch.full((layout.num_parameters,), 9.0),
            torch.full((3, 3, layout.num_features), 9.0),
        )
        for i in range(count)
    ]

"""MNIST nets of section 4.1 that differ in their choices, trained together.

All of them see the same mini-batches, and begin with the same random numbers, scaled. K nets are
computed as one: their first layers are one matrix product, the others are products in a batch,
and their features are normalised in one call. The loss is the sum of theirs, so no net's
gradient depends on another's. A net computes what `MnistNet` does, but for rounding.

Shapes: B examples, K nets, H = 100 units of a layer, C = 10 classes. The K*H columns of a layer
are those of net 0, then of net 1, and so on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from downpour.cluster.reproduce.choices.choice import Choice, NetLoss, Normalized, initial_std
from downpour.models.batchnorm import DEFAULT_EPS
from downpour.models.layers import LinearBN
from downpour.models.mlp import MnistNet

INPUTS, UNITS, LAYERS, CLASSES = 784, 100, 3, 10
EVALUATION_ROWS = 1_000
"""Rows of a forward pass if no statistics are of the mini-batch."""


class JointNets:
    """K nets, with their parameters, velocities and moving averages."""

    def __init__(self, choices: Sequence[Choice], seed: int) -> None:
        """Begin as `MnistNet` does with `seed`, each net with its own standard deviations.

        Args:
            choices: of the nets; those with one place of BN must follow on one another.
            seed: of the initial weights.
        """
        self.choices = tuple(choices)
        count = len(self.choices)
        self._kinds = _columns_by_kind(self.choices)
        self._losses = _nets_by_loss(self.choices)
        self._weights = _initial_weights(self.choices, seed)
        width = count * UNITS
        self._biases = [torch.zeros(width) for _ in range(LAYERS)]
        self._betas = [torch.zeros(width) for _ in range(LAYERS)]
        gains = torch.tensor([choice.gain for choice in self.choices]).repeat_interleave(UNITS)
        self._gammas = [gains.clone() for _ in range(LAYERS)]
        self._output_bias = torch.zeros(count, 1, CLASSES)
        self._parameters = [
            *self._weights,
            *self._biases,
            *self._betas,
            *self._gammas,
            self._output_bias,
        ]
        for parameter in self._parameters:
            parameter.requires_grad_()
        momenta = torch.tensor([choice.momentum for choice in self.choices])
        self._momenta = momenta if bool(momenta.any()) else None
        self._velocities = [torch.zeros_like(p) for p in self._parameters]
        self.statistics = self.no_statistics()
        """Moving averages of mean and unbiased variance, float32 `[LAYERS, 2, K*H]`."""

    def no_statistics(self) -> Tensor:
        """Return zeros and ones for means and variances, float32 `[LAYERS, 2, K*H]`."""
        statistics = torch.zeros(LAYERS, 2, len(self.choices) * UNITS)
        statistics[:, 1] = 1
        return statistics

    def tensors(self) -> dict[str, Tensor]:
        """Return what training goes on from, by name, in the nets' own memory."""
        named = {f"parameter-{i}": p.detach() for i, p in enumerate(self._parameters)}
        named |= {f"velocity-{i}": v for i, v in enumerate(self._velocities)}
        return named | {"statistics": self.statistics}

    def step(self, inputs: Tensor, labels: Tensor, rates: Tensor, share: float) -> None:
        """Take one step of each net, at its rate.

        Args:
            inputs: float32 `[B, 784]`.
            labels: int64 `[B]`.
            rates: float32 `[K]`.
            share: weight of the mini-batch's statistics in the moving averages.
        """
        logits = self.logits(inputs, self.statistics, share)
        loss = sum(
            (_loss(name, logits[nets], labels) for name, nets in self._losses), torch.zeros(())
        )
        found: Sequence[Tensor | None] = torch.autograd.grad(
            loss, self._parameters, allow_unused=True
        )
        with torch.no_grad():
            for parameter, velocity, gradient in zip(
                self._parameters, self._velocities, found, strict=True
            ):
                if gradient is None:
                    continue
                change = gradient
                if self._momenta is not None:
                    change = velocity.mul_(_of_nets(self._momenta, velocity)).add_(gradient)
                parameter.addcmul_(_of_nets(rates, parameter), change, value=-1)

    def logits(self, inputs: Tensor, statistics: Tensor, share: float | None = None) -> Tensor:
        """Return the logits of all nets, float32 `[K, B, C]`.

        Args:
            inputs: float32 `[B, 784]`.
            statistics: mean and variance of the features, float32 `[LAYERS, 2, K*H]`.
            share: None normalises by `statistics` (Algorithm 2). A number normalises by the
                mini-batch (Algorithm 1), and gives it this weight in `statistics`.
        """
        hidden = inputs
        for layer, weight in enumerate(self._weights[:-1]):
            if layer == 0:
                summed = hidden @ weight
            else:
                by_net = torch.bmm(self._by_net(hidden), weight)
                summed = by_net.transpose(0, 1).reshape(len(inputs), -1)
            if len(self._kinds) == 1:
                ((kind, part),) = self._kinds
                hidden = self._activations(layer, summed, kind, part, statistics, share)
                continue
            parts = [
                self._activations(
                    layer, summed[:, part].contiguous(), kind, part, statistics, share
                )
                for kind, part in self._kinds
            ]
            hidden = torch.cat(parts, 1)
        return torch.baddbmm(self._output_bias, self._by_net(hidden), self._weights[-1])

    def hits(self, inputs: Tensor, labels: Tensor, statistics: Tensor, rows: int | None) -> Tensor:
        """Count the examples that each net classifies rightly, int64 `[K]`.

        Args:
            inputs: float32 `[n, 784]`.
            labels: int64 `[n]`.
            statistics: to normalise by, if `rows` is None.
            rows: normalise each `rows` examples, or a few more, by themselves, and leave
                `statistics` alone.
        """
        found = torch.zeros(len(self.choices), dtype=torch.int64)
        parts = max(1, len(labels) // (EVALUATION_ROWS if rows is None else rows))
        scratch, share = (statistics, None) if rows is None else (self.no_statistics(), 1.0)
        with torch.no_grad():
            for some, theirs in zip(
                inputs.tensor_split(parts), labels.tensor_split(parts), strict=True
            ):
                answers = self.logits(some, scratch, share).argmax(2)
                found += (answers == theirs).sum(1)
        return found

    def population(self, mini_batches: Iterable[Tensor]) -> Tensor:
        """Return Algorithm 2's statistics over mini-batches, float32 `[LAYERS, 2, K*H]`."""
        statistics = self.no_statistics()
        with torch.no_grad():
            for number, inputs in enumerate(mini_batches):
                self.logits(inputs, statistics, 1 / (number + 1))
        return statistics

    def _by_net(self, hidden: Tensor) -> Tensor:
        """`[B, K*H]` as `[K, B, H]`."""
        return hidden.view(len(hidden), len(self.choices), UNITS).transpose(0, 1)

    def _activations(
        self,
        layer: int,
        summed: Tensor,
        kind: Normalized,
        part: slice,
        statistics: Tensor,
        share: float | None,
    ) -> Tensor:
        """From Wu to what the layer gives, of the nets whose columns `part` are."""
        if kind == "never":
            return torch.sigmoid(summed + self._biases[layer][part])
        if kind == "after":
            summed = torch.sigmoid(summed + self._biases[layer][part])
        normalized = functional.batch_norm(
            summed,
            statistics[layer, 0, part],
            statistics[layer, 1, part],
            self._gammas[layer][part],
            self._betas[layer][part],
            training=share is not None,
            momentum=share or 0.0,
            eps=DEFAULT_EPS,
        )
        return normalized if kind == "after" else torch.sigmoid(normalized)


def _initial_weights(choices: Sequence[Choice], seed: int) -> list[Tensor]:
    """Return the weights of the layers: `[784, K*H]`, two of `[K, H, H]`, and `[K, H, C]`."""
    net = MnistNet(batch_norm=True, seed=seed, init_std=1.0)
    blocks = [block for block in net.hidden if isinstance(block, LinearBN)]
    drawn = [block.linear.weight.detach().t() for block in blocks]
    weights = [
        torch.stack([values * initial_std(c.init_std, len(values)) for c in choices])
        for values in drawn
    ]
    last = net.output.weight.detach().t()
    weights.append(
        torch.stack(
            [
                last * initial_std(c.init_std if c.output_std is None else c.output_std, UNITS)
                for c in choices
            ]
        )
    )
    weights[0] = weights[0].transpose(0, 1).reshape(INPUTS, -1)
    return [weight.contiguous() for weight in weights]


def _columns_by_kind(choices: Sequence[Choice]) -> list[tuple[Normalized, slice]]:
    """Return where BN stands, and the columns of the nets where it stands there."""
    found: list[tuple[Normalized, slice]] = []
    start = 0
    for kind, group in groupby(choices, lambda choice: choice.normalized):
        end = start + len(list(group)) * UNITS
        found.append((kind, slice(start, end)))
        start = end
    return found


def _nets_by_loss(choices: Sequence[Choice]) -> list[tuple[NetLoss, list[int]]]:
    """Return the losses, and the nets that have each."""
    found: dict[NetLoss, list[int]] = {}
    for net, choice in enumerate(choices):
        found.setdefault(choice.loss, []).append(net)
    return list(found.items())


def _loss(name: NetLoss, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over nets of the mean over examples, of logits `[k, B, C]`."""
    count, rows, _ = logits.shape
    if name == "softmax":
        mean = functional.cross_entropy(logits.flatten(0, 1), labels.repeat(count))
        return mean * count
    targets = functional.one_hot(labels, CLASSES).to(logits.dtype).expand_as(logits)
    if name == "logistic":
        summed = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return summed / rows
    return (logits.sigmoid() - targets).square().sum() / (2 * rows)


def _of_nets(values: Tensor, parameter: Tensor) -> Tensor:
    """Return a number of each net, `[K]`, in the shape that a parameter takes it in."""
    if parameter.ndim == 3:
        return values[:, None, None]
    return values.repeat_interleave(UNITS)

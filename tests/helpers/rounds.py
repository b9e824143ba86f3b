"""A partition's state in synchronous rounds, and pushes for it."""

import torch
from torch import Tensor

from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Version
from downpour.paramserver.rules.policy import StalenessPolicy
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import Momentum, Regulariser

torch.set_num_threads(1)


P, F, Q = 12, 2, 10
(PARTITION,) = split(num_parameters=P, num_features=F, num_decayed=5, num_partitions=1)


def config(pushes: int, *, steps: int | None = None, epochs: int | None = 1) -> UpdateConfig:
    policy = StalenessPolicy(
        staleness_policy="synchronous", round_pushes=pushes, round_steps=steps or pushes
    )
    return UpdateConfig(
        rule=Momentum(momentum=0.9),
        regulariser=Regulariser(weight_decay=0.01, clip_norm=5.0),
        schedule=Schedule(learning_rate=0.1, decay_factor=0.5),
        policy=policy,
        batches_per_epoch=Q,
        epoch_examples=8 * Q,
        epochs=epochs,
    )


def new_version() -> Version:
    return Version(weights=torch.zeros(P), statistics=torch.zeros(2, F))


def push(
    batch: int, version: int, gradient: Tensor, *, examples: int = 8, loss: float = 1.0
) -> Push:
    return Push(
        mailbox=0,
        replica=0,
        epoch=0,
        batches=(batch,),
        examples=examples,
        version=version,
        loss=loss,
        gradient_norm=gradient.norm().item(),
    )


def moments_of(batch: int) -> Tensor:
    return torch.stack([torch.full((F,), 8.0), torch.full((F,), float(batch)), torch.ones(F)])[None]


class Bench:
    """A state and mini-batches with gradients of their own."""

    def __init__(self, of: UpdateConfig) -> None:
        self.config = of
        self.state = PartitionState(PARTITION, of, new_version())
        torch.manual_seed(1)
        self.gradients = [torch.randn(P) for _ in range(Q)]
        self.examples = [8] * (Q - 1) + [3]

    def take(self, batch: int, version: int | None = None, loss: float = 1.0) -> Outcome:
        gradient = self.gradients[batch].clone()
        version = self.state.weights_version if version is None else version
        arrival = push(batch, version, gradient, examples=self.examples[batch], loss=loss)
        return self.state.apply(arrival, gradient, moments_of(batch), new_version)

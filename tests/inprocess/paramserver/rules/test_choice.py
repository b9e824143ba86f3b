"""Every rule and schedule through the partitions' own code, against `torch.optim` on a real net.

One replica with one step in flight: each gradient is computed on the latest weights. The net is cut
over two partitions, so rule state, schedule and decay are seen from both sides of a cut.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

from downpour.models.batchnorm import BatchNorm
from downpour.models.flat import FlatModel
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Version
from downpour.paramserver.rules.choice import BY_LAYER, RuleNumbers, make_regulariser, make_rule
from downpour.paramserver.rules.schedule import Schedule

torch.set_num_threads(1)

BATCH, Q, EPOCHS = 16, 40, 5
DECAY = 0.01


def make_net() -> nn.Module:
    """A small net with batch normalization."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(20, 32, bias=False), BatchNorm(32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh(),
        nn.Linear(16, 4),
    )  # fmt: skip


def mini_batches() -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(epoch, index, inputs, targets); targets depend on the inputs, with noise."""
    generator = torch.Generator().manual_seed(7)
    truth = torch.randn(20, 4, generator=generator)
    for epoch in range(EPOCHS):
        for index in range(Q):
            x = torch.randn(BATCH, 20, generator=generator)
            noise = torch.randn(BATCH, 4, generator=generator)
            yield epoch, index, x, (x @ truth + noise).argmax(1)


def downpours(
    rule: str, numbers: RuleNumbers, schedule: Schedule, clip_norm: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weights after all mini-batches, by the partitions; and by name."""
    flat = FlatModel(make_net())
    layout = flat.layout
    config = UpdateConfig(
        rule=make_rule(rule, 0.9, numbers, DECAY),
        regulariser=make_regulariser(rule, DECAY, clip_norm),
        schedule=schedule.over(EPOCHS),
        batches_per_epoch=Q,
        epoch_examples=Q * BATCH,
    )
    parts = split(
        num_parameters=layout.num_parameters,
        num_features=layout.num_features,
        num_decayed=layout.decayed,
        num_partitions=2,
        stops=[entry.stop for entry in layout.entries] if rule in BY_LAYER else (),
    )
    states = [
        PartitionState(
            part,
            config,
            Version(
                weights=flat.weights[part.start : part.stop].clone(),
                statistics=torch.zeros(2, part.num_features),
            ),
        )
        for part in parts
    ]
    flat.module.train()
    for epoch, index, x, y in mini_batches():
        for part, state in zip(parts, states, strict=True):
            flat.weights[part.start : part.stop] = state.current.weights
        flat.zero_gradient()
        loss = functional.cross_entropy(flat.module(x), y)
        loss.backward()
        assert flat.gradient is not None
        norm = float(flat.gradient.norm())
        for part, state in zip(parts, states, strict=True):
            push = Push(
                mailbox=0, replica=0, epoch=epoch, batches=(index,), examples=BATCH,
                version=state.version, loss=loss.item(), gradient_norm=norm,
            )  # fmt: skip
            moments = flat.moments[None, :, part.feature_start : part.feature_stop]
            outcome = state.apply(push, flat.gradient[part.start : part.stop].clone(), moments)
            assert outcome is Outcome.APPLIED
    for state in states:
        state.check()
    weights = torch.cat([state.current.weights for state in states])
    return weights, {e.name: weights[e.start : e.stop].view(e.shape) for e in layout.entries}


def torchs(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    make_scheduler: Callable[[Any], Any] | None,
    clip_norm: float | None,
) -> dict[str, Tensor]:
    """The same by torch: a plain loop."""
    net = make_net()
    named = dict(net.named_parameters())
    decayed = [n for n in named if n.endswith("weight") and named[n].ndim == 2]
    groups = [
        {"params": [named[n] for n in decayed], "weight_decay": DECAY},
        {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = make(groups)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    for _, _, x, y in mini_batches():
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {name: parameter.detach() for name, parameter in named.items()}


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """At which schedules are tried."""
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


class TheirLARS(torch.optim.Optimizer):
    """You et al. 2017, Algorithm 1, parameter by parameter; torch has no LARS."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta = group["weight_decay"]
            for p in group["params"]:
                w, g = p.detach(), p.grad
                trust = 0.05 * w.norm() / (g.norm() + beta * w.norm()) if beta else 1.0
                state = self.state[p]
                change = 0.05 * trust * (g + beta * w)
                state["v"] = 0.9 * state["v"] + change if "v" in state else change
                w.sub_(state["v"])


CONSTANT = Schedule(learning_rate=0.05)
NONE = RuleNumbers()
CASES: dict[str, tuple[str, RuleNumbers, Schedule, Any, Any, float | None]] = {
    "adam": (
        "adam", NONE, Schedule(learning_rate=0.01),
        lambda g: torch.optim.Adam(g, lr=0.01), None, None,
    ),
    "adamw": (
        "adamw", RuleNumbers(beta2=0.98), Schedule(learning_rate=0.01),
        lambda g: torch.optim.AdamW(g, lr=0.01, betas=(0.9, 0.98)), None, None,
    ),
    "rmsprop": (
        "rmsprop", RuleNumbers(square_decay=0.9, epsilon=0.1), Schedule(learning_rate=0.005),
        lambda g: torch.optim.RMSprop(g, lr=0.005, alpha=0.9, eps=0.1, momentum=0.9), None, None,
    ),
    "lars": ("lars", RuleNumbers(trust=0.05), CONSTANT, TheirLARS, None, None),
    "adagrad": (
        "adagrad", NONE, CONSTANT, lambda g: torch.optim.Adagrad(g, lr=0.05), None, None,
    ),
    "momentum, clipped": ("momentum", NONE, CONSTANT, sgd, None, 0.5),
    "cosine": (
        "momentum", NONE, Schedule(shape="cosine", learning_rate=0.05), sgd,
        lambda o: lr_scheduler.CosineAnnealingLR(o, Q * EPOCHS), None,
    ),
    "milestones": (
        "momentum", NONE,
        Schedule(shape="milestones", learning_rate=0.05, milestones=(2, 4), decay_factor=0.1), sgd,
        lambda o: lr_scheduler.MultiStepLR(o, [2 * Q, 4 * Q], 0.1), None,
    ),
    "adamw, one-cycle": (
        "adamw", NONE, Schedule(shape="one-cycle", learning_rate=0.02),
        lambda g: torch.optim.AdamW(g, lr=0.02),
        lambda o: lr_scheduler.OneCycleLR(
            o, 0.02, total_steps=Q * EPOCHS + 1, cycle_momentum=False,
            pct_start=(0.3 * Q * EPOCHS + 1) / (Q * EPOCHS + 1),
        ),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_replica_with_one_step_is_torchs_loop(name: str) -> None:
    rule, numbers, schedule, make, make_scheduler, clip_norm = CASES[name]
    weights, ours = downpours(rule, numbers, schedule, clip_norm)
    theirs = torchs(make, make_scheduler, clip_norm)
    start = torch.cat([p.detach().flatten() for p in make_net().parameters()])
    assert (weights.norm() - start.norm()).abs() > 1e-2
    for key, value in theirs.items():
        # Rounding grows over 200 steps through batch normalization and ReLU.
        found = ours[key]
        assert torch.allclose(found, value, rtol=2e-3, atol=2e-4), key

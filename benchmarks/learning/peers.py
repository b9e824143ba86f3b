"""Who learns side by side, the settings that each may have, and how far all of them go. Data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from downpour.benchmarks.learning.search import Grid, Shape

LIMIT = "plain"
"""The peer that the others are measured by."""
AVERAGED_LIMIT = "plain-averaged"
"""The same with an average of its weights, by which they are measured too."""
SYSTEM = "downpour"
RECIPE = "mnist-bn"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One that learns."""

    title: str
    """What it is."""
    module: str | None
    """The baseline's module; None for this system."""
    shapes: tuple[Shape, ...]
    """Workers and mini-batch sizes to try, good guesses first."""
    averages: tuple[float | None, ...] = (0.998, None)
    """Of the weights, to try; None is the weights themselves."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far all go, and what the search tries."""

    goals: tuple[float, ...] = (0.97, 0.975)
    """Accuracies on the test split, ascending. A training stops at the last."""
    base_rates: tuple[float, ...] = (0.25, 0.4, 0.15, 0.1)
    """Rates for steps of 32 examples at a momentum of 0.9; larger steps get more by the linear
    rule, and so does a smaller momentum."""
    decays: tuple[float, ...] = (0.75, 0.85)
    """What the rate is multiplied by every epoch."""
    momenta: tuple[float, ...] = (0.9, 0.8)
    """Shares of the velocity that are kept at every step."""
    nesterov: tuple[bool, ...] = (True, False)
    """Whether the momentum is Nesterov's: for a push on old weights it looks ahead."""
    epochs: int = 20
    """Epochs at most."""
    looks_per_epoch: int = 4
    """How often the others are scored. This system is scored as often as it bears."""
    search_looks_per_epoch: int = 2
    """The same in the search, where it only costs time."""
    evaluate_every_s: float = 0.5
    """Seconds between two scorings of this system, beside its training; longer where scoring would
    take more than its share of the time, as the run's configuration says."""
    recompute_examples: int = 5000
    """Training examples from which Algorithm 2 recomputes the others' BN statistics."""
    search_s: float = 200.0
    """Seconds after which a peer's search begins no further trial."""
    run_s: float = 60.0
    """Training seconds of one training at most."""
    patience: float = 3.0
    """After the search, at most so many times the seconds of the best trial."""

    def grid(self, peer: Peer) -> Grid:
        """All settings of a peer."""
        return Grid(
            shapes=peer.shapes,
            base_rates=self.base_rates,
            decays=self.decays,
            averages=peer.averages,
            momenta=self.momenta,
            nesterov=self.nesterov,
        )


FULL = Bounds()
QUICK = Bounds(
    goals=(0.3, 0.5),
    base_rates=(0.1,),
    decays=(0.75,),
    momenta=(0.9,),
    nesterov=(True,),
    epochs=40,  # so that no run is over before its evaluator is up
    evaluate_every_s=0.2,
    run_s=20.0,
)
"""Enough to show that everything works, on a few thousand examples."""


def peers(cores: int, *, quick: bool = False) -> Mapping[str, Peer]:
    """Who is compared on so many cores, by the names that `--only` takes.

    The others are a plain PyTorch loop, with and without an average of its weights, torch's
    DistributedDataParallel over gloo, a parameter server over torch RPC, and Ray's documented
    asynchronous parameter server. The servers are tried with a worker a core, which is the least
    stale, and with ten.
    """
    many = max(2, cores)
    loops = tuple(Shape(workers=1, batch_size=size) for size in (128, 64, 256, 32))
    ranks = [Shape(workers=many, batch_size=size, averaged=True) for size in (64, 128, 32)]
    servers = [
        *(Shape(workers=many, batch_size=128), Shape(workers=10, batch_size=128)),
        Shape(workers=many, batch_size=32),
    ]
    found = {
        LIMIT: Peer(
            title="plain loop, one core",
            module="plain",
            shapes=loops,
            averages=(None,),
        ),
        AVERAGED_LIMIT: Peer(
            title="plain loop, averaged",
            module="plain",
            shapes=loops,
            averages=(0.999,),
        ),
        SYSTEM: Peer(
            title="this system, {workers} x 5",
            module=None,
            shapes=(Shape(workers=2 if quick else 10, batch_size=32),),
        ),
        "ddp": Peer(title="DDP, {workers} ranks", module="ddp", shapes=tuple(ranks)),
        "rpc": Peer(
            title="torch RPC, {workers} trainers",
            module="rpc_server",
            shapes=tuple(servers),
        ),
        "ray": Peer(
            title="Ray, {workers} workers",
            module="ray_server",
            shapes=tuple(servers),
        ),
    }
    if not quick:
        return found
    return {
        name: dataclasses.replace(peer, shapes=peer.shapes[:1], averages=peer.averages[:1])
        for name, peer in found.items()
    }

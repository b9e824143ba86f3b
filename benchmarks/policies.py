"""Claim: what a push costs a partition under each staleness policy, processes and messages aside.

One partition on one thread, with momentum, in the slots that it publishes versions in; every push
was computed 49 versions before it comes (in rounds of 50: on the round's weights). `bounded`,
`drop` and `scale` update as `asynchronous` does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, median

SIZES = {"0.4": 100_000, "45": 11_000_000}
"""Megabytes of weights -> parameters."""
STALENESS = 49
POLICIES: dict[str, dict[str, Any]] = {
    "asynchronous": {},
    "compensate, constant": {
        "staleness_policy": "compensate",
        "staleness_bound": STALENESS + 11,
        "compensation": "constant",
    },
    "compensate, adaptive": {
        "staleness_policy": "compensate",
        "staleness_bound": STALENESS + 11,
    },
    "synchronous": {"staleness_policy": "synchronous", "round_pushes": STALENESS + 1},
}
GRADIENTS = 8
"""Different ones, so that none is in a cache because it was just applied."""


def run(settings: Settings, say: Say) -> Report:
    """Measure every policy at every size, one after the other in every round."""
    unknown = set(settings.only) - SIZES.keys()
    if unknown:
        raise BadSettings(f"there is no size {min(unknown)!r}: give some of {', '.join(SIZES)}")
    names = settings.only or (("0.4",) if settings.quick else tuple(SIZES))
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(settings.repeat):
        say(f"policies, round {number + 1} of {settings.repeat}")
        rounds.append({size: _all(SIZES[size], settings) for size in names})
    result = {
        size: {name: median([r[size][name] for r in rounds]) for name in POLICIES} for size in names
    }
    return Report(
        name="policies",
        title="What a push costs a partition, by staleness policy",
        columns=("policy", *(f"{size} MB, ms" for size in names)),
        rows=tuple(
            (name, *(f"{1e3 * result[size][name]:.3f}" for size in names)) for name in POLICIES
        ),
        notes=("median over pushes, then over rounds",),
        configuration={"staleness": STALENESS, "policies": POLICIES, "rule": "momentum"},
        result={size: {n: round(1e3 * s, 4) for n, s in of.items()} for size, of in result.items()},
        rounds=rounds,
    )


def _all(num_parameters: int, settings: Settings) -> dict[str, float]:
    return {name: _measure(num_parameters, of, settings) for name, of in POLICIES.items()}


def _measure(num_parameters: int, policy: dict[str, Any], settings: Settings) -> float:
    """Median seconds of a push."""
    taken = []
    share_s = settings.seconds / len(POLICIES)
    began_s = time.perf_counter()
    for seconds in _pushes(num_parameters, policy):
        now_s = time.perf_counter() - began_s
        if now_s > settings.warmup_s / len(POLICIES):
            taken.append(seconds)
        if now_s > settings.warmup_s / len(POLICIES) + share_s and len(taken) >= STALENESS + 1:
            return _mean_of_rounds(taken) if "round_pushes" in policy else median(taken)
    raise AssertionError("pushes have no end")


def _mean_of_rounds(taken: list[float]) -> float:
    """A round's last push does more than the others: the mean of whole rounds' lengths."""
    whole = len(taken) - len(taken) % (STALENESS + 1)
    return sum(taken[:whole]) / whole


def _pushes(num_parameters: int, policy: dict[str, Any]) -> Iterator[float]:
    import torch

    from downpour.paramserver.messages import Push
    from downpour.paramserver.partition.ranges import split
    from downpour.paramserver.partition.state import PartitionState
    from downpour.paramserver.partition.update_config import UpdateConfig
    from downpour.paramserver.rules.policy import StalenessPolicy
    from downpour.paramserver.rules.update import Momentum
    from downpour.paramserver.transport.shared.published import PublishedWeights

    torch.set_num_threads(1)
    (part,) = split(num_parameters=num_parameters, num_features=0, num_decayed=0, num_partitions=1)
    config = UpdateConfig(
        rule=Momentum(),
        policy=StalenessPolicy(**policy),
        batches_per_epoch=1 << 24,
        epoch_examples=1,
    )
    published = PublishedWeights(num_parameters, 0, kept=config.policy.versions_kept)
    state = PartitionState(part, config, published.versions[0])
    gradients = [1e-3 * torch.randn(num_parameters) for _ in range(GRADIENTS)]
    norm, moments = float(gradients[0].norm()), torch.zeros(1, 3, 0)
    for number in range(1 << 24):
        synchronous = policy.get("staleness_policy") == "synchronous"
        push = Push(
            mailbox=0,
            replica=0,
            epoch=0,
            batches=(number,),
            examples=32,
            version=state.weights_version if synchronous else max(0, number - STALENESS),
            loss=1.0,
            gradient_norm=norm,
        )
        # A partition finds a gradient in a mailbox, and scribbles on it.
        gradient = gradients[number % GRADIENTS].clone()
        began_s, before = time.perf_counter(), state.weights_version
        state.apply(push, gradient, moments, lambda: published.versions[published.begin()])
        if state.weights_version > before:
            published.commit(state.weights_version)
        yield time.perf_counter() - began_s

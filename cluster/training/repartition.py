"""A checkpoint cut anew, for another number of partitions.

The snapshots of one checkpoint are of different instants. Each has its own applied set, but a range
of parameters can have only one. So the partitions are first brought level: a mini-batch that some
of them have applied and others lack is computed here, on the weights as they are, and the others
apply it, by the same code as ever. Then the ranges are joined and cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.fs

from downpour.cluster.errors import UserError
from downpour.cluster.run.checkpoint import Checkpoint, CheckpointStore, slowest
from downpour.paramserver.messages import Push
from downpour.paramserver.partition import snapshot
from downpour.paramserver.partition.applied_set import WAITING
from downpour.paramserver.partition.ranges import Partition, split
from downpour.paramserver.partition.snapshot import Snapshot
from downpour.paramserver.rules.adaptive import UPDATES
from downpour.paramserver.rules.averaging import AVERAGE_BATCHES, AVERAGE_STATISTICS

if TYPE_CHECKING:
    from torch import Tensor

    from downpour.paramserver.partition.state import PartitionState
    from downpour.paramserver.partition.update_config import UpdateConfig
    from downpour.workers.recompute import Recomputer

COUNTS = (f"rule.{UPDATES}", f"rule.{AVERAGE_BATCHES}")
"""Numbers that all partitions have alike, as tensors."""


def repartition(
    store: CheckpointStore,
    checkpoint: Checkpoint,
    num_partitions: int,
    *,
    config: UpdateConfig,
    epochs: int,
    recomputer: Recomputer,
    say: Callable[[str], None] = lambda _: None,
) -> Checkpoint:
    """Write `checkpoint` as a new one of `num_partitions` partitions, and return the new one.

    Args:
        store: the run's checkpoints.
        checkpoint: the one to cut.
        num_partitions: of the new one.
        config: how a push changes a partition.
        epochs: of the run.
        recomputer: computes gradients that some partitions lack.
        say: gets a line of news.

    Raises:
        UserError: the partitions have refused different mini-batches, and cannot be joined.
    """
    filesystem, base = pyarrow.fs.FileSystem.from_uri(store.folder_uri(checkpoint.number))
    taken = [snapshot.read(filesystem, f"{base}/{f.name}", f.sha256) for f in checkpoint.files]
    states = [_state(one, config) for one in taken]
    count = level(states, epochs, recomputer)
    if count:
        say(f"{count:,} mini-batches were applied to partitions that lacked them")
    for state in states:
        state.close_round()  # each may have other mini-batches in it
    dumps = [state.dump() for state in states]
    metas = [meta for meta, _ in dumps]
    if any(meta["version"] != metas[0]["version"] for meta in metas):
        raise UserError(
            "the partitions have refused different mini-batches, and cannot be joined: resume with "
            f"{len(states)} partitions"
        )
    whole = {name: _joined(name, [tensors[name] for _, tensors in dumps]) for name in dumps[0][1]}
    first = states[0].partition
    layout = split(
        num_parameters=first.total_parameters,
        num_features=first.total_features,
        num_decayed=sum(state.partition.num_decayed for state in states),
        num_partitions=num_partitions,
        num_frozen=sum(state.partition.num_frozen for state in states),
        stops=[p.start + stop for p in (s.partition for s in states) for stop in p.stops],
    )
    number = max(store.numbers()) + 1
    filesystem, folder = pyarrow.fs.FileSystem.from_uri(store.begin(number))
    files = tuple(
        snapshot.write(
            filesystem,
            folder,
            Snapshot(
                partition=part,
                meta=metas[0],
                tensors={name: _cut(name, tensor, part) for name, tensor in whole.items()},
            ),
        )
        for part in layout
    )
    new = dataclasses.replace(checkpoint, number=number, updates=slowest(files), files=files)
    store.commit(new)
    return new


def level(states: Sequence[PartitionState], epochs: int, recomputer: Recomputer) -> int:
    """Apply what some partitions have settled and others lack.

    Returns:
        How many mini-batches those were.
    """
    count = 0
    for epoch in range(epochs):
        waiting = np.stack([state.ledger.applied.flags(epoch) == WAITING for state in states])
        for batch in np.flatnonzero(waiting.any(axis=0) & ~waiting.all(axis=0)).tolist():
            for state in states:
                part = state.partition
                recomputer.weights[part.start : part.stop] = state.current.weights.numpy()
            found = recomputer.compute(epoch, batch)
            count += 1
            for state, missing in zip(states, waiting[:, batch], strict=True):
                if not missing:
                    continue
                part = state.partition
                push = Push(
                    mailbox=0,
                    replica=0,
                    epoch=epoch,
                    batches=(batch,),
                    examples=found.examples,
                    version=state.version,
                    loss=found.loss,
                    gradient_norm=found.gradient_norm,
                )
                gradient = found.gradient[part.trained].clone()
                moments = found.moments[:, :, part.feature_start : part.feature_stop]
                state.apply(push, gradient, moments)
    return count


def _state(taken: Snapshot, config: UpdateConfig) -> PartitionState:
    import torch

    from downpour.paramserver.partition.state import PartitionState
    from downpour.paramserver.partition.vectors import Version

    part = taken.partition
    current = Version(
        weights=torch.zeros(part.num_parameters), statistics=torch.zeros(2, part.num_features)
    )
    state = PartitionState(part, config, current)
    state.load(taken.meta, taken.tensors)
    return state


def _joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    """One tensor of all partitions together; applied flags and counts are the same on each."""
    import torch

    if name.startswith("applied.") or name in COUNTS:
        return parts[0]
    return torch.cat(list(parts), dim=-1)


def _cut(name: str, whole: Tensor, part: Partition) -> Tensor:
    """A partition's share of a joined tensor."""
    from downpour.paramserver.partition.combiner import ROUND_MOMENTS
    from downpour.paramserver.rules.statistics import BY_FEATURE

    if name.startswith("applied.") or name in COUNTS:
        return whole
    by_feature = {"statistics", "ledger", BY_FEATURE, ROUND_MOMENTS, f"rule.{AVERAGE_STATISTICS}"}
    if name in by_feature:
        return whole[..., part.feature_start : part.feature_stop].contiguous()
    return whole[part.trained if name.startswith("rule.") else slice(part.start, part.stop)]

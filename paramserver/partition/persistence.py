"""What a snapshot of a partition's state holds, gathered and put back.

The file itself is `snapshot`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from downpour.paramserver.errors import BadSnapshot
from downpour.paramserver.partition.combiner import Combiner
from downpour.paramserver.partition.ledger import Ledger
from downpour.paramserver.partition.vectors import Vectors
from downpour.paramserver.partition.witness import Witness, expected
from downpour.paramserver.rules.statistics import BY_FEATURE

_APPLIED = "applied."
"""Before an epoch's number: the name of the flags of its mini-batches, uint8 [q]."""


def room(vectors: Vectors) -> dict[str, Tensor]:
    """Return memory for the large tensors of a `dump`, as yet untouched."""
    return {name: torch.empty_like(vector) for name, vector in vectors.large().items()}


def dump(
    ledger: Ledger, vectors: Vectors, combiner: Combiner, into: Mapping[str, Tensor]
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Copy a state into plain metadata and tensors. See `PartitionState.dump`."""
    meta, open_flags = ledger.dump()
    meta["statistics"], statistics = vectors.statistics.dump()
    meta["witness"] = list(vectors.witness.dump())
    tensors = {
        name: into[name].copy_(vector) if name in into else vector.clone()
        for name, vector in vectors.large().items()
    }
    tensors |= {f"{_APPLIED}{epoch}": torch.from_numpy(f) for epoch, f in open_flags.items()}
    tensors |= {name: torch.from_numpy(array.copy()) for name, array in statistics.items()}
    return meta, tensors | combiner.dump()


def load(
    ledger: Ledger,
    vectors: Vectors,
    combiner: Combiner,
    meta: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `dump` gave. See `PartitionState.load`.

    Raises:
        BadSnapshot: No `dump` of this configuration gave this.
    """
    names = vectors.large()
    kept = {name for name in tensors if name.startswith("rule.")}
    if kept != {name for name in names if name.startswith("rule.")}:
        raise BadSnapshot(
            f"the snapshot's rule kept {sorted(kept) or 'nothing'}, which is not what "
            f"{ledger.config.rule}, the staleness policy and the average keep: resume with the "
            "rule, the staleness policy and the average that the run began with"
        )
    try:
        _load(ledger, vectors, combiner, meta, tensors)
        check(ledger, vectors, combiner)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise _damaged(vectors, error) from None
    except AssertionError as error:  # it says that what the snapshot holds cannot be
        raise _damaged(vectors, error) from None
    if ledger.applied.num_batches != ledger.config.batches_per_epoch:
        raise BadSnapshot(
            f"the snapshot is of epochs of {ledger.applied.num_batches} mini-batches, not "
            f"{ledger.config.batches_per_epoch}: resume with the data and the batch size that "
            "the run began with"
        )


def _load(
    ledger: Ledger,
    vectors: Vectors,
    combiner: Combiner,
    meta: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    for name, vector in vectors.large().items():
        saved = tensors[name]
        if saved.shape != vector.shape or saved.dtype != vector.dtype:
            raise ValueError(f"{name} is {saved.dtype} {list(saved.shape)}")
        vector.copy_(saved)
    flags = {
        int(name.removeprefix(_APPLIED)): tensor.numpy()
        for name, tensor in tensors.items()
        if name.startswith(_APPLIED)
    }
    ledger.load(meta, flags)
    arrays = {n: tensors[n].numpy() for n in ("ledger", BY_FEATURE) if n in tensors}
    vectors.statistics.load(meta["statistics"], arrays)
    if "witness" in meta:
        count, total = map(int, meta["witness"])
        vectors.witness = Witness(count, total)
    else:  # an earlier release had none: what went before is taken on trust
        applied = ledger.applied
        epochs = (*applied.open_epochs, *applied.complete_epochs)
        vectors.witness = Witness(*expected({epoch: applied.flags(epoch) for epoch in epochs}))
    combiner.load(tensors)


def check(ledger: Ledger, vectors: Vectors, combiner: Combiner) -> None:
    """Assert the invariants of a whole state."""
    ledger.check()
    combiner.check()
    vectors.check()


def _damaged(vectors: Vectors, error: Exception) -> BadSnapshot:
    return BadSnapshot(
        f"the snapshot of partition {vectors.partition.index} is damaged "
        f"({type(error).__name__}: {' '.join(str(error).split())}): use another checkpoint"
    )

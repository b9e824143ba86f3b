"""A whole run computed again from its folder, and compared with its newest checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow.fs

from downpour.cluster.config.derive import model_spec, update_config
from downpour.cluster.errors import UserError
from downpour.cluster.replay.replay import Replay, Taken
from downpour.cluster.run.checkpoint import CheckpointStore, partitions_before
from downpour.cluster.run.folder import ABOUT_RECORD, RECORD, RunFolder
from downpour.cluster.run.provenance import surroundings
from downpour.cluster.training.inputs import build_model, check_data, check_data_unchanged, loader
from downpour.paramserver.partition import record, snapshot

if TYPE_CHECKING:
    from torch import Tensor

    from downpour.paramserver.partition.state import PartitionState


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What came out of a replay."""

    pushes: int
    """Entries of the record."""
    versions: tuple[int, ...]
    """Version of each partition at the end."""
    checkpoint: int | None
    """Number of the checkpoint that it was compared with; None if there is none."""
    differing: tuple[str, ...]
    """What is not the same to the bit, a line each."""


def replay_run(
    folder: RunFolder,
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
    taken: Taken = lambda state, push, moments: None,
) -> Replayed:
    """Compute the run of `folder` again, and compare it with its newest checkpoint.

    Args:
        folder: of a run that was trained with --record-pushes.
        progress: gets the entries done and the entries in all.
        say: gets a warning.
        taken: as in `Replay`.

    Raises:
        UserError: the run has no record, or its data has changed.
        BadRecord: something else comes out than what was recorded.
    """
    from downpour.cluster.config.recipes import admit

    config, path = admit(folder.config()), folder.path / RECORD
    branches = [record.read(file) for file in record.files(path)]
    if not branches:
        raise UserError(f"{folder.path} has no record: train with --record-pushes")
    data = check_data(config)
    check_data_unchanged(folder, data)
    about = json.loads((path / ABOUT_RECORD).read_text())
    here = surroundings()
    for name in ("torch", "machine", "processor"):
        if about.get(name) != here[name]:
            say(f"recorded with {name} {about.get(name)}, here it is {here[name]}: bits may differ")
    import torch

    torch.set_num_threads(int(about["threads"]))
    from downpour.workers.recompute import Recomputer

    model = build_model(config, folder.initial)
    count = partitions_before(folder) or 1 + max(branch.partition for branch in branches)
    checkpoint, _ = CheckpointStore(folder.checkpoints_uri).latest()
    wanted = {} if checkpoint is None else {f.version: f for f in checkpoint.files}
    states: dict[int, dict[str, Tensor]] = {}

    def seen(state: PartitionState) -> None:
        index = state.partition.index
        if checkpoint is not None and checkpoint.files[index].version == state.version in wanted:
            states[index] = state.dump()[1]  # if several branches have it, the newest is last

    replay = Replay(
        branches,
        partitions=model.cut(count),
        config=update_config(config, data.plan),
        weights=torch.from_numpy(model.weights),
        statistics=model.statistics,
        recomputer=Recomputer(
            model_spec(config),
            loader(config, data.plan),
            model.initial_statistics(),
            config.replicas.steps.precision,
        ),
        seen=seen,
        taken=taken,
    )
    replay.run(progress)
    differing: list[str] = []
    if checkpoint is not None:
        uri = CheckpointStore(folder.checkpoints_uri).folder_uri(checkpoint.number)
        for index, file in enumerate(checkpoint.files):
            filesystem, base = pyarrow.fs.FileSystem.from_uri(uri)
            saved = snapshot.read(filesystem, f"{base}/{file.name}", file.sha256)
            differing += _differences(index, saved.tensors, states.get(index))
    return Replayed(
        pushes=replay.num_entries,
        versions=replay.versions,
        checkpoint=None if checkpoint is None else checkpoint.number,
        differing=tuple(differing),
    )


def _differences(
    index: int, saved: Mapping[str, Tensor], found: Mapping[str, Tensor] | None
) -> list[str]:
    """Which tensors of a partition are not the same to the bit."""
    if found is None:
        return [f"partition {index} has never had the checkpoint's version"]
    lines = []
    for name in ("weights", "statistics", *sorted(n for n in saved if n.startswith("rule."))):
        a, b = saved[name].numpy().view("uint32"), found[name].numpy().view("uint32")
        if not (a == b).all():
            lines.append(f"{name} of partition {index} differ in {(a != b).sum():,} of {a.size:,}")
    return lines

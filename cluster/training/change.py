"""Changes to a run before it goes on: other numbers of replicas or partitions, another device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from downpour.cluster.config import recipes
from downpour.cluster.config.derive import model_spec, update_config
from downpour.cluster.config.plain import to_plain
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.checkpoint import CheckpointStore, partitions_before
from downpour.cluster.run.folder import CONFIG, RunFolder
from downpour.cluster.training.inputs import Data, build_model, check_data_unchanged, loader
from downpour.workers.spec import DeviceName


def change(
    folder: RunFolder,
    data: Data,
    *,
    replicas: int | None = None,
    partitions: int | None = None,
    device: DeviceName | None = None,
    until: Mapping[str, float | int | None] | None = None,
) -> None:
    """Write the changes into the run's folder. What is None stays.

    Args:
        folder: the run's.
        data: what `check_data` found.
        replicas: another number of replicas.
        partitions: another number of partitions; the newest checkpoint is cut anew.
        device: another device for the replicas.
        until: other values of `stop_at_accuracy` and `patience`, by name; a value of None lets the
            run go on to its last epoch.

    Raises:
        UserError: the run cannot go on so.
    """
    config = recipes.admit(folder.config())
    members = config.replicas
    if replicas is not None:
        members = dataclasses.replace(members, replicas=replicas)
    if device is not None:
        members = dataclasses.replace(
            members, steps=dataclasses.replace(members.steps, device=device)
        )
    try:
        policy = dataclasses.replace(config.policy, **(until or {}))  # type: ignore[arg-type]
        config = dataclasses.replace(config, replicas=members, policy=policy)
    except ValueError as error:
        raise UserError(f"{folder.path} cannot go on so: {error}") from None
    with folder.locked():
        if partitions is not None and partitions != partitions_before(folder):
            config = _cut_anew(folder, config, data, partitions)
        if config != folder.config():
            folder.write_json(CONFIG, to_plain(config))


def _cut_anew(folder: RunFolder, config: RunConfig, data: Data, partitions: int) -> RunConfig:
    """Cut the newest checkpoint for another number of partitions.

    Returns:
        The configuration with that number.
    """
    n_push = config.replicas.steps.n_push
    if n_push != 1 or config.policy.record_pushes:
        why = "its pushes are recorded" if config.policy.record_pushes else f"n push is {n_push}"
        raise UserError(
            f"{folder.path} cannot go on with {partitions} partitions, since {why}: leave out "
            "--partitions"
        )
    check_data_unchanged(folder, data)
    new = dataclasses.replace(
        config, server=dataclasses.replace(config.server, partitions=partitions)
    )
    store = CheckpointStore(folder.checkpoints_uri, partitions_before(folder))
    checkpoint, _ = store.to_resume()
    model = build_model(new)
    model.cut(partitions)  # says so if it is too small for that
    if checkpoint is not None:
        from downpour.cluster.training.repartition import repartition
        from downpour.workers.recompute import Recomputer

        repartition(
            store,
            checkpoint,
            partitions,
            config=update_config(config, data.plan),
            epochs=config.policy.epochs,
            recomputer=Recomputer(
                model_spec(config),
                loader(config, data.plan),
                model.initial_statistics(),
                config.replicas.steps.precision,
            ),
        )
    return new

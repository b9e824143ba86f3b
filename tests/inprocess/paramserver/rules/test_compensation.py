"""Delay compensation in the whole system: what a push is compensated against, and replay."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from downpour.cluster.config.run import RunConfig
from downpour.paramserver.config import NetworkConfig
from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.messages import Push
from downpour.paramserver.partition.combiner import CompensatedCombiner
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.rules.policy import StalenessPolicy
from downpour.paramserver.server.server import PartitionServer
from downpour.workers.replica.replicas import Replicas
from tests.helpers import tiny
from tests.helpers.runs import Run, assert_replays_to_the_bit, killed_stopped_and_resumed
from tests.helpers.thread_backend import Faults, ThreadBackend


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


def compensated(config: RunConfig, bound: int = 60, **network: Any) -> RunConfig:
    server = dataclasses.replace(
        config.server,
        policy=StalenessPolicy(staleness_policy="compensate", staleness_bound=bound),
        network=NetworkConfig(**network),
    )
    return dataclasses.replace(config, server=server)


class Witness:
    """What every push was computed on, as its slot had it, and what it was compensated against."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computed: dict[tuple[int, tuple[int, ...]], list[np.ndarray[Any, Any]]] = {}
        self.checked = self.moved = 0
        self.wrong: list[tuple[int, Push]] = []
        lock, send, update = threading.Lock(), Replicas._push, CompensatedCombiner._update

        def pushing(replicas: Replicas, turn: Any) -> None:
            key = turn.task.window.epoch, turn.batches
            with lock:
                # More than one where a mini-batch is computed again.
                self.computed.setdefault(key, []).append(turn.weights.holder.weights.copy())
            send(replicas, turn)

        def updating(combiner: CompensatedCombiner, push: Push, *args: Any) -> None:
            vectors, moved = combiner._vectors, push.version != args[3]
            pulled = combiner.past[push.version] if moved else vectors.current.weights
            part = vectors.partition
            with lock:
                found = self.computed[push.epoch, push.batches]
                self.checked += 1
                self.moved += moved
                if not any(_same(w[part.start : part.stop], pulled) for w in found):
                    self.wrong.append((part.index, push))
            update(combiner, push, *args)

        monkeypatch.setattr(Replicas, "_push", pushing)
        monkeypatch.setattr(CompensatedCombiner, "_update", updating)


def _same(a: np.ndarray[Any, Any], b: Tensor) -> bool:
    return bool((a.view(np.uint32) == b.numpy().view(np.uint32)).all())


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("partitions", "steps", "network"),
    [
        (1, {}, {}),
        (3, {}, {"bound": 600}),
        (2, {"n_push": 4, "n_fetch": 4}, {}),
        (2, {}, {"transport": "network"}),
    ],
)
def test_a_push_is_compensated_against_exactly_what_it_was_computed_on(
    tmp_path: Path,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
    partitions: int,
    steps: dict[str, int],
    network: dict[str, Any],
) -> None:
    witness = Witness(monkeypatch)
    config = tiny.config(data, replicas=4, concurrent_steps=4, partitions=partitions, **steps)
    run = Run(tmp_path / "run", compensated(config, **network))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    assert witness.wrong == []
    assert witness.checked == sum(r.version for r in outcome.reports)
    assert witness.moved > witness.checked / 2


@pytest.mark.timeout(120)
def test_so_it_is_through_deaths(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = Witness(monkeypatch)
    faults = Faults(
        (4, ThreadBackend.kill_process, 0),
        (10, ThreadBackend.cut_connections, 1),
        (16, ThreadBackend.kill_partition, 1),
    )
    config = tiny.config(data, epochs=3, checkpoint_every_s=0.05)
    run = Run(tmp_path / "run", compensated(config))
    outcome = run.go(faults)
    assert not faults.left
    run.assert_exactly_once(outcome)
    assert witness.wrong == []


@pytest.mark.timeout(120)
def test_beyond_the_bound_mini_batches_are_computed_again(tmp_path: Path, data: str) -> None:
    config = compensated(tiny.config(data, replicas=4, concurrent_steps=5), bound=20)
    run = Run(tmp_path / "run", config)
    outcome = run.go()
    run.assert_exactly_once(outcome)
    for report in outcome.reports:
        assert all(len(counts) <= 21 for counts in report.staleness.values())


@pytest.mark.timeout(120)
def test_a_compensated_run_replays_to_the_bit_through_a_death_and_a_resume(
    tmp_path: Path, data: str
) -> None:
    config = compensated(tiny.config(data, epochs=3))
    outcome = killed_stopped_and_resumed(tmp_path / "run", config, deaths={8: 1}, stop_at=22)
    assert_replays_to_the_bit(tmp_path / "run", outcome)


def test_more_versions_than_there_is_memory_for_are_refused() -> None:
    (part,) = split(num_parameters=1 << 20, num_features=0, num_decayed=0, num_partitions=1)
    config = UpdateConfig(
        policy=StalenessPolicy(staleness_policy="compensate", staleness_bound=10**8),
        batches_per_epoch=1,
        epoch_examples=1,
    )
    with pytest.raises(BadConfiguration, match=r"staleness bound is 100000000: .* give a smaller"):
        PartitionServer(partition=part, config=config, key=bytes(32), weights=torch.zeros(1 << 20))

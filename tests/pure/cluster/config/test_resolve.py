"""What each actor is told, given the configuration and the facts."""

import dataclasses
import json
import pickle
from typing import Any

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.config.derive import make_decoder, make_plan, model_spec, step_config
from downpour.cluster.config.options import apply
from downpour.cluster.config.policy import PolicyConfig
from downpour.cluster.config.resolve import (
    Facts,
    Resolved,
    num_processes,
    num_threads,
    resolve,
    spread,
)
from downpour.paramserver.config import ServerConfig
from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.transport.names import NODE
from downpour.workers.config import ReplicaConfig

MNIST = Facts(
    num_rows=60_000,
    num_parameters=99_000,
    num_features=310,
    num_decayed=98_400,
    num_partitions=3,
    num_processors=4,
)


def facts(**changes: Any) -> Facts:
    return dataclasses.replace(MNIST, **changes)


def test_processes_are_as_many_as_processors_unless_told() -> None:
    assert num_processes(ReplicaConfig(replicas=10), 2) == 2
    assert num_processes(ReplicaConfig(replicas=10), 64) == 10
    assert num_processes(ReplicaConfig(replicas=10, replicas_per_process=1), 2) == 10
    assert num_processes(ReplicaConfig(replicas=10, replicas_per_process=3), 2) == 4


def test_recorded_steps_are_computed_on_one_thread() -> None:
    assert [num_threads(PolicyConfig(), count, 8) for count in (1, 3, 8, 20)] == [8, 2, 1, 1]
    assert num_threads(PolicyConfig(record_pushes=True), 1, 8) == 1


def test_partitions_follow_the_weights_up_to_one_a_processor() -> None:
    server = ServerConfig()
    assert [server.num_partitions(n, 8) for n in (1, 1 << 22, (1 << 22) + 1)] == [1, 1, 2]
    assert server.num_partitions(1 << 30, 8) == 8
    assert ServerConfig(partitions=5).num_partitions(1, 8) == 5


def test_a_run_keeps_its_partitions_on_another_machine() -> None:
    large = 1 << 30
    assert ServerConfig().num_partitions(large, 2, before=8) == 8
    assert ServerConfig().num_partitions(large, 64, before=8) == 8
    assert ServerConfig(partitions=3).num_partitions(large, 64, before=8) == 3


def test_replicas_take_turns_over_the_processes() -> None:
    assert spread(5, 2) == [(0, 2, 4), (1, 3)]
    assert spread(2, 2) == [(0,), (1,)]
    found = [r for members in spread(10, 4) for r in members]
    assert sorted(found) == list(range(10))


def test_every_part_is_told_its_own() -> None:
    config = apply(recipes.find("mnist-bn"), {"shufflers": 2, "queued_windows": 3})
    specs = resolve(config, MNIST)
    assert specs.plan == make_plan(config, 60_000)
    assert [spec.partition.index for spec in specs.partitions] == [0, 1, 2]
    assert specs.partitions[-1].partition.stop == 99_000
    assert {spec.update.batches_per_epoch for spec in specs.partitions} == {1877}
    assert {(spec.listen, spec.record) for spec in specs.partitions} == {(None, None)}
    assert [spec.replicas for spec in specs.processes] == spread(10, 4)
    for process in specs.processes:
        assert process.model == model_spec(config)
        assert process.steps == step_config(config)
        assert process.decoder == make_decoder(config)
        assert (process.num_threads, process.queued_windows) == (1, 3)
    assert [(spec.index, spec.num_shufflers) for spec in specs.shufflers] == [(0, 2), (1, 2)]
    assert specs.shufflers[0].plan == specs.plan
    assert (specs.evaluator.split, specs.evaluator.model) == ("test", model_spec(config))


def test_specs_travel() -> None:
    specs = resolve(recipes.find("bn-x5"), facts(num_features=0))
    assert pickle.loads(pickle.dumps(specs)) == specs  # noqa: S301


def test_the_numbers_are_plain() -> None:
    resolved = resolve(recipes.find("mnist-bn"), facts(num_processors=16, num_nodes=2)).resolved
    assert resolved == Resolved(partitions=3, processes=10, threads=1, nodes=2, processors=16)
    assert Resolved(**json.loads(json.dumps(dataclasses.asdict(resolved)))) == resolved


@pytest.mark.parametrize(
    ("given", "nodes", "expected"),
    [
        ({}, 1, None),
        ({}, 2, NODE),
        ({"transport": "network"}, 1, "127.0.0.1"),
        ({"transport": "shared"}, 2, None),
        ({"listen": "10.0.0.7"}, 1, "10.0.0.7"),
    ],
)
def test_partitions_listen_if_replicas_may_be_elsewhere(
    given: dict[str, object], nodes: int, expected: str | None
) -> None:
    specs = resolve(apply(recipes.find("mnist-bn"), given), facts(num_nodes=nodes))
    assert {spec.listen for spec in specs.partitions} == {expected}


def test_gpus_bound_the_processes_and_processors_the_threads() -> None:
    config = apply(recipes.find("mnist-bn"), {"replica_device": "cuda"})
    specs = resolve(config, facts(num_processors=16, gpu_places=2))
    assert (len(specs.processes), specs.resolved.threads) == (2, 8)


def test_recorded_pushes_have_a_folder_and_one_thread() -> None:
    config = apply(recipes.find("mnist-bn"), {"record_pushes": True, "replicas": 1})
    specs = resolve(config, facts(record="/runs/a/record"))
    assert {spec.record for spec in specs.partitions} == {"/runs/a/record"}
    assert specs.processes[0].num_threads == 1
    assert resolve(recipes.find("mnist-bn"), facts()).processes[0].num_threads == 1
    assert resolve(apply(config, {"record_pushes": False}), MNIST).processes[0].num_threads == 4


def test_a_network_too_small_for_its_partitions_is_refused() -> None:
    with pytest.raises(BadConfiguration, match="give 6187 or fewer"):
        resolve(recipes.find("mnist-bn"), facts(num_partitions=7000))

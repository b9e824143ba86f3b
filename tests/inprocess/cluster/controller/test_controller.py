"""The whole system on threads: real partitions, sockets and shared memory; scripted faults."""

import dataclasses
import math
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional

from downpour.cluster.config.derive import model_spec
from downpour.cluster.controller.backend import ProcessLost, RunFailed
from downpour.cluster.controller.hangs.patience import LIMITS, Limit, Wait
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.errors import user_message
from downpour.cluster.run.folder import RunFolder
from downpour.models.flat import FlatModel, flatten
from downpour.paramserver.client import ParameterClient
from downpour.paramserver.config import NetworkConfig
from downpour.paramserver.partition.applied_set import APPLIED, REFUSED
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.vectors import Vectors
from downpour.paramserver.rules.choice import RuleName
from downpour.paramserver.rules.policy import StalenessPolicy
from downpour.paramserver.rules.schedule import Schedule
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.images.decode import decode
from tests.helpers import tiny
from tests.helpers.runs import Run
from tests.helpers.thread_backend import ThreadBackend


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(("replicas", "partitions"), [(1, 1), (4, 3), (7, 2)])
def test_every_mini_batch_is_applied_exactly_once_on_every_partition(
    tmp_path: Path, data: str, replicas: int, partitions: int
) -> None:
    run = Run(tmp_path / "run", tiny.config(data, replicas=replicas, partitions=partitions))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    assert [r.version for r in outcome.reports] == [2 * run.plan.num_batches] * partitions
    assert all(r.duplicates == 0 for r in outcome.reports)
    assert outcome.evaluation is not None
    assert np.isfinite(outcome.evaluation.score.loss)
    if replicas == 1:  # many replicas on 126 updates in all may well not learn
        assert outcome.evaluation.score.accuracy > 0.6  # chance is 0.25
    assert run.shown[-1].examples == 2000
    assert run.shown[-1].accuracy == outcome.evaluation.score.accuracy


@pytest.mark.parametrize("rule", ["sgd", "momentum", "nesterov", "adagrad", "adamw", "rmsprop"])
def test_one_replica_with_one_step_in_flight_is_torch_optim(
    tmp_path: Path, data: str, rule: RuleName
) -> None:
    """The whole system against a plain loop over the plan's mini-batches: 268 steps.

    With AdamW the rate follows a cosine, and the weights are averaged.
    """
    config = tiny.config(data, replicas=1, concurrent_steps=1, epochs=4)
    server = dataclasses.replace(config.server, rule=rule, weight_decay=1e-3)
    if rule == "adamw":
        schedule = Schedule(shape="cosine", learning_rate=server.schedule.learning_rate)
        server = dataclasses.replace(server, schedule=schedule, ema=0.99)
    # One window at a time: of two that a replica holds, either may be ready to run first.
    replicas = dataclasses.replace(config.replicas, queued_windows=1)
    config = dataclasses.replace(config, server=server, replicas=replicas)
    run = Run(tmp_path / "run", config)
    outcome = run.go()
    run.assert_exactly_once(outcome)
    assert outcome.reports[0].staleness == {
        0: [4 * run.plan.num_batches]
    }  # always computed on the latest version

    model = FlatModel(model_spec(config).build())
    named = dict(model.module.named_parameters())
    decayed = [named[e.name] for e in model.layout.entries if e.decays]
    others = [named[e.name] for e in model.layout.entries if not e.decays]
    groups = [{"params": decayed, "weight_decay": 1e-3}, {"params": others, "weight_decay": 0.0}]
    rate = config.server.schedule.learning_rate
    optimizer: torch.optim.Optimizer
    if rule == "adagrad":
        optimizer = torch.optim.Adagrad(groups, lr=rate)
    elif rule == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)  # rounds as ours does
    elif rule == "rmsprop":
        optimizer = torch.optim.RMSprop(groups, lr=rate, momentum=0.9)
    else:
        momentum = 0.0 if rule == "sgd" else 0.9
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=rule == "nesterov")
    reader = RowReader(Dataset.open(data, "train"))
    model.module.train()
    average, num_steps, examples = model.weights.clone(), 0, 0
    for epoch in range(4):
        for window in run.plan.window_order(epoch).tolist():
            for batch in run.plan.window_batches_order(epoch, window).tolist():
                rows = reader.take(run.plan.rows(epoch, batch))
                inputs, labels = decode(rows, tiny.IMAGE)
                model.zero_gradient()
                outputs = model.module(torch.from_numpy(inputs))
                functional.cross_entropy(outputs, torch.from_numpy(labels)).backward()
                if rule == "adamw":  # mini-batches are not all of one size, so by examples
                    for group in optimizer.param_groups:
                        group["lr"] = rate * (1 + math.cos(math.pi * examples / 4000)) / 2
                optimizer.step()
                num_steps, examples = num_steps + 1, examples + len(labels)
                average.lerp_(model.weights, max(0.01, 1 / num_steps))
    torch.testing.assert_close(run.weights, model.weights, rtol=1e-4, atol=1e-5)
    kept = safetensors.torch.load_file(str(run.folder.path / "best.safetensors"))
    kept |= safetensors.torch.load_file(str(run.folder.path / "model.safetensors"))
    weights, _ = flatten(kept, model.layout)
    of_run = average if rule == "adamw" else model.weights
    torch.testing.assert_close(weights, of_run, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n_push", "n_fetch"), [(1, 3), (4, 1), (4, 2)])
def test_pushing_and_fetching_every_few_steps(
    tmp_path: Path, data: str, n_push: int, n_fetch: int
) -> None:
    run = Run(tmp_path / "run", tiny.config(data, n_push=n_push, n_fetch=n_fetch))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    windows = -(-run.plan.num_batches // 6)
    assert outcome.reports[0].version <= 2 * (run.plan.num_batches // n_push + windows)


def test_mini_batches_that_are_too_stale_are_computed_again(tmp_path: Path, data: str) -> None:
    config = tiny.config(data, replicas=4, concurrent_steps=5)
    policy = StalenessPolicy(staleness_policy="drop", staleness_bound=12)
    config = dataclasses.replace(config, server=dataclasses.replace(config.server, policy=policy))
    run = Run(tmp_path / "run", config)
    outcome = run.go()
    run.assert_exactly_once(outcome)
    assert sum(r.dropped for r in outcome.reports) > 0
    for report in outcome.reports:
        for counts in report.staleness.values():
            assert len(counts) <= 13  # none beyond the bound was applied


@pytest.mark.parametrize("failures", [0, 2])
def test_the_other_processes_are_started_once_the_first_is_up(
    tmp_path: Path, data: str, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run", tiny.config(data, replicas=4))
    backend, start = run.backend, run.backend.start_process
    started: list[tuple[int, bool]] = []

    def start_process(index: int) -> Future[Any]:
        started.append((index, backend.actors[0] is not None))
        if len(started) <= failures:
            failed: Future[Any] = Future()
            failed.set_exception(ProcessLost("it died before it was up"))
            return failed
        return start(index)

    monkeypatch.setattr(backend, "start_process", start_process)
    outcome = run.go()
    run.assert_exactly_once(outcome)
    assert len(backend.processes) > 1
    first = [(0, False)] * (1 + failures)
    assert started == [*first, *((i, True) for i in range(1, len(backend.processes)))]
    assert outcome.restarts.get("replicas", 0) == failures


def test_a_process_that_dies_costs_only_its_unfinished_mini_batches(
    tmp_path: Path, data: str
) -> None:
    killed: list[int] = []

    def kill_some(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id in (5, 11, 17):
            backend.kill_process(replica % 2)
            killed.append(lease.id)

    run = Run(tmp_path / "run", tiny.config(data, epochs=3))
    outcome = run.go(kill_some)
    assert killed == [5, 11, 17]
    assert outcome.restarts["replicas"] >= 1
    run.assert_exactly_once(outcome)


@pytest.mark.parametrize("transport", ["shared", "network"])
@pytest.mark.parametrize("checkpoint_every_s", [0.05, 1000.0])
def test_a_partition_that_dies_is_replaced_and_gets_what_it_lost(
    tmp_path: Path, data: str, transport: Literal["shared", "network"], checkpoint_every_s: float
) -> None:
    """From its last checkpoint, or from the initial weights where there is none yet."""
    config = tiny.config(data, epochs=3, checkpoint_every_s=checkpoint_every_s)
    network = NetworkConfig(transport=transport)
    config = dataclasses.replace(config, server=dataclasses.replace(config.server, network=network))
    killed: list[int] = []

    def kill(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        taken = any(run.folder.path.glob("checkpoints/*/manifest.json"))
        if checkpoint_every_s < 1 and not taken:
            return  # there is to be one to go on from, however fast the run is
        for number, partition in ((8, 1), (20, 0), (25, 1)):
            if lease.id >= number and number not in killed:
                backend.kill_partition(partition)
                killed.append(number)

    run = Run(tmp_path / "run", config)
    outcome = run.go(kill)
    assert killed == [8, 20, 25]
    run.assert_exactly_once(outcome)
    assert run.backend.partition_starts == [2, 3, 1]
    assert outcome.restarts["partition"] == 3
    versions = [r.version for r in outcome.reports]
    assert versions == [3 * run.plan.num_batches] * 3
    assert outcome.reports[2].duplicates > 0  # it ignored what only the others had lost
    events = (run.folder.path / "events.jsonl").read_text()
    assert "partition 1 died: replaced, 1 of 100" in events
    assert "mini-batches are run again" in events
    assert ("from the initial weights" in events) == (checkpoint_every_s > 1)


def test_a_partition_whose_thread_fails_is_replaced(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_all, failed = PartitionState.apply_all, []

    def failing(self: PartitionState, *arguments: Any) -> Any:
        if self.partition.index == 1 and self.version >= 40 and not failed:
            failed.append(self)
            raise MemoryError("by the test")
        return apply_all(self, *arguments)

    monkeypatch.setattr(PartitionState, "apply_all", failing)
    run = Run(tmp_path / "run", tiny.config(data, epochs=2, checkpoint_every_s=0.1))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    # The evaluator may have been connecting to the partition just then.
    assert outcome.restarts["partition"] == 1
    assert "replicas" not in outcome.restarts
    events = (run.folder.path / "events.jsonl").read_text()
    assert "partition 1 failed (MemoryError: by the test): replaced" in events
    assert "everybody is back after" in events


def test_a_process_that_loses_its_connections_is_connected_again(tmp_path: Path, data: str) -> None:
    def cut(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id in (5, 14):
            backend.cut_connections(lease.id % 2)

    run = Run(tmp_path / "run", tiny.config(data, epochs=3))
    outcome = run.go(cut)
    run.assert_exactly_once(outcome)
    assert outcome.restarts == {}
    assert "connecting again" in (run.folder.path / "events.jsonl").read_text()


def test_replicas_come_and_go_while_the_run_trains(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("downpour.cluster.controller.partitions.REPORT_EVERY_S", 0.02)
    run = Run(tmp_path / "run", tiny.config(data, replicas=2, epochs=12))
    seen: set[int] = set()

    def scale(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        seen.add(replica)
        if lease.id == 3:
            run.folder.ask_for_replicas(5)
        if seen >= {2, 3, 4} and run.controller.state.replicas_wanted == 5:
            run.folder.ask_for_replicas(1)

    outcome = run.go(scale)
    run.assert_exactly_once(outcome)
    assert seen == {0, 1, 2, 3, 4}
    assert len(run.backend.processes) == 5
    events = (run.folder.path / "events.jsonl").read_text()
    assert "from 2 replicas to 5" in events
    assert "from 5 replicas to 1" in events
    assert events.count("is let go") == 4
    assert run.shown[-1].replicas_wanted == 1


def test_a_word_that_others_could_have_left_does_not_count(tmp_path: Path, data: str) -> None:
    folder = RunFolder.create(tmp_path / "run", tiny.config(data))
    folder.ask_for_replicas(3)
    assert folder.replicas_asked_for() == 3
    assert folder.replicas_asked_for() is None
    folder.ask_for_replicas(3)
    (folder.path / "control.json").chmod(0o620)
    assert folder.replicas_asked_for() is None
    for text in ("{", "[]", '{"replicas": "3"}', '{"replicas": 0}', '{"replicas": true}'):
        (folder.path / "control.json").write_text(text)
        (folder.path / "control.json").chmod(0o600)
        assert folder.replicas_asked_for() is None


def test_a_replica_that_sends_poison_is_quarantined_and_named(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients are not finite, and its loss and norm do not tell: only the partitions can."""
    push = ParameterClient.push

    def poisoned(self: ParameterClient, **about: Any) -> None:
        if about["replica"] == 1:
            self.mailboxes.gradients[about["mailbox"]][::7] = np.nan
        push(self, **about)

    monkeypatch.setattr(ParameterClient, "push", poisoned)
    run = Run(tmp_path / "run", tiny.config(data, replicas=4, epochs=4))
    outcome = run.go()
    assert outcome.finished
    assert outcome.exactly_once
    assert outcome.quarantined == (1,)
    for flags, report in zip(run.flags, outcome.reports, strict=True):
        assert (flags == REFUSED).sum() == report.refused < 10 * 5
        assert (flags == APPLIED).sum() == report.batches_applied
    events = (run.folder.path / "events.jsonl").read_text()
    assert "replica 1 is quarantined: partition" in events
    assert outcome.evaluation is not None
    assert np.isfinite(outcome.evaluation.score.loss)


def test_a_shuffler_that_dies_is_replaced(tmp_path: Path, data: str) -> None:
    def kill(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id in (4, 9):
            backend.kill_shuffler()

    run = Run(tmp_path / "run", tiny.config(data))
    run.assert_exactly_once(run.go(kill))


def test_a_stopped_run_is_resumed_to_the_same_end(tmp_path: Path, data: str) -> None:
    run = Run(tmp_path / "run", tiny.config(data, epochs=3))

    def stop(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id == 12:
            run.controller.request_stop("SIGTERM")

    stopped = run.go(stop)
    assert not stopped.finished
    assert run.controller.stop_reason == "SIGTERM"
    before = min(r.version for r in stopped.reports)
    assert 0 < before < 3 * run.plan.num_batches

    again = Run(tmp_path / "run", run.config, resume=True)
    assert again.resumed is not None
    outcome = again.go()
    again.assert_exactly_once(outcome)
    assert min(r.updates_before for r in outcome.reports) == again.resumed.updates > 0
    assert outcome.elapsed_s > outcome.wall_s


def test_resume_goes_on_from_partitions_of_different_instants(tmp_path: Path, data: str) -> None:
    """A checkpoint of snapshots taken at different times, as they are without a barrier."""
    run = Run(tmp_path / "run", tiny.config(data, epochs=2))
    early: dict[int, Any] = {}

    def look(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id in (6, 9, 12):
            index = lease.id // 3 - 2
            folder = run.store.begin(900)
            early[index] = backend.partitions[index].snapshot(folder)
        if lease.id == 14:
            run.controller.request_stop("SIGTERM")

    run.go(look)
    versions = [early[i].version for i in range(3)]
    assert len(set(versions)) > 1
    from downpour.cluster.run.checkpoint import Checkpoint, slowest

    files = tuple(early[i] for i in range(3))
    run.store.commit(Checkpoint(number=900, updates=slowest(files), elapsed_s=1.0, files=files))
    again = Run(tmp_path / "run", run.config, resume=True)
    assert again.resumed is not None
    assert again.resumed.number == 900
    outcome = again.go()
    again.assert_exactly_once(outcome)
    assert sum(r.duplicates for r in outcome.reports) > 0


def poisoned_data(folder: Path) -> str:
    pixels, labels = tiny.images(320, 1)
    pixels[[7, 200]] = 255
    tiny.write_split(folder, "train", pixels, labels)
    tiny.write_split(folder, "test", *tiny.images(50, 2), shards=1)
    return str(folder)


def test_a_loss_that_is_not_a_number_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    data = poisoned_data(tmp_path / "data")
    config = tiny.config(data, model="tests.helpers.tiny:poisoned", epochs=2)
    run = Run(tmp_path / "run", config)
    outcome = run.go()
    assert outcome.finished
    assert outcome.exactly_once
    settled = [(f == REFUSED).sum() for f in run.flags]
    assert len(set(settled)) == 1
    assert outcome.refused == settled[0]
    assert 2 <= outcome.refused <= 4
    for report in outcome.reports:
        assert report.refused == outcome.refused
        assert report.batches_applied == 2 * run.plan.num_batches - outcome.refused
        assert sum(report.refusals.values()) == outcome.refused
    assert outcome.evaluation is not None
    assert np.isfinite(outcome.evaluation.score.loss)


def test_a_loss_that_is_not_a_number_stops_the_run_by_policy(tmp_path: Path) -> None:
    data = poisoned_data(tmp_path / "data")
    config = tiny.config(data, model="tests.helpers.tiny:poisoned", on_refusal="stop")
    run = Run(tmp_path / "run", config)
    outcome = run.go()
    assert not outcome.finished
    assert run.controller.stop_reason is not None
    assert "refused" in run.controller.stop_reason
    assert "--max-refused" in run.controller.stop_reason
    assert run.store.latest()[0] is not None


def test_an_image_that_does_not_decode_ends_the_run_in_a_line(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    data = tmp_path / "data"
    tiny.dataset(data)
    shard = next(data.glob("train-00001*"))
    table = pq.read_table(shard)
    rows = table["image"].to_pylist()
    rows[17]["bytes"] = b"not an image"
    import pyarrow as pa

    bad = table.set_column(0, "image", pa.array(rows, table.schema.field("image").type))
    pq.write_table(bad, shard)
    run = Run(tmp_path / "run", tiny.config(str(data)))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the kind is what is looked at
        run.go()
    message = user_message(caught.value)
    assert message is not None
    assert "decode" in message
    assert "\n" not in message


def test_processes_that_keep_dying_end_the_run_with_a_remedy(tmp_path: Path, data: str) -> None:
    config = tiny.config(data)
    config = dataclasses.replace(
        config, replicas=dataclasses.replace(config.replicas, max_restarts=2)
    )

    def kill(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        backend.kill_process(replica % 2)

    run = Run(tmp_path / "run", config)
    with pytest.raises(RunFailed, match=r"died 2 times.*downpour resume"):
        run.go(kill)


@pytest.mark.parametrize("fault", ["twice", "instead"])
def test_a_mini_batch_that_goes_into_the_weights_twice_is_told(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A planted fault: the applied sets are right, and the weights are not."""
    step, left = Vectors.step, [1]

    def faulty(self: Vectors, *arguments: Any) -> None:
        *before, push = arguments
        if left[0] and push.epoch == 1:
            left[0] = 0
            if fault == "twice":
                step(self, *arguments)
            else:
                push = dataclasses.replace(push, batches=((push.batches[0] + 1) % 3,))
        step(self, *before, push)

    monkeypatch.setattr(Vectors, "step", faulty)
    monkeypatch.setattr(PartitionState, "check", lambda self: None)  # it would tell, too
    outcome = Run(tmp_path / "run", tiny.config(data, partitions=1)).go()
    assert left == [0]
    assert outcome.finished
    assert not outcome.exactly_once


def test_a_delivery_that_is_stuck_for_good_is_made_by_another_shuffler(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("downpour.cluster.controller.partitions.REPORT_EVERY_S", 0.02)
    impatient = Limit(first_s=60.0, least_s=1.0)
    monkeypatch.setitem(cast(dict[Wait, Limit], LIMITS), "life", impatient)
    run, done = Run(tmp_path / "run", tiny.config(data, epochs=4)), list[int]()

    def get_stuck(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id > 8 and not done:
            backend.stuck = threading.Event()
            done.append(lease.id)

    outcome = run.go(get_stuck)
    assert done
    run.assert_exactly_once(outcome)
    assert outcome.restarts == {"shuffler": 1}
    events = (run.folder.path / "events.jsonl").read_text()
    assert "a shuffler does not answer (nothing for " in events

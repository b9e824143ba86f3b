"""The whole system on threads: real partitions, sockets and shared memory; scripted faults."""

import dataclasses
import math
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional

from downpour.cluster.config.derive import model_spec
from downpour.cluster.controller.hangs.patience import LIMITS, Limit, Wait
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.errors import user_message
from downpour.cluster.training.result import make_result
from downpour.models.flat import FlatModel, flatten
from downpour.paramserver.client import ParameterClient
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
    assert run.shown[-1].figure.value == outcome.evaluation.score.accuracy


@pytest.mark.parametrize("rule", ["sgd", "momentum", "nesterov", "adagrad", "adamw", "rmsprop"])
def test_one_replica_with_one_step_in_flight_is_torch_optim(
    tmp_path: Path, data: str, rule: RuleName
) -> None:
    """The whole system against a plain loop over the plan's mini-batches: 126 steps.

    With AdamW the rate follows a cosine, and the weights are averaged.
    """
    config = tiny.config(data, replicas=1, concurrent_steps=1, epochs=2)
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
        0: [2 * run.plan.num_batches]
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
    for epoch in range(2):
        for window in run.plan.window_order(epoch).tolist():
            for batch in run.plan.window_batches_order(epoch, window).tolist():
                rows = reader.take(run.plan.rows(epoch, batch))
                inputs, labels = decode(rows, tiny.IMAGE)
                model.zero_gradient()
                outputs = model.module(torch.from_numpy(inputs))
                functional.cross_entropy(outputs, torch.from_numpy(labels)).backward()
                if rule == "adamw":  # mini-batches are not all of one size, so by examples
                    for group in optimizer.param_groups:
                        group["lr"] = rate * (1 + math.cos(math.pi * examples / 2000)) / 2
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
    began_s = time.monotonic()
    outcome = again.go()
    again.assert_exactly_once(outcome)
    assert min(r.updates_before for r in outcome.reports) == again.resumed.updates > 0
    assert outcome.elapsed_s > outcome.wall_s

    # The result is of both sessions, but for how fast this one was.
    result = make_result(again.folder, again.config, outcome, began_s)
    total = 3 * run.plan.num_batches
    assert result["updates"] == result["batches_applied"] == total
    assert result["examples"] == 3 * run.plan.num_rows
    pushes = sum(count for _, count in result["staleness"]["histogram"])
    assert pushes == result["partitions"] * total
    first_s = again.resumed.elapsed_s
    assert result["elapsed_s"] == pytest.approx(first_s + outcome.wall_s, abs=0.02)  # rounded
    session = total - again.resumed.updates
    assert outcome.first_update_s is not None
    assert outcome.last_update_s is not None
    seconds = outcome.last_update_s - outcome.first_update_s
    assert result["updates_per_s"] == pytest.approx(session / seconds, abs=0.06)
    assert result["training_s"] == pytest.approx(seconds, abs=0.006)


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
    monkeypatch.setattr("downpour.cluster.controller.members.partitions.REPORT_EVERY_S", 0.02)
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

"""A virtual cluster that learns, against torch's SGD, the plain simulation, and its own pushes."""

import dataclasses
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from downpour.cluster.config.derive import model_spec, update_config
from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.leases.book import LeaseBook
from downpour.cluster.simulate.arithmetic import LearningPartition, TrainingRows, VirtualArithmetic
from downpour.cluster.simulate.inputs import Inputs
from downpour.cluster.simulate.learning import LearningRun, WeightsScorer
from downpour.cluster.simulate.options import SimulateConfig, configured, make_inputs
from downpour.cluster.simulate.partition import CarriedPush
from downpour.cluster.simulate.run import Simulation
from downpour.cluster.simulate.settings import LearningConfig
from downpour.cluster.training.inputs import loader
from downpour.models.flat import flatten
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.vectors import Version
from downpour.workers.recompute import Recomputer
from tests.helpers import tiny

COSTS: dict[str, Any] = {"step_ms": 10.0, "apply_ms": 1.0, "processors": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


def inputs_of(run: RunConfig, examples: TrainingRows, **given: Any) -> Inputs:
    options = SimulateConfig(**COSTS | given)
    return make_inputs(
        configured(run, options),
        options,
        num_rows=examples.plan.num_rows,
        num_parameters=examples.model.num_parameters,
        like=None,
    )


def learning_run(run: RunConfig, learn: LearningConfig | None = None, **given: Any) -> LearningRun:
    examples = TrainingRows.of(run)
    inputs = inputs_of(run, examples, **given)
    learn = learn or LearningConfig(until="epochs", score_every_epochs=0.5)
    return LearningRun("tiny", inputs, learn, examples=examples, scorer=WeightsScorer(run))


def weights_of(run: LearningRun) -> Tensor:
    found = [partition.weights for partition in run.simulation.partitions]
    return torch.cat([weights for weights in found if weights is not None])


def test_one_replica_with_one_step_is_torchs_sgd(data: str) -> None:
    run = tiny.config(data, replicas=1, concurrent_steps=1, in_flight="auto")
    run = dataclasses.replace(run, server=dataclasses.replace(run.server, rule="sgd"))
    learned = learning_run(run)
    curve = learned.run()
    assert curve.staleness.counts.tolist() == [3 * curve.batches_applied]

    plan, spec = TrainingRows.of(run).plan, model_spec(run)
    load, book = loader(run, plan), LeaseBook(plan, run.policy.epochs)
    model = spec.build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=run.server.schedule.learning_rate)
    steps = 0
    while (lease := book.grant(0)) is not None:
        for batch in lease.batches:
            inputs, targets = load(lease.epoch, batch)
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(model(inputs), targets))
            optimizer.step()
            steps += 1
        book.complete(lease.id, 0)
    assert curve.batches_computed == curve.batches_applied == steps
    expected, _ = flatten(model.state_dict(), spec.build_flat().layout)
    torch.testing.assert_close(weights_of(learned), expected, rtol=1e-4, atol=1e-6)
    assert curve.best is not None
    assert curve.best.accuracy > 0.8


@pytest.mark.parametrize(
    "given",
    [
        {"in_flight": "auto"},  # mini-batches of a step are joined
        {"staleness_policy": "compensate", "speed_spread": 4.0, "step_spread": 0.5},
    ],
    ids=["joined", "compensated"],
)
def test_the_same_seed_gives_the_same_bits(data: str, given: dict[str, Any]) -> None:
    run = tiny.config(data)
    one, two = learning_run(run, **given), learning_run(run, **given)
    torch.manual_seed(99)  # what else the process has drawn does not matter
    first, second = one.run(), two.run()
    assert first.points == second.points
    assert first.as_plain((0.9,)) == second.as_plain((0.9,))
    assert torch.equal(weights_of(one), weights_of(two))
    other = learning_run(run, seed=1, **given).run()
    assert other.points != first.points


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"in_flight": "auto"},
        {"step_spread": 0.0, "in_flight": "all", "replicas_per_process": 1},  # in lock step
        {"machines": 3, "server_machines": 1, "latency_ms": 3.0, "speed_spread": 4.0},
        {"staleness_policy": "bounded", "staleness_bound": 9},
        {"staleness_policy": "synchronous", "round_pushes": 5},
        {"staleness_policy": "drop", "staleness_bound": 7},
        {"staleness_policy": "compensate", "staleness_bound": 8},
    ],
)
def test_time_and_staleness_are_those_of_a_simulation_without_arithmetic(
    data: str, given: dict[str, Any]
) -> None:
    run = tiny.config(data, epochs=4)
    examples = TrainingRows.of(run)
    inputs = inputs_of(run, examples, **given)
    plain = Simulation(inputs)
    learning = Simulation(inputs, VirtualArithmetic(inputs.config, inputs.num_partitions, examples))
    for simulation in (plain, learning):
        simulation.start()
        # Not to the end, which only the one that learns has.
        first = simulation.partitions[0]
        while first.applied < 100:
            assert simulation.clock.advance()
        simulation.check()
    assert plain.clock.now_s == learning.clock.now_s
    assert plain.book.remaining_batches - learning.book.remaining_batches > 0  # it has an end
    for a, b in zip(plain.partitions, learning.partitions, strict=True):
        assert a.seen.counts.tolist() == b.seen.counts.tolist()
        assert a.ledger.outcomes == b.ledger.outcomes
        assert a.seen.total >= 90


class Log:
    """All that a partition has taken, and kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: dict[int, list[CarriedPush]] = {}
        """By partition, pushes applied that no death has taken back, as they came."""
        self.computed: list[tuple[int, CarriedPush]] = []
        self.weights: dict[tuple[int, int], Tensor] = {}
        """By partition and version."""
        take, load = LearningPartition.take, LearningPartition.load

        def logged(keeper: LearningPartition, push: Push) -> Outcome:
            assert isinstance(push, CarriedPush)
            index, version = keeper._state.partition.index, keeper.ledger.version
            self.weights[index, version] = keeper.weights
            copied = dataclasses.replace(push, gradient=push.gradient.clone())
            self.computed.append((index, copied))
            outcome = take(keeper, push)
            if outcome is Outcome.APPLIED:
                self.kept.setdefault(index, []).append(copied)
            return outcome

        def loaded(keeper: LearningPartition, saved: Any) -> None:
            load(keeper, saved)
            del self.kept.setdefault(keeper._state.partition.index, [])[keeper.ledger.version :]

        monkeypatch.setattr(LearningPartition, "take", logged)
        monkeypatch.setattr(LearningPartition, "load", loaded)

    def assert_exactly_once(self, learned: LearningRun, run: RunConfig) -> None:
        """Each mini-batch once in each partition, and their sequence gives the weights."""
        plan = TrainingRows.of(run).plan
        every = {(e, b) for e in range(run.policy.epochs) for b in range(plan.num_batches)}
        for partition in learned.simulation.partitions:
            pushes = self.kept[partition.index]
            batches = [(push.epoch, b) for push in pushes for b in push.batches]
            assert len(batches) == len(every)
            assert set(batches) == every
            keeper = partition.keeper
            assert isinstance(keeper, LearningPartition)
            part = keeper._state.partition
            weights = torch.from_numpy(TrainingRows.of(run).model.weights)[part.start : part.stop]
            statistics = torch.stack(
                [torch.zeros(part.num_features), torch.ones(part.num_features)]
            )
            again = PartitionState(
                part,
                update_config(run, plan),
                Version(weights=weights.clone(), statistics=statistics),
            )
            for push in pushes:
                assert again.apply(push, push.gradient, push.moments) is Outcome.APPLIED
            assert torch.equal(again.current.weights, keeper.weights)
            assert torch.equal(again.current.statistics, keeper.scored.statistics)


def test_replicas_that_die_lose_nothing_and_apply_nothing_twice(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(monkeypatch)
    run = tiny.config(data)
    learned = learning_run(run, process_mtbf_s=0.15, restart_s=0.05, step_spread=0.3)
    curve = learned.run()
    assert curve.finished
    assert curve.deaths > 3
    assert curve.batches_computed > curve.batches_applied  # some had to be computed again
    log.assert_exactly_once(learned, learned.simulation._config)

    # Every gradient is that of the weights that it says it was computed on, to the bit.
    recomputer = Recomputer(model_spec(run), loader(run, TrainingRows.of(run).plan))
    parts = [p.keeper._state.partition for p in learned.simulation.partitions]  # type: ignore[attr-defined]
    by_step: dict[tuple[int, int, float], dict[int, CarriedPush]] = {}
    for index, push in log.computed:
        by_step.setdefault((push.epoch, push.batches[0], push.loss), {})[index] = push
    checked = 0
    for (epoch, batch, loss), pushes in by_step.items():
        if len(pushes) < len(parts):
            continue  # a death came between its pushes
        for part in parts:
            push = pushes[part.index]
            weights = log.weights[part.index, push.version]
            recomputer.weights[part.start : part.stop] = weights.numpy()
        found = recomputer.compute(epoch, batch)
        assert found.loss == loss
        for part in parts:
            assert torch.equal(found.gradient[part.start : part.stop], pushes[part.index].gradient)
        checked += 1
    assert checked >= curve.batches_applied - 10


def test_partitions_that_die_lose_nothing_and_apply_nothing_twice(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(monkeypatch)
    run = tiny.config(data)
    learned = learning_run(
        run, partition_mtbf_s=0.5, restart_s=0.05, checkpoint_every_s=0.05, in_flight="auto"
    )
    curve = learned.run()
    assert curve.finished
    assert curve.deaths > 1
    log.assert_exactly_once(learned, learned.simulation._config)


@pytest.mark.parametrize("policy", ["bounded", "synchronous", "drop", "compensate", "scale"])
def test_every_policy_ends_with_every_mini_batch(data: str, policy: Any) -> None:
    run = tiny.config(data, partitions=1)
    given: dict[str, Any] = {"staleness_policy": policy, "speed_spread": 4.0}
    if policy == "synchronous":
        given["round_pushes"] = 6
    elif policy != "scale":
        given["staleness_bound"] = 9
    curve = learning_run(run, **given).run()
    assert curve.finished
    assert curve.batches_applied == 2 * TrainingRows.of(run).plan.num_batches
    assert curve.points[-1].examples == 2000
    assert curve.best is not None
    assert math.isfinite(curve.best.loss)
    assert np.diff([point.seconds for point in curve.points]).min() > 0


def test_a_run_ends_at_its_goal_and_is_scored_when_it_is_due(data: str) -> None:
    run = tiny.config(data, replicas=2, epochs=6)
    learn = LearningConfig(goal=(0.3, 0.6), score_every_epochs=0.2)
    curve = learning_run(run, learn).run()
    assert not curve.finished
    last = curve.points[-1]
    assert curve.reached(0.6) is last
    assert last.accuracy >= 0.6 > max((p.accuracy for p in curve.points[:-1]), default=0.0)
    early = curve.reached(0.3)
    assert early is not None
    assert early.examples <= last.examples
    for number, point in enumerate(curve.points, 1):
        assert 0 <= point.examples - number * 200 <= 16

    by_time = LearningConfig(until="epochs", score_every_epochs=None, score_every_s=0.1)
    timed = learning_run(run, by_time).run()
    for number, point in enumerate(timed.points[:-1], 1):
        assert 0 <= point.seconds - number * 0.1 < 0.02


def test_memory_is_that_of_the_versions_that_pulls_still_need(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, most = LearningPartition._room, 0
    tensors: list[weakref.ref[Tensor]] = []

    def watched(keeper: LearningPartition) -> Version:
        nonlocal most
        version = room(keeper)
        tensors.append(weakref.ref(version.weights))
        most = max(most, sum(ref() is not None for ref in tensors))
        return version

    monkeypatch.setattr(LearningPartition, "_room", watched)
    run = tiny.config(data, partitions=1, replicas=2, concurrent_steps=2, epochs=1)
    learned = learning_run(run)
    learned.run()
    assert len(tensors) > 60
    # Four steps hold weights, the partition has those it publishes and those it writes.
    assert most <= 4 + 3


def test_a_run_ends_after_so_many_virtual_seconds(data: str) -> None:
    run = tiny.config(data, epochs=6)
    examples = TrainingRows.of(run)
    learn = LearningConfig(until="epochs", score_every_epochs=1.0)
    inputs = inputs_of(run, examples)
    scorer = WeightsScorer(run)
    learned = LearningRun("x", inputs, learn, examples=examples, scorer=scorer, seconds=0.3)
    curve = learned.run()
    assert not curve.finished
    assert curve.seconds == pytest.approx(0.3, abs=0.02)
    assert curve.points[-1].seconds == curve.seconds  # what came of it is scored

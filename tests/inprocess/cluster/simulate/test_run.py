"""Runs on the virtual clock, against what they must be by hand, and what they must never be."""

import dataclasses
import math

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.simulate import run as simulated
from downpour.cluster.simulate.forecast import Forecast
from downpour.cluster.simulate.inputs import Costs, Faults, Inputs, Machines, Spread
from downpour.cluster.simulate.options import SimulateConfig, configured, make_inputs
from downpour.cluster.simulate.run import Simulation

STEP_S, APPLY_S = 0.001, 0.0002


@pytest.fixture(
    autouse=True,
    params=[500, pytest.param(simulated.FEWEST_UPDATES, marks=pytest.mark.soak)],
    ids=["short", "whole"],
)
def fewest_updates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What figures are taken over: fewer updates than users get, but in the soak."""
    monkeypatch.setattr(simulated, "FEWEST_UPDATES", request.param)


def config(replicas: int, steps: int = 5, **given: object) -> RunConfig:
    """All steps in flight and windows of 64: what the figures below are worked out for."""
    run = configured(
        recipes.find("mnist-bn"),
        SimulateConfig(replicas=replicas, concurrent_steps=steps, **given),  # type: ignore[arg-type]
    )
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, window_batches=64))
    in_flight = dataclasses.replace(run.replicas.steps, in_flight="all")
    return dataclasses.replace(run, replicas=dataclasses.replace(run.replicas, steps=in_flight))


def inputs(
    run: RunConfig, *, step_s: float = STEP_S, spread: float = 0.0, **given: object
) -> Inputs:
    costs = Costs(step=Spread(mean_s=step_s, spread=spread), apply=Spread(mean_s=APPLY_S))
    values = {"costs": costs, "num_rows": 60_000, "num_partitions": 1, **given}
    return Inputs(config=run, **values)  # type: ignore[arg-type]


def forecast(run: RunConfig, seconds: float | None = None, **given: object) -> Forecast:
    return Simulation(inputs(run, **given)).forecast(seconds=seconds)  # type: ignore[arg-type]


def test_one_step_in_flight_is_never_stale_and_waits_for_its_answer() -> None:
    found = forecast(config(1, 1))
    assert found.staleness.counts.tolist() == [found.updates]
    assert found.updates_per_s == pytest.approx(1 / (STEP_S + APPLY_S), rel=1e-3)
    assert found.push_ms == pytest.approx(1e3 * APPLY_S, rel=1e-3)


def test_steps_overlap_with_the_server() -> None:
    """Three processors: two for steps, one for pushes. A slot pulls before its push is applied, so
    its own last push and those of four others of its process lie between its pull and its next
    push, and five of the other process, give or take one that is just being applied.
    """
    found = forecast(config(2, 5), machines=Machines(processors=3))
    assert found.batches_per_s == found.updates_per_s  # nobody died
    assert found.updates_per_s == pytest.approx(2 / STEP_S, rel=1e-3)
    assert set(found.staleness.counts.nonzero()[0].tolist()) <= {9, 10, 11}
    assert found.staleness.summary()["mean"] == pytest.approx(10.0, abs=0.5)


def test_the_only_process_has_all_processors_for_a_step() -> None:
    """Two threads a step, and the partition's between them: 2 STEP + APPLY of two processors."""
    found = forecast(config(1, 5))
    assert found.updates_per_s == pytest.approx(2 / (2 * STEP_S + APPLY_S), rel=1e-3)
    assert set(found.staleness.counts.nonzero()[0].tolist()) == {5}


def test_processors_are_shared_with_the_server() -> None:
    """Two processes and the partition on two processors: an update costs a step and a push."""
    found = forecast(config(10, 5), spread=0.2)
    assert found.updates_per_s == pytest.approx(2 / (STEP_S + APPLY_S), rel=0.01)
    assert found.busy[0] == pytest.approx(1.0, abs=0.01)
    alone = forecast(config(10, 5), spread=0.2, machines=Machines(background=0.5))
    assert alone.updates_per_s == pytest.approx(1.5 / (STEP_S + APPLY_S), rel=0.01)


def test_staleness_grows_with_the_steps_in_flight_and_with_what_doorbells_keep_back() -> None:
    """49 others are in flight beside a push of one of 50 slots; each of the two processes keeps
    up to three back, and its own push too is one that a pull does not see.
    """
    mean = forecast(config(10, 5), spread=0.2).staleness.summary()["mean"]
    assert 49 + 2 < mean < 49 + 9
    # Slots of one step: what is kept back is let go before anything is waited for.
    assert forecast(config(2, 1), spread=0.2).staleness.summary()["mean"] < 2 + 0.5


def test_a_slow_process_has_all_the_staleness() -> None:
    costs = Costs(
        step=Spread(mean_s=STEP_S, spread=0.1),
        apply=Spread(mean_s=APPLY_S),
        slow_share=0.5,
        slow_times=10.0,
    )
    run = config(8, 1, replicas_per_process=1)
    even = forecast(run, machines=Machines(processors=10), spread=0.1)
    found = forecast(run, machines=Machines(processors=10), costs=costs)
    assert found.staleness.summary()["max"] > 3 * even.staleness.summary()["max"]


def test_nothing_is_applied_beyond_the_bound_and_nothing_is_dropped() -> None:
    run = config(10, 5, staleness_policy="bounded", staleness_bound=30)
    simulation = Simulation(inputs(run, spread=0.5))
    found = simulation.forecast()
    assert 0 < found.staleness.summary()["max"] <= 30
    assert simulation.partitions[0].ledger.counts()["dropped"] == 0


def test_what_is_dropped_is_lent_again() -> None:
    run = config(10, 5, staleness_policy="drop", staleness_bound=50)
    simulation = Simulation(inputs(run, spread=0.2))
    found = simulation.forecast()
    assert found.staleness.summary()["max"] <= 50
    assert simulation.partitions[0].ledger.counts()["dropped"] > 0
    assert simulation.book.num_returned > 0


def test_a_compensated_run_is_an_asynchronous_one_with_a_bound() -> None:
    """What compensation costs a partition is told by the costs; what it drops, by its bound."""
    plain = forecast(config(10, 5), spread=0.2)
    run = config(10, 5, staleness_policy="compensate", staleness_bound=200)
    assert forecast(run, spread=0.2).staleness.summary() == plain.staleness.summary()
    run = config(10, 5, staleness_policy="compensate", staleness_bound=51)
    simulation = Simulation(inputs(run, spread=0.2))
    assert simulation.forecast().staleness.summary()["max"] <= 51
    assert simulation.partitions[0].ledger.counts()["dropped"] > 0


def test_rounds_wait_for_their_slowest_and_backup_workers_do_not_let_them() -> None:
    """Eight machines with one slot each, one of them ten times as slow."""
    costs = Costs(
        step=Spread(mean_s=STEP_S, spread=0.1),
        apply=Spread(mean_s=APPLY_S),
        slow_share=0.125,
        slow_times=10.0,
    )

    def run(pushes: int | None) -> Simulation:
        of = config(8, 1, staleness_policy="synchronous", round_pushes=pushes)
        return Simulation(inputs(of, machines=Machines(machines=8, processors=1), costs=costs))

    whole, backed = run(None), run(6)
    slow = sum(member.step_times > 1 for member in whole._members)
    assert 1 <= slow <= 2  # as the seed has it
    assert slow == sum(member.step_times > 1 for member in backed._members)
    waiting, going = whole.forecast(), backed.forecast()
    assert waiting.staleness.summary()["max"] == going.staleness.summary()["max"] == 0
    assert whole.partitions[0].ledger.counts()["dropped"] == 0
    assert backed.partitions[0].ledger.counts()["dropped"] > 0
    assert backed.book.num_returned > 0
    assert waiting.updates_per_s < 8 / (10 * STEP_S)
    assert going.updates_per_s > 3 * waiting.updates_per_s
    backed.check()


def test_weights_over_the_network_take_their_time() -> None:
    """One slot on one machine, the partition on another, 1 s of latency each way. Each push is
    answered after 2 s, and the pull, asked for then, takes 2 s more.
    """
    machines = Machines(server_machines=1, latency_s=1.0)
    found = forecast(config(1, 1), machines=machines, seconds=4_000.0)
    assert 1 / found.updates_per_s == pytest.approx(4.0 + STEP_S + APPLY_S, rel=1e-3)
    assert found.pull_wait_ms == pytest.approx(2_000.0, rel=1e-2)


def test_bandwidth_bounds_the_rate() -> None:
    """Four machines push 1 MB and pull 1 MB each step; the partition's machine has 100 MB/s."""
    costs = Costs(
        step=Spread(mean_s=STEP_S, spread=0.2),
        apply=Spread(mean_s=APPLY_S),
        gradient_bytes=1e6,
        num_parameters=250_000,
        weights_bytes=1e6,
    )
    machines = Machines(machines=4, server_machines=1, bytes_per_s=1e8)
    found = forecast(config(8, 5), costs=costs, machines=machines)
    assert found.updates_per_s == pytest.approx(100.0, rel=0.05)


@pytest.mark.parametrize("partitions", [1, 2])
def test_deaths_cost_time_and_no_mini_batch(partitions: int) -> None:
    run = config(4, 2, replicas_per_process=1, checkpoint_every_s=1.0)
    faults = Faults(process_mtbf_s=5.0, partition_mtbf_s=10.0, restart_s=0.5)
    simulation = Simulation(
        inputs(run, step_s=0.01, spread=0.2, num_partitions=partitions, faults=faults)
    )
    found = simulation.forecast(seconds=16.0)  # it checks its invariants
    assert found.deaths > 6
    calm = forecast(run, step_s=0.01, spread=0.2, num_partitions=partitions)
    assert 0 < found.batches_per_s < calm.batches_per_s
    assert simulation.book.num_returned > 0
    # Exactly once: what the book counts as done, every partition has settled, and once only.
    for epoch in range(simulation.book.epochs_finished):
        for partition in simulation.partitions:
            assert (partition.ledger.applied.flags(epoch) != 0).all()
    assert simulation.book.epochs_finished > 0
    if partitions == 2:  # of two, the one that lived is told again what the other lost
        assert found.repeated > 0


def test_many_replicas_are_kept_in_one_histogram() -> None:
    """Every turn of a slot lies between its pull and its push: 5 x 100, and what is kept back."""
    simulation = Simulation(inputs(config(100, 5), spread=0.2))
    found = simulation.forecast()
    assert found.staleness.summary()["mean"] == pytest.approx(500, rel=0.02)
    partition = simulation.partitions[0]
    assert list(partition.ledger.staleness.dump()) == [0]
    partition.save()
    partition.start()  # from its checkpoint: a record of the same kind
    assert partition.ledger.staleness.all().total == partition.ledger.version > 0
    partition.ledger.staleness.add(7, 1)
    assert list(partition.ledger.staleness.dump()) == [0]


def test_a_run_that_dies_all_the_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "STUCK_AFTER_S", 100.0)
    faults = Faults(partition_mtbf_s=0.001, restart_s=10.0)
    with pytest.raises(UserError, match="--restart-s"):
        Simulation(inputs(config(1), faults=faults)).forecast()


def test_a_seed_gives_the_same_forecast_and_another_does_not() -> None:
    run = config(3, 3)
    first, again, other = (forecast(run, spread=0.3, seed=seed) for seed in (1, 1, 2))
    assert first.updates_per_s == again.updates_per_s
    assert first.staleness.counts.tolist() == again.staleness.counts.tolist()
    assert first.updates_per_s != other.updates_per_s


def test_options_make_up_inputs_and_what_is_missing_is_named() -> None:
    recipe = recipes.find("mnist-bn")
    given = SimulateConfig(replicas=100, step_ms=2.0, apply_ms=0.5, bandwidth_mb_s=10.0)
    run = configured(recipe, given)
    made = make_inputs(run, given, num_rows=60_000, num_parameters=1_000_000, like=None)
    assert made.config.replicas.replicas == 100
    assert made.config.replicas.ramp_epochs == 0
    assert made.costs.step.mean_s == 0.002
    assert made.costs.apply.mean_s == 0.0005
    assert made.costs.gradient_bytes == made.costs.weights_bytes == 4e6
    assert made.machines.bytes_per_s == 1e7
    assert made.faults.process_mtbf_s == math.inf
    with pytest.raises(UserError, match="--apply-ms"):
        make_inputs(
            run,
            dataclasses.replace(given, apply_ms=None),
            num_rows=60_000,
            num_parameters=10,
            like=None,
        )
    with pytest.raises(ValueError, match="restart s is 0"):
        SimulateConfig(restart_s=0)
    with pytest.raises(UserError, match="more --processors"):
        make_inputs(
            run,
            dataclasses.replace(given, processors=2, background=2.0),
            num_rows=60_000,
            num_parameters=10,
            like=None,
        )


def test_processes_of_spread_speeds_share_the_work_by_them() -> None:
    """Four machines, steps 1, 2.5, 6.3 and 16 times as long: 1.625 times the fastest's rate."""
    run = config(4, 1, replicas_per_process=1)
    machines = Machines(machines=4, server_machines=1, processors=1)
    costs = Costs(step=Spread(mean_s=STEP_S), apply=Spread(mean_s=1e-6), speed_spread=16.0)
    found = forecast(run, machines=machines, costs=costs)
    rate = sum(1 / 16 ** (i / 3) for i in range(4)) / STEP_S
    assert found.batches_per_s == pytest.approx(rate, rel=0.02)

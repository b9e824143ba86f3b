"""The state of a run: events in, instructions out. Nothing runs, and nothing waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from downpour.cluster.controller import instructions as do
from downpour.cluster.controller.backend import (
    PartitionLost,
    ProcessLost,
    RunFailed,
    ShufflerLost,
    WriteFailed,
)
from downpour.cluster.controller.failure_policy import Failure, FailurePolicy, Recovery
from downpour.cluster.controller.partitions import SILENT_AFTER_S
from downpour.cluster.errors import UserError
from downpour.paramserver.partition.applied_set import APPLIED, REFUSED
from tests.helpers.world import World, configured

Made = Callable[..., World]


@pytest.fixture
def made() -> Iterator[Made]:
    """Makes runs, whose invariants are checked at the end."""
    runs: list[World] = []

    def make(*arguments: Any, **about: Any) -> World:
        runs.append(World(*arguments, **about))
        return runs[-1]

    yield make
    for run in runs:
        run.state.check()


def kinds(instructions: list[Any]) -> list[type]:
    return [type(instruction) for instruction in instructions]


# Starting


def test_processes_start_once_all_partitions_are_up_the_first_of_them_first(made: Made) -> None:
    run = made()
    run.begin()
    run.tick()
    assert kinds(run.pending) == [do.StartPartition, do.StartPartition]
    run.answer(run.pending[0])
    run.tick()
    assert kinds(run.pending) == [do.StartPartition]
    run.answer_all()
    run.tick()
    assert run.calls(do.StartProcess) == [do.StartProcess(process=0)]
    run.answer(do.StartProcess(process=0))
    assert run.calls(do.StartProcess) == [do.StartProcess(process=1)]
    run.tick()
    assert {call.replica for call in run.calls(do.RunWindow)} == {0, 1}
    assert run.state.phase == "training"


def test_a_stop_before_the_partitions_are_up_ends_without_a_checkpoint(made: Made) -> None:
    run = made()
    run.begin()
    run.hand_in(do.StopRequested(reason="SIGTERM"))
    run.tick()
    assert run.outcome is not None
    assert (run.outcome.finished, run.outcome.checkpoint) == (False, None)
    assert run.state.handle(do.Tick(), 1.0) == []  # that was all


def test_a_run_comes_to_its_end(made: Made) -> None:
    run = made()
    run.begin()
    run.go_on(lambda: run.outcome is not None)
    assert run.outcome is not None
    assert run.outcome.finished
    assert run.outcome.exactly_once
    assert all((flags == APPLIED).all() for flags in run.flags())
    assert run.outcome.checkpoint == 1
    assert run.outcome.best_accuracy == 0.5
    assert run.outcome.all_replicas_s is not None
    assert not run.pending


# Processes


def test_a_process_that_dies_costs_only_what_it_had_not_pushed(made: Made) -> None:
    run = made()
    run.train()
    lost = [call.lease for call in run.calls(do.RunWindow) if call.replica in (2, 3)]
    call = next(call for call in run.calls(do.RunWindow) if call.replica == 2)
    run.kill_process(1)
    run.fail(call, ProcessLost("it died"))
    assert run.calls(do.StartProcess) == [do.StartProcess(process=1)]
    assert not any(run.state.leases.is_live(lease) for lease in lost)
    assert "the process of replicas 2, 3 died: replaced, 1 of 100" in run.told()
    run.tick()
    asked = run.calls(do.AskFlags)
    assert [call.partition for call in asked] == [0, 1]
    run.answer_all(do.AskFlags)
    run.answer(do.StartProcess(process=1))
    run.tick()
    again = {b for c in run.calls(do.RunWindow) for b in [(c.lease.epoch, *c.lease.batches)]}
    assert again
    assert "everybody is back after" in run.told()
    run.go_on(lambda: run.outcome is not None)
    assert run.outcome is not None
    assert run.outcome.exactly_once
    assert run.outcome.restarts == {"replicas": 1}


def test_news_of_a_window_comes_too_late_once_its_process_was_lost(made: Made) -> None:
    run = made()
    run.train()
    first, second = [call for call in run.calls(do.RunWindow) if call.replica == 0][:2]
    run.fail(first, ProcessLost("it died"))
    run.fail(second, ProcessLost("it died"))
    assert run.state.failures.policy.restarts == {"replicas": 1}
    assert len(run.calls(do.StartProcess)) == 1


def test_a_process_that_lost_its_connection_connects_again_once_partitions_answer(
    made: Made,
) -> None:
    run = made()
    run.train()
    call = run.calls(do.RunWindow)[0]
    run.fail(call, PartitionLost("a connection is lost"))
    assert not run.calls(do.ReconnectProcess)
    run.tick()
    probes = [call for call in run.calls(do.AskReport) if call.inquiry is not None]
    assert [call.partition for call in probes] == [0, 1]
    run.answer(probes[0])
    assert not run.calls(do.ReconnectProcess)
    run.answer(probes[1])
    assert run.calls(do.ReconnectProcess) == [do.ReconnectProcess(process=0)]
    run.answer_all(do.ReconnectProcess)
    assert run.state.processes.is_up(0)
    assert run.state.failures.policy.restarts == {}


def test_the_policy_about_failures_is_given(made: Made) -> None:
    class Never(FailurePolicy):
        def decide(self, failure: Failure, *, followed: bool = False) -> Recovery:
            return Recovery(action="give up", reason=f"{failure}, and that is that")

    run = made(failure_policy=Never(max_restarts=100))
    run.train()
    run.fail(run.calls(do.RunWindow)[0], ProcessLost("it died"))
    assert isinstance(run.error, RunFailed)
    assert "died, and that is that: see the logs" in str(run.error)
    assert "downpour resume runs/a" in str(run.error)
    assert run.state.handle(do.Tick(), 9.0) == []


def test_an_error_of_the_users_ends_the_run_as_it_is(made: Made) -> None:
    run = made()
    run.train()
    error = UserError("image 17 cannot be decoded")
    run.fail(run.calls(do.RunWindow)[0], error)
    assert run.error is error


def test_other_numbers_of_replicas_add_processes_and_let_them_go(made: Made) -> None:
    run = made(configured(policy={"epochs": 30}))
    run.train()
    run.hand_in(do.ReplicasRequested(replicas=7))
    added = run.taken(do.AddProcess)
    assert [(given.process, given.replicas) for given in added] == [(2, (4, 5)), (3, (6,))]
    run.go_on(lambda: run.state.processes.all_up)
    run.tick()
    assert {call.replica for call in run.calls(do.RunWindow)} <= set(range(7))
    run.hand_in(do.ReplicasRequested(replicas=2))
    run.go_on(lambda: run.state.processes.num_alive(100) == 2)
    assert sorted(given.process for given in run.taken(do.StopProcess)) == [1, 2, 3]
    run.go_on(lambda: run.outcome is not None)
    assert run.outcome is not None
    assert run.outcome.exactly_once


# Shufflers


def test_a_shuffler_is_replaced_once_however_many_windows_tell_of_its_death(made: Made) -> None:
    run = made()
    run.train()
    run.shufflers_dead = 1
    calls = run.calls(do.RunWindow)[:3]
    for call in calls:
        run.fail(call, ShufflerLost("it died"))
    assert not any(run.state.leases.is_live(call.lease) for call in calls)
    run.answer_all(do.ReplaceShufflers)
    assert run.state.failures.policy.restarts == {"shuffler": 1}
    run.tick()
    again = {call.lease.batches for call in run.calls(do.RunWindow)}
    assert {call.lease.batches for call in calls} <= again


# Partitions


def test_a_partition_that_dies_while_a_checkpoint_is_in_the_making(made: Made) -> None:
    run = made(configured(policy={"checkpoint_every_s": 5.0}))
    run.train()
    for call in run.calls(do.RunWindow)[:4]:
        run.answer(call)
    run.tick(5.0)
    run.answer_all(do.BeginCheckpoint)
    one, other = run.calls(do.WriteSnapshot)
    run.answer(one)
    run.kill_partition(1)
    run.fail(other, PartitionLost("it died"))
    assert run.taken(do.DiscardCheckpoint) == [do.DiscardCheckpoint(number=1)]
    assert not run.state.checkpoints.in_the_making
    (start,) = run.calls(do.StartPartition)
    assert (start.partition, start.again) == (1, True)
    assert run.state.phase == "replacing partition 1"
    assert not any(p.ready for p in run.state.processes.members)
    run.tick()
    assert not run.calls(do.AskFlags)  # not before it is back
    run.answer(start)
    run.go_on(lambda: run.outcome is not None)
    assert run.outcome is not None
    assert run.outcome.exactly_once
    assert "mini-batches are run again" in run.told()
    assert 1 not in run.committed


def test_what_an_earlier_incarnation_says_is_of_no_interest(made: Made) -> None:
    run = made()
    run.train()
    reports = run.calls(do.AskReport)
    assert [call.partition for call in reports] == [0, 1]
    run.kill_partition(0)
    run.fail(reports[0], PartitionLost("it died"))
    old = do.AskReport(partition=0, incarnation=reports[0].incarnation)
    before = run.state.partitions.members[0].incarnation
    run.hand_in(do.Failed(call=old, error=PartitionLost("late news of its death")))
    assert run.state.partitions.members[0].incarnation == before
    assert run.state.failures.policy.restarts == {"partition": 1}


def test_an_answer_to_a_census_before_a_loss_does_not_count_after_it(made: Made) -> None:
    """Partition 0 is the same throughout, but what it answered is older than the second census."""
    run = made()
    run.train()
    run.fail(run.calls(do.RunWindow)[0], ProcessLost("it died"))
    run.tick()
    first = run.calls(do.AskFlags)
    assert len(first) == 2
    run.kill_partition(1)
    run.fail(first[1], PartitionLost("it died"))
    run.answer_all(do.StartPartition)
    run.tick()
    second = [call for call in run.calls(do.AskFlags) if call not in first]
    assert [call.partition for call in second] == [0, 1]
    run.answer(first[0])
    run.answer(second[1])
    assert run.state.leases.reopening
    run.answer(second[0])
    assert not run.state.leases.reopening


def test_a_partition_that_does_not_answer_is_taken_for_lost(made: Made) -> None:
    run = made()
    run.train()
    assert len(run.calls(do.AskReport)) == 2
    run.answer(run.calls(do.AskReport)[0])
    run.tick(SILENT_AFTER_S + 1)
    assert "partition 1 does not answer: replaced" in run.told()
    assert [call.partition for call in run.calls(do.StartPartition)] == [1]


def test_a_follower_takes_the_place_of_its_partition(made: Made) -> None:
    run = made(configured(server={"hot_standby": True}))
    run.train()
    run.tick(10.0)
    assert kinds(run.taken(do.MakeSpares)) == [do.MakeSpares]
    run.answer_all(do.StartFollower)
    assert run.state.partitions.followers.can_take_over(1)
    for call in run.calls(do.RunWindow):
        run.answer(call)
    run.tick(1.0)
    run.kill_partition(1)
    call = next(c for c in run.calls(do.AskReport) if c.partition == 1 and c.inquiry is None)
    run.fail(call, PartitionLost("it died"))
    assert not run.calls(do.StartPartition)
    (promote,) = run.calls(do.Promote)
    run.answer(promote)
    run.go_on(lambda: run.outcome is not None)
    assert run.outcome is not None
    assert run.outcome.exactly_once
    assert "0 mini-batches are run again" in run.told()


def test_replicas_that_are_quarantined_get_no_more_leases(made: Made) -> None:
    run = made(configured(policy={"epochs": 30}))
    run.train()
    run.partitions[0].quarantined = (1,)
    run.go_on(lambda: 1 in run.state.quarantined, turns=20)
    assert "replica 1 is quarantined: partition 0 refused" in run.told()
    held = run.state.leases.num_held_by(1)
    run.tick()
    assert run.state.leases.num_held_by(1) == held
    run.partitions[0].quarantined = (0, 1, 2, 3)
    run.go_on(lambda: run.outcome is not None, turns=20)
    assert run.outcome is not None
    assert not run.outcome.finished
    assert "every replica is quarantined" in (run.state.stop_reason or "")


def test_mini_batches_that_are_refused_stop_the_run_at_the_bound(made: Made) -> None:
    run = made(configured(policy={"max_refused": 5}))
    run.loss = None
    run.begin()
    run.go_on(lambda: run.outcome is not None)
    assert run.outcome is not None
    assert not run.outcome.finished
    assert run.outcome.refused > 5
    assert "raise --max-refused" in (run.state.stop_reason or "")
    assert any((flags == REFUSED).any() for flags in run.flags())


# Warm start and stopping


def test_a_stop_during_the_warm_start_writes_a_checkpoint_and_ends(made: Made) -> None:
    run = made(configured(warm_start_epochs=1.0, ramp_epochs=1.0))
    run.train()
    assert {call.replica for call in run.calls(do.RunWindow)} == {0}
    run.hand_in(do.StopRequested(reason="SIGTERM"))
    run.tick()
    assert run.state.phase == "stopping"
    assert len(run.calls(do.BeginCheckpoint)) == 1
    run.answer_all(do.BeginCheckpoint)
    run.answer_all(do.WriteSnapshot)
    run.answer_all(do.CommitCheckpoint)
    run.tick()
    run.answer_all(do.AskReport)
    run.tick()
    assert run.outcome is not None
    assert (run.outcome.finished, run.outcome.checkpoint) == (False, 1)
    assert not run.calls(do.Evaluate)


def test_a_stop_waits_for_the_checkpoint_in_the_making_and_writes_one_more(made: Made) -> None:
    run = made(configured(policy={"checkpoint_every_s": 5.0}))
    run.train()
    run.tick(5.0)
    run.hand_in(do.StopRequested(reason="SIGTERM"))
    run.tick()
    assert [call.number for call in run.calls(do.BeginCheckpoint)] == [1]
    run.go_on(lambda: run.outcome is not None, turns=20)
    assert run.committed == [1, 2]


def test_a_stop_does_without_a_checkpoint_if_a_partition_dies(made: Made) -> None:
    run = made()
    run.train()
    run.hand_in(do.StopRequested(reason="SIGTERM"))
    run.tick()
    run.answer_all(do.BeginCheckpoint)
    run.kill_partition(0)
    run.answer(run.calls(do.WriteSnapshot)[0])
    run.tick()
    assert run.outcome is not None
    assert run.outcome.checkpoint is None


# Checkpoints


def test_a_disk_that_is_full_costs_the_checkpoint_and_not_the_run(made: Made) -> None:
    run = made(configured(policy={"checkpoint_every_s": 5.0}))
    run.train()
    run.tick(5.0)
    (begin,) = run.calls(do.BeginCheckpoint)
    run.fail(begin, OSError("no space left on device"))
    assert "no space left on device): going on, there is none yet" in run.told()
    run.tick(5.0)
    run.answer_all(do.BeginCheckpoint)
    one, other = run.calls(do.WriteSnapshot)
    run.fail(one, WriteFailed("the disk is full"))
    run.answer(other)
    assert not run.calls(do.CommitCheckpoint)
    assert [given.number for given in run.taken(do.DiscardCheckpoint)] == [1, 2]
    run.tick(5.0)
    run.answer_all(do.BeginCheckpoint)
    run.answer_all(do.WriteSnapshot)
    run.answer_all(do.CommitCheckpoint)
    run.fail(run.calls(do.PruneCheckpoints)[0], OSError("a bucket is gone"))
    assert "the last good one is 3" in run.told()
    assert run.state.checkpoints.last == 3


# The end


@pytest.mark.parametrize("kind", [do.WriteSnapshot, do.Evaluate, do.AskFlags])
def test_a_partition_that_dies_while_a_finished_run_winds_up_gets_all_again(
    made: Made, kind: type[Any]
) -> None:
    run = made()
    run.begin()
    run.go_on(lambda: run.state.winds_up)
    assert run.state.finished
    while not run.calls(kind):
        for call in list(run.pending):
            run.answer(call)
        run.tick()
    run.kill_partition(1)
    for call in [*run.calls(do.WriteSnapshot), *run.calls(do.AskFlags), *run.calls(do.Evaluate)]:
        run.answer(call)
    run.go_on(lambda: run.outcome is not None)
    assert run.outcome is not None
    assert run.outcome.finished
    assert run.outcome.exactly_once
    assert run.outcome.restarts == {"partition": 1}
    assert all((flags == APPLIED).all() for flags in run.flags())


def test_an_evaluator_that_dies_at_the_end_is_replaced_and_scores_the_last_weights(
    made: Made,
) -> None:
    run = made()
    run.begin()
    run.go_on(lambda: bool(run.state.stage == "scoring" and run.calls(do.Evaluate)))
    for call in run.calls(do.Evaluate):
        run.fail(call, ProcessLost("it died"))
    run.go_on(lambda: run.outcome is not None)
    assert run.outcome is not None
    assert run.outcome.evaluation is not None
    assert run.outcome.restarts == {"evaluator": 1}


def test_a_run_that_has_arrived_ends_early_with_what_all_partitions_cover(made: Made) -> None:
    run = made(configured(policy={"stop_at_accuracy": 0.9, "epochs": 20}))
    run.train()
    run.accuracy = 0.95
    run.go_on(lambda: run.outcome is not None)
    assert run.outcome is not None
    assert run.outcome.finished
    assert run.outcome.ended.by == "accuracy"
    assert run.outcome.exactly_once
    one, other = run.flags()
    assert (one == other).all()
    assert 0 < (one == APPLIED).sum() < one.size
    assert "the run ends early" in run.told()


def test_a_push_that_is_seen_after_the_last_checkpoint_has_another_one_written(made: Made) -> None:
    run = made(configured(policy={"stop_at_accuracy": 0.9, "epochs": 20}))
    run.train()
    run.accuracy = 0.95
    run.go_on(lambda: run.state.stage == "reporting")
    assert run.committed == [1]
    for partition in run.partitions:
        partition.flags[-1, -1] = APPLIED
    run.go_on(lambda: run.outcome is not None)
    assert run.committed == [1, 2]
    assert run.outcome is not None
    assert run.outcome.exactly_once
    assert run.outcome.unfinished_epochs[19] == 1


def test_an_early_end_waits_for_windows_that_were_on_their_way(made: Made) -> None:
    """A window may come to a process that has connected again: the census is after it."""
    run = made(configured(policy={"stop_at_accuracy": 0.9, "epochs": 20}))
    run.train()
    for call in run.calls(do.RunWindow):
        run.answer(call)
    run.go_on(lambda: bool(run.calls(do.Evaluate)))
    (evaluate,) = run.calls(do.Evaluate)
    run.accuracy = 0.95
    run.tick()
    late = run.calls(do.RunWindow)[-1]
    run.answer(evaluate)
    for process in (0, 1):  # nothing is lost on the way to them
        run.state.processes.started(process)
    for call in run.calls(do.RunWindow)[:-1]:
        run.answer(call)
    run.answer_all(do.AskFlags)
    run.tick(1.0)
    assert run.calls(do.RunWindow) == [late]
    assert not run.calls(do.AskFlags)
    run.answer(late)
    run.tick(1.0)
    assert len(run.calls(do.AskFlags)) == 2


def test_partitions_that_do_not_answer_at_the_end_end_the_run_with_a_remedy(made: Made) -> None:
    run = made()
    run.begin()
    run.go_on(lambda: run.state.stage == "reporting")
    run.tick(SILENT_AFTER_S + 1)
    assert isinstance(run.error, RunFailed)
    assert "go on with `downpour resume runs/a`" in str(run.error)


@pytest.mark.parametrize("hot_standby", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_whatever_dies_and_in_whatever_order_all_is_covered_once(
    made: Made, seed: int, hot_standby: bool
) -> None:
    """Answers in any order, members that die at any time, late pushes of processes cut off."""
    config = configured(
        max_restarts=10_000,
        warm_start_epochs=0.5,
        policy={"epochs": 30, "checkpoint_every_s": 3.0},
        server={"hot_standby": hot_standby},
    )
    run = made(config, seed=seed, num_partitions=3)
    run.begin()
    for _ in range(4000):
        if run.outcome is not None or run.error is not None:
            break
        run.step(deaths=0.03)
    assert run.error is None or "without doing anything in between" in str(run.error)
    if run.error is None:
        run.go_on(lambda: run.outcome is not None)
        assert run.outcome is not None
        assert run.outcome.exactly_once
        assert np.all([flags == APPLIED for flags in run.flags()])

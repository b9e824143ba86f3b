"""What follows when a member of a run fails: events in, instructions out. Nothing waits."""

from __future__ import annotations

from downpour.cluster.controller.members.followers import LATE_S
from downpour.cluster.controller.protocol import events
from downpour.cluster.controller.protocol import instructions as do
from downpour.cluster.controller.protocol.backend import (
    PartitionLost,
    ProcessLost,
    ShufflerLost,
    WriteFailed,
)
from downpour.paramserver.partition.applied_set import REFUSED
from downpour.paramserver.standby.trouble import Trouble
from tests.helpers.world import Made, configured


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


def test_a_partition_that_dies_while_a_checkpoint_is_in_the_making(made: Made) -> None:
    run = made(configured(policy={"checkpoint_every_s": 5.0}))
    run.train()
    for call in run.calls(do.RunWindow)[:4]:
        run.answer(call)
    run.answer_all(do.StartEvaluator)
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
    run.tick()
    for probe in [call for call in run.calls(do.AskReport) if call.inquiry is not None]:
        run.answer(probe)
    assert run.calls(do.ReconnectProcess) == [do.ReconnectProcess(process=i) for i in (0, 1)]
    assert run.calls(do.ReconnectEvaluator) == [do.ReconnectEvaluator()]
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
    run.hand_in(events.Failed(call=old, error=PartitionLost("late news of its death")))
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


def test_a_partition_that_neither_its_follower_nor_we_hear_is_promoted_over(made: Made) -> None:
    """Without a word of Ray's: it may take minutes until that notices that a machine is gone."""
    run = made(configured(server={"hot_standby": True}), remote=True)
    run.train()
    run.tick(10.0)
    run.answer_all(do.StartFollower)
    run.answer_all(do.AskReport)
    run.partitions[1].hangs = True
    watch = next(call for call in run.calls(do.WatchPrimary) if call.partition == 1)
    run.answer(watch)
    run.tick()
    for call in run.calls(do.AskReport):
        run.answer(call)
    run.tick(LATE_S["silent"] / 2)
    assert not run.calls(do.Promote)
    run.tick(LATE_S["silent"])
    assert [call.partition for call in run.calls(do.Promote)] == [1]
    assert "partition 1 does not answer (it is silent, and no report for 1." in run.told()


def test_a_partition_that_closed_its_connections_is_promoted_over_at_once(made: Made) -> None:
    """No time passes. A connection that only one of the two lost costs nobody his place."""
    run = made(configured(server={"hot_standby": True}), remote=True)
    run.train()
    run.tick(10.0)
    run.answer_all(do.StartFollower)
    run.answer_all(do.AskReport)
    watch = next(call for call in run.calls(do.WatchPrimary) if call.partition == 1)
    closed = Trouble(kind="closed", why="it closed the connection")
    window = run.calls(do.RunWindow)[0]
    run.fail(window, PartitionLost("partition 1 closed the connection", partition=1))
    run.tick()
    assert not run.calls(do.Promote)
    run.pending.remove(watch)
    run.hand_in(events.Answered(call=watch, value=closed))
    run.tick()
    assert [call.partition for call in run.calls(do.Promote)] == [1]
    assert "replicas lost their connection, too): its follower takes its place" in run.told()


def test_a_follower_takes_the_place_of_its_partition(made: Made) -> None:
    run = made(configured(server={"hot_standby": True}))
    run.train()
    run.tick(10.0)
    assert run.taken(do.MakeSpares) == [do.MakeSpares()]
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
    for _ in range(4):  # it may finish what it has
        run.answer_all(do.RunWindow)
        run.tick()
    assert run.calls(do.RunWindow)
    assert run.state.leases.num_held_by(1) == 0
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

"""Nodes that say that they are to leave: what is out there is finished, and nothing is lost."""

import dataclasses

import numpy as np
import pytest

from downpour.cluster.controller.departures.notice import Departing
from downpour.cluster.controller.protocol import events
from downpour.cluster.controller.protocol import instructions as do
from downpour.cluster.controller.protocol.backend import (
    FollowerLost,
    PartitionLost,
    ProcessLost,
    RunFailed,
    ShufflerLost,
)
from downpour.paramserver.partition.applied_set import APPLIED, WAITING
from downpour.paramserver.rules.policy import StalenessPolicy
from tests.helpers.world import Made, World, configured

NOTICE_S = 120.0
COMPENSATED = StalenessPolicy(staleness_policy="compensate", staleness_bound=50)


def trained_once(run: World, restarts: dict[str, int] | None = None) -> None:
    """The run went on to its end, nothing was computed twice, and nobody was restarted."""
    run.go_on(lambda: run.outcome is not None)
    ended_well(run, restarts or {})
    assert run.num_recomputed == 0
    told = run.told().splitlines()
    assert {line for line in told if "run again" in line} <= {"0 mini-batches are run again"}


def ended_well(run: World, restarts: dict[str, int]) -> None:
    assert run.outcome is not None
    assert run.outcome.exactly_once
    assert run.outcome.restarts == restarts, "a departure is no restart"
    assert np.all([flags == APPLIED for flags in run.flags()])


def train(made: Made, remote: bool = False, epochs: int = 40, **about: object) -> World:
    """A run of so many epochs in the middle of its training."""
    run = made(configured(policy={"epochs": epochs}, **about), remote=remote)
    run.train()
    run.answer_all(do.StartEvaluator)
    return run


def followed(made: Made) -> World:
    """A run whose partitions have followers on other machines."""
    run = train(made, remote=True, server={"hot_standby": True})
    followers = run.state.partitions.followers
    run.go_on(lambda: all(followers.can_take_over(index) for index in (0, 1)))
    return run


def notify(run: World, **leaving: object) -> None:
    """Have the controller hear of nodes that are to leave."""
    run.leaving = Departing(**{"remaining_s": NOTICE_S, **leaving})  # type: ignore[arg-type]
    run.go_on(lambda: bool(run.calls(do.AskDepartures)))
    run.answer_all(do.AskDepartures)


def hear(run: World) -> None:
    """Have the controller look once more."""
    run.tick(5.0)
    run.answer_all(do.AskDepartures)


def come_to_promotion(run: World) -> list[do.Promote]:
    """Go on until followers are to take places of partitions."""
    run.go_on(lambda: bool(run.calls(do.Promote)))
    return run.calls(do.Promote)


# Replicas


def test_a_process_whose_node_is_to_leave_finishes_its_windows_and_goes_on_elsewhere(
    made: Made,
) -> None:
    run = train(made)
    run.departing.add(1)
    run.answer_all(do.AskDepartures)
    assert "the process of replicas 2, 3 moves: its node is to leave" in run.told()
    held = [call for call in run.calls(do.RunWindow) if call.replica in (2, 3)]
    assert held
    for _ in range(5):
        run.tick(1.0)
        assert not run.taken(do.StopProcess), "it has windows"
    for call in held:
        run.answer(call)
    run.tick(1.0)
    assert not [call for call in run.calls(do.RunWindow) if call.replica in (2, 3)]
    assert run.taken(do.StopProcess) == [do.StopProcess(process=1)]
    assert run.calls(do.StartProcess) == [do.StartProcess(process=1)]
    run.answer_all(do.StartProcess)
    run.tick(1.0)
    assert [call for call in run.calls(do.RunWindow) if call.replica in (2, 3)]
    trained_once(run)


def test_a_process_that_is_not_done_in_time_leaves_its_windows_to_others(made: Made) -> None:
    run = train(made)
    run.departing.add(1)
    run.leaving = Departing(remaining_s=30.0)
    run.answer_all(do.AskDepartures)
    run.tick(19.0)
    assert not run.taken(do.StopProcess)
    run.tick(1.5)
    assert run.taken(do.StopProcess) == [do.StopProcess(process=1)]
    run.go_on(lambda: run.outcome is not None)
    ended_well(run, {})


def test_processes_that_no_other_node_has_a_gpu_for_stay_and_train(made: Made) -> None:
    run = train(made)
    notify(run, crowded=2)
    hear(run)
    told = run.told()
    assert told.count("2 processes of replicas stay until their node is gone: no other node") == 1
    assert run.calls(do.RunWindow)
    trained_once(run)


# Partitions


def test_partitions_move_with_their_state_once_nothing_is_out(made: Made) -> None:
    run = train(made)
    notify(run, partitions=(0, 1))
    assert "partition 1 moves: its node is to leave" in run.told()
    first, second = run.calls(do.StartFollower)
    run.answer(first)
    run.tick()
    before = run.calls(do.RunWindow)
    assert before
    run.answer(before[0])
    run.tick()
    assert len(run.calls(do.RunWindow)) == len(before), "windows are granted until both are ready"
    run.answer(second)
    while windows := run.calls(do.RunWindow):
        assert not run.calls(do.Promote)
        run.answer(windows[0])
        run.tick(0.1)
    run.answer_all(do.AskReport)
    run.tick(1.0)
    assert {call.partition for call in run.calls(do.Promote)} == {0, 1}
    assert run.state.phase == "moving partition 0"
    run.answer_all(do.Promote)
    assert "partition 1 has moved, with all that it had" in run.told()
    trained_once(run)
    assert run.leaving.partitions == ()
    assert not run.calls(do.StartFollower), "followers are not wanted otherwise"


def test_everything_on_a_node_moves_at_once(made: Made) -> None:
    run = train(made)
    run.departing.add(0)
    notify(run, partitions=(0, 1), shufflers=2, evaluator=True)
    trained_once(run)
    assert run.leaving == Departing(remaining_s=NOTICE_S)
    assert not run.departing


def test_partitions_wait_for_processes_that_are_being_started(made: Made) -> None:
    run = train(made)
    run.departing = {0, 1}
    notify(run, partitions=(0,))
    run.answer_all(do.StartFollower)
    for _ in range(5):
        run.answer_all(do.RunWindow)
        run.answer_all(do.AskReport)
        run.tick(1.0)
    assert len(run.calls(do.StartProcess)) == 2
    assert not run.calls(do.Promote), "they would not find the partition"
    run.answer_all(do.StartProcess)
    come_to_promotion(run)
    trained_once(run)


def test_partitions_wait_for_a_process_that_does_not_come_for_half_of_the_time(
    made: Made,
) -> None:
    run = train(made, epochs=400)
    run.departing = {1}
    notify(run, partitions=(0,))
    run.leaving = dataclasses.replace(run.leaving, remaining_s=None)  # as it was said
    run.go_on(lambda: bool(run.calls(do.StartProcess)), turns=20)
    (start,) = run.calls(do.StartProcess)
    run.pending.remove(start)
    began_s = run.now
    come_to_promotion(run)
    assert 40.0 < run.now - began_s < 60.0
    assert not run.calls(do.RunWindow), "they have been finished"
    run.answer_all(do.Promote)
    run.pending.append(start)
    trained_once(run)


def test_others_are_granted_windows_while_a_process_moves_before_its_partition(
    made: Made,
) -> None:
    run = train(made)
    run.departing = {0}
    notify(run, partitions=(0,))
    run.answer_all(do.StartFollower)
    run.tick()
    for call in run.calls(do.RunWindow):
        if call.replica in (2, 3):
            run.answer(call)
    run.tick()
    assert {call.replica for call in run.calls(do.RunWindow)} == {0, 1, 2, 3}
    trained_once(run)


def test_a_deadline_takes_partitions_away_from_windows_that_are_out(made: Made) -> None:
    run = made(configured(policy={"epochs": 40, "checkpoint_every_s": 15.0}))
    run.train()
    notify(run, partitions=(0,), remaining_s=30.0)
    run.answer_all(do.StartFollower)
    run.tick(19.0)
    run.answer_all(do.AskReport)
    run.answer_all(do.BeginCheckpoint)
    assert run.calls(do.WriteSnapshot)
    assert not run.calls(do.Promote)
    run.state.partitions.ask_all_reports("probe")
    run.tick(1.5)
    assert run.calls(do.Promote)
    assert run.taken(do.DiscardCheckpoint) == [do.DiscardCheckpoint(number=1)]
    run.go_on(lambda: run.outcome is not None)
    ended_well(run, {})


def test_a_deadline_moves_the_partitions_whose_followers_are_there(made: Made) -> None:
    run = train(made)
    notify(run, partitions=(0, 1), remaining_s=30.0)
    run.answer(run.calls(do.StartFollower)[1])
    run.tick(20.5)
    assert [call.partition for call in run.calls(do.Promote)] == [1]
    run.go_on(lambda: run.outcome is not None)
    ended_well(run, {})


def test_a_node_that_is_gone_before_its_partition_has_moved_costs_what_a_death_costs(
    made: Made,
) -> None:
    run = train(made)
    notify(run, partitions=(0,))
    run.kill_partition(0)
    for call in run.calls(do.StartFollower):
        run.fail(call, FollowerLost("its partition is gone"))
    run.go_on(lambda: run.outcome is not None)
    ended_well(run, {"partition": 1})


def test_a_partition_that_dies_once_it_is_followed_loses_nothing(made: Made) -> None:
    """Before it has moved: this is a death, and counted; its follower is there already."""
    run = train(made)
    notify(run, partitions=(0,))
    run.answer_all(do.StartFollower)
    run.kill_partition(0)
    come_to_promotion(run)
    assert "partition 0 died: its follower takes its place" in run.told()
    run.go_on(lambda: run.outcome is not None)
    ended_well(run, {"partition": 1})


@pytest.mark.parametrize("remote", [False, True])
def test_a_follower_that_is_lost_before_it_takes_over_is_started_again(
    made: Made, remote: bool
) -> None:
    run = train(made, remote=remote)
    notify(run, partitions=(0,))
    (call,) = run.calls(do.StartFollower)
    run.fail(call, FollowerLost("it died"))
    assert "partition 0 cannot move: its follower is lost (it died): trying again" in run.told()
    hear(run)
    assert run.calls(do.StartFollower) == [do.StartFollower(partition=0, start=2)]
    trained_once(run)


def test_a_partition_whose_followers_are_lost_again_and_again_stays(made: Made) -> None:
    run = train(made, epochs=150)
    run.followers_fail = True
    notify(run, partitions=(0,))
    run.go_on(lambda: run.state.partitions.followers.gave_up(0))
    assert "it stays until its node is gone, after 3 tries" in run.told()
    for _ in range(3):
        run.answer_all(do.RunWindow)
        hear(run)
        assert not run.calls(do.StartFollower)
        assert run.calls(do.RunWindow), "it is trained on meanwhile"
    run.leaving = Departing()
    hear(run)
    assert "partition 0 stays after all" in run.told()
    run.followers_fail = False
    notify(run, partitions=(0,))
    assert run.calls(do.StartFollower), "another notice"
    trained_once(run)


def test_a_follower_that_dies_as_it_takes_over_is_the_partitions_death(made: Made) -> None:
    run = train(made)
    notify(run, partitions=(0,))
    run.answer_all(do.StartFollower)
    come_to_promotion(run)
    run.followers_fail = True
    run.answer_all(do.Promote)
    run.followers_fail = False
    run.go_on(lambda: run.outcome is not None)
    ended_well(run, {"partition": 1})


def test_a_follower_that_hangs_as_it_takes_over_is_the_partitions_death(made: Made) -> None:
    run = train(made)
    notify(run, partitions=(0,))
    run.answer_all(do.StartFollower)
    (promote,) = come_to_promotion(run)
    run.pending.remove(promote)
    run.go_on(lambda: run.outcome is not None, turns=2000)
    ended_well(run, {"partition": 1})


def test_a_partition_is_lost_while_another_moves(made: Made) -> None:
    run = train(made)
    notify(run, partitions=(0,))
    run.answer_all(do.StartFollower)
    come_to_promotion(run)
    run.kill_partition(1)
    for call in [c for c in run.pending if isinstance(c, do.AskReport) and c.partition == 1]:
        run.fail(call, PartitionLost("it died"))
    run.go_on(lambda: run.outcome is not None)
    ended_well(run, {"partition": 1})


def test_a_run_that_is_stopped_while_a_partition_moves_still_writes_its_checkpoint(
    made: Made,
) -> None:
    run = train(made)
    notify(run, partitions=(0,))
    run.answer_all(do.StartFollower)
    come_to_promotion(run)
    run.hand_in(events.StopRequested(reason="enough"))
    run.tick(1.0)
    assert run.state.stage == "training"
    run.go_on(lambda: run.outcome is not None)
    assert run.outcome is not None
    assert run.outcome.checkpoint == 1
    assert not run.outcome.finished


def test_a_partition_moves_while_the_last_weights_are_scored(made: Made) -> None:
    run = made()
    run.train()
    run.go_on(lambda: run.state.stage == "scoring" and bool(run.calls(do.Evaluate)))
    (scoring,) = run.calls(do.Evaluate)
    run.leaving = Departing(partitions=(0, 1), evaluator=True, remaining_s=NOTICE_S)
    for _ in range(20):  # all else is answered
        for call in [call for call in run.pending if call != scoring]:
            if call in run.pending:
                run.answer(call)
        run.tick(1.0)
    assert run.leaving.partitions == ()
    trained_once(run)


def test_followers_that_take_no_pushes_of_their_past_join_once_nothing_is_out(
    made: Made,
) -> None:
    run = train(made, server={"policy": COMPENSATED})
    notify(run, partitions=(0,))
    assert not run.calls(do.StartFollower)
    windows = run.calls(do.RunWindow)
    assert windows
    for call in windows:
        run.answer(call)
    assert not run.calls(do.RunWindow)
    run.go_on(lambda: bool(run.calls(do.StartFollower)))
    run.answer_all(do.StartFollower)
    run.go_on(lambda: bool(run.calls(do.Promote)))
    trained_once(run)


def test_a_notice_that_is_withdrawn_moves_nobody(made: Made) -> None:
    run = train(made, remote=True)
    notify(run, partitions=(0,), evaluator=True)
    run.answer_all(do.StartFollower)
    run.leaving = Departing()
    hear(run)
    assert "partition 0 stays after all" in run.told()
    assert run.taken(do.StopFollower) == [do.StopFollower(partition=0)]
    assert run.calls(do.LetAlone) == [do.LetAlone(partition=0, incarnation=1, follower=1)]
    trained_once(run)
    assert not run.promoted


# Partitions with followers


def test_a_follower_on_another_node_takes_the_place_of_its_partition(made: Made) -> None:
    run = followed(made)
    notify(run, partitions=(0,))
    assert not run.calls(do.StartFollower), "it has one"
    come_to_promotion(run)
    assert not run.calls(do.RunWindow)
    lacking = np.argwhere(run.partitions[0].flags == APPLIED)[0]
    run.partitions[0].flags[tuple(lacking)] = WAITING  # with `--no-standby-wait`
    run.answer_all(do.Promote)
    run.go_on(lambda: bool(run.calls(do.StartFollower)))
    run.go_on(lambda: run.outcome is not None)
    ended_well(run, {})
    assert run.num_recomputed == 1


def test_a_follower_whose_node_is_to_leave_is_started_elsewhere(made: Made) -> None:
    """Its partition is let alone before it ends, so that nobody waits for it."""
    run = followed(made)
    notify(run, followers=(0,))
    assert "the follower of partition 0 moves: its node is to leave" in run.told()
    assert run.calls(do.LetAlone) == [do.LetAlone(partition=0, incarnation=1, follower=1)]
    assert run.taken(do.StopFollower) == [do.StopFollower(partition=0)]
    run.go_on(lambda: bool(run.calls(do.StartFollower)))
    trained_once(run)


def test_a_partition_and_its_follower_on_nodes_that_are_to_leave(made: Made) -> None:
    run = followed(made)
    notify(run, partitions=(0,), followers=(0,))
    assert run.taken(do.StopFollower) == [do.StopFollower(partition=0)]
    assert [call.partition for call in run.calls(do.StartFollower)] == [0]
    trained_once(run)


def test_a_partition_whose_follower_is_to_leave_before_it_moves_gets_another(made: Made) -> None:
    run = followed(made)
    notify(run, partitions=(0,))
    assert run.state.partitions.wait_for_quiet(over=False)
    run.leaving = dataclasses.replace(run.leaving, followers=(0,))
    hear(run)
    assert run.calls(do.StartFollower)
    trained_once(run)


# The others


def test_the_evaluator_moves_when_it_has_scored(made: Made) -> None:
    run = train(made)
    run.go_on(lambda: bool(run.calls(do.Evaluate)))
    (scoring,) = run.calls(do.Evaluate)
    run.leaving = Departing(evaluator=True, remaining_s=NOTICE_S)
    hear(run)
    run.tick(1.0)
    assert not run.calls(do.StartEvaluator), "it scores"
    run.answer(scoring)
    run.tick(1.0)
    assert run.calls(do.StartEvaluator) == [do.StartEvaluator(life=1)]
    assert "the evaluator moves: its node is to leave" in run.told()
    run.answer_all(do.StartEvaluator)
    trained_once(run)


def test_an_evaluator_that_scores_for_too_long_scores_again_elsewhere(made: Made) -> None:
    run = train(made)
    run.go_on(lambda: bool(run.calls(do.Evaluate)))
    (scoring,) = run.calls(do.Evaluate)
    run.leaving = Departing(evaluator=True, remaining_s=30.0)
    hear(run)
    run.tick(20.5)
    assert run.calls(do.StartEvaluator) == [do.StartEvaluator(life=1)]
    run.fail(scoring, ProcessLost("it was ended"))
    run.answer_all(do.StartEvaluator)
    run.tick(1.0)
    assert [call.life for call in run.calls(do.Evaluate)] == [1]
    trained_once(run)


def test_shufflers_are_moved_once_and_again_if_that_fails(made: Made) -> None:
    run = train(made)
    notify(run, shufflers=2)
    (call,) = run.calls(do.MoveShufflers)
    hear(run)
    assert run.calls(do.MoveShufflers) == [call], "they are on their way"
    run.fail(call, ShufflerLost("it died"))
    hear(run)
    assert len(run.calls(do.MoveShufflers)) == 1
    run.answer_all(do.MoveShufflers)
    assert "2 shufflers have moved" in run.told()
    trained_once(run)


def test_shufflers_that_do_not_come_are_started_again(made: Made) -> None:
    run = train(made, epochs=400)
    notify(run, shufflers=1)
    (call,) = run.calls(do.MoveShufflers)
    run.pending.remove(call)
    for _ in range(100):
        run.answer_present()
        run.tick(20.0)
        if run.calls(do.MoveShufflers):
            break
    assert run.calls(do.MoveShufflers) == [call]


def test_shufflers_stay_if_their_rows_are_nowhere_else(made: Made) -> None:
    run = train(made)
    notify(run, shufflers=1)
    run.fail(run.calls(do.MoveShufflers)[0], RunFailed("shard 3 is on none of 2 nodes"))
    assert "shufflers stay until their node is gone: shard 3" in run.told()
    hear(run)
    assert not run.calls(do.MoveShufflers)
    run.leaving = Departing()
    hear(run)
    notify(run, shufflers=1)
    assert run.calls(do.MoveShufflers), "another notice"
    trained_once(run)


def test_the_drivers_own_node_ends_the_run_and_checkpoints_come_before(made: Made) -> None:
    """As with a single node: there is no other place to go to."""
    run = train(made, epochs=150)
    notify(run, driver=True, remaining_s=30.0)
    assert "the driver's own node is to leave, and the run ends with it" in run.told()
    run.tick(1.0)
    run.answer_present()
    run.answer_all(do.WriteSnapshot)
    run.answer_all(do.CommitCheckpoint)
    assert run.committed == [1]
    run.leaving = dataclasses.replace(run.leaving, remaining_s=None)  # as it was said
    run.go_on(lambda: len(run.committed) == 2, turns=40)
    hear(run)
    assert "the driver's own node" not in run.told(), "once"
    assert run.outcome is None, "it goes on until the node is gone"
    trained_once(run)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_dies_while_all_moves_the_run_is_finished_exactly_once(
    made: Made, seed: int
) -> None:
    run = made(
        configured(
            policy={"epochs": 6, "checkpoint_every_s": 5.0},
            max_restarts=1000,
            server={"hot_standby": seed % 3 == 0},
        ),
        seed=seed,
        remote=seed % 2 == 0,
    )
    run.begin()
    for turn in range(8000):
        if turn % 150 == 60:
            run.leaving = Departing(
                partitions=tuple(p for p in (0, 1) if run.rng.random() < 0.7),
                followers=tuple(p for p in (0, 1) if run.rng.random() < 0.2),
                shufflers=run.rng.randrange(3),
                evaluator=run.rng.random() < 0.5,
                driver=run.rng.random() < 0.1,
                remaining_s=run.rng.choice([None, 5.0, 30.0, 120.0]),
            )
            run.departing = {p for p in (0, 1) if run.rng.random() < 0.4}
        run.followers_fail = turn < 1500 and run.rng.random() < 0.05
        run.step(0.02 if turn < 1500 else 0.0)
        if run.outcome is not None or run.error is not None:
            break
    assert run.error is None
    assert run.outcome is not None, run.state.stage
    assert run.outcome.exactly_once
    assert np.all([flags == APPLIED for flags in run.flags()])

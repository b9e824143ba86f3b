"""What a run goes through: starting, training, stopping, and winding up. Nothing waits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from downpour.cluster.controller.hangs.patience import LIMITS
from downpour.cluster.controller.members.evaluation import MAX_TRIES, TRY_AGAIN_S
from downpour.cluster.controller.protocol import events
from downpour.cluster.controller.protocol import instructions as do
from downpour.cluster.controller.protocol.backend import ProcessLost, WriteFailed
from downpour.paramserver.partition.applied_set import APPLIED
from tests.helpers.world import Made, configured


def test_processes_start_once_all_partitions_are_up_the_first_of_them_first(made: Made) -> None:
    run = made()
    run.begin()
    run.tick()
    assert [type(call) for call in run.pending] == [do.StartPartition, do.StartPartition]
    run.answer(run.pending[0])
    run.tick()
    assert [type(call) for call in run.pending] == [do.StartPartition]
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
    run.hand_in(events.StopRequested(reason="SIGTERM"))
    run.tick()
    assert run.outcome is not None
    assert (run.outcome.finished, run.outcome.checkpoint) == (False, None)
    assert run.state.handle(events.Tick(), 1.0) == []  # that was all


def test_other_numbers_of_replicas_add_processes_and_let_them_go(made: Made) -> None:
    run = made(configured(policy={"epochs": 30}))
    run.train()
    run.hand_in(events.ReplicasRequested(replicas=7))
    added = run.taken(do.AddProcess)
    assert [(given.process, given.replicas) for given in added] == [(2, (4, 5)), (3, (6,))]
    run.go_on(lambda: run.state.processes.all_up)
    run.tick()
    assert {call.replica for call in run.calls(do.RunWindow)} <= set(range(7))
    run.hand_in(events.ReplicasRequested(replicas=2))
    run.go_on(lambda: run.state.processes.num_alive(100) == 2)
    assert sorted(given.process for given in run.taken(do.StopProcess)) == [1, 2, 3]
    run.go_on(lambda: run.outcome is not None)
    assert run.outcome is not None
    assert run.outcome.exactly_once


def test_a_partition_that_does_not_answer_is_taken_for_lost(made: Made) -> None:
    run = made()
    run.train()
    assert len(run.calls(do.AskReport)) == 2
    run.answer(run.calls(do.AskReport)[0])
    run.tick(LIMITS["report"].first_s + 1)
    told = run.told()
    assert "partition 1 does not answer (nothing for 61 s, which took 0 s before): replaced" in told
    assert [call.partition for call in run.calls(do.StartPartition)] == [1]


def test_a_stop_during_the_warm_start_writes_a_checkpoint_and_ends(made: Made) -> None:
    run = made(configured(warm_start_epochs=1.0, ramp_epochs=1.0))
    run.train()
    assert {call.replica for call in run.calls(do.RunWindow)} == {0}
    run.hand_in(events.StopRequested(reason="SIGTERM"))
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
    run.hand_in(events.StopRequested(reason="SIGTERM"))
    run.tick()
    assert [call.number for call in run.calls(do.BeginCheckpoint)] == [1]
    run.go_on(lambda: run.outcome is not None, turns=20)
    assert run.committed == [1, 2]


def test_a_stop_does_without_a_checkpoint_if_a_partition_dies(made: Made) -> None:
    run = made()
    run.train()
    run.hand_in(events.StopRequested(reason="SIGTERM"))
    run.tick()
    run.answer_all(do.BeginCheckpoint)
    run.kill_partition(0)
    run.answer(run.calls(do.WriteSnapshot)[0])
    run.tick()
    assert run.outcome is not None
    assert run.outcome.checkpoint is None


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


def test_last_weights_that_do_not_fit_on_the_disk_are_written_once_there_is_room(
    made: Made,
) -> None:
    run = made()
    run.begin()
    full = WriteFailed("the evaluator: No space left on device")
    for _ in range(3):
        run.go_on(lambda: any(call.final for call in run.calls(do.Evaluate)))
        (scoring,) = [call for call in run.calls(do.Evaluate) if call.final]
        run.fail(scoring, full)
        began_s = run.now
    assert run.told().count("the run's last weights could not be written (the evaluator: No") == 1
    run.go_on(lambda: run.outcome is not None)
    assert run.now >= began_s + TRY_AGAIN_S
    assert run.outcome is not None
    assert run.outcome.exactly_once
    assert run.outcome.restarts == {}, "nobody is to blame"


def test_a_disk_that_stays_full_ends_the_run_with_a_line(made: Made) -> None:
    run = made()
    run.begin()
    while run.error is None:
        run.go_on(lambda: any(call.final for call in run.calls(do.Evaluate)) or bool(run.error))
        for call in run.calls(do.Evaluate):
            run.fail(call, WriteFailed("the evaluator: No space left on device"))
    assert run.now >= MAX_TRIES * TRY_AGAIN_S / 2
    assert "the run's last weights could not be written" in str(run.error)
    assert "go on with `downpour resume runs/a`" in str(run.error)


def test_a_partition_that_hangs_at_the_end_is_replaced_and_gets_all_again(made: Made) -> None:
    run = made()
    run.begin()
    run.go_on(lambda: run.state.stage == "reporting")
    run.partitions[1].hangs = True
    run.go_on(lambda: run.outcome is not None)
    assert "partition 1 does not answer" in run.told()
    assert run.outcome is not None
    assert run.outcome.exactly_once
    assert np.all([flags == APPLIED for flags in run.flags()])

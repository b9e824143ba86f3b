"""Nodes that say that they are to leave: what is out there is finished, and nothing is lost."""

import numpy as np

from downpour.cluster.controller import instructions as do
from downpour.paramserver.partition.applied_set import APPLIED
from tests.helpers.world import Made, configured


def test_a_process_whose_node_is_to_leave_finishes_its_windows_and_goes_on_elsewhere(
    made: Made,
) -> None:
    run = made(configured(policy={"epochs": 40}))
    run.train()
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
    run.go_on(lambda: run.outcome is not None)
    assert run.outcome is not None
    assert run.outcome.exactly_once
    assert run.outcome.restarts == {}, "a departure is no restart"
    assert "are run again" not in run.told()
    assert np.all([flags == APPLIED for flags in run.flags()])

"""Whatever hangs is noticed, told with the reason, and replaced; by a test's clock."""

import numpy as np
import pytest

from downpour.cluster.controller.hangs.patience import LIMITS
from downpour.cluster.controller.protocol import events
from downpour.cluster.controller.protocol import instructions as do
from downpour.paramserver.partition.applied_set import APPLIED
from tests.helpers.world import Made, World, configured

DAY_S = 24 * 3600


def busy(made: Made, **about: object) -> World:
    """A run that has answered everything for a while, and has windows out."""
    run = made(configured(policy={"epochs": 40}, **about))
    run.train()
    for _ in range(10):
        run.answer_present()
        run.tick(1.0)
    assert run.outcome is None
    return run


def for_a_day(run: World, turn_s: float = 60.0) -> str:
    """Answer everybody who answers, for up to a day of the clock; return what was told."""
    news = []
    while run.now < DAY_S and run.outcome is None and run.error is None:
        run.answer_present()
        run.tick(turn_s)
        news.append(run.told())
    assert run.error is None
    assert run.outcome is not None, "a day was not enough"
    assert run.outcome.exactly_once
    assert np.all([flags == APPLIED for flags in run.flags()])
    return "\n".join(filter(None, news))


@pytest.mark.parametrize("turn_s", [1.0, 60.0])
def test_a_process_that_hangs_is_replaced_without_being_asked_for(
    made: Made, turn_s: float
) -> None:
    run = busy(made)
    run.hung_processes.add(1)
    told = for_a_day(run, turn_s)
    assert "the process of replicas 2, 3 does not answer (nothing for " in told
    assert "): replaced, 1 of 100 within an hour" in told
    assert run.outcome is not None
    assert run.outcome.restarts == {"replicas": 1}


def test_a_process_that_hangs_again_and_again_ends_no_run_in_which_others_train(
    made: Made,
) -> None:
    run = made(configured(policy={"epochs": 400}))
    run.train()
    news = ""
    while run.now < DAY_S and run.outcome is None:
        run.answer_present()
        run.hung_processes.add(1)
        run.tick(5.0)
        news += run.told()
        assert run.error is None, run.error
    assert "replaced in 10 s, since it did so 6 times without doing anything in between" in news
    assert "replaced in 20 s, since it did so 7 times" in news
    assert run.outcome is not None
    assert run.outcome.exactly_once
    assert np.all([flags == APPLIED for flags in run.flags()])


@pytest.mark.parametrize("hang_after_s", [2.0, LIMITS["life"].least_s, 90.0])
def test_a_process_that_hangs_is_told_after_as_long_as_was_asked_for(
    made: Made, hang_after_s: float
) -> None:
    run = made(configured(policy={"epochs": 400, "hang_after_s": hang_after_s}))
    run.train()
    for _ in range(10):
        run.answer_present()
        run.tick(0.1)
    run.hung_processes.add(0)
    hung_s = run.now
    while not run.calls(do.StartProcess):
        run.answer_present()
        run.tick(1.0)
    assert hung_s + hang_after_s <= run.now <= hung_s + hang_after_s + 5


def test_one_process_that_hangs_is_named_alone_if_the_others_wait_for_it(made: Made) -> None:
    """Under a bound of staleness the others soon wait for permits, and fall silent, too."""
    run = busy(made)
    run.hung_processes.add(1)
    for _ in range(60):
        if run.calls(do.StartProcess):
            break
        run.answer_present()
        run.tick(1.0)
        run.hung_processes.add(0)  # it only waits
    assert [call.process for call in run.calls(do.StartProcess)] == [1]
    run.hung_processes.discard(0)
    run.pending += [call for call in run.unanswered if call not in run.pending]
    run.unanswered.clear()
    for_a_day(run, 1.0)
    assert run.outcome is not None
    assert run.outcome.restarts == {"replicas": 1}


def test_a_delivery_that_is_stuck_is_charged_to_the_shuffler(made: Made) -> None:
    run = busy(made)
    run.shufflers_hang = True
    told = for_a_day(run)
    assert "a shuffler does not answer (nothing for " in told
    assert run.outcome is not None
    assert run.outcome.restarts == {"shuffler": 1}


def test_one_replica_whose_window_is_stuck_is_seen_by_its_window(made: Made) -> None:
    """Another replica of its process gets on, so the process shows signs of life."""
    run = busy(made)
    (stuck, *_) = [call for call in run.calls(do.RunWindow) if call.replica == 3]
    run.pending.remove(stuck)
    run.shufflers_hang = False
    news, limit_s = "", LIMITS["window"].least_s
    began_s = run.now
    while "does not answer" not in news and run.now < began_s + 10 * limit_s:
        run.answer_present()
        run.tick(5.0)
        news += run.told()
        if run.outcome is not None:
            break
    assert "the process of replicas 2, 3 does not answer" in news


@pytest.mark.parametrize("hot_standby", [False, True])
def test_a_partition_that_hangs_is_replaced_or_its_follower_takes_its_place(
    made: Made, hot_standby: bool
) -> None:
    run = busy(made, server={"hot_standby": hot_standby})
    run.partitions[0].hangs = True
    told = for_a_day(run)
    how = "its follower takes its place" if hot_standby else "replaced"
    assert f"): {how}, 1 of 100" in told
    assert "partition 0 does not answer (nothing for " in told


def test_an_evaluator_that_hangs_in_the_last_scoring_is_replaced(made: Made) -> None:
    run = made()
    run.begin()
    run.go_on(lambda: run.state.stage == "scoring")
    run.evaluator_hangs = True
    told = for_a_day(run)
    assert "the evaluator does not answer (nothing for " in told
    assert run.outcome is not None
    assert run.outcome.evaluation is not None
    assert run.outcome.restarts == {"evaluator": 1}


def test_a_long_scoring_that_gets_on_is_left_alone(made: Made) -> None:
    run = made()
    run.begin()
    run.go_on(lambda: run.state.stage == "scoring" and bool(run.calls(do.Evaluate)))
    (scoring,) = run.calls(do.Evaluate)
    run.pending.remove(scoring)
    for _ in range(2000):
        run.scored += 1
        run.answer_present()
        run.tick(30.0)
    assert not run.calls(do.StartEvaluator)
    assert "does not answer" not in run.told()
    run.pending.append(scoring)
    for_a_day(run)


def test_a_disk_that_hangs_costs_the_checkpoint_and_not_the_run(made: Made) -> None:
    run = made()
    run.begin()
    run.go_on(lambda: run.state.stage == "saving")
    run.disk_hangs = True
    told = for_a_day(run)
    assert "snapshot hangs: nothing for " in told
    assert "going on, " in told


@pytest.mark.parametrize("kind", [do.StartPartition, do.StartProcess, do.StartEvaluator])
def test_a_start_that_never_comes_to_its_end_is_made_again(
    made: Made, kind: type[do.StartPartition]
) -> None:
    run = made()
    run.begin()
    run.go_on(lambda: bool(run.calls(kind)))
    first = run.calls(kind)[0]
    run.pending.remove(first)
    told = for_a_day(run)
    assert f"nothing for {LIMITS['start'].first_s + 60:.0f} s, it was the first" in told or (
        "does not answer" in told
    )


@pytest.mark.parametrize(
    ("seed", "times"),
    [(0, 2), (1, 2), *(pytest.param(s, 5, marks=pytest.mark.soak) for s in range(2, 12))],
)
def test_members_hang_for_good_again_and_again_and_each_is_replaced(
    made: Made, seed: int, times: int
) -> None:
    policy = {"epochs": 160 * times, "checkpoint_every_s": 20.0}
    run = made(
        configured(max_restarts=10_000, policy=policy, server={"hot_standby": bool(seed % 2)}),
        num_partitions=3,
        seed=seed,
    )
    run.train()
    news, hung = "", 0
    while hung < times and run.outcome is None:
        run.answer_present()  # so that whoever hangs is there, and is not just being started
        if not run.hangs and run.rng.random() < 0.5:
            run.hang()
            hung += 1
        run.tick(5.0)
        news += run.told()
        assert run.error is None, run.error
    assert hung == times
    told = for_a_day(run)
    # Nobody waits for one that hangs when all is done: it still does at the end.
    assert (news + told).count("does not answer (nothing for ") >= times - int(run.hangs)


def test_nobody_is_blamed_for_the_time_in_which_the_driver_stood_still(made: Made) -> None:
    """A machine was suspended for an hour: all calls last longer than any limit."""
    run = busy(made)
    for stage in ("training", "scoring"):
        run.go_on(lambda stage=stage: run.state.stage == stage, turns=5000)  # type: ignore[misc]
        run.now += 3600.0
        run.hand_in(events.StoodStill(seconds=3600.0))
        run.tick()
        assert "the driver stood still for 3600 s: it was stopped" in run.told()
        run.tick(1.0)
        run.answer_present()
    run.hand_in(events.StoodStill(seconds=5.0))
    told = for_a_day(run, 1.0)
    assert "stood still" not in told, "a busy machine is no news"
    assert "does not answer" not in told
    assert run.outcome is not None
    assert run.outcome.restarts == {}


def test_what_hangs_after_the_driver_stood_still_is_noticed_all_the_same(made: Made) -> None:
    run = busy(made)
    run.partitions[0].hangs = True
    run.tick(1.0)
    run.answer_present()
    run.now += 3600.0
    run.hand_in(events.StoodStill(seconds=3600.0))
    began_s = run.now
    while "partition 0 does not answer" not in run.told():
        run.answer_present()
        run.tick(1.0)
    assert LIMITS["report"].least_s - 5 <= run.now - began_s <= LIMITS["report"].first_s + 5
    for_a_day(run)

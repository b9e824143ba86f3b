"""What is due as time passes: the stages of a run, and what goes on all the time in them. Pure.

Starting, resuming and training, then winding up. What follows from single answers is in
`reactions`, from partitions, departures and hangs in the modules beside it.
"""

from __future__ import annotations

from downpour.cluster.controller.hang_reactions import blame, end_hung_calls
from downpour.cluster.controller.partition_reactions import hand_over
from downpour.cluster.controller.parts import RunParts, Stage
from downpour.cluster.controller.protocol.instructions import (
    AskDepartures,
    Finish,
    MakeSpares,
    ReadRequests,
    RunOutcome,
    RunWindow,
    Tell,
)
from downpour.cluster.controller.reactions import finish
from downpour.cluster.run.early_stopping import Ended

DEPARTURES_EVERY_S = 5.0
"""How often nodes that are to leave are looked for; notices are of 30 seconds and more."""


def go_on(run: RunParts, now: float) -> None:
    """Do what is due now, and pass on to the next stages as far as they have been reached.

    Raises:
        GaveUp: the run cannot go on.
    """
    end_hung_calls(run, now)
    stage: Stage | None = None
    while stage != run.stage:
        stage = run.stage
        match stage:
            case "starting":
                _start(run, now)
            case "resuming":
                _resume(run, now)
            case "training":
                _train(run, now)
            case "saving":
                _save(run, now)
            case "reporting":
                _report(run, now)
            case "scoring":
                _score(run, now)
            case "verifying":
                _verify(run, now)
            case "ended":
                run.out.append(Finish(outcome=_outcome(run, now)))


# Starting


def _start(run: RunParts, now: float) -> None:
    """Wait for all partitions; then resume, or train."""
    if run.stop_reason is not None:
        _wind_up(run)
    elif not run.partitions.all_up:
        return
    elif run.resumed is not None:
        run.stage = "resuming"
    else:
        run.processes.start()
        run.evaluation.start()
        run.stage = "training"


def _resume(run: RunParts, now: float) -> None:
    """Ask the partitions what they cover of all epochs."""
    if run.stop_reason is not None:
        _wind_up(run)
    elif run.partitions.all_up and not run.partitions.is_asked("resume"):
        run.partitions.ask_all_flags("resume", _all_epochs(run))


# Training


def _train(run: RunParts, now: float) -> None:
    """Grant leases and look after everybody, until the run is finished or asked to stop."""
    if run.end_wanted is not None:
        finish(run, Ended(by="callback", reason=run.end_wanted))
    ends = run.leases.finished or run.stop_reason is not None
    if ends and not run.partitions.moving:
        _wind_up(run)
        return
    _grant(run, now)
    _look_after(run, now)
    all_up = run.partitions.all_up and run.processes.all_wanted_up(now)
    if all_up and not run.leases.reopening:
        run.failures.all_back(now, but_for_some=run.processes.some_wait(now))


def _grant(run: RunParts, now: float) -> None:
    if run.leases.reopening or _waits_for_quiet(run, now):
        return
    course = run.leases.decide_course(run.replicas_wanted)
    if course.reason is not None:
        run.out.append(Tell(text=course.reason))
    sound = [r for r in range(run.replicas_wanted) if r not in run.quarantined]
    active = [r for r in sound[: course.replicas] if run.processes.may_take(r)]
    for replica, lease in run.leases.grant(active):
        run.num_windows_out += 1
        run.out.append(RunWindow(replica=replica, lease=lease))


def _look_after(run: RunParts, now: float) -> None:
    """Ask how everybody is, bring back what is lost, score and save if it is time for it."""
    if run.partitions.ask_reports(now):
        run.out.append(ReadRequests())
        run.processes.retire()
        _look_for_departures(run, now)
        run.processes.look_for_stragglers(now)
        for process, why in run.processes.look_for_hangs(now):
            blame(run, process.replicas, why)
    if not run.partitions.all_up:
        return
    if run.failures.take_reserves_due(now):
        run.out.append(MakeSpares())
        run.partitions.followers.start_missing()
    _mend(run, now)
    if run.stage == "training":
        has_begun = run.partitions.first_update_s is not None
        if run.ended is None and has_begun:
            run.evaluation.score_if_due(now)
        run.checkpoints.begin_if_due(now)


def _look_for_departures(run: RunParts, now: float) -> None:
    """Ask for nodes that are to leave, and take what is there to others as soon as it is done.

    If time is short, what is not done there is done elsewhere, again or for the first time.
    """
    if now >= run.look_for_departures_s:
        run.look_for_departures_s = now + DEPARTURES_EVERY_S
        run.out.append(AskDepartures())
    over = run.notice.is_over(now)
    if not run.winds_up:
        run.processes.move(over=over)
    run.evaluation.move(now, over=over)
    if over and run.notice.of_driver and run.notice.is_news("the driver's time is over"):
        run.checkpoints.hasten(now)
    if run.partitions.all_up and _waits_for_quiet(run, now):
        asked = run.partitions.inquiries or run.checkpoints.in_the_making
        if over or (run.quiet and not asked):
            run.partitions.let_successors_join()
            hand_over(run, now)


def _waits_for_quiet(run: RunParts, now: float) -> bool:
    """Return whether no window is to be granted: partitions wait for those that are out.

    Processes that move or are being started come first, for half of the time that there is.
    """
    if run.partitions.need_quiet:
        return True
    if not run.partitions.wait_for_quiet(over=run.notice.is_over(now)):
        return False
    others = run.processes.any_starts or run.processes.any_move or run.evaluation.is_starting
    return run.notice.is_half_over(now) or not others


def _mend(run: RunParts, now: float) -> None:
    """Bring back what has lost its connections, and lease again what was lost."""
    cut_off = run.processes.any_cut_off(now) or run.evaluation.cut_off
    if cut_off and not run.partitions.is_asked("probe"):
        run.partitions.ask_all_reports("probe")
    if not run.partitions.is_asked("census"):
        census = run.leases.census(quiet=run.quiet)
        if census is not None:
            run.partitions.ask_all_flags("census", census.epochs, census=census)


# Winding up


def _wind_up(run: RunParts) -> None:
    run.finished = run.leases.finished
    run.last_checkpoint_begun = False
    run.covered_before = None
    run.stage = "saving"


def _save(run: RunParts, now: float) -> None:
    """Write one more checkpoint, after one that began before."""
    if run.finished and run.ended is not None and run.covered_before is None:
        if not run.partitions.is_asked("first flags"):
            epochs = _all_epochs(run)
            run.partitions.ask_all_flags("first flags", epochs)
        return
    if run.checkpoints.in_the_making:
        return
    if run.partitions.all_up and not run.last_checkpoint_begun:
        run.last_checkpoint_begun = True
        run.checkpoints.begin()
        return
    run.stage = "reporting"


def _report(run: RunParts, now: float) -> None:
    """Ask for the last figures. A run that stops does without a partition that is lost."""
    if not run.partitions.all_up:
        run.stage = "ended"
    elif not run.partitions.is_asked("last reports"):
        run.partitions.ask_all_reports("last reports")


def _score(run: RunParts, now: float) -> None:
    """Score the last weights, and keep them."""
    if run.evaluation.score_final(now):
        run.stage = "verifying"
    elif not run.evaluation.ready:
        _look_after(run, now)
    elif run.partitions.ask_reports(now):
        _look_for_departures(run, now)


def _verify(run: RunParts, now: float) -> None:
    """Ask the partitions for the last time what they cover."""
    if not run.partitions.is_asked("last flags"):
        run.partitions.ask_all_flags("last flags", _all_epochs(run))


def _outcome(run: RunParts, now: float) -> RunOutcome:
    restarts = run.failures.policy.restarts
    return RunOutcome(
        finished=run.finished,
        ended=run.ended or Ended(),
        reached=run.early_stopping.reached,
        unfinished_epochs=run.unfinished_epochs,
        reports=run.partitions.latest_reports,
        evaluation=run.evaluation.newest,
        best=run.evaluation.best,
        exactly_once=run.exactly_once,
        refused=len(run.refused),
        skipped=run.skipped,
        quarantined=tuple(sorted(run.quarantined)),
        restarts={part: n for part, n in restarts.items() if n},
        updates_before=run.resumed.updates if run.resumed else 0,
        all_replicas_s=run.since_began_s(run.all_replicas_s),
        first_update_s=run.since_began_s(run.partitions.first_update_s),
        last_update_s=run.since_began_s(run.partitions.last_update_s),
        elapsed_s=run.elapsed_s(now),
        wall_s=run.wall_s(now),
        checkpoint=run.checkpoints.last,
    )


def _all_epochs(run: RunParts) -> range:
    return range(run.config.policy.epochs)

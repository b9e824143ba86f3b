"""Watching a run and stopping it, from any machine that sees its folder.

The process that trains writes status and metrics to the folder, and looks there for a request to
stop. There is no other connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.display import TrainingDisplay
from downpour.cluster.monitoring.progress import Progress, goal_of, plain_line
from downpour.cluster.monitoring.scores import best_of, figure_of, figures_in
from downpour.cluster.run.folder import METRICS, RESULT, RunFolder
from downpour.cluster.run.liveness import BEAT_S, SILENT_S, Pulse
from downpour.workers.tasks import ACCURACY

EVERY_S = 0.5
STOP_DEADLINE_S = 180.0
BEATS_S = 3 * BEAT_S


NEVER_BEGAN = "never began"


def watch(
    folder: RunFolder,
    *,
    once: bool,
    console: Console,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Show a run's progress until it ends, or once; return the exit status."""
    if once:
        console.print(plain_line(progress(folder)), markup=False, highlight=False, soft_wrap=True)
        return 0
    pulse, told_still = folder.pulse(clock), False
    with TrainingDisplay(folder.name, console=console) as display:
        while True:
            ended = end(folder, pulse)
            display.update(progress(folder))
            if ended:
                break
            still = pulse.quiet_s > SILENT_S
            if still and not told_still:
                console.print(_still_line(folder, pulse), markup=False, highlight=False)
            told_still = still
            pause(EVERY_S)
    console.print(f"{folder.name}: {ended}", markup=False, highlight=False)
    return 0


def _still_line(folder: RunFolder, pulse: Pulse) -> str:
    return (
        f"{folder.name}: nothing has moved for {pulse.quiet_s:.0f} s: {pulse.holder()} is stopped "
        f"or suspended, or waits for a disk. If it does not come back, end it (kill -9), and "
        f"`downpour resume {folder.path}` goes on"
    )


def stop(
    folder: RunFolder,
    *,
    wait: bool,
    console: Console,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Ask a run to stop after a checkpoint; return the exit status.

    Raises:
        UserError: the run does not train, or has not stopped in time.
    """
    pulse = folder.pulse(clock)
    ended = end(folder, pulse)
    if ended is not None:
        raise UserError(f"{folder.path} does not train: {ended}")
    folder.request_stop()
    console.print(f"{folder.name}: asked to write a checkpoint and stop", highlight=False)
    give_up_s = clock() + STOP_DEADLINE_S
    while wait:
        ended = end(folder, pulse)
        if ended is not None:
            break
        if clock() > give_up_s:
            raise UserError(
                f"{folder.path} has not stopped within {STOP_DEADLINE_S:.0f} s: look at its "
                "output, or end its process"
            )
        pause(EVERY_S)
    if ended is not None and ended.startswith("died"):
        folder.clear_stop()  # it is not for the session that resumes
        raise UserError(f"{folder.path} does not train: {ended}")
    if wait:
        console.print(f"{folder.name}: {ended}", markup=False, highlight=False)
    return 0


def end(folder: RunFolder, pulse: Pulse | None = None) -> str | None:
    """Return how a run ended, in words; None while it goes on, or as long as that is not known.

    Args:
        folder: the run's.
        pulse: of somebody who has looked at it for some time; None looks for the first time.
    """
    if (folder.path / RESULT).exists():
        result = folder.read_json(RESULT)
        early = result.get("ended_by", "epochs") != "epochs"
        why = f": {result['ended_because']}" if early else ""
        figure = figure_of(result)
        what = "" if figure is None else f" with {_article(figure.metric)} of {figure.value_text}"
        return f"finished{what}{why}"
    status = folder.status()
    if status.get("state") == "stopped":
        return f"stopped ({status.get('reason')}): `downpour resume {folder.path}` goes on"
    if (folder.pulse() if pulse is None else pulse).life() != "died":
        return None
    if not folder.has_trained():
        return f"{NEVER_BEGAN}: `downpour resume {folder.path}` trains it, or remove the folder"
    return f"died: `downpour resume {folder.path}` goes on with it"


def _article(metric: str) -> str:
    return "an accuracy" if metric == ACCURACY else f"{metric.replace('_', ' ')}"


def states(
    folders: Sequence[RunFolder],
    *,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[str | None]:
    """Return how each of some runs ended, see `end`; None for those that go on.

    Where neither lock nor process can be seen from here, this waits for beats, a few seconds for
    all of them together. A run without any in this time is `silent`.
    """
    pulses = [folder.pulse(clock) for folder in folders]
    give_up_s = clock() + BEATS_S
    while True:
        lives = [pulse.life() for pulse in pulses]
        ends = [end(folder, pulse) for folder, pulse in zip(folders, pulses, strict=True)]
        waiting = [
            life == "unknown" and ended is None for life, ended in zip(lives, ends, strict=True)
        ]
        if not any(waiting) or clock() > give_up_s:
            break
        pause(EVERY_S)
    return [
        f"silent for {BEATS_S:.0f} s: `downpour watch {folder.path}` tells whether it lives"
        if unknown
        else ended
        for folder, unknown, ended in zip(folders, waiting, ends, strict=True)
    ]


def progress(folder: RunFolder) -> Progress:
    """Return where a run stands, from the files in its folder."""
    config, status = folder.config(), folder.status()
    lines = _metrics(folder)
    figures = figures_in(lines)
    examples = status.get("examples")
    epochs = config.policy.epochs
    done = status.get("epoch")
    return Progress(
        elapsed_s=status.get("elapsed_s", 0.0),
        phase=status.get("state", "starting"),
        epoch=None if done is None else min(epochs, int(done) + 1),
        epochs=epochs,
        examples=examples,
        total_examples=round(examples * epochs / done) if examples and done else None,
        updates=status.get("updates"),
        updates_per_s=status.get("updates_per_s"),
        examples_per_s=status.get("examples_per_s"),
        loss=status.get("loss"),
        metric=config.model.the_task.metric,
        figure=figures[-1] if figures else None,
        best=best_of(figures),
        goal=goal_of(config),
        staleness_mean=status.get("staleness_mean"),
        staleness_p99=status.get("staleness_p99"),
        replicas_alive=status.get("replicas_alive"),
        replicas_wanted=status.get("replicas_wanted", config.replicas.replicas),
        replicas_held=status.get("replicas_held"),
        duplicates=status.get("duplicates"),
        refused=status.get("refused"),
    )


def _metrics(folder: RunFolder) -> list[dict[str, Any]]:
    return list(folder.read_lines(METRICS))
